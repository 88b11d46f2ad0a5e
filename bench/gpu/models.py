"""Models to measure: CLIPs with random weights, with or without open_clip, and the ways to run UPT on them."""

from __future__ import annotations

import copy
import functools
import re
import zlib
from collections import OrderedDict
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from gpu.machine import Machine
from gpu.record import Skipped
from torch import Tensor, nn

from upt_fast import FastUPT, ReferenceUPT
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import AskedOfTowers
from upt_fast.testing import TruncatedUPT, random_clip

_B16 = dict(embed_dim=512, image_size=224, patch_size=16, vision_layers=12, vision_width=768)
_L14 = dict(embed_dim=768, image_size=224, patch_size=14, vision_layers=24, vision_width=1024)
_TINY = dict(embed_dim=32, image_size=32, patch_size=16, vision_layers=2, vision_width=64, vision_head_width=32)
GEOMETRIES: dict[str, dict[str, int]] = {
    "ViT-B/16": _B16 | dict(text_layers=12, text_width=512, text_heads=8),
    "ViT-L/14": _L14 | dict(text_layers=12, text_width=768, text_heads=12),
    "tiny": _TINY | dict(text_layers=2, text_width=64, text_heads=2),
}
# tokens of upt_fast.data.benchmark.bench_classnames -> how many names have as many
NAME_LENGTHS: dict[int, dict[int, int]] = {
    100: {1: 61, 2: 31, 3: 8},
    397: {1: 61, 2: 178, 3: 97, 4: 31, 5: 14, 6: 9, 7: 6, 12: 1},
    1000: {1: 246, 2: 508, 3: 154, 4: 50, 5: 22, 6: 10, 7: 8, 9: 1, 12: 1},
}
FAST = ("fast torch", "fast triton", "fast xformers", "fast triton,xformers")
PROVIDERS = ("truncated", *FAST, "compiled", "reference")


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        linears = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=linears[0], gelu=QuickGELU(), c_proj=linears[1]))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        h = self.ln_1(x)
        attn_mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def get_cast_dtype(self) -> torch.dtype:
        return self.resblocks[0].mlp.c_fc.weight.dtype


class Visual(nn.Module):
    def __init__(self, embed_dim: int, image_size: int, patch_size: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.image_size = (image_size, image_size)
        positions = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_post(x)
        return x[:, 0], x[:, 1:]


class PlainCLIP(nn.Module):
    """CLIP with random weights as OpenAI built it, for machines without open_clip, whose names of parts it has.

    Args:
        geometry: as upt_fast.testing.random_clip takes it.
    """

    def __init__(self, **geometry: int) -> None:
        super().__init__()
        g = {"vision_head_width": 64, "context_length": 77, "vocab_size": 49408} | geometry
        text_width, length = g["text_width"], g["context_length"]
        heads = g["vision_width"] // g["vision_head_width"]
        sizes = (g["image_size"], g["patch_size"], g["vision_layers"], g["vision_width"])
        self.visual = Visual(g["embed_dim"], *sizes, heads)
        self.transformer = Transformer(text_width, g["text_layers"], g["text_heads"])
        self.token_embedding = nn.Embedding(g["vocab_size"], text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, g["embed_dim"]))
        self.register_buffer("attn_mask", torch.full((length, length), float("-inf")).triu_(1), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(14.2857).log())
        self.logit_bias = None


def random_plain_clip(seed: int = 0, **geometry: int) -> PlainCLIP:
    """A PlainCLIP whose LayerNorms and biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = PlainCLIP(**geometry)
        with torch.no_grad():
            for name, parameter in clip.named_parameters():
                if name.endswith("bias") and parameter.ndim == 1:
                    parameter.normal_(std=0.1)
                elif ".ln_" in f".{name}":
                    parameter.normal_(mean=1.0, std=0.2)
    return clip.eval()


class WordTokenizer:
    """One token for each word, in CLIP's vocabulary and its layout; called as open_clip's tokenizers are."""

    def __call__(self, texts: list[str], context_length: int = 77) -> Tensor:
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = [1 + zlib.crc32(word.encode()) % 49000 for word in re.findall(r"\w+|\.", text)]
            tokens = torch.tensor([49406, *words, 49407])[:context_length]
            tokens[-1] = 49407
            row[: len(tokens)] = tokens
        return ids


def has_open_clip() -> bool:
    return util.find_spec("open_clip") is not None


def plain_classnames(classes: int) -> list[str]:
    """Names of one to many words, as many with each number as in the names that open_clip's tokenizer sees."""
    known = NAME_LENGTHS[min(size for size in NAME_LENGTHS if size >= classes)]
    lengths = [length for length, count in known.items() for _ in range(count)]
    # every so many of them, where fewer are wanted
    lengths = [lengths[i * len(lengths) // classes] for i in range(classes)]
    return [" ".join([f"class{i}", *["of"] * (length - 1)]) for i, length in enumerate(lengths)]


class Clips:
    """CLIPs by geometry, in float32 on the host, from which each model takes its own copy.

    Args:
        machine: where the copies go.
        open_clip: build them with open_clip; None: where it is installed.
    """

    def __init__(self, machine: Machine, open_clip: bool | None = None) -> None:
        self.machine, self.open_clip = machine, has_open_clip() if open_clip is None else open_clip

    @functools.cache  # noqa: B019 (lives as long as the process)
    def _host(self, geometry: str) -> nn.Module:
        return (random_clip if self.open_clip else random_plain_clip)(**GEOMETRIES[geometry], seed=self.machine.seed)

    def get(self, geometry: str, dtype: torch.dtype) -> nn.Module:
        """A copy on the device."""
        return copy.deepcopy(self._host(geometry)).to(self.machine.device, dtype)

    def names(self, classes: int) -> dict[str, Any]:
        """classnames and tokenizer, as the models take them."""
        if self.open_clip:
            return {"classnames": bench_classnames(classes), "tokenizer": None}
        return {"classnames": plain_classnames(classes), "tokenizer": WordTokenizer()}

    def build(self, provider: str, geometry: str, dtype: torch.dtype, classes: int, **options: Any) -> nn.Module:
        """A model to train, its prompts the same for all providers.

        Args:
            provider: one of PROVIDERS.
            geometry: a key of GEOMETRIES.
            dtype: of the CLIP's weights.
            classes: number of classes.
            options: of FastUPT.
        Raises:
            Skipped: the provider does not run here.
        """
        kind, _, backend = provider.partition(" ")
        if kind == "fast":
            require(backend, self.machine, dtype)
            options["backend"] = backend
        clip, names = self.get(geometry, dtype), self.names(classes)
        torch.manual_seed(self.machine.seed)  # the prompts and their transform are the same for all
        if kind == "fast":
            return FastUPT(clip, **names, **options).train()
        build = PreparedReference if kind == "reference" else PreparedTruncated
        model = build(clip, **names).train().prepare()
        if kind != "compiled":
            return model
        torch._dynamo.reset()
        return compiled(model, self.machine)

    def images(self, geometry: str, batch: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
        size = GEOMETRIES[geometry]["image_size"]
        generator = torch.Generator(self.machine.device).manual_seed(1000 * self.machine.seed + seed)
        images = torch.randn(batch, 3, size, size, generator=generator, device=self.machine.device)
        return images.to(dtype)


def compiled(function: Any, machine: Machine) -> Any:
    """torch.compile; in a dry run without its slow back end."""
    return torch.compile(function, dynamic=False, backend="eager" if machine.dry else "inductor")


def require(backend: str, machine: Machine, dtype: torch.dtype) -> None:
    """Raise Skipped with dispatch's reasons unless each of the backends that a text names runs here."""
    for name in dict.fromkeys(name for asked in AskedOfTowers.of(backend) for name in asked.everyone):
        reasons = dispatch.refusals(name, machine.device, dtype)
        if machine.dry and name == "triton" and dtype == torch.bfloat16:
            reasons.append("bfloat16 (Triton's interpreter cuts it off instead of rounding)")
        if reasons:
            raise Skipped(f"{name}: {'; '.join(reasons)}")


class _Prepared:
    """Token embeddings and rows of the prompts computed once, as published code does: steps do not wait for them."""

    def prepare(self) -> Any:
        with torch.no_grad():
            embedded, rows = super().embed_classes(), super().prompt_rows()  # type: ignore[misc]
        self._embedded, self._rows = embedded, rows.to(embedded.device)
        return self

    def embed_classes(self) -> Tensor:
        return self._embedded

    def prompt_rows(self) -> Tensor:
        return self._rows


class PreparedReference(_Prepared, ReferenceUPT):
    pass


class PreparedTruncated(_Prepared, TruncatedUPT):
    pass


def step(model: nn.Module, images: Tensor, labels: Tensor, loss_scale: float = 1.0) -> Tensor:
    """Forward, loss and backward of a training step; the logits."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    (loss_scale * F.cross_entropy(logits.float(), labels)).backward()
    return logits.detach()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])
