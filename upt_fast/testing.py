"""Closeness, golden vectors, random CLIPs: what tests, benchmarks and ``upt-fast verify`` share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.tokens import ClassTokens, tokenize_words
from upt_fast.common.files import load_safetensors
from upt_fast.engine.backends import xformers
from upt_fast.methods import MethodConfig
from upt_fast.model import FastPromptedCLIP
from upt_fast.reference import TWINS, ReferencePromptedCLIP, ReferenceUPT
from upt_fast.reference.zeroshot import ReferenceZeroShot


@contextlib.contextmanager
def xformers_on_cpu() -> Iterator[list[str]]:
    """Let the xformers route run on a CPU: exact attention in the place of xformers' own, under its bias objects.

    Yields:
        the name of each call's bias class, as calls come.
    """
    calls: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        calls.append(type(bias).__name__)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, K)
        mask = None if bias is None else bias.materialize((q.shape[2], k.shape[2]), dtype=q.dtype, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2)

    kept = xformers.devices, xformers.call
    xformers.devices, xformers.call = ("cuda", "cpu"), attend
    try:
        yield calls
    finally:
        xformers.devices, xformers.call = kept


def random_clip(
    *,
    embed_dim: int = 64,
    image_size: int = 32,
    patch_size: int = 8,
    vision_layers: int = 3,
    vision_width: int = 128,
    vision_head_width: int = 64,
    text_layers: int = 3,
    text_width: int = 128,
    text_heads: int = 2,
    context_length: int = 77,
    vocab_size: int = 49408,
    quick_gelu: bool = True,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    custom_text: bool = False,
    logit_bias: float | None = None,
) -> nn.Module:
    """An open_clip CLIP with random weights, also where open_clip starts at 1 and 0 (LayerNorms, biases).

    Args:
        vision: further keys of open_clip's vision_cfg.
        text: further keys of open_clip's text_cfg.
        custom_text: build CustomTextCLIP instead of CLIP.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    vision_cfg = dict(
        layers=vision_layers,
        width=vision_width,
        head_width=vision_head_width,
        patch_size=patch_size,
        image_size=image_size,
        **(vision or {}),
    )
    text_cfg = dict(
        layers=text_layers,
        width=text_width,
        heads=text_heads,
        context_length=context_length,
        vocab_size=vocab_size,
        **(text or {}),
    )
    build = CustomTextCLIP if custom_text else CLIP
    model = build(embed_dim, vision_cfg, text_cfg, quick_gelu=quick_gelu, init_logit_bias=logit_bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1 and "logit" not in name:
                parameter.normal_(std=0.1)
            elif parameter.ndim == 1 and ("ln_" in name and name.endswith("weight")):
                parameter.normal_(mean=1.0, std=0.2)
            elif name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    torch.set_rng_state(generator_state)
    return model.eval()


def vit_b16(seed: int = 0) -> nn.Module:
    """ViT-B/16's geometry (OpenAI's: QuickGELU, 224 pixels, text width 512) with random weights."""
    return random_clip(
        embed_dim=512,
        image_size=224,
        patch_size=16,
        vision_layers=12,
        vision_width=768,
        text_layers=12,
        text_width=512,
        text_heads=8,
        seed=seed,
    )


class _Truncated(ReferencePromptedCLIP):
    """The reference with its texts cut after the longest class's pooled row: what a careful user would do."""

    def set_classnames(self, classnames: Iterable[str]) -> None:
        super().set_classnames(classnames)
        if isinstance(self, ReferenceZeroShot):
            self.template_tokens = tuple(map(_cut, self.template_tokens))
        else:
            self.tokens = _cut(self.tokens)


def _cut(tokens: ClassTokens) -> ClassTokens:
    return dataclasses.replace(tokens, ids=tokens.ids[:, : max(tokens.pooled) + 1].contiguous())


class TruncatedUPT(_Truncated, ReferenceUPT):
    """UPT's reference with its texts cut after the longest class's pooled row."""


PROVIDERS = ("reference", "truncated", "fast")


def build(
    provider: str, clip_model: nn.Module, classnames: Sequence[str], method: str = "upt", **options: Any
) -> FastPromptedCLIP | ReferencePromptedCLIP:
    """A method as one of PROVIDERS computes it: plain, plain with cut texts, or by the engine."""
    if provider == "fast":
        return FastPromptedCLIP(clip_model, classnames, method=method, **options)
    kind: type[ReferencePromptedCLIP] = TWINS[method]
    if provider == "truncated":
        kind = type(f"Truncated{kind.__name__.removeprefix('Reference')}", (_Truncated, kind), {})
    return kind(clip_model, classnames, **options)


def golden_clip(path: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The CLIP of a directory of vectors as an open_clip model.

    Args:
        path: the ``clip_*.safetensors`` file (OpenAI's state-dict names; token embeddings as ``.ids`` and ``.rows``),
            with its ``.json`` beside it.
        dtype: dtype of the model; the stored values are exact in it.
    """
    from open_clip.model import CLIP

    tensors, _ = load_safetensors(path)
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    config = sidecar["config"]
    vision_heads = sidecar.get("vision_heads", config["vision_width"] // 64)
    model = CLIP(
        config["embed_dim"],
        dict(
            layers=config["vision_layers"],
            width=config["vision_width"],
            head_width=config["vision_width"] // vision_heads,
            patch_size=config["vision_patch_size"],
            image_size=config["image_resolution"],
        ),
        dict(
            context_length=config["context_length"],
            vocab_size=config["vocab_size"],
            width=config["transformer_width"],
            heads=config["transformer_heads"],
            layers=config["transformer_layers"],
        ),
        quick_gelu=True,
    ).to(dtype)
    ids, rows = tensors.pop("token_embedding.ids"), tensors.pop("token_embedding.rows")
    embedding = torch.full((config["vocab_size"], config["transformer_width"]), float("nan"), dtype=dtype)
    embedding[ids] = rows.to(dtype)
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()} | {"token_embedding.weight": embedding})
    return model.eval()


def write_vectors(
    directory: Path,
    name: str,
    config: MethodConfig,
    classnames: list[str],
    geometry: dict[str, Any],
    images: int = 3,
    seed: int = 0,
    method: str = "upt",
) -> None:
    """Record vectors of a reference in float64, in the format that ``upt-fast verify`` reads.

    All stored values are float16-exact, so that every precision starts from the same numbers.

    Args:
        directory: gets clip_<name>.safetensors, <name>.safetensors and their .json files.
        name: of the files.
        config: the method's options.
        classnames: the classes.
        geometry: embed_dim, image_size, patch_size, vision_layers, vision_width, text_layers, text_width of the CLIP;
            heads are widths // 64.
        images: number of images.
        seed: of all random values.
        method: its name.
    """
    from safetensors.torch import save_file

    clip = random_clip(**geometry, text_heads=geometry["text_width"] // 64, seed=seed)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_(parameter.half())
    clip = clip.double()
    torch.manual_seed(seed)
    model = ReferencePromptedCLIP(clip, classnames, method=method, config=config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    size = geometry["image_size"]
    pixels = torch.randn(images, 3, size, size).half()
    labels = torch.randint(len(classnames), (images,))
    if isinstance(model, ReferenceZeroShot):
        ids = torch.stack([tokens.ids for tokens in model.template_tokens])
        ids = ids[0] if len(ids) == 1 else ids
    else:
        ids = model.tokens.ids
    tensors = {"images": pixels, "labels": labels, "tokenized_prompts": ids}
    tensors |= {f"param.{n.removeprefix('prompt_learner.')}": t.half() for n, t in model.state_dict().items()}
    tensors |= _results(model, pixels.double(), labels)
    tensors |= {f"mid.{n}": t for n, t in model.prompts(pixels.double()).items()}
    if hasattr(config, "half_prompts"):
        rounded = config.to_dict() | {"half_prompts": True}
        twin = ReferencePromptedCLIP(clip, classnames, method=method, **rounded).eval()
        twin.load_state_dict(model.state_dict())
        tensors |= {f"half.{n}": t for n, t in _results(twin, pixels.double(), labels).items()}
    state = {n: t.half() for n, t in clip.state_dict().items()}
    ids = torch.unique(torch.cat([ids.flatten(), _word_ids(model)]))
    state |= {"token_embedding.ids": ids, "token_embedding.rows": state.pop("token_embedding.weight")[ids]}
    clip_config = {
        "embed_dim": geometry["embed_dim"],
        "image_resolution": size,
        "vision_layers": geometry["vision_layers"],
        "vision_width": geometry["vision_width"],
        "vision_patch_size": geometry["patch_size"],
        "context_length": clip.context_length,
        "vocab_size": clip.vocab_size,
        "transformer_width": geometry["text_width"],
        "transformer_heads": geometry["text_width"] // 64,
        "transformer_layers": geometry["text_layers"],
    }
    options = config.to_dict()
    templates = options.pop("templates", None)
    sidecar = {
        "method": method,
        "clip_file": f"clip_{name}.safetensors",
        "clip_config": clip_config,
        "classnames": classnames,
        "options": options,
        "templates": templates,
        "produced_by": "upt_fast.testing.write_vectors, the reference in float64",
    }
    directory.mkdir(parents=True, exist_ok=True)
    for stem, values in ((name, tensors), (f"clip_{name}", state)):
        save_file({n: t.detach().contiguous() for n, t in values.items()}, directory / f"{stem}.safetensors")
    for stem, value in (
        (name, sidecar),
        (f"clip_{name}", {"config": clip_config, "vision_heads": geometry["vision_width"] // 64}),
    ):
        (directory / f"{stem}.json").write_text(
            json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _results(model: ReferencePromptedCLIP, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss, logits = model.loss_and_logits(images, labels)
    names, parameters = list(model.state_dict()), list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else ()
    return {
        "out.logits": logits,
        "out.loss": loss,
        "out.image_features": model.encode_image(images),
        "out.text_features": model.encode_text(images=images),
        **{f"grad.{n.removeprefix('prompt_learner.')}": g for n, g in zip(names, gradients, strict=True)},
    }


def _word_ids(model: ReferencePromptedCLIP) -> Tensor:
    """Ids of the words that a model's prompts start from."""
    if model.prefix is None:
        return torch.zeros(0, dtype=torch.int64)
    return tokenize_words(model.prefix, model.n_text, model.text_context, model.tokenizer)
