"""What the demo shows of its results: a table, what it says of UPT, a plot, and sample images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from upt_fast.common.files import atomic_path
from upt_fast.demo.digits import CLASS_NAMES
from upt_fast.demo.methods import UNIMODAL_METHODS
from upt_fast.demo.training import pick_rows
from upt_fast.methods import MAIN_METHOD

SAMPLES = 24
MARKERS = "osD^vP*X"


def format_table(results: dict[str, Any]) -> str:
    """Results as a Markdown table: a row per method, a column per number of shots, and what the cells are."""
    zero_shot, shots = results["zero_shot"]["accuracy"], results["config"]["shots"]
    summary = {(entry["method"], entry["shots"]): entry for entry in results["summary"]}
    rows = [
        ["method", "trained parameters", *(f"{k} per digit" for k in shots)],
        ["zero-shot CLIP", "0", *(f"{zero_shot:.1f}" for _ in shots)],
    ]
    for name, method in results["methods"].items():
        cells = []
        for k in shots:
            entry = summary[name, k]
            cells.append(f"{_mean(entry)} ({entry['mean'] - zero_shot:+.1f})")
        rows.append([method["title"], f"{method['parameters']:,}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    seeds = len(results["config"]["seeds"])
    cells_are = f"mean ± standard deviation of {seeds} trainings" if seeds > 1 else "one training each"
    lines += [
        "",
        f"Accuracy on notes in percent, {cells_are}; in brackets the difference from zero-shot.",
        f'Zero-shot caption: "{results["zero_shot"]["template"]}"; '
        f"on paper it reaches {results['zero_shot']['paper_accuracy']:.1f}.",
    ]
    return "\n".join(lines)


def compare_with_unimodal(results: dict[str, Any]) -> dict[str, Any] | None:
    """UPT at the largest number of shots against the better unimodal method's mean minus one standard deviation.

    Args:
        results: with ``summary`` and ``config``.
    Returns:
        ``shots``; ``upt`` and ``upt_std``, UPT's mean and standard deviation; ``method``, ``mean`` and ``std`` of the
        better of CoOp and VPT-deep; ``bar``, mean - std; ``holds``, whether UPT's mean reaches it. None unless all
        three were trained.
    """
    shots = max(results["config"]["shots"])
    largest = {entry["method"]: entry for entry in results["summary"] if entry["shots"] == shots}
    if not {MAIN_METHOD, *UNIMODAL_METHODS} <= set(largest):
        return None
    upt = largest[MAIN_METHOD]
    better = max((largest[name] for name in UNIMODAL_METHODS), key=lambda entry: entry["mean"])
    bar = better["mean"] - better["std"]
    return {
        "shots": shots,
        "upt": upt["mean"],
        "upt_std": upt["std"],
        "method": better["method"],
        "mean": better["mean"],
        "std": better["std"],
        "bar": bar,
        "holds": upt["mean"] >= bar,
    }


def format_comparison(results: dict[str, Any]) -> str:
    """What :func:`compare_with_unimodal` found, whatever it is, in two lines; empty if that is None."""
    found = results["against_unimodal"]
    if found is None:
        return ""
    title = results["methods"][found["method"]]["title"]
    verdict = "not below" if found["holds"] else "below"
    several = len(results["config"]["seeds"]) > 1
    upt, better = (
        f"{found[mean]:.1f} ± {found[std]:.1f}" if several else f"{found[mean]:.1f}"
        for mean, std in (("upt", "upt_std"), ("mean", "std"))
    )
    numbers = (
        f"With {found['shots']} per digit UPT has {upt} and the better unimodal method, {title}, {better}: "
        f"a difference of {found['upt'] - found['mean']:+.1f}."
    )
    if several:
        return f"{numbers}\nUPT's mean is {verdict} {found['bar']:.1f}, {title}'s mean minus one standard deviation."
    return f"{numbers}\nUPT is {verdict} {title}; with one training each there is no standard deviation."


def plot_accuracy(results: dict[str, Any], path: Path) -> None:
    """Accuracy against shots, a line per method; zero-shot is the dashed line."""
    from matplotlib.figure import Figure

    shots = sorted(results["config"]["shots"])
    summary = {(entry["method"], entry["shots"]): entry for entry in results["summary"]}
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    methods = results["methods"]
    for i, (name, method) in enumerate(methods.items()):
        entries = [summary[name, k] for k in shots]
        apart = 1.02 ** (2 * i - len(methods) + 1)  # side by side, so that no error bar hides another
        axes.errorbar(
            [k * apart for k in shots],
            [entry["mean"] for entry in entries],
            yerr=[entry["std"] for entry in entries],
            marker=MARKERS[i % len(MARKERS)],
            capsize=3,
            linewidth=2.2 if name == MAIN_METHOD else 1.3,
            color="black" if name == MAIN_METHOD else f"C{i}",
            label=method["title"],
        )
    axes.axhline(results["zero_shot"]["accuracy"], color="tab:gray", linestyle="--", label="zero-shot CLIP")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.set(xlabel="training images per digit", ylabel="accuracy on notes (%)", title="Tiny CLIP, handwritten digits")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    _save_figure(figure, path)


def plot_samples(
    pixels: Tensor, labels: Tensor, zero_shot: Tensor, guess: Tensor, title: str, shots: int, path: Path
) -> None:
    """Draw test images, picked at random (not by their answers), with zero-shot's and a method's answers.

    Args:
        pixels: (N, 3, 32, 32) uint8.
        labels: (N,)
        zero_shot: (N,) classes.
        guess: (N,) classes, the method's.
        title: the method's.
        shots: that it was trained with, per digit.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    picked = pick_rows(len(labels), SAMPLES)
    columns, initial = 8, title[0].lower()
    figure = Figure(figsize=(columns * 1.25, -(-len(picked) // columns) * 2.05), layout="constrained")
    grid = figure.subplots(-(-len(picked) // columns), columns, squeeze=False)
    figure.suptitle(
        f"true digit; zero-shot (z) and {title} with {shots} per digit ({initial}): green is right, red is wrong",
        fontsize=9,
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, picked.tolist(), strict=False):
        axes.imshow(pixels[i].permute(1, 2, 0).numpy())
        truth = int(labels[i])
        axes.set_title(CLASS_NAMES[truth], fontsize=8)
        for y, mark, answer in ((-0.13, "z", int(zero_shot[i])), (-0.27, initial, int(guess[i]))):
            colour = "tab:green" if answer == truth else "tab:red"
            text = f"{mark}: {CLASS_NAMES[answer]}"
            axes.text(0.5, y, text, color=colour, fontsize=8, ha="center", transform=axes.transAxes)
    _save_figure(figure, path)


def _mean(entry: dict[str, Any]) -> str:
    return f"{entry['mean']:.1f} ± {entry['std']:.1f}" if entry["trainings"] > 1 else f"{entry['mean']:.1f}"


def _save_figure(figure: Any, path: Path) -> None:
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=150)
