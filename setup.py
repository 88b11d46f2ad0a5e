"""Packages that pyproject.toml cannot map: the top-level folders kernels/ and configs/ go inside of upt_fast."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["upt_fast", "upt_fast.*"]), "upt_fast.kernels", "upt_fast.configs"],
    package_dir={"upt_fast.kernels": "kernels", "upt_fast.configs": "configs"},
)
