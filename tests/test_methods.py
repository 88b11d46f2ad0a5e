"""Every method on the engine against its plain twin, on CLIPs of several kinds, and what users do with it."""

import copy
import dataclasses
import json
import pickle
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from upt_fast import FastPromptedCLIP, FastUPT, list_methods, register_method
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import assert_rounded, max_error, relative_rms
from upt_fast.methods import BUILTIN_METHODS, MethodConfig, find_method
from upt_fast.prompts import LearnerSetting, PromptLearner, Prompts
from upt_fast.reference import TWINS, ReferencePromptedCLIP
from upt_fast.testing import build, random_clip, xformers_on_cpu

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid", "dog"]
SMALL = dict(
    embed_dim=32, image_size=16, vision_layers=3, vision_width=64, vision_head_width=32, text_layers=2, text_width=64
)
GEOMETRIES = {
    "small": {},
    "wide": dict(vision_width=96, vision_head_width=48, text_width=128, embed_dim=48, image_size=(16, 24)),
    "patches_of_4": dict(patch_size=4, vision_layers=2, text_layers=4),
    "one_layer": dict(vision_layers=1, text_layers=1),
    "custom_text": dict(custom_text=True, logit_bias=-3.0, context_length=40),
    "pooling": dict(vision={"pool_type": "avg"}, text={"pool_type": "last"}, context_length=24),
    "no_ln_pre": dict(vision={"no_ln_pre": True}, quick_gelu=False, text={"proj_bias": True}),
}
# as (method, options); depths that fit towers of one layer are set below
CASES = {
    "upt": ("upt", {"n_text": 3, "n_visual": 2}),
    "upt_released": ("upt", {"preset": "released", "n_text": 3, "n_visual": 2}),
    "upt_mlp": ("upt", {"transform": "mlp", "n_text": 2, "n_visual": 3}),
    "upt_shared": ("upt", {"shared": True, "n_text": 3, "n_visual": 3}),
    "upt_shared_none": ("upt", {"shared": True, "transform": "none", "n_text": 2, "n_visual": 2, "layerwise": False}),
    "upt_none": ("upt", {"transform": "none", "n_text": 2, "n_visual": 1}),
    "upt_joint": ("upt", {"joint": True, "n_text": 2, "n_visual": 3}),
    "upt_joint_one": ("upt", {"joint": True, "layerwise": False}),
    "upt_one_for_all": ("upt", {"layerwise": False, "n_text": 3, "n_visual": 2}),
    "coop": ("coop", {"n_ctx": 3}),
    "coop_words": ("coop", {"ctx_init": "a photo of a"}),
    "coop_middle": ("coop", {"n_ctx": 3, "class_token_position": "middle"}),
    "coop_front": ("coop", {"ctx_init": "one two", "class_token_position": "front"}),
    "coop_csc": ("coop", {"n_ctx": 3, "class_specific": True}),
    "coop_csc_middle": ("coop", {"n_ctx": 5, "class_specific": True, "class_token_position": "middle"}),
    "coop_csc_front": ("coop", {"n_ctx": 1, "class_specific": True, "class_token_position": "front"}),
    "kgcoop": ("kgcoop", {}),
    "cocoop": ("cocoop", {"n_ctx": 3}),
    "cocoop_words": ("cocoop", {"ctx_init": "a photo of a"}),
    "vpt_shallow": ("vpt_shallow", {}),
    "vpt_deep": ("vpt_deep", {"n_ctx": 2}),
    "maple": ("maple", {"depth": None}),
    "maple_shallow": ("maple", {"depth": 1, "n_ctx": 3}),
    "maple_half": ("maple", {"depth": None, "half_prompts": True}),
    "ivlp": ("ivlp", {"n_text": 3, "n_visual": 1}),
    "ivlp_half": ("ivlp", {"n_text": 3, "n_visual": 1, "half_prompts": True}),
    "ivlp_text": ("ivlp", {"depth_vision": 0, "ctx_init": "one two three four five"}),
    "mvpt": ("mvpt", {"n_ctx": 2}),
    "mvpt_half": ("mvpt", {"depth": 1, "half_prompts": True, "templates": ("a {}.", "one {} two")}),
    "zeroshot": ("zeroshot", {}),
    "zeroshot_seven": ("zeroshot", {"templates": "imagenet_select"}),
}
NO_KERNELS = [name for name in CASES if name not in ("zeroshot_seven", "coop_words", "cocoop_words")]


@lru_cache(maxsize=8)
def _clip(key: str, dtype: torch.dtype):
    return random_clip(**json.loads(key)).to(dtype)


def make_clip(dtype: torch.dtype = torch.float64, **geometry):
    return _clip(json.dumps(SMALL | geometry, sort_keys=True), dtype)


@lru_cache(maxsize=1)
def read_tokenizer():
    return clip_tokenizer()


def images_for(clip, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *clip.visual.image_size, dtype=torch.float64, generator=generator)


def pair(case: str, clip=None, names=NAMES, **more):
    """The plain twin and the engine with the same values, away from the initial ones, in eval mode."""
    method, options = CASES[case]
    clip = make_clip() if clip is None else clip
    arguments = dict(method=method, tokenizer=read_tokenizer(), **options)
    reference = ReferencePromptedCLIP(clip, names, **arguments).eval()
    fast = FastPromptedCLIP(clip, names, **arguments, **more).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def gradients(model) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in state.items()}


def run(model, images, labels=None):
    """Logits and gradients of the loss, by the names of the state dict."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    if logits.requires_grad:
        labels = torch.arange(len(images)) % logits.shape[1] if labels is None else labels
        F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    return logits.detach(), gradients(model)


def assert_equal(got, wanted, tolerance: float = 1e-12) -> None:
    assert max_error(got[0], wanted[0]) <= tolerance
    assert got[1].keys() == wanted[1].keys()
    scale = max((float(g.abs().max()) for g in wanted[1].values()), default=1.0)
    for name, gradient in wanted[1].items():
        assert float((got[1][name] - gradient).abs().max()) <= tolerance * scale, name


def test_all_methods_are_tried():
    assert {method for method, _ in CASES.values()} == set(BUILTIN_METHODS) == set(TWINS) <= set(list_methods())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_equals_reference(geometry, case):
    """Logits, features, prompts and every gradient in float64."""
    clip = make_clip(**geometry)
    reference, fast = pair(case, clip)
    images = images_for(clip)
    assert_equal(run(fast, images), run(reference, images))
    with torch.no_grad():
        assert max_error(fast.encode_image(images), reference.encode_image(images)) <= 1e-12
        for normalize in (True, False):
            wanted = reference.encode_text(normalize, images=images)
            assert max_error(fast.encode_text(normalize, images=images), wanted) <= 1e-12
        wanted = reference.prompts(images)
        got = fast.prompts(images)
        assert got.keys() == wanted.keys()
        assert all(max_error(got[name], t) <= 1e-13 for name, t in wanted.items())


@pytest.mark.parametrize("memory", ["balanced", "lean"])
@pytest.mark.parametrize("case", CASES)
def test_memory_levels(case, memory):
    clip = make_clip(text_layers=3)
    reference, fast = pair(case, clip, memory=memory)
    images = images_for(clip)
    assert_equal(run(fast, images), run(reference, images))


@pytest.mark.parametrize("case", CASES)
def test_initial_values(case):
    """The same seed gives the same parameters, under the same names and in the same order."""
    method, options = CASES[case]
    models = []
    for kind in (ReferencePromptedCLIP, FastPromptedCLIP):
        torch.manual_seed(3)
        models.append(kind(make_clip(), NAMES, method=method, tokenizer=read_tokenizer(), **options))
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    assert [p.shape for p in models[0].parameters()] == [p.shape for p in models[1].parameters()]


@pytest.mark.parametrize("case", [case for case in CASES if find_method(CASES[case][0]).loss_terms is None])
def test_loss_equals_cross_entropy(case):
    _, fast = pair(case)
    images, labels = images_for(make_clip()), torch.tensor([3, 0, 2])
    wanted = F.cross_entropy(fast(images), labels)
    got = fast.loss(images, labels)
    assert max_error(got, wanted) <= 1e-13
    if got.requires_grad:
        parameters = list(fast.parameters())
        grads = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (got, wanted)]
        assert all(max_error(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case):
    """bfloat16 towers, float32 learner: at most 1.5 times the plain twin's own error, over all results."""
    exact, _ = pair(case)
    images = images_for(make_clip())
    wanted = run(exact, images)
    errors = []
    for model in pair(case, make_clip(torch.bfloat16)):
        model.load_state_dict(exact.state_dict())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        logits, grads = run(model, images)
        flat = [torch.cat([torch.zeros(1), *(g[n].flatten() for n in wanted[1])]) for g in (grads, wanted[1])]
        errors.append((relative_rms(logits, wanted[0]), relative_rms(*flat)))
    # a few numbers of a small model: chance is as large as the error
    assert errors[1][0] <= 1.5 * errors[0][0] + 0.02
    assert errors[1][1] <= 1.5 * errors[0][1] + 0.05


# CoCoOp: texts by image, in groups


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("text_batch", [1, 2, 3, 4, 9])
def test_groups_of_images(text_batch, memory):
    clip = make_clip()
    reference, fast = pair("cocoop", clip, text_batch=text_batch, memory=memory)
    images = images_for(clip, 5)
    assert_equal(run(fast, images), run(reference, images))
    with torch.no_grad():
        assert max_error(fast(images), reference(images)) <= 1e-12
        assert max_error(fast.encode_text(images=images), reference.encode_text(images=images)) <= 1e-12


def test_groups_follow_memory(monkeypatch):
    """Groups are of equal size and as few as the limit allows; without gradients more fits."""
    import upt_fast.features.texts

    _, fast = pair("cocoop")
    with_gradients, without = (sum(fast.text_tower.need(fast._classes, backward)) for backward in (True, False))
    assert without < with_gradients
    monkeypatch.setattr(upt_fast.features.texts, "TEXT_BYTES", 4 * with_gradients)
    assert [fast._group(batch) for batch in (1, 4, 5, 8, 9)] == [1, 4, 3, 4, 3]
    with torch.no_grad():
        assert fast._group(8) > 4
    monkeypatch.setattr(upt_fast.features.texts, "TEXT_BYTES", 1)
    assert fast._group(8) == 1


def test_texts_by_image_want_images():
    _, fast = pair("cocoop")
    with pytest.raises(ValueError, match="class features of 'cocoop' depend on the image: pass images"):
        fast.encode_text()
    with pytest.raises(ValueError, match="pass features"):
        fast.prompt_learner()
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="text_batch="):
            FastPromptedCLIP(make_clip(), NAMES, method="cocoop", tokenizer=read_tokenizer(), text_batch=bad)


def test_repeated_classes_are_kept_and_follow_the_module():
    _, fast = pair("cocoop")
    packed = fast._classes
    assert packed.repeated(1, False) is packed
    twice = packed.repeated(2, False)
    assert packed.repeated(2, False) is twice
    assert len(twice.rows) == 2 * len(packed.rows)
    assert twice.layout.num_classes == 2 * len(NAMES)
    for sets in (3, 4):
        packed.repeated(sets, False)
    assert packed.repeated(2, False) is not twice
    assert len(packed._repeated) == 2
    fast.double()
    assert packed._repeated == {}


# backends that keep streams


def assert_as_exact(case: str, backend: str, images: torch.Tensor) -> None:
    """Logits and every gradient of a backend in float32 are off by no more than rounding explains."""
    clip = make_clip(torch.float32)
    _, fast = pair(case, clip, backend=backend)
    exact, _ = pair(case, copy.deepcopy(clip).double())
    exact.double().load_state_dict(fast.state_dict())

    def flat(found):
        return found[0], *(found[1][name] for name in sorted(found[1]))

    # rounding to float16 turns small differences into whole steps
    dtype = torch.float16 if "half" in case else torch.float32
    assert_rounded(flat(run(fast, images)), lambda: flat(run(exact, images.double())), dtype)


@pytest.mark.parametrize("case", NO_KERNELS)
def test_xformers(case):
    with xformers_on_cpu():
        assert_as_exact(case, "xformers", images_for(make_clip()).float())


@pytest.mark.parametrize(
    "case", ["upt_mlp", "upt_shared", "upt_one_for_all", "coop", "coop_csc", "cocoop", "maple", "vpt_deep", "zeroshot"]
)
def test_triton(case):
    assert_as_exact(case, "triton", images_for(make_clip(), 2).float())


@pytest.mark.parametrize("case", ["coop", "coop_csc", "cocoop", "maple", "ivlp", "vpt_deep"])
def test_compiled(case):
    """torch.compile without graph breaks gives the same numbers."""
    reference, fast = pair(case, make_clip(torch.float32))
    images = images_for(make_clip()).float()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = compiled(images)
    assert relative_rms(got, reference(images)) <= 1e-5


# what users do


@pytest.mark.parametrize("case", CASES)
def test_copies_classes_and_cache(case):
    reference, fast = pair(case)
    images = images_for(make_clip())
    logits = fast(images).detach()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(images), logits)
        assert list(twin.state_dict()) == list(fast.state_dict())
        twin.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert max_error(fast(images), logits) <= 1e-13  # fills the cache
        for parameter in fast.parameters():
            parameter.data += 0.05
        reference.load_state_dict(fast.state_dict())
        assert max_error(fast(images), reference(images)) <= 1e-12
    names = ["owl", NAMES[2], "dog", "x"] if "csc" in case else ["owl", NAMES[2]]
    for model in (reference, fast):
        model.set_classnames(names)
    assert max_error(fast(images), reference(images)) <= 1e-12
    assert fast.classnames == tuple(names)
    for bad in ([], ["cat", "_"], ["cat " * 80]):
        with pytest.raises(ValueError, match="class name"):
            fast.set_classnames(bad)
    assert fast(images).shape == (3, len(names))


def test_class_specific_contexts_want_their_classes():
    _, fast = pair("coop_csc")
    with pytest.raises(ValueError, match="2 class names for the class-specific contexts of 4 classes"):
        fast.set_classnames(["a", "b"])
    assert fast.classnames == tuple(name.replace("_", " ") for name in NAMES)


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded(case, tmp_path):
    _, fast = pair(case)
    path = fast.save_pretrained(tmp_path / "saved")
    loaded = FastPromptedCLIP.load(path.parent, make_clip(), tokenizer=read_tokenizer())
    assert (loaded.method, loaded.config, loaded.classnames) == (fast.method, fast.config, fast.classnames)
    images = images_for(make_clip())
    assert torch.equal(loaded(images), fast(images))
    if fast.method == "upt":
        assert torch.equal(FastUPT.load(path, make_clip(), tokenizer=read_tokenizer())(images), fast(images))
    else:
        with pytest.raises(ValueError, match=f"method '{fast.method}'; wanted 'upt'"):
            FastUPT.load(path, make_clip(), tokenizer=read_tokenizer())


@pytest.mark.parametrize("case", ["vpt_deep", "ivlp"])
def test_names_of_whole_models(case, tmp_path):
    """Released as whole models: names without the learner's place, also inside another module, and in messages."""
    _, fast = pair(case)
    state = fast.state_dict()
    assert ("visual_ctx" if case == "vpt_deep" else "image_encoder.VPT") in state
    holder = nn.ModuleDict({"clip": fast})
    assert list(holder.state_dict()) == [f"clip.{name}" for name in state]
    holder.load_state_dict({f"clip.{name}": t + 1 for name, t in state.items()})
    assert all(torch.equal(t, state[name]) for name, t in fast.state_dict().items())  # state holds views
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fast.load_state_dict(dict(state) | {"other": torch.zeros(1)})
    path = fast.save_pretrained(tmp_path)
    from upt_fast.common.files import load_safetensors, save_safetensors

    tensors, metadata = load_safetensors(path)
    first = sorted(tensors)[0]
    save_safetensors(path, {n: t for n, t in tensors.items() if n != first}, metadata)
    with pytest.raises(
        ValueError, match=f'does not fit this CLIP.*"{first}"'.replace(".", r"\.").replace(r"\.*", "(?s:.*)")
    ):
        FastPromptedCLIP.load(path, make_clip(), tokenizer=read_tokenizer())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("zeroshot")])
def test_steps_lower_the_loss(case):
    method, options = CASES[case]
    torch.manual_seed(0)
    clip = make_clip(torch.float32)
    model = FastPromptedCLIP(clip, NAMES, method=method, tokenizer=read_tokenizer(), **options).eval()  # no dropout
    images, labels = images_for(clip).float(), torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_templates_run_once():
    _, fast = pair("mvpt_half")
    calls = []
    fast.text_tower.register_forward_hook(lambda *_: calls.append(1))
    images = images_for(make_clip())
    fast.train()
    for _ in range(3):
        fast(images).sum().backward()
    assert len(calls) == 2  # one for each template
    with torch.inference_mode():
        fast.set_classnames(["owl"])
        fast(images)
    fast(images).sum().backward()  # the kept features are no inference tensors
    assert len(calls) == 4


def test_unprompted_towers_have_no_graph():
    """CoOp's images and VPT's texts need no memory for backward."""
    images = images_for(make_clip())
    _, coop = pair("coop")
    assert not coop.encode_image(images).requires_grad
    assert coop.encode_text().requires_grad
    _, vpt = pair("vpt_deep")
    assert vpt.encode_image(images).requires_grad
    assert not vpt.encode_text().requires_grad


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "tpt"}, "method='tpt'; wanted one of 'upt', 'coop'"),
        ({"method": ""}, "method=''; wanted one of"),
        ({"method": 3}, "method=3; wanted one of"),
        ({"method": "coop", "n_text": 3}, "unknown option n_text; wanted some of n_ctx"),
        (
            {"method": "coop", "config": find_method("maple").config()},
            "config is MaPLeConfig; method 'coop' wants CoOpConfig",
        ),
        ({"method": "coop", "config": find_method("coop").config(), "n_ctx": 2}, "config and n_ctx given"),
        ({"method": "maple", "depth": 3}, "depth=3; this CLIP's tower has 2 layers"),
        ({"method": "vpt_deep", "n_ctx": 0}, "n_ctx=0"),
        ({"method": "no_file.py:Learner"}, "cannot import no_file.py: FileNotFoundError"),
        ({"method": "json:JSONDecoder"}, "wanted a subclass of PromptLearner"),
        ({"method": "no_such_module:Learner"}, "cannot import no_such_module: ModuleNotFoundError"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_arguments(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        FastPromptedCLIP(make_clip(), NAMES, tokenizer=read_tokenizer(), **options)


def test_fast_upt_is_upt():
    with pytest.raises(ValueError, match="method='coop'; FastUPT is 'upt'"):
        FastUPT(make_clip(), NAMES, tokenizer=read_tokenizer(), method="coop")


# methods from outside


@dataclasses.dataclass(frozen=True)
class GainConfig(MethodConfig):
    """Options of the method below.

    Args:
        n_ctx: prompt tokens.
    """

    n_ctx: int = 2


class Gain(PromptLearner):
    """CoOp whose context has a gain, and which adds the same number of visual prompts in two layers."""

    method = "gain"
    config_class = GainConfig
    source = "nowhere"

    def __init__(self, config: GainConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.n_text = config.n_ctx
        self.ctx = nn.Parameter(setting.initial_context(config.n_ctx))
        self.gain = nn.Parameter(torch.ones(()))
        self.visual = nn.Parameter(torch.randn(2, config.n_ctx, setting.vision_width))

    def forward(self) -> Prompts:
        return Prompts(text=(self.gain * self.ctx)[None, None], visual=self.visual[None])


@pytest.fixture
def gain():
    import upt_fast.methods

    yield register_method(Gain)
    upt_fast.methods.registry._METHODS.pop("gain", None)


def test_a_method_from_outside(gain, tmp_path):
    assert "gain" in list_methods()
    assert find_method("gain").source == "nowhere"
    fast = FastPromptedCLIP(make_clip(), NAMES, method="gain", tokenizer=read_tokenizer(), n_ctx=3)
    by_class = FastPromptedCLIP(make_clip(), NAMES, method=Gain, tokenizer=read_tokenizer(), n_ctx=3)
    assert list(fast.state_dict()) == ["prompt_learner.ctx", "prompt_learner.gain", "prompt_learner.visual"]
    by_class.load_state_dict(fast.state_dict())
    images = images_for(make_clip())
    assert torch.equal(fast(images), by_class(images))
    plain = ReferencePromptedCLIP(make_clip(), NAMES, method="coop", tokenizer=read_tokenizer(), n_ctx=3)
    plain.load_state_dict({"prompt_learner.ctx": fast.prompt_learner.ctx})
    assert max_error(fast.encode_text(), plain.encode_text()) <= 1e-12
    F.cross_entropy(fast(images), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad.abs().max() > 0 for p in fast.parameters())

    path = fast.save_pretrained(tmp_path)
    assert torch.equal(FastPromptedCLIP.load(path, make_clip(), tokenizer=read_tokenizer())(images), fast(images))
    import upt_fast.methods

    del upt_fast.methods.registry._METHODS["gain"]  # as in a process that has not imported it
    with pytest.raises(ValueError, match=r"method 'gain' is not known here; wanted one of .*or the class"):
        FastPromptedCLIP.load(path, make_clip(), tokenizer=read_tokenizer())
    with pytest.raises(ValueError, match="method 'gain'; method='coop' was given"):
        FastPromptedCLIP.load(path, make_clip(), tokenizer=read_tokenizer(), method="coop")
    loaded = FastPromptedCLIP.load(path, make_clip(), tokenizer=read_tokenizer(), method=Gain)
    assert torch.equal(loaded(images), fast(images))


def test_registration_is_checked(gain):
    assert register_method(Gain) is Gain  # again, as a reloaded module does
    for attributes, wanted in (
        ({"method": "gain"}, "method 'gain' exists already"),
        ({"method": "coop"}, "method 'coop' exists already"),
        ({"method": "a b"}, "wanted a PromptLearner class whose method is a name"),
        ({"method": "other", "config_class": dict}, "wanted a subclass of upt_fast.MethodConfig"),
    ):
        with pytest.raises(ValueError, match=wanted):
            register_method(type("Other", (Gain,), attributes))
    with pytest.raises(ValueError, match="wanted a PromptLearner class"):
        register_method(nn.Linear)


def test_providers_agree():
    clip = make_clip()
    images = images_for(clip)
    for method in TWINS:
        _, options = CASES[method]
        models = [
            build(p, clip, NAMES, method, tokenizer=read_tokenizer(), **options)
            for p in ("reference", "truncated", "fast")
        ]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
            assert max_error(model(images), models[0](images)) <= 1e-12
    assert models[1].template_tokens[0].ids.shape[1] < 20
