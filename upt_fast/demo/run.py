"""``upt-fast demo``: adapt the tiny CLIP from clean paper to tilted, squared notes, with a few images per digit.

The frozen CLIP has never seen such notes. UPT learns its prompts from 1, 4 and 16 images per digit of the ``train``
pool; all accuracies are on the same 701 ``test`` digits, which neither the pretraining nor any prompt has seen. With
one image per digit the learner, 120 thousand parameters, falls behind zero-shot; the table says so.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.demo.digits import CLASS_NAMES, load_split, sample_shots, to_model_input
from upt_fast.demo.tiny_clip import TINY_CLIP_NAME, limited_threads
from upt_fast.files import atomic_path, write_text
from upt_fast.train.schedule import WarmupCosineLR

TEMPLATE = "a photo of the digit {}."  # one caption, fixed in advance, as the field scores zero-shot CLIP
DOMAIN = "notes"
SAMPLES = 24


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo.

    lr was chosen once, on pretraining digits drawn as notes (never on the train pool or the test digits). The field's
    0.002 is for ViT-B/16: this CLIP is 100 times smaller, and its few steps have to be larger.
    """

    shots: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int = 100  # after the warm-up epoch; the same for all shots, so more images mean more steps
    batch_size: int = 32
    lr: float = 0.03
    warmup_lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    n_text: int = 4
    n_visual: int = 4
    max_test_images: int | None = None

    def __post_init__(self) -> None:
        for name in ("shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: got {values}, wanted at least one value and none twice")
        if min(self.shots) < 1:
            raise ValueError(f"shots: got {self.shots}, wanted at least 1 each")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.max_test_images is not None and self.max_test_images < 1:
            raise ValueError(f"max_test_images: got {self.max_test_images}, wanted at least 1")


@torch.no_grad()
def zero_shot_logits(
    clip_model: Any,
    tokenizer: Any,
    images: Tensor,
    classnames: Sequence[str],
    template: str = TEMPLATE,
    batch_size: int = 256,
) -> Tensor:
    """Zero-shot classification with an open_clip model.

    Args:
        clip_model: open_clip CLIP.
        tokenizer: its tokenizer.
        images: (N, 3, H, W) normalised.
        classnames: C names.
        template: caption with ``{}`` for the name.
        batch_size: images at a time.
    Returns:
        (N, C) logits.
    """
    text = F.normalize(clip_model.encode_text(tokenizer([template.format(name) for name in classnames])), dim=-1)
    features = torch.cat([F.normalize(clip_model.encode_image(part), dim=-1) for part in images.split(batch_size)])
    return clip_model.logit_scale.exp() * features @ text.T


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Classes (N,) that a prompted model sees in images (N, 3, H, W)."""
    model.eval()
    return torch.cat([model(part).argmax(dim=1) for part in images.split(batch_size)])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random zoom, shift and colour cast: the field's random crops, without the flips that digits do not survive.

    Args:
        images: (B, 3, H, W) normalised.
        generator: source of the choices.
    Returns:
        (B, 3, H, W)
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = uniform(0.8, 1.1)
    matrix[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return moved * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)


def train_prompts(model: Any, images: Tensor, labels: Tensor, config: DemoConfig, seed: int, progress: str) -> None:
    """Train a model's prompts by SGD with one warm-up epoch and a cosine, the field's recipe.

    Args:
        model: FastUPT or ReferenceUPT.
        images: (N, 3, H, W) normalised.
        labels: (N,)
        config: recipe.
        seed: of the order of the images and of their augmentation.
        progress: label of the progress bar; empty for none.
    Raises:
        ValueError: the loss is not finite.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(images) // config.batch_size)
    epochs = 1 + config.epochs  # the warm-up epoch learns next to nothing
    optimizer = torch.optim.SGD(
        model.prompt_learner.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = WarmupCosineLR(optimizer, epochs, config.lr, config.warmup_lr)
    model.train()
    with tqdm(total=epochs * steps_per_epoch, desc=progress, disable=not progress, leave=False) as bar:
        for epoch in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(config.batch_size):
                loss = F.cross_entropy(model(augment(images[rows], generator)), labels[rows])
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"loss: got {loss.item()} in epoch {epoch}, wanted a finite one; lower lr={config.lr}"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            schedule.step()


def run_demo(
    out_dir: str | os.PathLike[str] | None = None,
    shots: Sequence[int] = DemoConfig.shots,
    seeds: Sequence[int] = DemoConfig.seeds,
    epochs: int = DemoConfig.epochs,
    batch_size: int = DemoConfig.batch_size,
    lr: float = DemoConfig.lr,
    max_test_images: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Zero-shot CLIP against UPT on handwritten digits on notes; prints a table and fills a run folder.

    The folder gets ``results.json``, ``table.md``, ``accuracy.png``, ``samples.png`` and the prompts of one training.

    Args:
        out_dir: the run folder; None for ``runs/demo-<time>``.
        shots: training images per digit, at most 20.
        seeds: trainings per number of shots.
        epochs: passes over the shots, after the warm-up epoch.
        batch_size: images per step.
        lr: learning rate.
        max_test_images: test on so many images only.
        progress: show progress bars.
    Returns:
        What ``results.json`` holds: ``zero_shot``, ``upt`` (one entry per training), ``summary``, ``config`` and more;
        accuracies in percent.
    Raises:
        ValueError: bad option, or the run folder's path is a file.
    """
    config = DemoConfig(tuple(shots), tuple(seeds), epochs, batch_size, lr=lr, max_test_images=max_test_images)
    run_dir = Path(f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}" if out_dir is None else out_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"out_dir: got {run_dir}, which is a file, wanted a folder")
    with limited_threads(1):
        return _run(config, run_dir, progress)


def _run(config: DemoConfig, run_dir: Path, progress: bool) -> dict[str, Any]:
    from upt_fast.clip.loading import load_clip
    from upt_fast.model import FastUPT

    started = time.perf_counter()

    clip = load_clip(TINY_CLIP_NAME)
    mean, std = clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]
    pool, pool_labels = load_split("train", DOMAIN)
    pixels, labels = load_split("test", DOMAIN)
    upright, _ = load_split("test", "paper")
    picked = _pick(len(labels), config.max_test_images)
    pixels, labels, upright = pixels[picked], labels[picked], upright[picked]
    pool_images, images = to_model_input(pool, mean, std), to_model_input(pixels, mean, std)
    sample_shots(pool_labels, max(config.shots), config.seeds[0])  # too many shots fail here, not in mid-run

    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"A tiny CLIP that knows digits on clean paper meets tilted, squared notes: {len(labels)} test images.")
    zero_shot_guess = zero_shot_logits(clip.model, clip.tokenizer, images, CLASS_NAMES).argmax(dim=1)
    on_paper = zero_shot_logits(clip.model, clip.tokenizer, to_model_input(upright, mean, std), CLASS_NAMES)

    trainings: list[dict[str, Any]] = []
    upt_guess, shown = zero_shot_guess, (max(config.shots), config.seeds[0])
    for k in config.shots:
        for seed in config.seeds:
            began = time.perf_counter()
            rows = sample_shots(pool_labels, k, seed)  # the first k of each digit's
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = FastUPT.from_loaded(clip, CLASS_NAMES, n_text=config.n_text, n_visual=config.n_visual)
            label = f"UPT {k:2d} shots, seed {seed}" if progress else ""
            train_prompts(model, pool_images[rows], pool_labels[rows], config, seed, label)
            guess = predict(model, images)
            seconds = time.perf_counter() - began
            trainings.append(
                {"shots": k, "seed": seed, "accuracy": _accuracy(guess, labels), "seconds": round(seconds, 2)}
            )
            if (k, seed) == shown:
                upt_guess = guess
                model.save_pretrained(run_dir / f"upt-{k}shot-seed{seed}")

    summary = []
    for k in config.shots:
        values = [training["accuracy"] for training in trainings if training["shots"] == k]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append({"shots": k, "mean": statistics.fmean(values), "std": spread, "trainings": len(values)})
    results: dict[str, Any] = {
        "data": {"source": "scikit-learn load_digits", "domain": DOMAIN, "test_images": len(labels)},
        "zero_shot": {
            "accuracy": _accuracy(zero_shot_guess, labels),
            "template": TEMPLATE,
            "paper_accuracy": _accuracy(on_paper.argmax(dim=1), labels),
        },
        "upt": trainings,
        "summary": summary,
        "config": asdict(config),
        "clip": TINY_CLIP_NAME,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = format_table(results)
    write_text(run_dir / "table.md", table + "\n")
    _plot_accuracy(results, run_dir / "accuracy.png")
    _plot_samples(pixels, labels, zero_shot_guess, upt_guess, shown[0], run_dir / "samples.png")
    write_text(run_dir / "results.json", json.dumps(results, indent=2) + "\n")  # last: its presence means a whole run
    print(f"\n{table}\n\nRun folder: {run_dir}")
    return results


def format_table(results: dict[str, Any]) -> str:
    """Results as a Markdown table, accuracy in percent, mean and sample standard deviation over the seeds."""
    zero_shot = results["zero_shot"]
    rows = [
        ("method", "shots per digit", "accuracy on notes", "against zero-shot"),
        ("---", "---:", "---:", "---:"),
        ("zero-shot CLIP", "0", f"{zero_shot['accuracy']:.1f}", ""),
    ]
    for entry in results["summary"]:
        spread = f" ± {entry['std']:.1f}" if entry["trainings"] > 1 else ""
        gain = f"{entry['mean'] - zero_shot['accuracy']:+.1f}"
        rows.append(("UPT", str(entry["shots"]), f"{entry['mean']:.1f}{spread}", gain))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for number, row in enumerate(rows):
        if number == 1:
            cells = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
        else:
            cells = [row[0].ljust(widths[0])] + [
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f'Zero-shot caption: "{zero_shot["template"]}"; on paper it reaches {zero_shot["paper_accuracy"]:.1f}.'
    )
    return "\n".join(lines)


def _pick(total: int, limit: int | None) -> Tensor:
    """Rows of the test images to use: all, or a fixed random part."""
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def _accuracy(guess: Tensor, labels: Tensor) -> float:
    return 100 * (guess == labels).float().mean().item()


def _plot_accuracy(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    summary = sorted(results["summary"], key=lambda entry: entry["shots"])
    shots = [entry["shots"] for entry in summary]
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        shots, [e["mean"] for e in summary], yerr=[e["std"] for e in summary], marker="o", capsize=4, label="UPT"
    )
    zero_shot = results["zero_shot"]["accuracy"]
    axes.axhline(zero_shot, color="tab:gray", linestyle="--", label="zero-shot CLIP")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.set(xlabel="training images per digit", ylabel="accuracy on notes (%)", title="Tiny CLIP, handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    _save_figure(figure, path)


def _plot_samples(pixels: Tensor, labels: Tensor, zero_shot: Tensor, upt: Tensor, shots: int, path: Path) -> None:
    """Draw test images, (N, 3, 32, 32) uint8, picked at random (not by their answers), with both models' answers."""
    from matplotlib.figure import Figure

    picked = _pick(len(labels), SAMPLES)
    columns = 8
    figure = Figure(figsize=(columns * 1.25, -(-len(picked) // columns) * 2.05), layout="constrained")
    grid = figure.subplots(-(-len(picked) // columns), columns, squeeze=False)
    figure.suptitle(
        f"true digit; zero-shot (z) and UPT with {shots} shots (u): green is right, red is wrong", fontsize=9
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, picked.tolist(), strict=False):
        axes.imshow(pixels[i].permute(1, 2, 0).numpy())
        truth = int(labels[i])
        axes.set_title(CLASS_NAMES[truth], fontsize=8)
        for y, mark, guess in ((-0.13, "z", int(zero_shot[i])), (-0.27, "u", int(upt[i]))):
            colour = "tab:green" if guess == truth else "tab:red"
            axes.text(
                0.5, y, f"{mark}: {CLASS_NAMES[guess]}", color=colour, fontsize=8, ha="center", transform=axes.transAxes
            )
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=150)
