"""The model under PyTorch's own machinery: torch.func, second derivatives, shapes without data; any names."""

import contextlib
import itertools
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upt_fast import FastPromptedCLIP, FastUPT, ReferencePromptedCLIP
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import relative_rms
from upt_fast.engine.cpu import ways as cpu_ways
from upt_fast.engine.towers.blocks import MEMORY_LEVELS
from upt_fast.testing import random_clip, xformers_on_cpu

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid"]
SMALL = dict(embed_dim=32, image_size=16, vision_width=32, vision_head_width=16, text_width=32)
OPTIONS = {
    "upt": dict(n_text=2, n_visual=2),
    "coop": dict(n_ctx=3),
    "vpt_shallow": dict(n_ctx=2),
    "vpt_deep": dict(n_ctx=1),
    "maple": dict(depth=2),
    "cocoop": {},
    "ivlp": {},
    "mvpt": dict(n_ctx=2),
}
METHODS = list(OPTIONS)
LABELS = torch.tensor([0, 2, 1])


read_tokenizer = cache(clip_tokenizer)


@cache
def clip_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    return random_clip(**SMALL, vision_layers=3, text_layers=3).to(dtype)


def make(method: str, clip: nn.Module | None = None, **options) -> FastPromptedCLIP:
    torch.manual_seed(0)
    options |= OPTIONS.get(method, {}) | {"tokenizer": read_tokenizer()}
    return FastPromptedCLIP(clip_of() if clip is None else clip, NAMES, method=method, **options)


def make_both(method: str, **options) -> tuple[FastPromptedCLIP, ReferencePromptedCLIP]:
    fast = make(method, **options)
    reference = ReferencePromptedCLIP(clip_of(), NAMES, method=method, tokenizer=read_tokenizer(), **OPTIONS[method])
    reference.load_state_dict(fast.state_dict())
    return fast, reference


def images_of(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


def second_derivatives(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients, and those of a fixed direction's product with them."""
    # the parameters have the same values and shapes in both models, but not the same order
    parameters = [p for _, p in sorted(model.named_parameters())]
    grads = torch.autograd.grad(loss_of(model, images), parameters, create_graph=True)
    torch.manual_seed(2)
    along = sum((g * torch.randn_like(g)).sum() for g in grads)
    return [g.detach() for g in grads], list(torch.autograd.grad(along, parameters))


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert relative_rms(a, b) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_gradients_are_those_of_single_images(method):
    fast, reference = make_both(method)
    images = images_of()

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(fast, parameters, (image[None],)), label[None])

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters_of(fast), images, LABELS)
    wanted = []
    for i in range(len(images)):
        reference.zero_grad()
        loss_of(reference, images[i : i + 1], LABELS[i : i + 1]).backward()
        wanted.append([p.grad for _, p in sorted(reference.named_parameters())])
    assert_close([g for _, g in sorted(got.items())], [torch.stack(g) for g in zip(*wanted, strict=True)])


@pytest.mark.parametrize(
    ("method", "memory"),
    [*((method, "fast") for method in METHODS), *itertools.product(("upt", "cocoop"), MEMORY_LEVELS[1:])],
)
def test_second_derivatives_equal_the_references(method, memory):
    fast, reference = make_both(method, memory=memory, text_batch=2 if method == "cocoop" else None)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative
        wanted = second_derivatives(reference, images_of())
    got = second_derivatives(fast, images_of())
    assert_close(got[0], wanted[0])
    assert_close(got[1], wanted[1])
    # and gradients without create_graph go the fast way, to the same numbers
    loss_of(fast, images_of()).backward()
    assert_close([p.grad for _, p in sorted(fast.named_parameters())], wanted[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(class_token_position="middle"),
        dict(class_token_position="front"),
        dict(class_specific=True),
    ],
    ids=["middle", "front", "class_specific"],
)
def test_places_of_the_class_name_compose(options):
    model = make("coop", **options)
    (context,) = model.parameters()

    def loss(value):
        return F.cross_entropy(functional_call(model, {"prompt_learner.ctx": value}, (images_of(),)), LABELS)

    loss_of(model, images_of()).backward()
    assert_close([grad(loss)(context.detach())], [context.grad])
    assert_close(list(torch.autograd.grad(loss(context), [context], create_graph=True)), [context.grad])


def test_gradcheck_and_gradgradcheck():
    model = make("vpt_shallow")

    def logits(value):
        return functional_call(model, {"prompt_learner.visual_ctx": value}, (images_of(1),))

    value = model.prompt_learner.visual_ctx.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(logits, (value,), fast_mode=True)
    assert torch.autograd.gradgradcheck(logits, (value,), fast_mode=True)


def test_gradients_of_images_are_twice_differentiable():
    fast, reference = make_both("upt")
    found = []
    for model, context in ((fast, contextlib.nullcontext()), (reference, sdpa_kernel(SDPBackend.MATH))):
        images = images_of().requires_grad_()
        with context:
            (gradient,) = torch.autograd.grad(loss_of(model, images), images, create_graph=True)
            gradient.square().sum().backward()
        found.append([gradient.detach(), images.grad])
    assert_close(*found)


def test_forward_mode_hessians_and_batched_backward():
    model = make("vpt_shallow", random_clip(**SMALL, vision_layers=2, text_layers=1).double())
    # a part of the parameter, for the Hessian is as many gradients as numbers in it
    context, rest, images = *model.prompt_learner.visual_ctx.detach().split([6, 26], dim=1), images_of()

    def loss(part):
        value = torch.cat([part, rest], dim=1)
        return F.cross_entropy(functional_call(model, {"prompt_learner.visual_ctx": value}, (images,)), LABELS)

    along = torch.randn_like(context)
    assert_close([jvp(loss, (context,), (along,))[1][None]], [(grad(loss)(context) * along).sum()[None]])
    wanted = torch.autograd.functional.hessian(loss, context)
    assert_close([hessian(loss)(context)], [wanted])
    assert_close([torch.autograd.functional.hessian(loss, context, vectorize=True)], [wanted])

    logits, parameters = model(images), list(model.parameters())
    rows = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    (batched,) = torch.autograd.grad(logits, parameters, rows, is_grads_batched=True)
    (one,) = torch.autograd.grad(model(images)[1, 2], parameters)
    assert_close([batched[5]], [one])


def test_models_of_one_shape_run_as_one():
    models, images = [make("coop") for _ in range(2)], images_of()
    with torch.no_grad():
        models[1].prompt_learner.ctx.mul_(-1)
    parameters, _ = stack_module_state(models)
    logits = vmap(lambda p: functional_call(models[0], p, (images,)))(parameters)
    assert_close(list(logits.unbind()), [m(images) for m in models])


@pytest.mark.parametrize("dtype", ["bf16", "autocast"])
def test_half_precision_composes(dtype):
    model = make("upt", clip_of(torch.float32), dtype="bf16" if dtype == "bf16" else None)
    images = images_of(dtype=torch.float32)
    found = []
    for create_graph in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = loss_of(model, images)
        found.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph))
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32
        assert relative_rms(a, b) < 0.05  # bfloat16 rounds to 0.4 %, once in each of a dozen ops


@pytest.mark.parametrize("method", ["upt", "vpt_deep", "zeroshot"])
def test_nothing_seen_under_a_transform_is_kept(method):
    model, fresh = make(method).eval(), make(method).eval()
    images = images_of()
    with torch.no_grad():
        batched = vmap(lambda image: model(image[None])[0])(images)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert isinstance(model(torch.randn(2, 3, 16, 16, dtype=torch.float64)), FakeTensor)
    with torch.no_grad():
        assert type(model(images)) is torch.Tensor
        assert torch.equal(model(images), fresh(images))
        assert_close([batched], [model(images)])


def test_named_backends_refuse_by_name():
    clip, images = random_clip(**SMALL, vision_layers=2, text_layers=2), images_of(2, torch.float32)
    with xformers_on_cpu():
        model = make("vpt_shallow", clip, backend="xformers")
        with pytest.raises(ValueError, match="backend='xformers' has no second derivatives"):
            torch.autograd.grad(model(images).sum(), list(model.parameters()), create_graph=True)
        with pytest.raises(ValueError, match=r"no torch\.func transforms.*wanted 'auto' or 'torch'"):
            grad(lambda p: functional_call(model, p, (images,)).sum())(parameters_of(model))
        model(images).sum().backward()


# shapes without data


@contextlib.contextmanager
def parameters_on_meta():
    """What accelerate's init_empty_weights does: each parameter goes to the meta device as it is registered."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@pytest.mark.parametrize(
    ("method", "where"),
    [
        *((method, "meta") for method in [*METHODS, "zeroshot"]),
        *itertools.product(("maple", "vpt_deep", "zeroshot"), ("fake", "empty")),
        ("cocoop", "fake"),
    ],
)
def test_shapes_without_data(method, where):
    mode = {"meta": torch.device("meta"), "fake": FakeTensorMode(), "empty": parameters_on_meta()}[where]
    device = "cpu" if where == "fake" else "meta"
    with mode:
        model = make(method, random_clip(**SMALL, vision_layers=2, text_layers=2))
        images, labels = torch.randn(5, 3, 16, 16, device=device), torch.zeros(5, dtype=torch.int64, device=device)
        logits = model(images)
        assert logits.shape == (5, 3)
        assert isinstance(logits, FakeTensor) if where == "fake" else logits.is_meta
        if method != "zeroshot":
            model.loss(images, labels).backward()
            assert all(p.grad.shape == p.shape for p in model.parameters())
            assert model.predict_peak_memory(4) > 0
        with torch.no_grad():
            for _ in range(2):
                assert model.eval()(images).shape == (5, 3)


@pytest.mark.parametrize("product", ["mm", "onednn"])
def test_flops_are_counted_without_data(product, monkeypatch):
    if product == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such product")
    monkeypatch.setattr(cpu_ways, "float32_product", lambda: product)
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = make("coop", random_clip(**SMALL, vision_layers=2, text_layers=2))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(3, 3, 16, 16, device=device))
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[1] == pytest.approx(counts[0], rel=0.15)


def test_a_learner_made_empty_takes_weights_later():
    wanted = make("upt")
    with parameters_on_meta():
        model = make("upt")
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    model.load_state_dict(wanted.state_dict(), assign=True)
    assert torch.equal(model(images_of()), wanted(images_of()))


# class names


class Column:
    """What matters of a pandas column: values by iteration, [] by label, a shape."""

    ndim = 1

    def __init__(self, values):
        self.values = dict(zip(range(100, 100 + len(values)), values, strict=True))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[label]

    def __iter__(self):
        return iter(self.values.values())


SEQUENCES = {
    "tuple": tuple,
    "array": np.array,
    "array of objects": lambda names: np.array(names, dtype=object),
    "keys": lambda names: dict.fromkeys(names, 0).keys(),
    "values": lambda names: dict(enumerate(names)).values(),
    "column": Column,
    "generator": iter,
}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(
    ("model_class", "method"), [(FastPromptedCLIP, "coop"), (FastPromptedCLIP, "mvpt"), (ReferencePromptedCLIP, "coop")]
)
def test_class_names_of_any_sequence(kind, model_class, method):
    wanted = ("cat", "golden retriever", "hard-leaved pocket orchid")
    model = model_class(clip_of(), SEQUENCES[kind](NAMES), method=method, tokenizer=read_tokenizer())
    assert model.classnames == wanted
    assert all(type(name) is str for name in model.classnames)
    model.set_classnames(["dog"])
    model.set_classnames(SEQUENCES[kind](NAMES))
    assert model.classnames == wanted


def test_pandas_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"name": NAMES}, index=[7, 8, 9])
    assert make("coop").classnames == FastUPT(clip_of(), frame["name"]).classnames
    with pytest.raises(ValueError, match=r"DataFrame of shape \(3, 1\)"):
        FastUPT(clip_of(), frame)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("cat", "str 'cat', one text"),
        (b"cat", "bytes b'cat', one text"),
        ({"cat": 0, "dog": 1}, r"dict: which class has which index .*\.keys\(\) or \.values\(\)"),
        ({"cat", "dog"}, "set, which has no order"),
        (3, "int, which gives no strings"),
        (None, "NoneType, which gives no strings"),
        (np.array([["cat"], ["dog"]]), r"ndarray of shape \(2, 1\)"),
        (np.array("cat"), r"ndarray of shape \(\)"),
        (np.array([b"cat"]), "class name 0 is .*bytes_"),
        (Column(["cat", float("nan")]), r"class name 1 is nan \(float\)"),
        (np.array([]), "classnames is empty"),
        (iter(()), "classnames is empty"),
    ],
)
def test_what_is_no_sequence_of_names_is_refused(names, reason):
    model = make("coop")
    with pytest.raises(ValueError, match=reason):
        model.set_classnames(names)
    assert model.classnames == make("coop").classnames
