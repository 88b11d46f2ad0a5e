"""For the kernels' tests: the tiles of a GPU."""

import pytest


@pytest.fixture
def gpu_tiles(monkeypatch):
    """The blocks of a GPU, of which small shapes fill several; other tests run those that suit the interpreter."""
    from upt_fast.kernels import _launch, activation, insert_shared

    for module in (_launch, activation, insert_shared):
        monkeypatch.setattr(module, "INTERPRETED", False)
