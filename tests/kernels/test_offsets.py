"""No kernel computes an offset in 32 bits that needs more, and none leaves its tensors, at batches of thousands.

What a GPU would run at 4096 images of ViT-L/14-336 and at the texts of 256 prompt sets runs here in Triton's
interpreter, whose integers have the compiled kernels' widths: sums and products of int32 that do not fit are reported
by Triton's own check, as in debug mode on a GPU. Tensors are address space without memory behind it, and each load and
store is held against it. Of a grid the first, the last and some programs between run.

Tiles are the interpreter's, larger than a GPU's: offsets depend on the rows and their strides.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from upt_fast.kernels import _launch, activation, insert_shared, layer_norm, prompt_insert
from upt_fast.kernels._attention import sum_by_set
from upt_fast.kernels._contrastive_loss_bwd import contrastive_loss_bwd
from upt_fast.kernels._contrastive_loss_fwd import contrastive_loss_fwd
from upt_fast.kernels._linear_act import linear_act
from upt_fast.kernels._linear_dact import linear_dact
from upt_fast.kernels._packed_attention_bwd import packed_attention_bwd
from upt_fast.kernels._packed_attention_fwd import packed_attention_fwd
from upt_fast.kernels._prefix_attention_bwd import prefix_attention_bwd
from upt_fast.kernels._prefix_attention_fwd import prefix_attention_fwd

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # softmax of what is zero everywhere
]

B, L, P, H, K, M = 4096, 577, 4, 16, 64, 4096  # images of ViT-L/14-336; prompts, heads and their width, hidden features
D = H * K
SETS, CLASSES, LENGTH = 256, 1000, 4  # prompt sets, each with its classes, of so many rows
TEXTS = SETS * CLASSES
LIMIT = 2**31
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA Programming Guide, "Compute Capabilities", technical specifications
META = functools.partial(torch.empty, dtype=torch.float16, device="meta")


class Addresses:
    """Virtual memory for recorded launches, and the watch over what programs do with it."""

    def __init__(self) -> None:
        self.maps: dict[int, tuple[mmap.mmap, Tensor]] = {}
        self.ranges: dict[int, int] = {}  # first address -> end
        self.farthest = 0  # numbers from a tensor's begin to where a program was

    def place(self, x: Tensor) -> Tensor:
        """A tensor like x, on the meta device, with addresses; others as they are."""
        if x.is_meta:
            storage = x.untyped_storage()
            if storage._cdata not in self.maps:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
                try:
                    memory = mmap.mmap(-1, max(storage.nbytes(), 16), flags=flags)
                except OSError:
                    pytest.skip(f"no {storage.nbytes() >> 30} GiB of addresses are to be had")
                self.maps[storage._cdata] = memory, torch.frombuffer(memory, dtype=torch.uint8)
            _, base = self.maps[storage._cdata]
            shape, strides, offset = x.shape, x.stride(), x.storage_offset()
            x = base.view(x.dtype).as_strided(shape, strides, offset)
        begin = x.untyped_storage().data_ptr()
        self.ranges[begin] = begin + x.untyped_storage().nbytes()
        return x

    def check(self, pointers: Any, mask: Any) -> None:
        """Refuse addresses outside of all tensors."""
        seen = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not seen.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        begins = np.array(sorted(self.ranges), dtype=np.uint64)
        ends = np.array([self.ranges[int(begin)] for begin in begins], dtype=np.uint64)
        of = np.searchsorted(begins, seen, side="right").astype(np.int64) - 1
        assert (of >= 0).all(), "an address below every tensor"
        assert (seen + np.uint64(size) <= ends[of]).all(), "an address behind a tensor's end"
        self.farthest = max(self.farthest, int((seen - begins[of]).max()) // size)


@pytest.fixture
def addresses(monkeypatch):
    """Let the interpreter run some programs of a grid on virtual memory."""
    found, builder = Addresses(), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(pointers, mask, *others):
        found.check(pointers, mask)
        return load(pointers, mask, *others)

    def masked_store(pointers, value, mask, *others):
        found.check(pointers, mask)
        return store(pointers, value, mask, *others)

    def some(*bounds: Any) -> Any:
        if len(bounds) > 1 or not isinstance(bounds[0], int):  # a loop in a kernel
            return builtins.range(*bounds)
        return sorted({0, bounds[0] // 3, bounds[0] - 1})

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    # loops over the grid are the executor's
    monkeypatch.setattr(interpreter, "range", some, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    return found


def run(addresses: Addresses, call: Callable[[], object], one_tile_each: bool = False, without: str = "") -> list[str]:
    """Run a part of what a call launches; the kernels' names.

    Args:
        addresses: where.
        call: of launchers, with tensors on the meta device; those on the CPU are read.
        one_tile_each: give a persistent kernel as many programs as there are tiles.
        without: a kernel that is left out.
    """
    with _launch.record() as launches:
        call()
    for launch in launches:
        if without and launch.kernel.__name__ == without:
            continue
        given = {n: addresses.place(v) if isinstance(v, Tensor) else v for n, v in launch.arguments.items()}
        grid = launch.grid
        if one_tile_each:
            grid = (-(-given["M"] // given["BLOCK_M"]) * -(-given["N"] // given["BLOCK_N"]),)
        assert all(0 < n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=False)), (launch.kernel, grid)
        launch.kernel[grid](**given)
    return [launch.kernel.__name__ for launch in launches]


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def streams() -> Iterator[tuple[str, Callable[[], object]]]:
    """Kernels on the rows of images: q, k, v and what comes before and behind them."""
    rows, hidden, statistics = META(B, L, D), META(B, L, M), META(B, L, dtype=torch.float32)
    sets = torch.arange(B) % 3
    yield "layer_norm", lambda: layer_norm.layer_norm_fwd(rows, rows, 1e-5)
    yield "layer_norm backward", lambda: layer_norm.layer_norm_bwd(rows, rows, rows, statistics)
    yield "activation", lambda: activation.activation_fwd(hidden, META(M), "quick_gelu")
    yield "activation backward", lambda: activation.activation_bwd(hidden, hidden, META(M), "gelu")
    yield "prompt_insert", lambda: prompt_insert.prompt_insert_fwd(rows, rows, META(3, P, D), sets, 1e-5)
    yield "prompt_insert backward", lambda: prompt_insert.prompt_insert_bwd(rows, rows, rows, statistics, sets, 3, P)
    yield "linear_act", lambda: linear_act(rows, META(M, D), META(M), "quick_gelu")
    yield "linear_dact", lambda: linear_dact(rows, META(D, M), hidden, "quick_gelu")


def attentions() -> Iterator[tuple[str, Callable[[], object]]]:
    """Attention of images, whose prompts are those of three sets or each image's own."""
    q, k, v = META(B, L, 3, H, K).unbind(2)
    softmax = META(2, H, B * L, dtype=torch.float32)
    for sets in (3, B):
        shared = META(sets, P, 2, H, K).unbind(2)
        given = q, k, v, *shared, torch.arange(B) % sets, None
        yield f"prefix_attention, {sets} sets", functools.partial(prefix_attention_fwd, *given, 0)
        backward = functools.partial(prefix_attention_bwd, q, *given, q, softmax, 0)
        yield f"prefix_attention backward, {sets} sets", functools.partial(backward, True, True, True)
    partial, members = META(2, B // 2, 520, H, K, dtype=torch.float32), torch.arange(B // 2) % 3
    yield "sum_by_set", functools.partial(sum_by_set, partial, members, META(3, 520, H, K))


def texts() -> Iterator[tuple[str, Callable[[], object]]]:
    """Class names of many prompt sets: packed rows, their buffers, and names that need a block each."""
    rows = TEXTS * LENGTH
    q, k, v = META(rows, 3, H, K).unbind(1)
    shared = META(SETS, 1 + P, 2, H, K).unbind(2)
    first, last = index(0, LENGTH, 0, 1, 0), index(rows - LENGTH, rows, TEXTS - 1, TEXTS, SETS - 1)
    tiles = torch.stack([first, last]).to(torch.int32)
    # of the others' classes and rows nothing is asked
    classes = torch.zeros(TEXTS, 5, dtype=torch.int32)
    classes[0], classes[-1] = first, last
    starts = torch.zeros(rows, dtype=torch.int32)
    starts[-LENGTH:] = rows - LENGTH
    for queries, name in ((q, ""), (META(TEXTS, H, K), ", last rows")):
        given = queries, k, v, *shared, tiles, classes, starts
        yield f"packed_attention{name}", functools.partial(packed_attention_fwd, *given)
        backward = functools.partial(packed_attention_bwd, queries, *given)
        yield f"packed_attention backward{name}", functools.partial(backward, True, True, True)
        long = queries, k, v, *shared, classes[:, 4], classes
        yield f"long names{name}", functools.partial(prefix_attention_fwd, *long, LENGTH)
        softmax = META(2, H, len(queries), dtype=torch.float32)
        backward = functools.partial(prefix_attention_bwd, queries, *long, queries, softmax, LENGTH)
        yield f"long names backward{name}", functools.partial(backward, True, True, True)
    size = rows + TEXTS * (1 + P)
    source = torch.zeros(size, dtype=torch.int64)
    source[-LENGTH - 1 :] = index(-SETS * (1 + P), *range(rows - LENGTH, rows))
    own, prefix = META(rows, 3, H, K)[:, 1], META(SETS, 1 + P, H, K)
    yield "insert_shared", lambda: insert_shared.insert_shared_fwd(own, prefix, source)
    firsts = torch.arange(TEXTS) * (LENGTH + 1 + P)
    bounds = torch.arange(SETS + 1) * CLASSES
    backward = functools.partial(insert_shared.insert_shared_bwd, META(size, H, K), index(0, 1))
    yield "insert_shared backward", functools.partial(backward, firsts, bounds, 1 + P)


def losses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Many images and few classes, and the reverse; the few far from each other."""
    many, few, far = 1 << 22, 128, 1 << 26
    scale = torch.ones(())
    for images, classes in ((many, few), (few, many)):
        features = [META(n, D) if n == many else META(n, far)[:, :D] for n in (images, classes)]
        labels, norms = torch.zeros(images, dtype=torch.int64), [torch.ones(n) for n in (images, classes)]
        # the last classes alone
        ranges = torch.tensor([[classes - few, classes]]).repeat(images, 1)
        lse = torch.zeros(images)
        name = f"{images} images, {classes} classes"
        yield f"contrastive_loss, {name}", functools.partial(contrastive_loss_fwd, *features, scale, labels, ranges)
        backward = functools.partial(contrastive_loss_bwd, lse, *features, scale, labels, ranges, lse, *norms)
        yield f"contrastive_loss backward, {name}", functools.partial(backward, of_text=classes == many)


CASES = dict([*streams(), *attentions(), *texts(), *losses()])


@pytest.mark.parametrize("name", CASES)
def test_offsets(addresses, name):
    # which goes through all classes, some at once: it has a case of its own
    without = "_sum_by_set_kernel" if name.startswith("long names") else ""
    assert run(addresses, CASES[name], name.startswith("linear_"), without)
    assert addresses.farthest >= LIMIT, addresses.farthest


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, M, WIDE: tl.constexpr, BEHIND: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows * stride, rows < M + BEHIND, other=0.0)
    tl.store(y_ptr + rows, x, rows < M)


@pytest.mark.parametrize(
    ("wide", "behind", "said"),
    [(True, 0, ""), (False, 0, "int32 overflow detected for operation mul"), (True, 1, "behind a tensor's end")],
)
def test_what_is_wrong_is_seen(addresses, wide, behind, said):
    rows, block = 1 << 20, 64
    x, y = META(rows - 8, 4096), META(rows)
    given = {"x_ptr": x, "y_ptr": y, "stride": 4096, "M": rows - 8, "WIDE": wide, "BEHIND": behind, "BLOCK": block}

    def call() -> None:
        _launch.launch(_copy_kernel, (rows // block,), **given)

    if said:
        with pytest.raises(InterpreterError, match=said):
            run(addresses, call)
    else:
        assert run(addresses, call) == ["_copy_kernel"]
        assert addresses.farthest >= LIMIT
