"""The MLP's fused kernels against their plain twin in float64, and the tiles that they take."""

import pytest
import torch
from upt_fast.kernels import _linear_product, _tuning
from upt_fast.kernels import linear_gelu as kernel
from upt_fast.kernels._launch import SMALLEST_LIMIT, record, shared_limit
from upt_fast.kernels._linear_tiles import TILES, Tile, default_tile, precision_of, tiles_that_fit

from upt_fast.clip.frozen import ACTIVATIONS
from upt_fast.common.closeness import assert_rounded, relative_rms
from upt_fast.engine import ops
from upt_fast.reference import ops as reference
from upt_fast.testing_ops import DEVICE, Numbers, compare_op, dtype_name, frozen_mlp, precisions, randn

DTYPES = pytest.mark.parametrize("dtype", precisions("linear_gelu"), ids=dtype_name)
KINDS = pytest.mark.parametrize("kind", ACTIVATIONS)
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
# sizes of which blocks are never full; several groups of rows of tiles, several tiles a program, two pieces
SMALL = Tile(32, 64, 16, 1, 1)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty folder for tables."""
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(width: int, hidden: int, out: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return frozen_mlp(Numbers(dtype), width, hidden, out)


def compare(h, w, kind="gelu", recompute=False, dy=None) -> None:
    h = h.detach().requires_grad_()
    compare_op("linear_gelu", [h, *w, kind, recompute], None if dy is None else [dy])


@DTYPES
@KINDS
@RECOMPUTE
@pytest.mark.parametrize("rows", [1, 7, 33, 130])
def test_matches_reference(rows, recompute, kind, dtype):
    compare(randn(rows, 33, dtype=dtype), weights(33, 150, 29, dtype), kind, recompute)


SHAPES = {
    "blocks": ((64,), 64, 128, 64),
    "one_number": ((1,), 1, 1, 1),
    "one_row": ((), 19, 67, 19),
    "images": ((2, 3, 5), 70, 40, 70),
    "long_sums": ((5,), 200, 300, 130),
}


@RECOMPUTE
@pytest.mark.parametrize(("batch", "width", "hidden", "out"), SHAPES.values(), ids=SHAPES)
def test_shapes(batch, width, hidden, out, recompute):
    compare(randn(*batch, width), weights(width, hidden, out), recompute=recompute)


@RECOMPUTE
@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)
def test_no_rows(batch, recompute):
    compare(randn(*batch, 33), weights(33, 40, 33), recompute=recompute)


VIEWS = {
    "every_second_row": lambda rows, columns: randn(2 * rows, columns)[::2],
    "some_columns": lambda rows, columns: randn(rows, columns + 7)[:, 3 : columns + 3],
    "every_second_column": lambda rows, columns: randn(rows, 2 * columns)[:, ::2],
    "transposed": lambda rows, columns: randn(columns, rows).t(),
    "one_row_for_all": lambda rows, columns: randn(columns).expand(rows, columns),
    "one_number_for_all": lambda rows, columns: randn(1).expand(rows, columns),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", ["h", "fc", "proj", "gradient"])
def test_strided(place, view):
    h, (fc, fc_bias, proj, proj_bias) = randn(9, 33), weights(33, 70, 21)
    h = view(9, 33) if place == "h" else h
    fc, proj = view(70, 33) if place == "fc" else fc, view(21, 70) if place == "proj" else proj
    compare(h, [fc, fc_bias, proj, proj_bias], dy=view(9, 21) if place == "gradient" else None)


def test_strided_sequences_biases_and_u():
    w = weights(33, 70, 21)
    w[1], w[3] = randn(70, 2)[:, 0], randn(1).expand(21)
    compare(randn(4, 5, 33)[:, 1:3], w, dy=randn(2, 4, 21).transpose(0, 1))
    dy, u = randn(9, 21), randn(9, 140)[:, ::2]
    got = kernel.linear_dact(dy, w[2], u, "gelu")
    assert torch.equal(got, kernel.linear_dact(dy, w[2].contiguous(), u.contiguous(), "gelu"))


def exact_pair(x, w, b, kind):
    u = (x.double() @ w.double().t() + b.double()).requires_grad_()
    return u, reference.activation(u, kind)


@pytest.mark.parametrize(
    "tile", [*(t for tiles in TILES.values() for t in tiles), SMALL], ids=lambda t: "x".join(map(str, t))
)
def test_every_tile(tile):
    """More than one group of rows for the smallest; the kernels alone, u and du against the twin's."""
    rows, hidden, width = 2 * tile.block_m + 5, tile.block_n + 9, tile.block_k + 3
    rows = 9 * tile.block_m + 5 if tile is SMALL else rows
    x, w, b, dy = randn(rows, width), randn(hidden, width, scale=0.2), randn(hidden), randn(rows, 17)
    v = randn(17, hidden)
    a, u = kernel.linear_act(x, w, b, "gelu", tile=tile)
    du = kernel.linear_dact(dy, v, u, "gelu", tile=tile)

    def run():
        exact_u, exact_a = exact_pair(x, w, b, "gelu")
        return [exact_u, exact_a, *torch.autograd.grad(exact_a, exact_u, dy.double() @ v.double())]

    assert_rounded([u, a, du], run, torch.float32)


@DTYPES
def test_full_blocks_take_no_masks(dtype):
    """Sizes that blocks divide, one way, and sizes that they do not: the same numbers."""
    tile = Tile(32, 32, 16, 1, 1)
    x, w, b = randn(64, 32, dtype=dtype), randn(64, 32, dtype=dtype), randn(64, dtype=dtype)
    a, u = kernel.linear_act(x, w, b, "quick_gelu", tile=tile)
    part_a, part_u = kernel.linear_act(x[:50], w[:50], b[:50], "quick_gelu", tile=tile)
    assert torch.equal(a[:50, :50], part_a)
    assert torch.equal(u[:50, :50], part_u)
    dy, v = randn(64, 32, dtype=dtype), randn(32, 64, dtype=dtype)
    part = kernel.linear_dact(dy[:50], v[:, :50], u[:50, :50], "quick_gelu", tile=tile)
    assert torch.equal(kernel.linear_dact(dy, v, u, "quick_gelu", tile=tile)[:50, :50], part)


def test_u_is_written_only_where_it_is_needed():
    x, w = randn(5, 33), weights(33, 70, 33)
    a, u = kernel.linear_act(x, w[0], w[1], "gelu_tanh")
    alone, nothing = kernel.linear_act(x, w[0], w[1], "gelu_tanh", keep=False)
    assert torch.equal(a, alone)
    assert (u.shape, nothing.shape) == ((5, 70), (0,))


@pytest.mark.parametrize(
    ("grad", "recompute", "mode"),
    [(True, False, True), (True, True, True), (True, False, False), (False, False, True)],
    ids=["keep", "recompute", "no_grad", "constant"],
)
def test_what_is_launched(grad, recompute, mode):
    """With gradients to come u is written unless backward computes it again; without them it never is."""
    h = randn(5, 33).requires_grad_(grad)
    with torch.set_grad_enabled(mode), record() as launches:
        ops.linear_gelu(h, *weights(33, 70, 33), "gelu", recompute, "triton")
    (launched,) = launches
    keeps = grad and mode and not recompute
    assert launched.arguments["HAS_U"] is keeps
    assert (launched.arguments["u_ptr"] is not None) is keeps


@RECOMPUTE
def test_backward_keeps_one_tensor(recompute):
    saved = []
    h, w = randn(5, 33).requires_grad_(), weights(33, 70, 33)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_gelu(h, *w, "gelu", recompute, "triton")
    own = [t for t in saved if t.data_ptr() not in {x.data_ptr() for x in w}]
    assert [t.shape for t in own] == [(5, 33) if recompute else (5, 70)]
    assert (own[0].data_ptr() == h.data_ptr()) is recompute


@RECOMPUTE
def test_frozen_weights_get_no_gradient(recompute):
    h, w = randn(5, 33).requires_grad_(), [t.requires_grad_() for t in weights(33, 70, 33)]
    grads = torch.autograd.grad(ops.linear_gelu(h, *w, "gelu", recompute, "triton").sum(), [h, *w], allow_unused=True)
    assert [g is None for g in grads] == [False, True, True, True, True]


@RECOMPUTE
def test_autocast(recompute):
    """The products in autocast's dtype, as PyTorch's own linears make them."""
    h, w = randn(9, 33).requires_grad_(), weights(33, 70, 33)
    results = []
    for backend in ("triton", "torch"):
        with torch.autocast(DEVICE, torch.float16):
            y = ops.linear_gelu(h, *w, "gelu", recompute, backend)
        (dh,) = torch.autograd.grad(y.float().sum(), h)
        results.append((y, dh))
    assert [(y.dtype, dh.dtype) for y, dh in results] == [(torch.float16, torch.float32)] * 2
    for got, wanted in zip(*results, strict=True):
        assert relative_rms(got, wanted) <= 2e-3


def test_plain_operations_recompute_too():
    """backend="torch" keeps no hidden features with recompute, and the results are equal."""
    h, w = randn(5, 33).requires_grad_(), weights(33, 70, 33)
    results, shapes = [], []
    for recompute in (False, True):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.shape) or t, lambda t: t):
            y = ops.linear_gelu(h, *w, "gelu", recompute)
        shapes.append((5, 70) in seen)
        results.append([y, *torch.autograd.grad(y.square().sum(), h)])
    assert all(map(torch.equal, *results))
    assert shapes == [True, False]


def test_float64_is_refused():
    h, w = randn(2, 33, dtype=torch.float64), weights(33, 70, 33, torch.float64)
    with pytest.raises(ValueError, match="float64 rows; wanted one of float32, float16, bfloat16"):
        kernel.linear_gelu_linear(h, *w, "gelu")


BAD = {
    "fc_width": (0, lambda t: t[:, :-1], r"fc_weight \(70, 32\) for rows \(5, 33\); wanted \(70, 33\)"),
    "fc_bias": (1, lambda t: t[:-1], r"fc_bias \(69,\) for rows \(5, 33\); wanted \(70,\)"),
    "proj_width": (2, lambda t: t[:, 1:], r"proj_weight \(33, 69\) for rows \(5, 33\); wanted \(33, 70\)"),
    "proj_bias": (3, lambda t: t[None], r"proj_bias \(1, 33\) for rows \(5, 33\); wanted \(33,\)"),
    "dimensions": (0, lambda t: t[0], r"a weight \(33,\); wanted two dimensions"),
    "fc_dtype": (0, torch.Tensor.half, r"fc_weight is torch.float16 on cpu; wanted the rows' torch.float32 on cpu"),
    "proj_dtype": (2, torch.Tensor.double, r"proj_weight is torch.float64"),
    "device": (3, lambda t: t.to("meta"), r"proj_bias is torch.float32 on meta; wanted the rows' torch.float32"),
}


@pytest.mark.parametrize(("place", "change", "message"), BAD.values(), ids=BAD)
def test_weights_that_do_not_fit(place, change, message):
    w = weights(33, 70, 33)
    w[place] = change(w[place])
    with pytest.raises(ValueError, match=message.replace("cpu", DEVICE + r"\S*")):
        kernel.linear_gelu_linear(randn(5, 33), *w, "gelu")


def test_other_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="kind 'relu'; wanted one of quick_gelu, gelu, gelu_tanh"):
        kernel.linear_gelu_linear(randn(5, 33), *weights(33, 70, 33), "relu")
    with pytest.raises(ValueError, match="kind 'relu'; wanted one of"):
        kernel.linear_act(randn(5, 33), randn(70, 33), randn(70), "relu")
    with pytest.raises(ValueError, match=r"u \(4, 70\) for rows \(5, 33\); wanted \(5, 70\)"):
        kernel.linear_dact(randn(5, 33), randn(33, 70), randn(4, 70), "gelu")


def _opchecks():
    h, w = randn(5, 33).requires_grad_(), weights(33, 40, 33)
    fwd, bwd = torch.ops.upt_fast.linear_gelu_fwd, torch.ops.upt_fast.linear_gelu_bwd
    dy, u, fixed = randn(5, 33), randn(5, 40), (w[0], w[1], w[2])
    return {
        "fwd_keep": (fwd, (h, *w, "quick_gelu", True)),
        "fwd_recompute": (fwd, (h, *w, "gelu", False)),
        "fwd_strided": (fwd, (randn(33, 5).t().requires_grad_(), w[0].t().contiguous().t(), *w[1:], "gelu_tanh", True)),
        "bwd_keep": (bwd, (dy, u, None, *fixed, "quick_gelu")),
        "bwd_recompute": (bwd, (randn(33).expand(5, 33), None, h.detach(), *fixed, "gelu")),
    }


@pytest.mark.parametrize("case", ["fwd_keep", "fwd_recompute", "fwd_strided", "bwd_keep", "bwd_recompute"])
def test_opcheck(case):
    op, inputs = _opchecks()[case]
    torch.library.opcheck(op, inputs)


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
def test_workloads_launch_on_meta_tensors(limit, monkeypatch):
    """On a GPU's tiles every tile that fits is launched, both kernels in every precision."""
    monkeypatch.setattr(_linear_product, "INTERPRETED", False)
    names = []
    for name, run in kernel.workloads():
        names.append(name)
        with record(limit * 1024) as launches:
            assert shared_limit(torch.device("meta")) == limit * 1024
            run()
        for la in launches:
            assert set(la.arguments) == set(la.kernel.arg_names), name
            assert la.options["num_warps"] in (4, 8), name
            assert la.arguments["EVEN_N"]
            assert la.arguments["EVEN_K"]
            assert la.arguments["BLOCK_N"] % la.arguments["PIECES"] == 0
        precision = "half" if "bfloat16" in name else name.split(",")[0].split()[-1]
        assert len(launches) == (len(tiles_that_fit(precision, limit * 1024)) if "every" in name else 1)
    assert len(names) == len(set(names))
    assert shared_limit(torch.device("meta")) == SMALLEST_LIMIT


def test_every_precision_has_a_tile_everywhere():
    for precision, tiles in TILES.items():
        assert tiles_that_fit(precision, SMALLEST_LIMIT)
        assert tiles_that_fit(precision, 227 * 1024) == list(tiles)
        areas = [t.block_m * t.block_n for t in tiles]
        assert areas == sorted(areas, reverse=True)


def test_the_default_tile_gives_each_multiprocessor_one():
    large, middle, small = tiles = Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 3)
    assert default_tile(tiles, 6304, 3072, 132) == large
    assert default_tile(tiles, 1000, 2048, 128) == middle
    assert default_tile(tiles, 300, 2048, 132) == small
    assert default_tile(tiles, 0, 2048, 132) == small


def test_precision_follows_pytorch(monkeypatch):
    assert precision_of(torch.float16) == precision_of(torch.bfloat16) == "half"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, wanted in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert precision_of(torch.float32) == wanted
            with record() as launches:
                kernel.linear_act(randn(5, 33), randn(70, 33), randn(70), "gelu")
                kernel.linear_act(randn(5, 33).half(), randn(70, 33).half(), randn(70).half(), "gelu")
            assert [la.arguments["PRECISION"] for la in launches] == [wanted, "ieee"]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(DEVICE == "cuda", reason="has a GPU")
def test_nothing_is_measured_without_a_gpu(monkeypatch, cache):
    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(_linear_product, "tile_table", refuse)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        for interpreted in (True, False):
            monkeypatch.setattr(_linear_product, "INTERPRETED", interpreted)
            compare(randn(5, 33), weights(33, 70, 33))
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    assert not cache.exists()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@DTYPES
def test_measured_on_a_gpu(dtype, cache):
    compare(randn(300, 256, dtype=dtype), weights(256, 512, 256, dtype))
    assert not cache.exists()  # tests ask for equal bits
    torch.use_deterministic_algorithms(False)
    try:
        compare(randn(300, 256, dtype=dtype), weights(256, 512, 256, dtype))
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    name = str(dtype).removeprefix("torch.")
    table = _tuning.tile_table(torch.cuda.get_device_name()).tiles
    assert table.keys() == {f"linear_act {name} 512x512x256", f"linear_dact {name} 512x512x256"}
