"""FastUPT against ReferenceUPT: logits, features and every gradient; then what a user does with the model."""

import copy
import itertools
import json
import os
import pickle
from functools import cache, lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upt_fast.common.files
import upt_fast.model
from upt_fast import FastUPT, ReferenceUPT, UPTConfig
from upt_fast.clip import LoadedCLIP
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error, relative_rms
from upt_fast.engine.towers.blocks import MEMORY_LEVELS
from upt_fast.saving import LEARNER_FILE
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid"]
POSITIONS = ("end", "middle", "front")
POOL = [
    *NAMES,
    "dog",
    "Boeing 747-400",
    "?!",
    "#..",
    "?",
    "2",
    "chien_de_berger",
    "日本犬",
    "Ærøskøbing café",
    "\N{DOG FACE}",
    "  yin and  yang ",
    "a" * 20,
    "snoopy (cartoon beagle)",
    "x_y_z",
    "don't & won't; it's #1 of 3: 'ok'",
]
SMALL = dict(
    embed_dim=32, image_size=16, vision_layers=3, vision_width=64, vision_head_width=32, text_layers=3, text_width=64
)

read_tokenizer = cache(clip_tokenizer)


@lru_cache(maxsize=6)
def _clip(key: str, dtype: torch.dtype) -> nn.Module:
    return random_clip(**json.loads(key)).to(dtype)


def make_clip(dtype: torch.dtype = torch.float64, **geometry) -> nn.Module:
    """A random CLIP, built once while it is used."""
    return _clip(json.dumps(SMALL | geometry, sort_keys=True), dtype)


def pair(clip, names=NAMES, *, fast=None, **options):
    """The reference and FastUPT in eval mode, with the same values, away from the initial ones, in all parameters."""
    reference = ReferenceUPT(clip, names, tokenizer=read_tokenizer(), **options)
    model = FastUPT(clip, names, tokenizer=read_tokenizer(), **options, **(fast or {}))
    shake(reference)
    model.load_state_dict(reference.state_dict())
    return reference.eval(), model.eval()


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def images_for(clip, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *clip.visual.image_size, dtype=torch.float64, generator=generator).to(dtype)


def weights_of(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(1, 9, y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)


def outputs(model, images) -> dict[str, torch.Tensor]:
    return {"logits": model(images), "image": model.encode_image(images), "text": model.encode_text()}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.prompt_learner.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def run(model, images) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    results = outputs(model, images)
    return results, gradients(model, (results["logits"] * weights_of(results["logits"])).sum())


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in tensors.values()])


def assert_close(got, wanted, tolerance: float = 1e-9) -> None:
    for name, value in wanted[0].items():
        assert got[0][name].shape == value.shape
        assert max_error(got[0][name], value) <= tolerance, name
    assert got[1].keys() == wanted[1].keys()
    largest = max(float(g.abs().max()) for g in wanted[1].values())
    assert largest > 0
    for name, value in wanted[1].items():
        # against the tensor's own size, unless it is all but zero, as that of the keys' biases is
        scale = max(float(value.abs().max()), 1e-4 * largest)
        error = float((got[1][name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


def check(clip, names=NAMES, batch: int = 2, **options) -> None:
    reference, model = pair(clip, names, **options)
    images = images_for(clip, batch)
    assert_close(run(model, images), run(reference, images))


# every kind of tower that is supported

TANH = {"act_kwargs": {"approximate": "tanh"}}
VARIANTS = {
    "quick_gelu": {},
    "gelu": {"quick_gelu": False},
    "tanh_gelu": {"quick_gelu": False, "vision": TANH, "text": TANH},
    "activations_differ": {"quick_gelu": False, "vision": TANH},
    "layer_scale": {"vision": {"ls_init_value": 0.5}, "text": {"ls_init_value": 0.5}},
    "no_ln_pre": {"vision": {"no_ln_pre": True}},
    "avg": {"vision": {"pool_type": "avg"}},
    "avg_final_ln_after_pool": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "tok_final_ln_after_pool": {"vision": {"final_ln_after_pool": True}},
    "text_eos": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "text_last": {"text": {"pool_type": "last"}, "context_length": 24},
    "custom_text": {"custom_text": True},
    "custom_text_eos": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": 49407}},
    "custom_text_last": {"custom_text": True, "text": {"pool_type": "last"}, "context_length": 24},
    "projection_bias": {"text": {"proj_bias": True}},
    "custom_text_projection_bias": {"custom_text": True, "text": {"proj_bias": True}},
    "no_text_projection": {"text": {"proj_type": "none"}, "embed_dim": 64},
    "logit_bias": {"logit_bias": -3.0},
    "custom_text_logit_bias": {"custom_text": True, "logit_bias": -3.0},
    "norm_eps": {"vision": {"norm_kwargs": {"eps": 1e-2}}, "text": {"norm_kwargs": {"eps": 3e-2}}},
    "no_norm_affine": {k: {"norm_kwargs": {"elementwise_affine": False}} for k in ("vision", "text")},
    "no_norm_bias": {k: {"norm_kwargs": {"bias": False}} for k in ("vision", "text")},
    "mlp_ratio": {"vision": {"mlp_ratio": 2.5}, "text": {"mlp_ratio": 1.0}},
    "head_width_64": {"vision_head_width": 64, "text_heads": 1},
    "many_heads": {"vision_head_width": 16, "text_heads": 8},
    "sin_cos_positions": {"vision": {"pos_embed_type": "sin_cos_2d"}},
    "oblong_image": {"image_size": (16, 40)},
    "one_patch": {"image_size": 8},
    "one_layer": {"vision_layers": 1, "text_layers": 1},
    "short_context": {"context_length": 16},
}
OPTIONS = {
    "paper": {},
    "paper_partial": dict(depth_text=2, depth_vision=1, n_text=3, n_visual=2, class_token_position="middle"),
    "released": dict(preset="released", n_text=2, n_visual=5),
}


def fit(clip, options: dict) -> dict:
    """options with depths that the CLIP's towers have."""
    layers = {
        "depth_text": len(getattr(clip, "text", clip).transformer.resblocks),
        "depth_vision": len(clip.visual.transformer.resblocks),
    }
    return {k: min(v, layers[k]) if k in layers else v for k, v in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("geometry", VARIANTS.values(), ids=VARIANTS)
def test_equals_reference(geometry, options):
    clip = make_clip(**geometry)
    check(clip, **fit(clip, options))


def differ_in_eps(clip):
    for tower in (clip.transformer, clip.visual.transformer):
        for i, block in enumerate(tower.resblocks):
            block.ln_1.eps, block.ln_2.eps = 10.0 ** -(i + 1), 10.0 ** -(i + 2)


def conv_bias(clip):
    clip.visual.conv1.bias = nn.Parameter(torch.randn_like(clip.visual.class_embedding))


def no_biases(clip):
    for tower in (clip.transformer, clip.visual.transformer):
        for block in tower.resblocks:
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                linear.bias = None
            block.attn.in_proj_bias = None


def no_projections(clip):
    clip.visual.proj = clip.text_projection = None


def scale_of_shape_1(clip):
    clip.logit_scale = nn.Parameter(torch.full([1], 1.5, dtype=torch.float64))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("edit", [differ_in_eps, conv_bias, no_biases, no_projections, scale_of_shape_1])
def test_equals_reference_of_an_edited_clip(edit, options):
    clip = copy.deepcopy(make_clip())
    edit(clip)
    check(clip, **options)


def test_variants_are_different_models():
    """What the variants switch on is in the logits: else the tests above would show nothing."""
    seen = {}
    for name, geometry in VARIANTS.items():
        if geometry.keys() & {"image_size", "embed_dim", "vision_layers", "context_length"}:
            continue
        clip = make_clip(**geometry)
        torch.manual_seed(0)
        seen[name] = ReferenceUPT(clip, NAMES, tokenizer=read_tokenizer())(images_for(clip)).detach()
    # the same model in other words
    names = {n: n.removeprefix("custom_text_") for n in seen}
    names |= dict.fromkeys(("tok_final_ln_after_pool", "text_eos", "custom_text", "custom_text_eos"), "quick_gelu")
    for a, b in itertools.combinations(seen, 2):
        equal = seen[a].shape == seen[b].shape and torch.equal(seen[a], seen[b])
        assert equal == (names[a] == names[b]), (a, b)


tower_options = st.fixed_dictionaries(
    {},
    optional={
        "ls_init_value": st.sampled_from([1e-2, 1.0]),
        "norm_kwargs": st.sampled_from([{"eps": 1e-3}, {"eps": 1e-6}]),
        "mlp_ratio": st.sampled_from([0.5, 3.0]),
    },
)


@st.composite
def cases(draw):
    """(geometry of a CLIP, class names, options, number of images)."""
    quick_gelu, tanh = draw(st.booleans()), draw(st.booleans())
    vision = draw(tower_options) | draw(
        st.fixed_dictionaries(
            {},
            optional={
                "no_ln_pre": st.just(True),
                "pool_type": st.just("avg"),
                "final_ln_after_pool": st.just(True),
            },
        )
    )
    text = draw(tower_options) | draw(
        st.sampled_from([{}, {"proj_bias": True}, {"pool_type": "eos", "eos_id": 49407}, {"pool_type": "last"}])
    )
    if not quick_gelu and tanh:
        vision, text = vision | TANH, text | TANH
    layers = {"text": draw(st.integers(1, 4)), "vision": draw(st.integers(1, 4))}
    geometry = dict(
        embed_dim=draw(st.sampled_from([8, 24, 64])),
        image_size=draw(st.sampled_from([8, 16, 24])),
        patch_size=8,
        vision_layers=layers["vision"],
        vision_width=draw(st.sampled_from([64, 128])),
        vision_head_width=draw(st.sampled_from([32, 64])),
        text_layers=layers["text"],
        text_width=64,
        text_heads=draw(st.sampled_from([1, 2])),
        context_length=draw(st.sampled_from([40, 77])),
        quick_gelu=quick_gelu,
        vision=vision,
        text=text,
        custom_text=draw(st.booleans()),
        logit_bias=draw(st.sampled_from([None, -2.5])),
        seed=draw(st.integers(0, 3)),
    )
    options = dict(
        preset=draw(st.sampled_from(["paper", "released"])),
        n_text=draw(st.integers(1, 6)),
        n_visual=draw(st.integers(1, 6)),
        class_token_position=draw(st.sampled_from(POSITIONS)),
        attention_heads=draw(st.sampled_from([1, 2, 4])),
    )
    if options["preset"] == "paper":
        for tower, count in layers.items():
            options[f"depth_{tower}"] = draw(st.none() | st.integers(1, count))
    names = draw(st.lists(st.sampled_from(POOL), min_size=1, max_size=4))
    return geometry, names, options, draw(st.integers(1, 3))


@settings(max_examples=70)
@given(cases())
def test_equals_reference_in_every_case(case):
    geometry, names, options, batch = case
    clip = make_clip(**geometry)
    torch.manual_seed(geometry["seed"])
    check(clip, names, batch, **options)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(POOL) | st.text("ab _-.,!?é日", max_size=9), min_size=1, max_size=6), st.data())
def test_equals_reference_on_any_names(names, data):
    clip = make_clip(text_layers=2, vision_layers=1)
    options = dict(n_text=data.draw(st.integers(1, 3)), class_token_position=data.draw(st.sampled_from(POSITIONS)))
    torch.manual_seed(0)
    if any(not name.replace("_", " ").strip() for name in names):
        for build in (ReferenceUPT, FastUPT):
            with pytest.raises(ValueError, match="class name"):
                build(clip, names, tokenizer=read_tokenizer(), **options)
        return
    check(clip, names, **options)


def test_equals_reference_in_float32():
    errors = []
    for seed, options in enumerate(OPTIONS.values()):
        clip = make_clip(torch.float32, seed=seed)
        reference, model = pair(clip, **options)
        images = images_for(clip, dtype=torch.float32)
        got, wanted = run(model, images), run(reference, images)
        errors += [relative_rms(got[0][name], value) for name, value in wanted[0].items()]
        errors.append(relative_rms(flat(got[1]), flat(wanted[1])))
        assert {t.dtype for part in got for t in part.values()} == {torch.float32}
    assert max(errors) <= 1e-5
    assert max(errors) > 0  # another arrangement of the same sums


def half_clip(dtype: torch.dtype, seed: int, pure: bool) -> tuple[nn.Module, nn.Module]:
    """A CLIP in half precision and the same numbers in float64."""
    from open_clip.model import CLIP, convert_weights_to_lp

    exact = random_clip(**SMALL, seed=seed)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(dtype))
    if pure:
        return copy.deepcopy(exact).to(dtype), exact.double()
    # as open_clip loads "fp16" and "bf16": norms and embeddings stay float32
    text = dict(layers=3, width=64, heads=2, context_length=77, vocab_size=49408)
    vision = dict(layers=3, width=64, head_width=32, patch_size=8, image_size=16)
    half = CLIP(32, vision, text, quick_gelu=True, cast_dtype=dtype)
    half.load_state_dict(exact.state_dict())
    convert_weights_to_lp(half, dtype)
    return half.eval(), exact.double()


@pytest.mark.parametrize("pure", [True, False], ids=["all_half", "norms_float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_good_as_the_reference(dtype, pure):
    squares = {name: {"outputs": 0.0, "gradients": 0.0} for name in ("fast", "reference")}
    for seed in range(8):
        torch.manual_seed(seed)
        half, exact = half_clip(dtype, seed, pure)
        options = dict(depth_text=1 + seed % 3, class_token_position=POSITIONS[seed % 3])
        truth, _ = pair(exact, **options)
        with torch.no_grad():
            for parameter in truth.parameters():
                parameter.copy_(parameter.float())
        images = images_for(half, 4).to(dtype)
        wanted = run(truth, images.double())
        for name, build in (("reference", ReferenceUPT), ("fast", FastUPT)):
            model = build(half, NAMES, tokenizer=read_tokenizer(), **options)
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            model.load_state_dict(truth.state_dict())
            got = run(model, images)
            squares[name]["outputs"] += sum(relative_rms(got[0][key], wanted[0][key]) ** 2 for key in wanted[0])
            squares[name]["gradients"] += relative_rms(flat(got[1]), flat(wanted[1])) ** 2
    for kind in ("outputs", "gradients"):
        fast, reference = ((squares[name][kind] / 8) ** 0.5 for name in ("fast", "reference"))
        assert 1e-4 < fast <= 1.5 * reference, (kind, fast, reference)
        assert fast < (0.01 if dtype == torch.float16 else 0.1)


# parameters


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_initial_parameters_equal_the_reference(preset):
    models = []
    for build in (ReferenceUPT, FastUPT):
        torch.manual_seed(3)
        models.append(build(make_clip(), NAMES, tokenizer=read_tokenizer(), preset=preset, attention_heads=2))
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0]["prompt_learner.uni_ctx"].std() == pytest.approx(0.02, rel=0.2)
    assert {key.split(".")[0] for key in states[1]} == {"prompt_learner"}


def test_state_dicts_go_both_ways():
    clip = make_clip()
    reference, model = pair(clip)
    images = images_for(clip)
    shake(model)
    assert max_error(model(images), reference(images)) > 1e-3
    reference.load_state_dict(model.state_dict())
    assert max_error(model(images), reference(images)) <= 1e-12
    shake(reference)
    model.load_state_dict(reference.state_dict())
    assert max_error(model(images), reference(images)) <= 1e-12


def test_only_the_learner_is_trained():
    model = pair(make_clip())[1]
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"prompt_learner"}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_dropout_acts_in_training_mode_only(preset):
    clip = make_clip()
    reference, model = pair(clip, preset=preset, dropout=0.3, attention_heads=2)
    images = images_for(clip)
    quiet = model(images)
    assert max_error(quiet, reference(images)) <= 1e-9
    noisy = [seeded(model.train(), images, seed)[0]["logits"] for seed in (5, 5, 6)]
    assert torch.equal(noisy[0], noisy[1])
    assert max_error(noisy[0], noisy[2]) > 1e-3
    assert max_error(noisy[0], quiet) > 1e-3
    assert torch.equal(quiet, model.eval()(images))


def seeded(model, images, seed: int):
    torch.manual_seed(seed)
    return run(model, images)


def test_released_dropout_draws_the_reference_masks():
    """Twice through the transform, visual first, whatever the number of heads."""
    clip = make_clip()
    for heads in (1, 4):
        reference, model = pair(clip, preset="released", dropout=0.3, attention_heads=heads)
        images = images_for(clip)
        assert_close(seeded(model.train(), images, 5), seeded(reference.train(), images, 5))


def test_dropout_defaults():
    images = images_for(make_clip())
    for preset, drops in (("paper", False), ("released", True)):
        model = pair(make_clip(), preset=preset)[1].train()
        assert torch.equal(model(images), model(images)) is not drops


# memory, precision, batches


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("memory", MEMORY_LEVELS[1:])
def test_memory_levels_are_equal(memory, position):
    clip = make_clip()
    options = dict(depth_text=2, depth_vision=2, class_token_position=position)
    _, model = pair(clip, **options)
    other = FastUPT(clip, NAMES, tokenizer=read_tokenizer(), memory=memory, **options)
    other.load_state_dict(model.state_dict())
    images = images_for(clip)
    assert_close(run(other, images), run(model, images), 1e-12)


@pytest.mark.parametrize("depth", [1, 3, 6, 7])
@pytest.mark.parametrize("memory", MEMORY_LEVELS)
def test_memory_levels_of_deep_towers(memory, depth):
    """More layers than any buffer shared by a few of them has room for, prompts becoming rows early, late or never."""
    clip = make_clip(text_layers=7, vision_layers=7)
    reference, model = pair(clip, depth_text=depth, depth_vision=8 - depth, fast={"memory": memory})
    images = images_for(clip)
    assert_close(run(model, images), run(reference, images))


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
def test_passes_that_overlap(memory):
    """Two forward passes before their backward passes, in either order, and backward twice through one graph."""
    clip = make_clip()
    _, model = pair(clip, depth_vision=2, fast={"memory": memory})
    batches = images_for(clip, 2), images_for(clip, 3).flip(0)
    wanted = [gradients(model, model(images).square().sum()) for images in batches]
    for order in ((0, 1), (1, 0)):
        losses = [model(images).square().sum() for images in batches]
        for i in order:
            (got,) = torch.autograd.grad(losses[i], model.prompt_learner.uni_ctx, retain_graph=True)
            assert max_error(got, wanted[i]["uni_ctx"]) <= 1e-12
        (got,) = torch.autograd.grad(losses[0], model.prompt_learner.uni_ctx)
        assert max_error(got, wanted[0]["uni_ctx"]) <= 1e-12


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_autocast_is_as_good_as_the_reference(preset, memory):
    errors = {"fast": [], "reference": []}
    for seed in range(3):
        clip = make_clip(torch.float32, seed=seed)
        reference, model = pair(clip, preset=preset, fast={"memory": memory})
        images = images_for(clip, 4, torch.float32)
        wanted = run(reference, images)
        for name, m in (("reference", reference), ("fast", model)):
            with torch.autocast("cpu", torch.bfloat16):
                results = outputs(m, images)
                loss = (results["logits"] * weights_of(results["logits"])).sum()
            got = results, gradients(m, loss.float())
            errors[name] += [relative_rms(flat(part), flat(exact)) for part, exact in zip(got, wanted, strict=True)]
    for i in range(2):
        fast, plain = (sum(e**2 for e in errors[name][i::2]) ** 0.5 for name in ("fast", "reference"))
        assert 1e-4 < fast <= 1.5 * plain, (i, fast, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_to_moves_the_constants(dtype):
    clip = make_clip(torch.float32)
    _, model = pair(clip)
    wanted = model(images_for(clip, dtype=torch.float32))
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {dtype}
    assert all(t.dtype == torch.float32 for t in clip.parameters())  # the user's CLIP stays
    got = model(images_for(clip, dtype=torch.float32))
    assert got.dtype == dtype
    assert relative_rms(got, wanted) <= (1e-5 if dtype == torch.float64 else 0.1)
    model.set_classnames(["dog", "cat"])
    assert model(images_for(clip)).dtype == dtype


def test_dtype_of_the_towers_apart_from_the_clip():
    clip = make_clip(torch.float32)
    double = FastUPT(clip, NAMES, tokenizer=read_tokenizer(), dtype=torch.float64)
    exact = ReferenceUPT(copy.deepcopy(clip).double(), NAMES, tokenizer=read_tokenizer())
    exact.load_state_dict(double.state_dict())
    images = images_for(clip)
    assert_close(run(double, images), run(exact, images))


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_of_the_images(options, memory):
    clip = make_clip()
    found = []
    for model in pair(clip, **options, fast={"memory": memory}):
        images = images_for(clip).requires_grad_()
        logits = model(images)
        (logits * weights_of(logits)).sum().backward()
        found.append((images.grad, model.prompt_learner.uni_ctx.grad))
    assert relative_rms(found[1][0], found[0][0]) <= 1e-9
    assert relative_rms(found[1][1], found[0][1]) <= 1e-9


def test_rows_of_a_batch_are_independent():
    clip = make_clip()
    _, model = pair(clip)
    images = images_for(clip, 3)
    whole = model(images)
    assert max_error(torch.cat([model(images[i : i + 1]) for i in range(3)]), whole) <= 1e-12
    assert max_error(model(images.flip(0)), whole.flip(0)) <= 1e-12


def test_images_in_channels_last():
    clip = make_clip()
    _, model = pair(clip)
    images = images_for(clip)
    assert max_error(model(images.contiguous(memory_format=torch.channels_last)), model(images)) <= 1e-12


def test_one_class_one_image():
    check(make_clip(), ["cat"], 1)


def test_gradients_add_up():
    clip = make_clip()
    _, model = pair(clip)
    images, labels = images_for(clip, 4), torch.tensor([0, 1, 2, 0])
    _, wanted = 0, gradients(model, F.cross_entropy(model(images), labels))
    for half in (slice(2), slice(2, 4)):
        (F.cross_entropy(model(images[half]), labels[half]) / 2).backward()
    for name, parameter in model.prompt_learner.named_parameters():
        assert max_error(parameter.grad, wanted[name]) <= 1e-12, name


def test_a_step_lowers_the_loss_and_moves_every_parameter():
    clip = make_clip()
    _, model = pair(clip)
    images, labels = images_for(clip, 4), torch.tensor([0, 1, 2, 0])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied):
    clip = make_clip()
    _, model = pair(clip)
    images = images_for(clip)
    twin = copied(model)
    assert torch.equal(twin(images), model(images))
    shake(twin)
    twin.set_classnames(["dog"])
    assert model(images).shape == (2, 3)
    assert max_error(twin(images)[:, 0], model(images)[:, 0]) > 1e-3


def test_normalize():
    clip = make_clip()
    reference, model = pair(clip)
    images = images_for(clip)
    for got, wanted in (
        (model.encode_image(images, normalize=False), reference.encode_image(images, normalize=False)),
        (model.encode_text(normalize=False), reference.encode_text(normalize=False)),
    ):
        assert max_error(got, wanted) <= 1e-12
        assert (got.norm(dim=-1) - 1).abs().max() > 1e-3
    assert model.encode_image(images).norm(dim=-1).sub(1).abs().max() <= 1e-12
    assert model.encode_text().norm(dim=-1).sub(1).abs().max() <= 1e-12


# the class features kept in eval mode


class Counted:
    """A model in eval mode that counts the runs of its text tower."""

    def __init__(self, **options) -> None:
        self.clip = make_clip()
        self.images = images_for(self.clip)
        self.reference, self.model = pair(self.clip, **options)
        self.model.eval()
        self.runs = 0
        self.model.text_tower.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.runs += 1

    def logits(self, mode=torch.no_grad) -> torch.Tensor:
        """Logits in eval mode, which must be those of the reference."""
        with mode():
            got = self.model(self.images)
        self.reference.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            assert max_error(got, self.reference(self.images)) <= 1e-9
        return got


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cache_runs_the_text_tower_once(counted, mode):
    for _ in range(3):
        counted.logits(mode)
    with mode():
        features = counted.model.encode_text()
    assert counted.runs == 1
    assert max_error(features, counted.reference.encode_text()) <= 1e-9


def test_cache_is_shared_by_no_grad_and_inference_mode(counted):
    counted.logits(torch.inference_mode)
    counted.logits(torch.no_grad)
    counted.logits(torch.inference_mode)
    with torch.enable_grad():  # features kept in inference mode must not reach a graph
        counted.model(counted.images).sum().backward()
    assert counted.model.prompt_learner.uni_ctx.grad.abs().sum() > 0


def step(model, images) -> None:
    model(images).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def write_in_place(model, _) -> None:
    with torch.no_grad():
        model.prompt_learner.linear1.weight[0, 0] += 1.0


def write_data(model, _) -> None:
    model.prompt_learner.uni_ctx.data[0, 0, 0] += 1.0


def write_numpy(model, _) -> None:
    model.prompt_learner.norm2.bias.detach().numpy()[3] -= 0.5


def load(model, _) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def replace(model, _) -> None:
    model.prompt_learner.uni_ctx = nn.Parameter(model.prompt_learner.uni_ctx.detach() * 2)


@pytest.mark.parametrize("change", [step, write_in_place, write_data, write_numpy, load, replace])
def test_cache_sees_changes(counted, change):
    before = counted.logits()
    change(counted.model, counted.images)
    runs = counted.runs
    after = counted.logits()
    assert counted.runs == runs + 1
    assert max_error(after, before) > 1e-9
    counted.logits()
    assert counted.runs == runs + 1


def test_cache_sees_new_classes(counted):
    counted.logits()
    for model in (counted.model, counted.reference):
        model.set_classnames(["dog", "tree", "golden retriever"])
    counted.logits()
    assert counted.runs == 2


def test_cache_sees_another_dtype(counted):
    before = counted.logits()
    counted.model.float()
    with torch.no_grad():
        after = counted.model(counted.images.float())
    assert counted.runs == 2
    assert after.dtype == torch.float32
    assert relative_rms(after, before) <= 1e-4


def test_cache_is_not_used_with_gradients_or_in_training(counted):
    counted.logits()
    for _ in range(2):
        assert counted.model(counted.images).requires_grad
    assert counted.runs == 3
    counted.model.train()
    for _ in range(2):
        counted.logits()
    assert counted.runs == 5


def test_cache_does_not_outlive_autocast():
    """Features of bfloat16 must not serve a float32 evaluation."""
    clip = make_clip(torch.float32)
    _, model = pair(clip)
    images = images_for(clip, dtype=torch.float32)
    with torch.no_grad():
        wanted = model.train()(images)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
        assert relative_rms(rough, wanted) > 1e-4
        assert relative_rms(model(images), wanted) <= 1e-5


def test_cached_features_cannot_be_written_from_outside(counted):
    before = counted.logits()
    with torch.no_grad():
        counted.model.encode_text(normalize=False).zero_()
        counted.model.encode_text().zero_()
    assert torch.equal(counted.logits(), before)


# save and load


@pytest.fixture
def saved(tmp_path):
    clip = make_clip(torch.float32)
    options = dict(n_text=3, n_visual=2, depth_text=2, class_token_position="middle", attention_heads=2, dropout=0.2)
    _, model = pair(clip, **options)
    model.clip_name, model.clip_pretrained = "ViT-Z-8", "some_tag"
    model.preprocess_cfg = {"size": [16, 16], "mean": [0.1, 0.2, 0.3]}
    return clip, model.eval(), model.save_pretrained(tmp_path / "new" / "run")


def test_save_and_load(saved):
    clip, model, path = saved
    assert path.name == LEARNER_FILE
    images = images_for(clip, dtype=torch.float32)
    for place in (path, path.parent, str(path.parent)):
        loaded = FastUPT.load(place, clip, tokenizer=read_tokenizer())
        assert torch.equal(loaded(images), model(images))
        assert not loaded.training
        for name in ("config", "classnames", "clip_name", "clip_pretrained", "preprocess_cfg"):
            assert getattr(loaded, name) == getattr(model, name), name


def test_load_other_classes_and_options(saved):
    clip, model, path = saved
    loaded = FastUPT.load(path, clip, tokenizer=read_tokenizer(), classnames=["dog", "cat"], memory="lean")
    assert loaded.classnames == ("dog", "cat")
    assert loaded.vision_tower.blocks.memory == "lean"
    images = images_for(clip, dtype=torch.float32)
    assert relative_rms(loaded(images)[:, 1], model(images)[:, 0]) <= 1e-5
    double = FastUPT.load(path, clip, tokenizer=read_tokenizer(), dtype=torch.float64)
    assert double(images).dtype == torch.float64


def test_load_by_the_saved_name(saved, monkeypatch):
    clip, model, path = saved
    calls = []

    def load_clip(*args) -> LoadedCLIP:
        calls.append(args)
        return LoadedCLIP(clip, read_tokenizer(), {"size": 16}, args[0], args[1])

    monkeypatch.setattr(upt_fast.saving, "load_clip", load_clip)
    loaded = FastUPT.load(path, precision="bf16", cache_dir="somewhere")
    assert calls == [("ViT-Z-8", "some_tag", "bf16", "cpu", "somewhere", model.clip_quick_gelu)]
    images = images_for(clip, dtype=torch.float32)
    assert torch.equal(loaded(images), model(images))
    assert (loaded.clip_name, loaded.clip_pretrained, loaded.preprocess_cfg) == ("ViT-Z-8", "some_tag", {"size": 16})
    again = FastUPT.from_pretrained("ViT-Z-8", "some_tag", classnames=["dog"], n_text=2)
    assert (again.config.n_text, again.clip_name, again.classnames) == (2, "ViT-Z-8", ("dog",))


def test_file_holds_the_learner_alone(saved):
    _, model, path = saved
    tensors, metadata = upt_fast.common.files.load_safetensors(path)
    assert tensors.keys() == model.state_dict().keys() == {f"prompt_learner.{n}" for n in LEARNER_SHAPES}
    assert {n: tuple(tensors[f"prompt_learner.{n}"].shape) for n in LEARNER_SHAPES} == LEARNER_SHAPES
    assert path.stat().st_size < 1.1 * sum(t.numel() * 4 for t in tensors.values()) + 4096
    description = json.loads(metadata["upt_fast"])
    assert description["method"] == "upt"
    assert description["classnames"] == ["cat", "golden retriever", "hard-leaved pocket orchid"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


LEARNER_SHAPES = {
    "uni_ctx": (3, 5, 64),
    "self_attn.in_proj_weight": (192, 64),
    "self_attn.in_proj_bias": (192,),
    "self_attn.out_proj.weight": (64, 64),
    "self_attn.out_proj.bias": (64,),
    "norm1.weight": (64,),
    "norm1.bias": (64,),
    "norm2.weight": (64,),
    "norm2.bias": (64,),
    "linear1.weight": (64, 64),
    "linear1.bias": (64,),
    "linear2.weight": (64, 64),
    "linear2.bias": (64,),
    "mlp.weight": (64, 64),
    "mlp.bias": (64,),
}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, when):
    _, model, path = saved
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with torch.no_grad():
        model.prompt_learner.uni_ctx += 1.0
    if when == "write":
        import safetensors.torch

        def half(tensors, file, metadata):
            file.write_bytes(old[:1000])
            fail()

        monkeypatch.setattr(safetensors.torch, "save_file", half)
    elif when == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path.parent)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    model.save_pretrained(path.parent)
    assert path.read_bytes() != old
    assert list(path.parent.iterdir()) == [path]


def test_load_on_another_clip(saved):
    _, _, path = saved
    with pytest.raises(ValueError, match=r"uni_ctx.*\[3, 5, 64\].*\[4, 5, 64\]") as error:
        FastUPT.load(path, make_clip(torch.float32, vision_layers=4), tokenizer=read_tokenizer())
    assert LEARNER_FILE in str(error.value)
    with pytest.raises(ValueError, match=r"mlp\.weight.*\[64, 64\].*\[128, 64\]"):
        FastUPT.load(path, make_clip(torch.float32, vision_width=128), tokenizer=read_tokenizer())
    with pytest.raises(ValueError, match=r"depth_text=2.*1 layers"):
        FastUPT.load(path, make_clip(torch.float32, text_layers=1), tokenizer=read_tokenizer())


def test_load_without_a_clip_and_a_name(saved):
    _, model, path = saved
    model.clip_name = None
    model.save_pretrained(path.parent)
    with pytest.raises(ValueError, match=r"which CLIP.*clip_model"):
        FastUPT.load(path)


def rewrite(path, tensors=None, **changes) -> None:
    """Change a learner file: its tensors, or entries of its description (None: leave the entry out)."""
    old, metadata = upt_fast.common.files.load_safetensors(path)
    description = {k: v for k, v in (json.loads(metadata["upt_fast"]) | changes).items() if v is not None}
    upt_fast.common.files.save_safetensors(path, tensors or old, {"upt_fast": json.dumps(description)})


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda path: path.unlink(), "no file"),
        (lambda path: path.write_bytes(b"PK not this"), "not a safetensors file"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a safetensors file"),
        (lambda path: upt_fast.common.files.save_safetensors(path, {"w": torch.zeros(2)}, {}), "not a learner"),
        (lambda path: upt_fast.common.files.save_safetensors(path, {}, {"upt_fast": "{"}), "not a learner"),
        (lambda path: upt_fast.common.files.save_safetensors(path, {}, {"upt_fast": "[]"}), "not a learner"),
        (lambda path: rewrite(path, format_version=2), "format_version 2; this version reads 1"),
        (lambda path: rewrite(path, method="coop"), "method 'coop'; wanted 'upt'"),
        (lambda path: rewrite(path, config=None), "config"),
        (lambda path: rewrite(path, classnames=None), "classnames"),
        (lambda path: rewrite(path, config={"n_tokens": 4}), "n_tokens"),
        (lambda path: rewrite(path, {"prompt_learner.uni_ctx": torch.zeros(3, 5, 64)}), "Missing key.*norm1"),
    ],
    ids=[
        "missing",
        "text",
        "empty",
        "cut",
        "no_description",
        "no_json",
        "no_object",
        "newer",
        "other_method",
        "no_config",
        "no_classnames",
        "unknown_option",
        "keys_missing",
    ],
)
def test_load_bad_file(saved, spoil, wanted):
    clip, _, path = saved
    spoil(path)
    with pytest.raises(ValueError, match=wanted) as error:
        FastUPT.load(path, clip, tokenizer=read_tokenizer())
    assert str(path.parent) in str(error.value)


def test_load_from_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=LEARNER_FILE):
        FastUPT.load(tmp_path, make_clip(torch.float32))


# bad input


@pytest.mark.parametrize("build", [FastUPT, ReferenceUPT])
@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], ["empty", "at least one class name"]),
        ("cat", ["str", "list of strings"]),
        ({"cat": 1}, ["dict", "list of strings"]),
        (["cat", ""], ["class name 1", "''"]),
        (["cat", "dog", "_ _"], ["class name 2", "'_ _'"]),
        (["cat", 7], ["class name 1", "7", "int", "string"]),
        ([None], ["class name 0", "None"]),
        (["cat", "word " * 80], ["word word", "4 prompt tokens", "77 tokens", "shorter name"]),
        (["cat", "&nbsp;"], ["class name 1", "'&nbsp;'", "no token"]),
    ],
    ids=["none", "str", "dict", "empty", "underscores", "int", "null", "long", "blank"],
)
def test_bad_classnames(build, names, wanted):
    with pytest.raises(ValueError) as error:
        build(make_clip(), names, tokenizer=read_tokenizer())
    assert all(part in str(error.value) for part in wanted), error.value


def test_the_longest_name_fits():
    """77 tokens: start, 4 prompts, 70 words, full stop, end."""
    clip = make_clip(text_layers=1, vision_layers=1)
    check(clip, ["cat " * 70])
    with pytest.raises(ValueError, match="77 tokens"):
        FastUPT(clip, ["cat " * 71], tokenizer=read_tokenizer())


@pytest.mark.parametrize("build", [FastUPT, ReferenceUPT])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"n_text": 0}, ["n_text=0", "at least 1"]),
        ({"n_visual": -1}, ["n_visual=-1", "at least 1"]),
        ({"preset": "Paper"}, ["'Paper'", "'paper', 'released'"]),
        ({"class_token_position": "mid"}, ["'mid'", "'end', 'middle', 'front'"]),
        ({"depth_text": 4}, ["depth_text=4", "3 layers"]),
        ({"depth_vision": 9}, ["depth_vision=9", "3 layers"]),
        ({"attention_heads": 3}, ["attention_heads=3", "64"]),
        ({"n_text": 80}, ["80 prompt tokens", "77 tokens"]),
        ({"config": UPTConfig(), "n_text": 2}, ["config", "n_text", "one or the other"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_options(build, options, wanted):
    with pytest.raises(ValueError) as error:
        build(make_clip(), NAMES, tokenizer=read_tokenizer(), **options)
    assert all(part in str(error.value) for part in wanted), error.value


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"n_ctx": 4}, ["n_ctx", "n_text", "depth_vision"]),
        ({"memory": "low"}, ["memory='low'", "'fast', 'balanced', 'lean'"]),
        ({"backend": "cuda"}, ["backend='cuda'", "'auto'", "'torch'"]),
        ({"backend": "triton,cuda"}, ["backend='triton,cuda'", "'xformers'"]),
        ({"dtype": torch.int32}, ["torch.int32", "fp64"]),
        ({"dtype": "single"}, ["single", "fp32"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_options_of_the_engine(options, wanted):
    with pytest.raises(ValueError) as error:
        FastUPT(make_clip(), NAMES, tokenizer=read_tokenizer(), **options)
    assert all(part in str(error.value) for part in wanted), error.value


@pytest.mark.parametrize(("name", "wanted"), [("cuda", "wanted"), ("xformers", "cannot run here")])
def test_bad_backend_in_the_environment(monkeypatch, name, wanted):
    monkeypatch.setenv("UPT_FAST_BACKEND", name)
    with pytest.raises(ValueError, match=f"UPT_FAST_BACKEND='{name}'.*{wanted}"):
        FastUPT(make_clip(), NAMES, tokenizer=read_tokenizer())
    model = FastUPT(make_clip(), NAMES, tokenizer=read_tokenizer(), backend="torch")  # the argument comes first
    assert model.backend == "torch"


def test_tokenizer_of_another_clip():
    clip = make_clip(vocab_size=1000)
    for build in (FastUPT, ReferenceUPT):
        with pytest.raises(ValueError, match=r"49407.*ids below 1000.*tokenizer that belongs"):
            build(clip, NAMES, tokenizer=read_tokenizer())


def test_no_tokenizer_is_clips():
    ids = [FastUPT(make_clip(), NAMES, **kw).packed[0].rows for kw in ({}, {"tokenizer": read_tokenizer()})]
    assert torch.equal(*ids)


@pytest.mark.parametrize("names", [[], ["dog", "_"], ["word " * 80], "dog", [3]], ids=str)
def test_bad_new_classes_leave_the_old(names):
    clip = make_clip()
    for model in pair(clip):
        before = model(images_for(clip))
        with pytest.raises(ValueError, match="class"):
            model.set_classnames(names)
        assert model.classnames == ("cat", "golden retriever", "hard-leaved pocket orchid")
        assert torch.equal(model(images_for(clip)), before)


def test_bad_images_name_shapes():
    _, model = pair(make_clip())
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(B, 3, 16, 16\)"):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"torch\.uint8.*floating-point"):
        model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


# the user's model


@pytest.mark.parametrize("training", [False, True])
def test_the_clip_is_left_untouched(training):
    clip = copy.deepcopy(make_clip(torch.float32)).train(training)
    clip.visual.proj.requires_grad_(False)
    state = {n: t.clone() for n, t in clip.state_dict().items()}
    wants = {n: p.requires_grad for n, p in clip.named_parameters()}
    modes = {n: m.training for n, m in clip.named_modules()}
    for dtype in (None, torch.float64):
        model = FastUPT(clip, NAMES, tokenizer=read_tokenizer(), dtype=dtype).train()
        step(model, images_for(clip, dtype=torch.float32))
        model.to(torch.bfloat16)
    assert {n: p.requires_grad for n, p in clip.named_parameters()} == wants
    assert {n: m.training for n, m in clip.named_modules()} == modes
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(t, state[n]) and t.dtype == torch.float32 for n, t in clip.state_dict().items())
