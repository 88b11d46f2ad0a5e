"""FastUPT on token streams with reserved prompt rows: Triton kernels in the interpreter, xformers by a stand-in."""

from __future__ import annotations

import copy
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from upt_fast import FastUPT, ReferenceUPT
from upt_fast.common.closeness import relative_rms
from upt_fast.engine.backends import xformers
from upt_fast.engine.backends.dispatch import Asked
from upt_fast.engine.layout import PackedTiles
from upt_fast.engine.towers.streams import Streams
from upt_fast.testing import random_clip, xformers_on_cpu
from upt_fast.tools.verify import run_verify

NAMES = ["cat", "dog", "aeroplane", "traffic light", "x"]
GOLDEN = Path(__file__).parents[1] / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = random_clip(vision_layers=2, text_layers=2).to(DEVICE)
OPTIONS = [
    pytest.param({}, id="paper"),
    pytest.param({"preset": "released"}, id="released"),
    pytest.param({"depth_text": 1, "depth_vision": 1, "n_text": 3, "n_visual": 2}, id="shallow"),
    pytest.param({"class_token_position": "middle", "n_text": 3}, id="middle"),
    pytest.param({"class_token_position": "front"}, id="front"),
]


def run(model, images):
    model.zero_grad(set_to_none=True)
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images), device=DEVICE) % len(NAMES)).backward()
    return logits.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


def pair(clip=CLIP, **options):
    """A reference and a fast model with the same parameters, in float32."""
    fast_only = {name: options.pop(name) for name in ("backend", "memory") if name in options}
    torch.manual_seed(0)
    reference = ReferenceUPT(clip, NAMES, **options).eval()
    fast = FastUPT(clip, NAMES, **options, **fast_only).eval()
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def close(reference, fast, images, tolerance=3e-5):
    for got, wanted in zip(run(fast, images), run(reference, images), strict=True):
        assert relative_rms(got, wanted) <= tolerance


def images(count=2, dtype=torch.float32):
    return torch.randn(count, 3, 32, 32, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("options", OPTIONS)
def test_triton(options):
    close(*pair(**options, backend="triton"), images())


ATTENTIONS = {"prefix_attention", "packed_attention"}
INSERTIONS = {"prompt_insert", "insert_shared", "stream_attention", "buffer_attention"}


@pytest.mark.parametrize(
    ("backend", "used", "unused"),
    [
        ("triton", ATTENTIONS, INSERTIONS),
        ("triton,xformers", INSERTIONS, ATTENTIONS),
        ("xformers", INSERTIONS, ATTENTIONS),
    ],
)
def test_where_the_prompts_keys_and_values_are(backend, used, unused, monkeypatch):
    """The kernels read them in place; beside xformers they are inserted."""
    from upt_fast.engine import ops

    called, asked = dict.fromkeys(used | unused, 0), Asked.of(backend)

    def count(name, op):
        def counted(*args, **options):
            # the propagating prompts' own rows are PyTorch's on each route
            called[name] += args[-1] == asked or isinstance(args[-1], PackedTiles)
            return op(*args, **options)

        return counted

    for name in called:
        monkeypatch.setattr(ops, name, count(name, getattr(ops, name)))
    with xformers_on_cpu():
        _, fast = pair(backend=backend)
        fast(images())
    layers = {name: 2 * (name == "insert_shared") or 1 for name in used}  # keys and values
    assert all(called[name] == 2 * layers[name] for name in used), called
    assert not any(called[name] for name in unused), called


@pytest.mark.parametrize("memory", ["balanced", "lean"])
def test_triton_with_recomputation(memory):
    close(*pair(backend="triton", memory=memory), images())


@pytest.mark.parametrize("options", OPTIONS)
def test_xformers(options):
    with xformers_on_cpu() as calls:
        reference, fast = pair(**options, backend="xformers")
        close(reference, fast, images(3))
    layers = len(fast.text_tower.blocks.eps_1)
    assert calls == ["BlockDiagonalCausalFromBottomRightMask"] * layers + ["NoneType"] * layers


def test_triton_beside_xformers():
    with xformers_on_cpu() as calls:
        close(*pair(backend="triton,xformers"), images())
    assert calls


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_prompts_inserted_in_place_beside_a_norm_that_saves_the_stream(memory):
    """PyTorch's LayerNorm keeps the stream for backward, and the kernel of the next layer writes into it."""
    with xformers_on_cpu():
        close(*pair(backend="triton,xformers,add_layer_norm=torch", memory=memory), images())


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize(
    "clip_options",
    [{}, {"quick_gelu": False, "seed": 1}],
    ids=["quick_gelu", "gelu"],
)
def test_streams_in_float64(memory, clip_options):
    """The route itself, exact to rounding: reserved rows, buffers, pending residuals, and their gradients."""
    clip = random_clip(**clip_options).double().to(DEVICE)
    with xformers_on_cpu():
        reference, fast = pair(clip, memory=memory, backend="xformers,torch")
        close(reference, fast, images(3, torch.float64), 1e-12)


@pytest.mark.parametrize("sets", [1, 3])
def test_prompt_sets(sets):
    """Each image and each class meets its own set's prompts, as if every set ran alone."""
    from upt_fast.clip.open_clip import frozen_clip
    from upt_fast.clip.tokens import tokenize_classnames
    from upt_fast.engine.towers.text import TextTower
    from upt_fast.engine.towers.vision import VisionTower

    clip = frozen_clip(random_clip().double().to(DEVICE))
    prompts = torch.randn(sets, 2, 3, clip.vision.width, dtype=torch.float64, device=DEVICE, requires_grad=True)
    set_index = None if sets == 1 else torch.tensor([2, 0, 2, 0], device=DEVICE)
    batch = images(4, torch.float64)
    found = []
    for backend in ("torch", "torch,triton"):
        tower = VisionTower(clip.vision, torch.float64, backend=backend)
        features = tower(batch, prompts, set_index)
        found.append((features, *torch.autograd.grad(features.square().sum(), prompts)))
    assert type(tower.route) is Streams
    for got, wanted in zip(*found, strict=True):
        assert relative_rms(got, wanted) <= 1e-12

    tokens = tokenize_classnames(NAMES, 2, clip.text.context)
    text_prompts = torch.randn(sets, 2, 2, clip.text.width, dtype=torch.float64, device=DEVICE, requires_grad=True)
    class_sets = [0, 0, sets - 1, sets - 1, 0]
    found = []
    for backend in ("torch", "torch,triton"):
        text_tower = TextTower(clip.text, torch.float64, backend=backend)
        features = text_tower(text_prompts, text_tower.pack(tokens, 2, "end", class_sets))
        found.append((features, *torch.autograd.grad(features.square().sum(), text_prompts)))
    for got, wanted in zip(*found, strict=True):
        assert relative_rms(got, wanted) <= 1e-12


def test_verify_passes_on_the_golden_vectors(capsys):
    assert run_verify(GOLDEN, DEVICE, "float32", "triton") == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^upt\S*\s+ok", out, re.MULTILINE)) == 3


def test_float64_says_why_not(capsys):
    with pytest.raises(ValueError, match=r"no backend for .*\n.*float64 \S+\n    triton: float64 \(takes"):
        run_verify(None, DEVICE, "float64", "triton")


def test_half_precision_streams():
    """Error against float64 at most 1.5 times the reference's own in float16, over several draws."""
    errors = {"reference": 0.0, "fast": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        batch = images()
        exact, _ = pair(copy.deepcopy(CLIP).double())
        wanted = run(exact, batch.double())
        half, fast = pair(copy.deepcopy(CLIP).half(), backend="triton")
        for model in (half, fast):
            model.load_state_dict(exact.state_dict())
        for name, model in (("reference", half), ("fast", fast)):
            errors[name] += sum(relative_rms(g, w) ** 2 for g, w in zip(run(model, batch.half()), wanted, strict=True))
    assert errors["fast"] <= 1.5**2 * errors["reference"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend):
    _, fast = pair(backend=backend)
    batch = images()
    wanted = run(fast, batch)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, batch), wanted, strict=True):
        assert relative_rms(got, want) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast(backend):
    reference, fast = pair(backend=backend)
    batch = images()
    with torch.autocast(DEVICE, torch.float16):
        got = run(fast, batch)
        own = run(reference, batch)
    for g, o, w in zip(got, own, run(reference, batch), strict=True):
        assert relative_rms(g, w) <= 2 * relative_rms(o, w)


@pytest.mark.parametrize("backend", ["xformers", "triton,xformers"])
def test_autocast_beside_xformers(backend, monkeypatch):
    """Its operators are not cast: queries, keys and values come in one dtype, in autocast's behind the first layer."""
    given = []
    with xformers_on_cpu():
        attend = xformers.call

        def call(q, k, v, bias):
            given.append((bias is None, {t.dtype for t in (q, k, v)}))
            return attend(q, k, v, bias)

        monkeypatch.setattr(xformers, "call", call)
        reference, fast = pair(backend=backend)
        batch = images()
        with torch.autocast(DEVICE, torch.float16):
            got = run(fast, batch)
            own = run(reference, batch)
        monkeypatch.undo()
    for g, o, w in zip(got, own, run(reference, batch), strict=True):
        assert relative_rms(g, w) <= 2 * relative_rms(o, w)
    assert all(len(dtypes) == 1 for _, dtypes in given), given
    # layer 0 of the texts is a constant in the CLIP's precision
    assert [dtypes for _, dtypes in given].count({torch.float16}) == len(given) - 1


def test_two_models_and_two_threads_share_no_buffers():
    # the interpreter runs one kernel at a time: the route with PyTorch's ops there
    backend = "triton" if torch.cuda.is_available() else "torch,triton"
    pairs = [pair(backend=backend), pair(backend=backend)]
    batches = [images(2), images(1)]
    wanted = [run(reference, batch) for (reference, _), batch in zip(pairs, batches, strict=True)]

    def work(i):
        return [run(pairs[i][1], batches[i]) for _ in range(2)]

    with ThreadPoolExecutor(2) as threads:
        for results, want in zip(threads.map(work, range(2)), wanted, strict=True):
            for result in results:
                for got, exact in zip(result, want, strict=True):
                    assert relative_rms(got, exact) <= 3e-5


def test_one_model_in_two_threads():
    reference, fast = pair(backend="torch")
    batches = [images(3), images(2), images(3), images(1)]

    def forward(batch):
        logits = fast(batch)
        return logits, torch.autograd.grad(logits.square().sum(), list(fast.parameters()), allow_unused=True)

    with ThreadPoolExecutor(2) as threads:
        for batch, (logits, grads) in zip(batches, threads.map(forward, batches), strict=True):
            want = reference(batch)
            assert relative_rms(logits, want) <= 3e-5
            want_grads = torch.autograd.grad(want.square().sum(), list(reference.parameters()), allow_unused=True)
            for got, exact in zip(grads, want_grads, strict=True):
                assert (got is None) == (exact is None)
                assert got is None or relative_rms(got, exact) <= 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss(backend):
    """The mean cross-entropy of the logits, and its gradients."""
    reference, fast = pair(backend=backend)
    batch, labels = images(3), torch.tensor([4, 0, 2], device=DEVICE)
    wanted = F.cross_entropy(reference(batch), labels)
    got = fast.loss(batch, labels)
    assert abs(float((got - wanted).detach())) <= 1e-5 * float(wanted.detach())
    for model, loss in ((reference, wanted), (fast, got)):
        model.zero_grad()
        loss.backward()
    grads = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (fast, reference)]
    assert relative_rms(*grads) <= 3e-5


def test_dropout_is_refused_by_the_kernel():
    _, fast = pair(preset="released", dropout=0.1, backend="triton")
    with pytest.raises(ValueError, match=r"no backend for prompt_transform\n.*\n    triton: dropout 0.1 \(takes 0\)"):
        fast.train()(images())


def test_runs_are_bit_equal():
    _, fast = pair(backend="triton")
    batch = images()
    first, second = run(fast, batch), run(fast, batch)
    assert all(map(torch.equal, first, second))


def test_ddp_with_a_communication_hook():
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ["MASTER_ADDR"] = "localhost"
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        reference, fast = pair(backend="triton")
        seen = []

        def hook(state, bucket):
            seen.append(bucket.buffer().numel())
            return default_hooks.allreduce_hook(state, bucket)

        parallel = torch.nn.parallel.DistributedDataParallel(fast)
        parallel.register_comm_hook(None, hook)
        close(reference, parallel, images())
        assert sum(seen) == sum(p.numel() for p in fast.parameters())
    finally:
        dist.destroy_process_group()


def test_nothing_is_concatenated_layer_by_layer():
    """One torch.cat remains per set of class names, when packed, and one behind the groups of a step in parts."""
    root = Path(__file__).parents[2]
    for path in [*(root / "upt_fast" / "engine" / "towers").glob("*.py"), *(root / "kernels").glob("*.py")]:
        if path.name not in ("packing.py", "groups.py"):
            assert "torch.cat" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL), path
