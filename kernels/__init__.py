"""Triton kernels of upt_fast, one op per file, installed as ``upt_fast.kernels``.

The folder sits at the top level of the repository, where Hugging Face's ``kernels`` package would have the same import
name; setup.py maps it to ``upt_fast.kernels``. The guard below keeps Python from importing it a second time as
``kernels`` when the current directory is the repository's root.
"""

if __name__ != "upt_fast.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}: it is installed as 'upt_fast.kernels'; "
        "run 'pip install -e .' and import that, or leave the repository's root if you want another package 'kernels'"
    )
