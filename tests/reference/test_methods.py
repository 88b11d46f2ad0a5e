"""What the recorded vectors do not show: identities between the methods, other CLIPs, what a user does with a model."""

import copy
import json
import pickle
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error
from upt_fast.methods import find_method
from upt_fast.methods.coop import CoOpConfig
from upt_fast.methods.upt import UPTConfig
from upt_fast.reference import TWINS, ReferencePromptedCLIP, ReferenceUPT
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid"]
SMALL = dict(
    embed_dim=32, image_size=16, vision_layers=3, vision_width=64, vision_head_width=32, text_layers=2, text_width=64
)
# depths that fit towers of 2 and 3 layers
OPTIONS = {
    "upt": {"n_text": 3, "n_visual": 2},
    "coop": {"n_ctx": 3},
    "kgcoop": {},
    "cocoop": {"n_ctx": 3},
    "vpt_shallow": {},
    "vpt_deep": {"n_ctx": 2},
    "maple": {"depth": 2},
    "ivlp": {"n_text": 3, "n_visual": 1},
    "mvpt": {"n_ctx": 2},
    "zeroshot": {},
}


@lru_cache(maxsize=8)
def _clip(key: str, dtype: torch.dtype):
    return random_clip(**json.loads(key)).to(dtype)


def make_clip(dtype: torch.dtype = torch.float64, **geometry):
    return _clip(json.dumps(SMALL | geometry, sort_keys=True), dtype)


def build(method: str, clip=None, names=NAMES, **options):
    """A model away from its initial values, in eval mode."""
    model = ReferencePromptedCLIP(
        make_clip() if clip is None else clip, names, method=method, tokenizer=read_tokenizer(), **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@lru_cache(maxsize=1)
def read_tokenizer():
    return clip_tokenizer()


def fresh(method: str, clip=None, names=NAMES, **options):
    clip = make_clip() if clip is None else clip
    return ReferencePromptedCLIP(clip, names, method=method, tokenizer=read_tokenizer(), **options).eval()


def images_for(clip, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = clip.visual.conv1.weight.dtype
    return torch.randn(batch, 3, *clip.visual.image_size, dtype=torch.float64, generator=generator).to(dtype)


def text_of(model, images=None) -> torch.Tensor:
    return model.encode_text(images=images) if model.method == "cocoop" else model.encode_text()


# every method on CLIPs of other kinds and sizes

GEOMETRIES = {
    "small": {},
    "wide": dict(vision_width=96, vision_head_width=48, text_width=128, embed_dim=48, image_size=(16, 24)),
    "patches_of_4": dict(patch_size=4, vision_layers=2, text_layers=4),
    "custom_text": dict(custom_text=True, logit_bias=-3.0, context_length=40),
    "pooling": dict(vision={"pool_type": "avg"}, text={"pool_type": "last"}, context_length=24),
    "no_ln_pre": dict(vision={"no_ln_pre": True}, quick_gelu=False, text={"proj_bias": True}),
}


@pytest.mark.parametrize("method", TWINS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_runs_on_any_clip(geometry, method):
    clip = make_clip(**geometry)
    model = build(method, clip, **OPTIONS[method])
    images = images_for(clip)
    logits = model(images)
    embed_dim = clip.visual.proj.shape[1]
    assert logits.shape == (2, 3)
    assert logits.dtype == torch.float64
    image, text = model.encode_image(images), text_of(model, images)
    assert image.shape == (2, embed_dim)
    assert text.shape == ((2, 3, embed_dim) if method == "cocoop" else (3, embed_dim))
    for features in (image, text):
        assert max_error(features.norm(dim=-1), torch.ones(features.shape[:-1], dtype=torch.float64)) <= 1e-12
    bias = geometry.get("logit_bias", 0.0)
    wanted = clip.logit_scale.exp() * (image[:, None] * text).sum(-1) + bias
    assert max_error(logits, wanted) <= 1e-12
    if method != "zeroshot":
        F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize("method", TWINS)
def test_half_precision_clip(method):
    clip = make_clip(torch.bfloat16)
    exact, model = (build(method, c, **OPTIONS[method]) for c in (make_clip(), clip))
    assert all(p.dtype == torch.bfloat16 for p in clip.parameters())  # building the learner left it
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.load_state_dict(exact.state_dict())
    images = images_for(clip)
    logits = model(images)
    assert max_error(logits, exact(images.double())) <= 0.15
    if method != "zeroshot":
        logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# prompts that are words: equal to CLIP on the written text


@pytest.mark.parametrize(
    ("position", "template"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
def test_coop_from_words_is_the_written_text(position, template):
    clip = make_clip()
    model = fresh("coop", ctx_init="a_photo of a", class_token_position=position)
    assert model.prompt_learner.ctx.shape == (4, 64)
    assert torch.equal(
        model.prompt_learner.ctx, clip.token_embedding(read_tokenizer()(["a photo of a"])[0, 1:5]).detach()
    )
    written = fresh("zeroshot", templates=template)
    assert max_error(model.encode_text(), written.encode_text()) <= 1e-13
    assert max_error(model(images_for(clip)), written(images_for(clip))) <= 1e-13


def test_odd_context_in_the_middle():
    """The larger part stands behind the name."""
    model = fresh("coop", ctx_init="one two three", class_token_position="middle")
    assert max_error(model.encode_text(), fresh("zeroshot", templates="one {} two three.").encode_text()) <= 1e-13


def test_words_of_several_tokens():
    """The number of words counts, as in the released code: the phrase's further tokens stay in front of the name."""
    phrase = "retrievers, photograph"
    model = fresh("coop", ctx_init=phrase)
    assert model.n_text == 2
    assert len(read_tokenizer().encode(phrase)) > 2
    assert max_error(model.encode_text(), fresh("zeroshot", templates=f"{phrase} {{}}.").encode_text()) <= 1e-13


@pytest.mark.parametrize("ctx_init", ["a photo of a", "a photo", "one two three four five six"])
def test_maple_and_ivlp_keep_all_words(ctx_init):
    """Two prompts and a longer phrase: the words behind the second stay between the prompts and the name."""
    written = fresh("zeroshot", templates=f"{ctx_init} {{}}.")
    for model in (
        fresh("maple", n_ctx=2, depth=1, ctx_init=ctx_init),
        fresh("ivlp", n_text=2, depth_text=1, depth_vision=0, ctx_init=ctx_init),
    ):
        assert model.prompt_learner.ctx.shape == (2, 64)
        assert max_error(model.encode_text(), written.encode_text()) <= 1e-13
        extra = len(ctx_init.split()) - 2
        assert [p - n for p, n in zip(model.tokens.pooled, model.tokens.name_lengths, strict=True)] == [4 + extra] * 3


@pytest.mark.parametrize("method", ["maple", "ivlp"])
def test_more_than_four_prompts_start_at_random(method):
    count = {"n_ctx" if method == "maple" else "n_text": 5}
    model = fresh(method, ctx_init="a photo of a", **(OPTIONS[method] | count))
    assert model.tokens.ids[0, 1:7].tolist() == [343] * 5 + read_tokenizer().encode("cat")
    assert 0.01 < model.prompt_learner.ctx.std() < 0.03
    words = make_clip().token_embedding(torch.tensor(read_tokenizer().encode("a")))
    assert max_error(model.prompt_learner.ctx[:1], words) > 1e-3


@pytest.mark.parametrize("method", ["maple", "ivlp"])
def test_too_few_words(method):
    count = {"n_ctx" if method == "maple" else "n_text": 3}
    with pytest.raises(ValueError, match=r"'a photo' has 2 tokens; wanted at least 3"):
        fresh(method, ctx_init="a photo", **(OPTIONS[method] | count))


def test_cocoop_without_its_network_is_coop():
    clip, images = make_clip(), images_for(make_clip(), 3)
    model, coop = build("cocoop", ctx_init="a photo of a"), fresh("coop", ctx_init="a photo of a")
    coop.prompt_learner.load_state_dict({"ctx": model.prompt_learner.ctx})
    assert max_error(model(images), coop(images)) > 1e-3
    for parameter in model.prompt_learner.meta_net.linear2.parameters():
        parameter.data.zero_()
    assert max_error(model(images), coop(images)) <= 1e-13
    assert model.prompts(images)["bias"].shape == (3, clip.text_projection.shape[0])


def test_cocoop_by_image():
    model, images = build("cocoop"), images_for(make_clip(), 3)
    assert max_error(torch.cat([model(image[None]) for image in images]), model(images)) <= 1e-13
    features, wanted = model.prompts(images)["bias"], model.encode_image(images)
    net = model.prompt_learner.meta_net
    hidden = F.relu(wanted @ net.linear1.weight.T + net.linear1.bias)
    assert hidden.shape == (3, 2)
    assert max_error(features, hidden @ net.linear2.weight.T + net.linear2.bias) <= 1e-13
    assert "bias" not in model.prompts()
    with pytest.raises(ValueError, match="pass images"):
        model.encode_text()
    raw = model.encode_text(normalize=False, images=images)
    assert max_error(F.normalize(raw, dim=-1), model.encode_text(images=images)) <= 1e-13


def test_cocoop_wants_features_wide_enough():
    with pytest.raises(ValueError, match="8 entries; wanted at least 16"):
        fresh("cocoop", make_clip(embed_dim=8))


def test_class_specific_contexts():
    shared, own = build("coop", n_ctx=2), build("coop", n_ctx=2, class_specific=True)
    images = images_for(make_clip())
    assert own.prompt_learner.ctx.shape == (3, 2, 64)
    own.load_state_dict({"prompt_learner.ctx": shared.prompt_learner.ctx.expand(3, -1, -1)})
    assert max_error(own(images), shared(images)) <= 1e-13
    (grad,) = torch.autograd.grad(own.encode_text()[1].sum(), own.prompt_learner.ctx)
    assert grad.abs().amax((1, 2)).gt(0).tolist() == [False, True, False]
    own.set_classnames(["dog", "fox", "owl"])
    with pytest.raises(ValueError, match="2 class names for the class-specific contexts of 3 classes"):
        own.set_classnames(["dog", "fox"])
    assert own.classnames == ("dog", "fox", "owl")
    assert fresh("coop", class_specific=True, ctx_init="a photo").prompt_learner.ctx.shape == (2, 64)


# image prompts


@pytest.mark.parametrize("geometry", [{}, {"vision": {"pool_type": "avg"}}])
def test_order_of_visual_prompts_does_not_matter(geometry):
    """After the class token or behind the patches, in any order: attention over images has no order."""
    clip = make_clip(**geometry)
    images = images_for(clip)
    first, last = build("vpt_shallow", clip), build("mvpt", clip, n_ctx=4, depth=1)
    first.visual_ctx.data = last.image_encoder.VPT.flip(0).clone()
    assert max_error(first(images), last(images)) <= 1e-13


@pytest.mark.parametrize("method", ["mvpt", "ivlp", "maple"])
def test_depth_one_is_shallow(method):
    """Deep prompts that repeat what propagates would be another model; depth 1 lets the input's rows propagate."""
    options = {"mvpt": {"depth": 1}, "ivlp": {"depth_text": 1, "depth_vision": 1}, "maple": {"depth": 1}}[method]
    model = build(method, **options)
    shallow = build("vpt_shallow", n_ctx=len(model.prompts()["visual_ctx"]))
    shallow.visual_ctx.data = model.prompts()["visual_ctx"].detach().clone()
    images = images_for(make_clip())
    assert max_error(model.encode_image(images), shallow.encode_image(images)) <= 1e-13


@pytest.mark.parametrize(("layers", "n_ctx", "tokens"), [(3, 1, 4), (4, 2, 6), (12, 1, 1), (5, 5, 12), (1, 1, 12)])
def test_deep_vpt_rows(layers, n_ctx, tokens):
    """Token j of layer l is row j * layers + l of 12 * n_ctx, whatever the number of layers."""
    model = fresh("vpt_deep", make_clip(vision_layers=layers), n_ctx=n_ctx)
    assert model.visual_ctx.shape == (12 * n_ctx, 64)
    prompts = model.tower_prompts().visual
    assert len(prompts) == layers
    for layer, rows in enumerate(prompts):
        assert torch.equal(rows, model.visual_ctx[layer::layers])
        assert rows.shape == (tokens, 64)


def test_deep_vpt_that_does_not_divide():
    with pytest.raises(ValueError, match=r"n_ctx=4.*12 \* n_ctx = 48.*5 layers do not divide: wanted a multiple of 5"):
        fresh("vpt_deep", make_clip(vision_layers=5), n_ctx=4)


def test_deep_vpt_passes_no_ln_pre():
    """In a tower of one layer it is the shallow method whose prompts went through ln_pre beforehand."""
    clip = make_clip(vision_layers=1)
    images = images_for(clip)
    deep, shallow = build("vpt_deep", clip, n_ctx=1), build("vpt_shallow", clip, n_ctx=12)
    deep.visual_ctx.data = clip.visual.ln_pre(shallow.visual_ctx).detach()
    assert max_error(deep(images), shallow(images)) <= 1e-13
    deep.visual_ctx.data = shallow.visual_ctx.data
    assert max_error(deep(images), shallow(images)) > 1e-3


def test_ivlp_without_visual_prompts():
    clip = make_clip()
    model = build("ivlp", depth_vision=0)
    assert sorted(model.state_dict()) == ["prompt_learner.ctx", "text_encoder.transformer.resblocks.1.VPT_shallow"]
    images = images_for(clip)
    assert max_error(model.encode_image(images), F.normalize(clip.encode_image(images), dim=-1)) <= 1e-12


def test_half_prompts_round_values_and_gradients():
    images = images_for(make_clip())
    for method in ("maple", "ivlp", "mvpt"):
        exact, model = build(method, **OPTIONS[method]), build(method, **OPTIONS[method], half_prompts=True)
        model.load_state_dict(exact.state_dict())
        error = max_error(model(images), exact(images))
        assert 1e-7 < error < 1e-2
        model.load_state_dict({n: p.half().double() for n, p in exact.state_dict().items()})
        (model(images).sum() * 1e-9).backward()  # below float16's smallest number
        for name, parameter in model.named_parameters():
            rounded = "VPT" in name or "proj" in name or "compound" in name
            assert bool(parameter.grad.abs().max() > 0) != rounded, name


def test_maple_starts_from_one_projection():
    model = fresh("maple", make_clip(text_layers=3), depth=3)
    state = model.state_dict()
    key = "prompt_learner.compound_prompt_projections.{}.weight"
    assert torch.equal(state[key.format(0)], state[key.format(1)])
    assert not torch.equal(state[key.format(0)], state["prompt_learner.proj.weight"])
    assert state[key.format(0)].data_ptr() != state[key.format(1)].data_ptr()


# fixed texts


def test_zero_shot_is_clip():
    clip = make_clip()
    model, images = fresh("zeroshot"), images_for(clip)
    text = clip.encode_text(read_tokenizer()([f"a photo of a {n.replace('_', ' ')}." for n in NAMES]))
    assert max_error(model.encode_text(), F.normalize(text, dim=-1)) <= 1e-12
    assert max_error(model.encode_text(normalize=False), text) <= 1e-12
    assert max_error(model.encode_image(images), F.normalize(clip.encode_image(images), dim=-1)) <= 1e-12
    assert model.state_dict() == {}
    assert model.prompts() == {}


@pytest.mark.parametrize("method", ["zeroshot", "vpt_shallow", "vpt_deep", "mvpt"])
def test_templates(method):
    templates = ("imagenet_select", "a photo of a {}, a type of pet.")
    model = fresh(method, templates=templates, **OPTIONS[method])
    texts = model.config.template_texts
    assert len(texts) == len(model.template_tokens) == 8
    single = [fresh("zeroshot", templates=text).encode_text() for text in texts]
    assert max_error(model.encode_text(), F.normalize(torch.stack(single).mean(0), dim=-1)) <= 1e-13
    assert max_error(model.encode_text(), single[0]) > 1e-3


def test_fixed_features_are_kept_and_follow_the_model():
    model = build("vpt_shallow", copy.deepcopy(make_clip(torch.float32)))
    with torch.inference_mode():
        first = model.encode_text()
    kept = model._features
    images = images_for(model.clip_model)
    model(images).sum().backward()  # what inference mode computed may be trained with
    assert model._features is kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.set_classnames(NAMES)
        model.encode_text()
    assert torch.equal(model.encode_text(), first)
    model.encode_text(normalize=False).zero_()
    assert torch.equal(model.encode_text(), first)
    assert model.double().encode_text().dtype == torch.float64
    assert max_error(model.encode_text(), first) <= 1e-5
    model.set_classnames(["dog", "cat"])
    assert model(images.double()).shape == (2, 2)
    assert max_error(model.encode_text()[1], first[0]) <= 1e-5


# UPT's ablations


def ablation(**options):
    return build("upt", **({"n_text": 2, "n_visual": 2} | options))


def assert_equal_prompts(got, wanted, tolerance: float = 1e-13) -> None:
    got, wanted = got.prompts(), wanted.prompts()
    for name, value in wanted.items():
        assert max_error(got[name], value) <= tolerance


def test_the_default_is_upt():
    torch.manual_seed(0)
    plain = ReferenceUPT(make_clip(), NAMES, config=UPTConfig(n_text=3, n_visual=2))
    torch.manual_seed(0)
    named = ReferenceUPT(make_clip(), NAMES, n_text=3, n_visual=2, transform="transformer", layerwise=True)
    assert plain.config == named.config
    images = images_for(make_clip())
    assert torch.equal(plain(images), named(images))


def test_mlp_is_the_transformer_without_attention():
    mlp, full = ablation(transform="mlp"), ablation()
    assert {n for n in full.state_dict() if "self_attn" not in n} == set(mlp.state_dict())
    full.load_state_dict(mlp.state_dict(), strict=False)
    for parameter in full.prompt_learner.self_attn.out_proj.parameters():
        parameter.data.zero_()
    assert_equal_prompts(mlp, full)


def test_no_transform():
    model = ablation(transform="none", n_visual=3)
    assert sorted(model.prompt_learner.state_dict()) == ["mlp.bias", "mlp.weight", "uni_ctx"]
    learner = model.prompt_learner
    assert learner.uni_ctx.shape == (3, 5, 64)
    prompts = model.prompts()
    assert torch.equal(prompts["text_prompts"], learner.uni_ctx[:2, :2])
    assert max_error(prompts["visual_prompts"], learner.mlp(learner.uni_ctx[:, 2:])) <= 1e-13


@pytest.mark.parametrize("transform", ["transformer", "mlp", "none"])
def test_shared(transform):
    model = ablation(transform=transform, shared=True)
    learner = model.prompt_learner
    assert learner.uni_ctx.shape == (3, 2, 64)
    transformed = learner.transform()
    assert torch.equal(model.prompts()["text_prompts"], transformed[:2])
    assert max_error(model.prompts()["visual_prompts"], learner.mlp(transformed)) <= 1e-13
    if transform != "transformer":  # each prompt on its own: the same as two equal halves
        halves = ablation(transform=transform)
        state = model.state_dict()
        state["prompt_learner.uni_ctx"] = learner.uni_ctx.repeat(1, 2, 1)
        halves.load_state_dict(state)
        assert_equal_prompts(model, halves)


@pytest.mark.parametrize("options", [{}, {"transform": "mlp"}, {"transform": "none", "shared": True}, {"joint": True}])
def test_one_set_for_all_layers(options):
    one, each = ablation(layerwise=False, **options), ablation(**options)
    images = images_for(make_clip())
    state = {n: t.detach().clone() for n, t in one.state_dict().items()}
    sets = [n for n in state if n.endswith("ctx")]
    for name in sets:
        assert len(state[name]) == 1
        state[name] = state[name].expand_as(each.state_dict()[name])
    each.load_state_dict(state)
    assert max_error(one(images), each(images)) <= 1e-13
    for model in (one, each):
        model(images).square().sum().backward()
    for name in sets:
        summed = each.get_parameter(name).grad.sum(0, keepdim=True)
        assert max_error(one.get_parameter(name).grad, summed) <= 1e-12


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_joint_is_coop_with_vpt(position):
    model = ablation(joint=True, depth_text=1, depth_vision=1, class_token_position=position)
    assert {n: tuple(t.shape) for n, t in model.prompt_learner.state_dict().items()} == {
        "ctx": (1, 2, 64),
        "visual_ctx": (1, 2, 64),
    }
    coop, vpt = fresh("coop", n_ctx=2, class_token_position=position), fresh("vpt_shallow", n_ctx=2)
    coop.prompt_learner.ctx.data = model.prompt_learner.ctx[0].detach()
    vpt.visual_ctx.data = model.prompt_learner.visual_ctx[0].detach()
    images = images_for(make_clip())
    assert max_error(model.encode_text(), coop.encode_text()) <= 1e-13
    assert max_error(model.encode_image(images), vpt.encode_image(images)) <= 1e-13
    deep = ablation(joint=True, transform="none")
    assert deep.prompt_learner.ctx.shape == (2, 2, 64)
    assert deep.prompt_learner.visual_ctx.shape == (3, 2, 64)


# by name


def test_one_class_for_each_method():
    for method, reference in TWINS.items():
        model = fresh(method, **OPTIONS[method])
        assert type(model) is reference
        assert isinstance(model, ReferencePromptedCLIP)
        assert type(model.config) is find_method(method).config
        assert model.method == method
        again = reference(make_clip(), NAMES, tokenizer=read_tokenizer(), config=model.config, method=method)
        assert again.state_dict().keys() == model.state_dict().keys()
    assert type(ReferencePromptedCLIP(make_clip(), NAMES)) is ReferenceUPT


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "clip-adapter"}, "method='clip-adapter'; wanted one of 'upt', 'coop', 'cocoop'"),
        ({"method": "coop", "n_text": 4}, "unknown option n_text; wanted some of n_ctx, ctx_init"),
        ({"method": "coop", "config": CoOpConfig(), "n_ctx": 4}, "config and n_ctx given; wanted one or the other"),
        ({"method": "maple", "config": CoOpConfig()}, "config is CoOpConfig; method 'maple' wants MaPLeConfig"),
        ({"method": "maple"}, "depth=9; this CLIP's tower has 2 layers: wanted 1 to 2"),
        ({"method": "ivlp", "depth_text": 3}, "depth_text=3; this CLIP's tower has 2 layers: wanted 1 to 2"),
        ({"method": "ivlp", "depth_vision": 4}, "depth_vision=4; this CLIP's tower has 3 layers: wanted 0 to 3"),
        ({"method": "mvpt", "depth": 4}, "depth=4; this CLIP's tower has 3 layers"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_refuses(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        ReferencePromptedCLIP(make_clip(), NAMES, **options)


def test_a_method_by_another_name():
    with pytest.raises(ValueError, match="method='coop'; ReferenceUPT is 'upt'"):
        ReferenceUPT(make_clip(), NAMES, method="coop")


@pytest.mark.parametrize("method", TWINS)
def test_classes_and_copies(method):
    model, images = build(method, **OPTIONS[method]), images_for(make_clip())
    logits = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(images), logits)
    model.set_classnames([NAMES[2], "dog"])
    assert max_error(model(images)[:, 0], logits[:, 2]) <= 1e-12
    assert model.classnames == (NAMES[2], "dog")
    for names in (["cat "] * 0, ["cat", "_"], ["cat " * 80]):
        with pytest.raises(ValueError, match="class name"):
            model.set_classnames(names)
    assert model(images).shape == (2, 2)


@pytest.mark.parametrize("method", [m for m in TWINS if m != "zeroshot"])
def test_steps_lower_the_loss(method):
    model, images = fresh(method, **OPTIONS[method]), images_for(make_clip(), 3)
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
