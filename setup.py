"""Packages that pyproject.toml cannot map: the top-level folder kernels/ is installed as upt_fast.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["upt_fast", "upt_fast.*"]), "upt_fast.kernels"],
    package_dir={"upt_fast.kernels": "kernels"},
)
