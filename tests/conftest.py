"""For all tests: deterministic torch, unwritten memory that shows as NaN, Triton's interpreter without a GPU."""

import os
import shutil
import sys
import tempfile

# one thread in each worker and in the processes that tests start: the shapes are too small for more, and threads that
# wait for busy cores make the suite twenty times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# which way runs is not left to a timing: tests name it
os.environ.setdefault("UPT_FAST_MEASURE", "0")
# nothing that an earlier run has kept
os.environ["UPT_FAST_FEATURE_STORE"] = "off"
# decoded images of the tests' datasets are not kept
os.environ["UPT_FAST_IMAGE_CACHE"] = tempfile.mkdtemp(prefix="upt_fast_images_")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # triton reads it when it is imported, and its own helpers decorate then
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# torch.empty and its kin are then filled with NaN (integers: the largest); operations without a deterministic form warn
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

hypothesis.settings.register_profile("deterministic", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)  # --hypothesis-profile explore: new examples each time
hypothesis.settings.load_profile("deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", help="run every N-th test, from the K-th")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the share that --share names; equal ones in each worker."""
    share = config.getoption("--share")
    if share is None:
        return
    try:
        which, parts = map(int, share.split("/"))
    except ValueError:
        which, parts = 0, 0
    if not 1 <= which <= parts:
        raise pytest.UsageError(f"--share {share!r}; wanted K/N with 1 <= K <= N, as in 2/5")
    kept = {item for i, item in enumerate(items) if i % parts == which - 1}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["UPT_FAST_IMAGE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer():
    """CLIP's byte-pair tokenizer, read once."""
    from upt_fast.clip.tokens import clip_tokenizer

    return clip_tokenizer()
