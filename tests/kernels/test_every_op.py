"""What holds for every operation with kernels of its own, at the shapes of small_cases() and at larger ones."""

import pytest
import torch
from upt_fast.kernels._workloads import modules_with_kernels

from upt_fast.engine.backends import dispatch
from upt_fast.engine.layout import PackedLayout, PackedTiles
from upt_fast.testing_ops import DEVICE, OPERATIONS, Case, Numbers, call, case, copied, gradients, leaves, small_cases

FP32 = (torch.float32,)
MANY = PackedLayout((((40, 1), (30, 2)), ((33, 1),)))  # more than a program adds at once
SETS = PackedLayout((((2, 2),), (), ((1, 1), (9, 4)), ((3, 3), (1, 10))))
LONG = PackedLayout((((3, 2), (1, 50)), ((1, 33), (2, 1)), ((1, 4),)))
# of which a GPU's blocks need several
LARGER = (
    case("activation", "larger", FP32, 33, 127, kind="gelu_tanh"),
    case("activation", "(2, 5, 33)", FP32, 2, 5, 33, kind="gelu"),
    case("activation", "without bias", FP32, 2, 5, 33, kind="gelu", bias=False),
    case("layer_norm", "larger", FP32, 33, 127),
    case("add_layer_norm", "larger", FP32, 33, 127),
    case("linear_gelu", "larger", FP32, 130, width=33, hidden=150, kind="quick_gelu"),
    case("linear_gelu", "larger, again", FP32, 130, width=33, hidden=150, kind="quick_gelu", recompute=True),
    case("prompt_insert", "larger", FP32, 37, 3, 2, 127, (0, 1, 1, 0, 1) * 7 + (0, 1)),
    case("prompt_insert", "alone", FP32, 3, 5, 2, 33, residual=False),
    case("insert_shared", "larger", FP32, MANY, 3, 2, 65),
    case("prefix_attention", "larger", FP32, 7, None, 20, 5, sets=(0, 1, 1, 0, 1, 0, 0)),
    case("packed_attention", "many", FP32, PackedLayout((((40, 1),),))),
    case("packed_attention", "sets", FP32, SETS),
    case("packed_attention", "larger", FP32, LONG),
    case("contrastive_loss", "larger", FP32, 7, 141, 19, True),
)
EVERY = [c for c in (*small_cases(), *LARGER) if OPERATIONS[c.op].kernel]
CASES = pytest.mark.parametrize("case", EVERY, ids=[f"{c.op}-{c.name}" for c in EVERY])
ONE = {c.op: c for c in reversed(EVERY)}  # of each operation
OPS = pytest.mark.parametrize("case", ONE.values(), ids=ONE)


def evaluate(case: Case) -> list[torch.Tensor]:
    """Outputs and gradients by the kernels, of the same numbers each time."""
    arguments = case.make(Numbers(seed=0))
    outputs = call(case.op, arguments, "triton")
    weights = [torch.ones_like(y).cumsum(-1) if y.ndim else y for y in outputs]
    return [*outputs, *gradients(outputs, arguments, weights)]


@CASES
@pytest.mark.usefixtures("gpu_tiles")
def test_repeats_bit_for_bit(case):
    assert all(map(torch.equal, evaluate(case), evaluate(case)))


@CASES
def test_compiles(case):
    def f(first, *others):
        outputs = call(case.op, [2 * first, *others], "triton", **options)
        return sum((y * y * y).sum() for y in outputs)

    torch._dynamo.reset()  # it compiles one function a few times only
    options, results = {}, []
    for compiled in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        arguments = case.make(Numbers(seed=0))
        if case.op == "packed_attention":
            options["tiles"] = PackedTiles.of(arguments[5], arguments[3].shape[1]).to(DEVICE)
        loss = compiled(*arguments)
        results.append([loss, *torch.autograd.grad(loss, leaves(arguments), materialize_grads=True)])
    assert all(map(torch.equal, *results))
    assert results[0][0].isfinite()


@OPS
def test_gradients_of_gradients_are_refused(case):
    arguments = case.make(Numbers())
    loss = sum(y.pow(3).sum() for y in call(case.op, arguments, "triton"))
    first = leaves(arguments)[0]
    (grad,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{OPERATIONS[case.op].kernel}_bwd"):
        grad.sum().backward()


@OPS
def test_float64_is_refused(case):
    arguments = copied(case.make(Numbers()), torch.float64)
    with pytest.raises(ValueError) as error:
        call(case.op, arguments, "triton")
    message = str(error.value)
    shape = tuple(next(t for t in arguments if isinstance(t, torch.Tensor)).shape)
    assert message.startswith(f"no backend for {case.op}\n")
    assert f"x: {shape} float64 {DEVICE}" in message
    assert "triton: float64 (takes float32, float16, bfloat16)" in message


def test_every_kernel_is_known():
    """To this list, to what may choose it, and to the GPU suite by its file."""
    known = {op: operation.kernel for op, operation in OPERATIONS.items() if operation.kernel}
    assert known.keys() == {op for op, backends in dispatch.OPS.items() if "triton" in backends}
    assert {f"upt_fast.kernels.{file}" for file in known.values()} == set(modules_with_kernels(None))
    assert {c.op for c in small_cases()} == OPERATIONS.keys()
