"""Every recorded vector: logits, features, loss, all gradients and the prompts, in float64."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from upt_fast.common.closeness import max_error
from upt_fast.common.files import load_safetensors
from upt_fast.reference import TWINS, ReferencePromptedCLIP
from upt_fast.testing import golden_clip

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(p.stem for p in GOLDEN.glob("*.json") if not p.stem.startswith("clip_"))
# their keys in the state dict stand behind "prompt_learner."
LEARNER_ONLY = ("upt", "coop", "cocoop")


def sidecar_of(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def method_of(name: str) -> tuple[str, dict]:
    """The method and our options of a file."""
    sidecar = sidecar_of(name)
    method, o = sidecar["method"], sidecar["options"]
    if method == "upt":
        return "upt", {"preset": "released", "class_token_position": o["CLASS_TOKEN_POSITION"]}
    if method == "upt_paper":
        return "upt", {"preset": "paper", **o}
    if method.startswith("coop"):
        position = o["CLASS_TOKEN_POSITION"]
        options = {"n_ctx": o["N_CTX"], "class_specific": o["CSC"], "class_token_position": position}
        return "coop", {"ctx_init": o["CTX_INIT"], **options}
    if method == "cocoop":
        return "cocoop", {"n_ctx": o["N_CTX"], "ctx_init": o["CTX_INIT"]}
    if method.startswith("vpt"):
        return method.removesuffix("_l6"), {"n_ctx": o["N_CTX"], "templates": sidecar["templates"]}
    if method == "maple":
        return "maple", {"n_ctx": o["N_CTX"], "depth": o["PROMPT_DEPTH"], "ctx_init": o["CTX_INIT"]}
    if method == "ivlp":
        names = {"n_text": "N_CTX_TEXT", "n_visual": "N_CTX_VISION", "ctx_init": "CTX_INIT"}
        names |= {"depth_text": "PROMPT_DEPTH_TEXT", "depth_vision": "PROMPT_DEPTH_VISION"}
        return "ivlp", {k: o[v] for k, v in names.items()}
    if method == "mvpt":
        return "mvpt", {"n_ctx": o["N_CTX_VISION"], "depth": o["PROMPT_DEPTH_VISION"]}
    assert method in ("zsclip", "zsclip2")
    return "zeroshot", {"templates": sidecar["templates"]}


@lru_cache(maxsize=2)
def clip_of(file: str, dtype: torch.dtype):
    return golden_clip(GOLDEN / file, dtype)


def build(name: str, tokenizer, dtype: torch.dtype = torch.float64, **more):
    """The model with a file's parameters in eval mode, the file's tensors, and the names of the parameters."""
    tensors, _ = load_safetensors(GOLDEN / f"{name}.safetensors")
    sidecar = sidecar_of(name)
    method, options = method_of(name)
    clip = clip_of(sidecar["clip_file"], dtype)
    model = ReferencePromptedCLIP(
        clip, sidecar["classnames"], method=method, tokenizer=tokenizer, **options, **more
    ).eval()
    assert type(model) is TWINS[method]
    prefix = "prompt_learner." if method in LEARNER_ONLY else ""
    state = {prefix + n[6:]: t.to(dtype) for n, t in tensors.items() if n.startswith("param.")}
    if "trainable" in sidecar:
        assert sorted(model.state_dict()) == sorted(prefix + n for n in sidecar["trainable"])
    assert model.state_dict().keys() == state.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(state)
    return model, tensors, prefix


def run(model, tensors) -> dict[str, torch.Tensor]:
    """What a file records, under the same names; gradients by the model's parameter names."""
    dtype = next(model.clip_model.parameters()).dtype
    images = tensors["images"].to(dtype)
    logits = model(images)
    loss = F.cross_entropy(logits, tensors["labels"])
    found = {"out.logits": logits, "out.loss": loss}
    with torch.no_grad():
        found["out.image_features"] = model.encode_image(images)
        by_image = model.method == "cocoop"
        found["out.text_features"] = model.encode_text(images=images) if by_image else model.encode_text()
        found |= {f"mid.{n}": t for n, t in model.prompts(images).items()}
    names, parameters = zip(*model.named_parameters(), strict=True) if len(model.state_dict()) else ((), ())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    for name, parameter, grad in zip(names, parameters, gradients, strict=True):
        found[f"grad.{name}"] = torch.zeros_like(parameter) if grad is None else grad
    return found


def check(found, tensors, kind: str, prefix: str, tolerance: float = 1e-9) -> None:
    """Compare everything that is recorded under kind ("", "half.") with what was found."""
    wanted = {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith((f"{kind}out.", f"{kind}grad."))}
    if not kind:
        wanted |= {n: t for n, t in tensors.items() if n.startswith("mid.")}
    gradients = {n for n in wanted if n.startswith("grad.")}
    assert {f"grad.{prefix}{n[5:]}" for n in gradients} == {n for n in found if n.startswith("grad.")}
    for name, value in wanted.items():
        got = found[f"grad.{prefix}{name[5:]}" if name in gradients else name]
        scale = max(float(wanted[n].abs().max()) for n in gradients) if name in gradients else 1.0
        assert max_error(got / scale, value / scale) <= tolerance, name


def test_all_methods_are_recorded():
    assert {method_of(name)[0] for name in FILES} == set(TWINS) - {"kgcoop"}  # tests/test_kgcoop.py


def check_tokens(model, tensors) -> None:
    """The ids are the recorded ones, words that prompts replace included, and so are the embeddings beside them."""
    wanted = tensors["tokenized_prompts"]
    if hasattr(model, "template_tokens"):
        got = torch.stack([tokens.ids for tokens in model.template_tokens])
        assert torch.equal(got, wanted if wanted.ndim == 3 else wanted[None])
        return
    # UPT's CTX_INIT gives words in place of the X, which prompts replace in any case
    first = 1 + model.n_text if model.method == "upt" else 1
    assert torch.equal(model.tokens.ids[:, first:], wanted[:, first:])
    (suffix,) = [t for n, t in tensors.items() if n.endswith("token_suffix")] or [None]
    if suffix is not None and model.class_token_position == "end":
        assert torch.equal(model.embed_classes()[:, 1 + model.n_text :], suffix.double())


@pytest.mark.parametrize("name", FILES)
def test_golden(name, tokenizer):
    model, tensors, prefix = build(name, tokenizer)
    check(run(model, tensors), tensors, "", prefix, 1e-12)
    check_tokens(model, tensors)


@pytest.mark.parametrize("name", ["maple", "ivlp", "mvpt"])
def test_golden_with_half_prompts(name, tokenizer):
    model, tensors, prefix = build(name, tokenizer, half_prompts=True)
    found = run(model, tensors)
    check(found, tensors, "half.", prefix, 1e-12)
    with pytest.raises(AssertionError):
        check(found, tensors, "", prefix)


@pytest.mark.parametrize("name", [n for n in FILES if not n.startswith("upt_paper")])
def test_golden_in_float32(name, tokenizer):
    """The untouched released classes in float32; those of MaPLe's repository round their prompts."""
    half = {"half_prompts": True} if name in ("maple", "ivlp", "mvpt") else {}
    model, tensors, _ = build(name, tokenizer, torch.float32, **half)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        logits = model(tensors["images"].float())
    assert logits.dtype == torch.float32
    assert max_error(logits, tensors["f32.logits"]) <= 1e-5
    assert max_error(F.cross_entropy(logits, tensors["labels"]), tensors["f32.loss"]) <= 1e-5
