"""Contrastive pretraining of the tiny CLIP, from scratch, on half of the digits in the ``paper`` domain.

    python -m upt_fast.demo.pretrain --out tiny_clip.safetensors --seed 0

The split is ``digits.split_indices(seed=0)["pretrain"]``: 896 digits; the other 901 stay unseen for the demo. Each step
draws new poses, inks and papers, and a fresh set of captions. A digit occurs many times in a batch, so InfoNCE takes
every caption that is true of an image as a positive, not just one: a caption that names no colour is true of any ink.

The same seed gives the same weights on the same machine with the same number of threads (one, unless ``--threads`` says
otherwise): matrix products round differently when they are shared out differently.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.tiny_clip import MEAN, METADATA_KEY, STD, build_tiny_clip, limited_threads, load_tiny_tokenizer
from upt_fast.common.files import atomic_path
from upt_fast.demo.digits import (
    CLASS_NAMES,
    INK_COLOURS,
    SPLIT_SEED,
    load_split,
    raw_digits,
    render,
    split_indices,
    to_model_input,
)

TEMPLATES = (
    "a photo of the digit {}.",
    "a photo of the number {}.",
    "a photo of a handwritten {}.",
    "a handwritten {}.",
    "the digit {} on paper.",
    "the number {}, written by hand.",
    "a drawing of the digit {}.",
    "a picture of the number {}.",
    "this is the digit {}.",
    "{}.",
    "{}",
)
COLOUR_TEMPLATES = (
    "a photo of the digit {} in {colour} ink.",
    "a handwritten {} in {colour} ink.",
    "the number {}, written with a {colour} pen.",
    "a {colour} {}.",
)
EXTRA_WORDS = (
    "image",
    "an",
    "image",
    "in",
    "ink",
    "white",
    "dark",
    "light",
    "chalk",
    "board",
    "style",
    "bad",
    "good",
    "x",
)


@dataclass(frozen=True)
class PretrainConfig:
    """Recipe of the shipped weights."""

    seed: int = 0
    steps: int = 1200
    batch_size: int = 128
    captions: int = 40  # per step
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.captions < len(CLASS_NAMES):
            raise ValueError(f"captions: got {self.captions}, wanted at least one per digit ({len(CLASS_NAMES)})")


@dataclass(frozen=True)
class Captions:
    """Captions of one step."""

    texts: list[str]
    digit: np.ndarray  # (T,)
    ink: np.ndarray  # (T,) colour index, or -1 where the caption names none


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: the most frequent pair first, ties in alphabetical order.

    Args:
        words: lower-case words, one token each in the end.
    Returns:
        Pairs of symbols; the last symbol of a word ends in ``</w>``, as in CLIP's vocabulary.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in pieces.values() for pair in pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in pieces.items():
            merged: list[str] = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            pieces[word] = merged


def caption_words() -> list[str]:
    """Every word of the captions, without digits and punctuation (those are single bytes, hence tokens already)."""
    text = " ".join([*TEMPLATES, *COLOUR_TEMPLATES, *CLASS_NAMES, *INK_COLOURS, *EXTRA_WORDS])
    for mark in "{},.":
        text = text.replace(mark, " ")
    return [word for word in dict.fromkeys(text.replace(" colour ", " ").lower().split()) if len(word) > 1]


def write_vocabulary(path: str | os.PathLike[str]) -> None:
    """Write the merges in the form that ``open_clip.tokenizer.SimpleTokenizer(bpe_path=...)`` reads."""
    lines = ["#version: tiny"] + [" ".join(pair) for pair in learn_merges(caption_words())]
    data = gzip.compress("\n".join(lines).encode("utf-8"), mtime=0)  # no final newline: it would read as an empty merge
    _replace(Path(path), data)


def caption_token_ids() -> Tensor:
    """(N,) ids of the tokens that captions are made of: start, end, words, digits and punctuation, ascending."""
    tokenizer = load_tiny_tokenizer()
    text = f"{' '.join(caption_words())} a x 0 1 2 3 4 5 6 7 8 9 , ."
    return torch.tensor(sorted({*tokenizer.encode(text), *tokenizer.all_special_ids}))


def draw_captions(count: int, rng: np.random.Generator) -> Captions:
    """Draw captions, the ten digits in turn; four in ten name an ink."""
    digit = np.arange(count) % len(CLASS_NAMES)
    colours = list(INK_COLOURS)
    texts, ink = [], np.full(count, -1)
    for i in range(count):
        name = CLASS_NAMES[digit[i]] if rng.random() < 0.7 else str(digit[i])
        if rng.random() < 0.4:
            ink[i] = rng.integers(len(colours))
            texts.append(COLOUR_TEMPLATES[rng.integers(len(COLOUR_TEMPLATES))].format(name, colour=colours[ink[i]]))
        else:
            texts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(name))
    return Captions(texts, digit, ink)


def encode_short_text(model: Any, tokens: Tensor) -> Tensor:
    """``model.encode_text`` without the padding: the causal tower never looks past the end-of-text token.

    Args:
        model: open_clip CLIP.
        tokens: (T, 77) token ids.
    Returns:
        (T, e) features, not normalised.
    """
    ends = tokens.argmax(dim=-1)  # (T,)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]  # (T, length, d)
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    return model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE in both directions, the target spread evenly over all positives.

    Args:
        logits: (B, T) scaled cosine similarities.
        positive: (B, T) bool, which captions are true of which image.
    Returns:
        Scalar mean of the two cross-entropies; captions (images) without any positive are left out.
    """
    total = logits.new_zeros(())
    for scores, target in ((logits, positive), (logits.T, positive.T)):
        keep = target.any(dim=1)
        weights = target[keep].float()
        total = total + F.cross_entropy(scores[keep], weights / weights.sum(dim=1, keepdim=True))
    return total / 2


def pretrain(config: PretrainConfig, progress: bool = False) -> nn.Module:
    """Train a tiny CLIP from random weights; the same config gives the same weights on the same machine.

    Args:
        config: recipe.
        progress: show a progress bar.
    Returns:
        open_clip CLIP in eval mode, float32.
    """
    from tqdm import trange

    rng = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_tiny_clip().train()
    tokenizer = load_tiny_tokenizer()
    strokes, labels = raw_digits()
    pool = split_indices(SPLIT_SEED)["pretrain"]

    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        return 0.5 * (1 + np.cos(np.pi * (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    bar = trange(config.steps, desc="pretrain", disable=not progress)
    for _ in bar:
        chosen = rng.choice(pool, size=config.batch_size)
        drawn = render(strokes[torch.from_numpy(chosen)], "paper", rng)
        captions = draw_captions(config.captions, rng)
        same_digit = labels[chosen][:, None] == captions.digit[None, :]
        same_ink = (captions.ink[None, :] < 0) | (drawn.ink[:, None] == captions.ink[None, :])
        positive = torch.from_numpy(same_digit & same_ink)  # (B, T)

        image = F.normalize(model.encode_image(to_model_input(drawn.images, MEAN, STD)), dim=-1)  # (B, e)
        text = F.normalize(encode_short_text(model, tokenizer(captions.texts)), dim=-1)  # (T, e)
        loss = contrastive_loss(model.logit_scale.exp() * image @ text.T, positive)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save_weights(model: nn.Module, path: str | os.PathLike[str], config: PretrainConfig) -> None:
    """Store the weights as float16 safetensors, with the seed and the split in the metadata."""
    from safetensors.torch import save

    record = {
        **asdict(config),
        "split_seed": SPLIT_SEED,
        "domain": "paper",
        "data": "scikit-learn load_digits",
        "pretrain_indices": split_indices(SPLIT_SEED)["pretrain"].tolist(),
    }
    state = {key: value.detach().to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    # most of the vocabulary is bytes that no caption uses: their rows carry nothing learned and are drawn when loading
    ids = caption_token_ids()
    state["token_embedding.ids"] = ids
    state["token_embedding.rows"] = state.pop("token_embedding.weight")[ids].contiguous()
    # one key: safetensors writes several in no fixed order, and equal weights should give equal files
    _replace(Path(path), save(state, metadata={METADATA_KEY: json.dumps(record)}))


def in_domain_accuracy(model: nn.Module) -> float:
    """Zero-shot accuracy on the unseen digits (train and test) in the ``paper`` domain, in percent."""
    from upt_fast.demo.run import zero_shot_logits

    correct = total = 0
    for split in ("train", "test"):
        images, labels = load_split(split, "paper")
        logits = zero_shot_logits(model, load_tiny_tokenizer(), to_model_input(images, MEAN, STD), CLASS_NAMES)
        correct += int((logits.argmax(dim=1) == labels).sum())
        total += len(labels)
    return 100 * correct / total


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_bytes(data)


def main(argv: list[str] | None = None) -> None:
    """Command line of the pretraining."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's tiny CLIP on handwritten digits.")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--threads", type=int, default=1, help="of torch; more are faster, and round differently")
    parser.add_argument("--vocabulary", help="also write the BPE merges to this .txt.gz file, before training")
    args = parser.parse_args(argv)
    if args.vocabulary:
        write_vocabulary(args.vocabulary)
    config = PretrainConfig(seed=args.seed, steps=args.steps)
    with limited_threads(args.threads):
        model = pretrain(config, progress=True)
    save_weights(model, args.out, config)
    print(f"{args.out}: accuracy {in_domain_accuracy(model):.1f} % on the unseen digits, paper domain")


if __name__ == "__main__":
    main()
