"""How kernels are launched and recorded, and how rows are divided among programs."""

import importlib
import sys

import numpy as np
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from upt_fast.kernels import _launch
from upt_fast.kernels._launch import Launch, launch, record, row_tile, rows_of
from upt_fast.kernels._workloads import modules_with_kernels

from upt_fast.engine.backends import dispatch

META = torch.empty(6, 40, device="meta")


class Kernel:
    """Notes how it is called: [(grid, arguments)]."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


def test_launch_runs_the_kernel():
    kernel = Kernel()
    launch(kernel, (2, 3), x_ptr=META, M=6, num_warps=4)
    assert kernel.calls == [((2, 3), {"x_ptr": META, "M": 6, "num_warps": 4})]


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_grid_runs_nothing(grid):
    kernel = Kernel()
    launch(kernel, grid, M=6)
    assert kernel.calls == []


def test_record_keeps_arguments_and_options_apart():
    kernel = Kernel()
    with record() as launches:
        launch(kernel, (2,), x_ptr=META, M=6, BLOCK_M=16, num_warps=4, num_stages=2)
        launch(kernel, (0,), M=0)
    assert kernel.calls == []
    first = Launch(kernel, (2,), {"x_ptr": META, "M": 6, "BLOCK_M": 16}, {"num_warps": 4, "num_stages": 2})
    assert launches == [first, Launch(kernel, (0,), {"M": 0}, {})]


def test_record_nests_and_ends():
    kernel = Kernel()
    with record() as outer:
        with record() as inner:
            launch(kernel, (1,), M=1)
        launch(kernel, (1,), M=2)
    assert ([la.arguments["M"] for la in inner], [la.arguments["M"] for la in outer]) == ([1], [2])
    launch(kernel, (1,), M=3)
    assert [arguments["M"] for _, arguments in kernel.calls] == [3]
    assert len(outer) == 1


def test_record_ends_where_a_workload_fails():
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), record():
        _ = 1 / 0
    launch(kernel, (1,), M=1)
    assert len(kernel.calls) == 1


@pytest.fixture
def broken(monkeypatch):
    """An interpreter that stops at the first loop, as triton 3.6's with NumPy 2.4."""

    class Broken:
        def __getitem__(self, grid):
            def fail(*_):
                raise RuntimeError("TypeError('no scalar')") from TypeError("no scalar\nat line 5")

            return fail

    monkeypatch.setattr(_launch, "INTERPRETED", True)
    monkeypatch.setattr(_launch, "_count", Broken())
    _launch._try_interpreter.cache_clear()
    yield rf"triton {triton.__version__}'s interpreter .* NumPy {np.__version__} \(no scalar\): install 'numpy<2\.4'"
    _launch._try_interpreter.cache_clear()


def test_an_interpreter_that_does_not_run(broken, monkeypatch):
    """Named and launched, kernels say what to install; recorded, or compiled, they do not care."""
    kernel = Kernel()
    with pytest.raises(ValueError, match=broken):
        launch(kernel, (1,), M=1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=rf"backend='triton' cannot run here: triton: {broken}"):
        dispatch.resolve("triton")
    launch(kernel, (0,), M=1)
    with record() as launches:
        launch(kernel, (1,), M=1)
    assert len(launches) == 1
    assert kernel.calls == []
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    launch(kernel, (1,), M=1)
    assert len(kernel.calls) == 1
    assert dispatch.refusals("triton", "cuda") == []


@pytest.mark.skipif(not _launch.INTERPRETED, reason="compiled here")
def test_which_interpreters_run():
    """What pyproject.toml says beside the extra "interpreter"."""
    old, new = Version(triton.__version__) < Version("3.7"), Version(np.__version__) >= Version("2.4")
    assert bool(_launch.interpreter_refusal()) == (old and new)


MODULES = [importlib.import_module(name) for name in modules_with_kernels(None)]
WORKLOADS = {
    f"{module.__name__.rpartition('.')[2]}: {name}": run for module in MODULES for name, run in module.workloads()
}


@pytest.mark.parametrize("tiles", ["gpu_tiles", "large_tiles"])
def test_workloads_launch_on_meta_tensors(tiles, monkeypatch):
    """What a kernel file is compiled for in advance; nothing may be computed, as there are no numbers."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("upt_fast.kernels.") and hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", tiles == "large_tiles")
    for name, run in WORKLOADS.items():
        with record() as launches:
            run()
        assert launches, name
        for la in launches:
            blocks = {key: value for key, value in la.arguments.items() if key.startswith("BLOCK_")}
            assert blocks, name
            assert all(value == triton.next_power_of_2(value) for value in blocks.values()), (name, blocks)
            assert la.options["num_warps"] in (1, 2, 4, 8, 16, 32), name  # at most 1024 threads
            assert set(la.arguments) == set(la.kernel.arg_names), name


@pytest.mark.parametrize("interpreted", [False, True], ids=["gpu", "interpreter"])
@given(rows=st.integers(0, 1 << 20), columns=st.integers(0, 1 << 17))
def test_row_tile(interpreted, rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "INTERPRETED", interpreted)
        tile = row_tile(rows, columns)
    block_m, block_n, num_warps = tile["BLOCK_M"], tile["BLOCK_N"], tile["num_warps"]
    assert set(tile) == {"BLOCK_M", "BLOCK_N", "num_warps"}
    assert all(value & (value - 1) == 0 < value for value in tile.values())
    assert columns <= block_n < 2 * max(columns, 1)  # whole rows, as narrow as a power of two can be
    assert block_m < 2 * max(rows, 1)
    assert block_m * block_n <= max(1 << 16 if interpreted else 4096, block_n)
    assert num_warps <= 16
    if not interpreted and block_m * block_n >= 1024 and num_warps < 16:
        assert block_m * block_n == 32 * 32 * num_warps  # 32 numbers a thread


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [
        (6432, 768, (4, 1024, 4)),
        (8352, 1024, (4, 1024, 4)),
        (3, 768, (4, 1024, 4)),
        (1, 768, (1, 1024, 1)),
        (6432, 64, (64, 64, 4)),
        (6432, 5000, (1, 8192, 8)),
        (6432, 1 << 16, (1, 1 << 16, 16)),
        (0, 33, (1, 64, 1)),
    ],
)
def test_row_tiles_of_a_gpu(rows, columns, tile, monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    assert tuple(row_tile(rows, columns).values()) == tile


ROWS = {
    "contiguous": (lambda: torch.randn(2, 3, 5), True),
    "one_dimension": (lambda: torch.randn(5), True),
    "cropped": (lambda: torch.randn(6, 9)[:, 2:7], True),
    "every_second_row": (lambda: torch.randn(12, 5)[::2], True),
    "expanded_rows": (lambda: torch.randn(5).expand(6, 5), True),
    "one_column": (lambda: torch.randn(6, 4)[:, 1:2], True),
    "sequences_cut": (lambda: torch.randn(2, 5, 5)[:, :3], False),
    "transposed": (lambda: torch.randn(5, 6).t(), False),
    "every_second_column": (lambda: torch.randn(6, 10)[:, ::2], False),
    "expanded": (lambda: torch.randn(1).expand(6, 5), False),
    "no_rows": (lambda: torch.randn(2, 0, 5), True),
}


@pytest.mark.parametrize(("make", "is_view"), ROWS.values(), ids=ROWS)
def test_rows_of(make, is_view):
    x = make()
    rows = rows_of(x)
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))
    assert rows.stride(-1) == 1 or rows.shape[-1] == 1
    assert (rows.data_ptr() == x.data_ptr()) == is_view
