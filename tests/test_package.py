"""What a user gets: quiet imports, the names it promises, a wheel that works away from the repository."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import upt_fast

ROOT = Path(__file__).parents[1]


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UPT_FAST"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=cwd, env=env)


def modules_after(statement: str, cwd: Path, *flags: str) -> set[str]:
    """Top-level modules that a statement imports, which must print nothing."""
    code = f"import sys\n{statement}\nwith open('modules', 'w') as file:\n    file.write(' '.join(sys.modules))"
    done = python("-P", *flags, "-c", code, cwd=cwd)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return {name.split(".")[0] for name in (cwd / "modules").read_text().split()}


def test_import_is_light_and_quiet(tmp_path):
    modules = modules_after("import upt_fast; upt_fast.__version__", tmp_path, "-W", "error")
    assert "upt_fast" in modules
    assert not modules & {"torch", "numpy", "open_clip", "xformers", "triton"}


def test_import_of_the_model_is_quiet(tmp_path):
    modules = modules_after("from upt_fast import FastUPT", tmp_path)
    assert "torch" in modules
    assert not modules & {"open_clip", "xformers", "sklearn", "matplotlib", "torchvision", "triton", "tensorboard"}


def test_names():
    assert "FastUPT" in upt_fast.__all__
    for name in upt_fast.__all__:
        assert getattr(upt_fast, name) is not None
    for name in upt_fast._HOMES:
        assert getattr(upt_fast, name).__name__ == name
    assert set(upt_fast._HOMES) == set(upt_fast.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="'upt_fast' has no attribute 'SlowUPT'"):
        upt_fast.SlowUPT  # noqa: B018


def test_star_import(tmp_path):
    assert "upt_fast" in modules_after("from upt_fast import *\nUPTConfig(), FastUPT, __version__", tmp_path)


def test_kernels_is_ours(tmp_path):
    modules_after("import upt_fast.kernels\nassert 'kernels' not in sys.modules", tmp_path)


def test_the_folder_kernels_is_not_a_second_package():
    done = python("-c", "import kernels", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "upt_fast.kernels" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left behind in the repository."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "upt_fast", "kernels", "configs"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source)
    build = ["-m", "pip", "wheel", "./source", "--no-deps", "--no-build-isolation", "--no-index"]
    done = python(*build, "--disable-pip-version-check", "--wheel-dir", "dist", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").iterdir()
    return path


def test_wheel_holds_what_it_needs(wheel):
    assert wheel.name == f"upt_fast-{upt_fast.__version__}-py3-none-any.whl"
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {"upt_fast/py.typed", "upt_fast/kernels/__init__.py", "upt_fast/model.py"} <= files
    package = ROOT / "upt_fast"
    sources = {f"upt_fast/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    sources |= {
        f"upt_fast/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in (ROOT / "kernels").rglob("*.py")
    }
    vectors = {f"upt_fast/vectors/{p.name}" for p in (package / "vectors").iterdir()}
    assert sum(name.endswith(".safetensors") for name in vectors) >= 2
    assets = {f"upt_fast/clip/assets/{p.name}" for p in (package / "clip" / "assets").glob("*")}
    assert sources | vectors | assets <= files
    top = {name.split("/")[0] for name in files}
    assert top == {"upt_fast", f"upt_fast-{upt_fast.__version__}.dist-info"}  # neither kernels nor tests


def test_wheel_works_away_from_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from pathlib import Path\nimport upt_fast, upt_fast.kernels\n"
        "from upt_fast.tools.verify import run_verify\n"
        "assert all(Path.cwd() / 'site' in Path(m.__file__).parents for m in (upt_fast, upt_fast.kernels))\n"
        "raise SystemExit(run_verify(None))"
    )
    done = python("-P", "-c", code, cwd=tmp_path, path=tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"vectors in {tmp_path / 'site'}" in done.stdout
    assert "2 passed, 0 failed, 0 skipped" in done.stdout
