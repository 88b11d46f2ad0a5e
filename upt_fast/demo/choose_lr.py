"""How the demo's learning rates were chosen: on pretraining digits drawn as notes, never on the demo's own digits.

    python -m upt_fast.demo.choose_lr            # all methods
    python -m upt_fast.demo.choose_lr coop upt

Of each digit's pretraining images 20 are a pool to draw shots from, and the others measure. A method takes the learning
rate of the grid with the best accuracy, meaned over the demo's numbers of shots and over two seeds that the demo does
not use; everything else is the demo's recipe. The pretraining has seen these digits, but none of them on notes; the
demo's train and test digits are not looked at. What came out stands beside each method's choice (upt_fast/methods).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from upt_fast.demo.methods import ALL_METHODS
from upt_fast.demo.training import DemoConfig, Training, run_trainings

GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = (11, 12)


def choose_lr(
    config: DemoConfig, grid: Sequence[float] = GRID, workers: int | None = None, progress: bool = True
) -> dict[str, dict[float, float]]:
    """Accuracies on pretraining digits that training never saw.

    Args:
        config: methods, shots, seeds and recipe.
        grid: learning rates.
        workers: processes, as for :func:`run_trainings`.
        progress: show a progress bar.
    Returns:
        for each method and learning rate the mean accuracy in percent over shots and seeds; the chosen one is the best.
    Raises:
        ValueError: a loss is not finite: leave such learning rates out of the grid.
    """
    runs = [(k, seed) for k in config.shots for seed in config.seeds]
    trainings = [
        Training(method, k, seed, lr, config, purpose="choice")
        for method in config.methods
        for lr in grid
        for k, seed in runs
    ]
    outcomes = iter(run_trainings(trainings, workers, progress))
    return {
        method: {lr: statistics.fmean(next(outcomes).accuracy for _ in runs) for lr in grid}
        for method in config.methods
    }


def main(argv: list[str] | None = None) -> None:
    """Command line of the choice: a Markdown table, the chosen learning rate of each method in bold."""
    parser = argparse.ArgumentParser(description="Choose the demo's learning rates on pretraining digits.")
    parser.add_argument("methods", nargs="*", help=f"some of {', '.join(ALL_METHODS)}; none: all")
    parser.add_argument("--lrs", nargs="+", type=float, default=GRID)
    parser.add_argument("--shots", nargs="+", type=int, default=DemoConfig.shots)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=DemoConfig.epochs)
    parser.add_argument("--max-images", type=int, help="measure on so many images only")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    config = DemoConfig(
        tuple(args.methods) or ALL_METHODS,
        tuple(args.shots),
        tuple(args.seeds),
        args.epochs,
        max_test_images=args.max_images,
    )
    print(f"| method | {' | '.join(f'{lr:g}' for lr in args.lrs)} |\n| --- |{' ---: |' * len(args.lrs)}")
    for method, accuracies in choose_lr(config, args.lrs, args.workers).items():
        best = max(accuracies, key=lambda lr: accuracies[lr])
        cells = [f"**{value:.1f}**" if lr == best else f"{value:.1f}" for lr, value in accuracies.items()]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
