"""The demo's trainings: one recipe for every method, one after the other or side by side in worker processes.

A training depends on nothing but its :class:`Training` record: it seeds its own generators, runs on one thread, and
each process builds the CLIP and draws the digits for itself. Hence the number of workers changes no result. Workers
write no files, so that they can be ended at any moment; what a training leaves comes back in its :class:`Outcome`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.clip.tiny_clip import MEAN, STD, TINY_CLIP_NAME, limited_threads
from upt_fast.demo.digits import CLASS_NAMES, TRAIN_PER_CLASS, load_split, sample_shots, to_model_input
from upt_fast.demo.methods import DEFAULT_METHODS, DEMO_METHODS, demo_methods
from upt_fast.model import FastPromptedCLIP
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.schedule import WarmupCosineLR

DOMAIN = "notes"
MAX_WORKERS = 4
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo; the recipe is the same for all methods, but for the learning rate (demo/methods.py)."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    shots: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int = 100  # after the warm-up epoch; the same for all shots, so more images mean more steps
    batch_size: int = 32
    warmup_lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_test_images: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", demo_methods(self.methods))  # in the table's order
        for name in ("shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: got {values}, wanted at least one value and none twice")
        if min(self.shots) < 1:
            raise ValueError(f"shots: got {self.shots}, wanted at least 1 each")
        if max(self.shots) > TRAIN_PER_CLASS:
            raise ValueError(f"shots: got {self.shots}, wanted at most {TRAIN_PER_CLASS} each (the size of the pool)")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.max_test_images is not None and self.max_test_images < 1:
            raise ValueError(f"max_test_images: got {self.max_test_images}, wanted at least 1")


class Digits(NamedTuple):
    """Digits on notes for one purpose, normalised."""

    pool: Tensor  # (N, 3, 32, 32), 20 per class, that the shots are drawn from
    pool_labels: Tensor  # (N,)
    images: Tensor  # (M, 3, 32, 32), that accuracies are measured on
    labels: Tensor  # (M,)


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        method: a key of DEMO_METHODS.
        shots: images per digit.
        seed: of the choice of images, the initial prompts, the order and the augmentation.
        lr: learning rate.
        config: the recipe.
        purpose: which digits, as for :func:`load_digits`.
        keep: whether the outcome has the learned parameters.
    """

    method: str
    shots: int
    seed: int
    lr: float
    config: DemoConfig
    purpose: str = "demo"
    keep: bool = False

    @property
    def steps(self) -> int:
        """Steps of SGD."""
        return (1 + self.config.epochs) * -(-self.shots * len(CLASS_NAMES) // self.config.batch_size)


class Outcome(NamedTuple):
    """What came of a training; plain arrays, which travel between processes."""

    guess: np.ndarray  # (M,) classes
    accuracy: float  # percent
    parameters: int  # that were trained
    seconds: float
    cpu_seconds: float
    state: dict[str, np.ndarray] | None  # the learned parameters


@lru_cache(maxsize=1)
def load_tiny() -> LoadedCLIP:
    """The tiny CLIP, loaded once per process."""
    return load_clip(TINY_CLIP_NAME)


@lru_cache(maxsize=2)
def load_digits(purpose: str, max_images: int | None = None) -> Digits:
    """Digits on notes.

    Args:
        purpose: "demo": the ``train`` pool and the ``test`` digits; "choice": the ``pretrain`` digits alone, 20 per
            class as the pool and the others to measure on. The two have no digit in common.
        max_images: measure on so many images only.
    Raises:
        ValueError: unknown purpose.
    """
    if purpose == "demo":
        (pool, pool_labels), (images, labels) = load_split("train", DOMAIN), load_split("test", DOMAIN)
    elif purpose == "choice":
        drawn, all_labels = load_split("pretrain", DOMAIN)
        in_pool = torch.zeros(len(drawn), dtype=torch.bool)
        in_pool[sample_shots(all_labels, TRAIN_PER_CLASS, seed=0)] = True
        pool, pool_labels, images, labels = drawn[in_pool], all_labels[in_pool], drawn[~in_pool], all_labels[~in_pool]
    else:
        raise ValueError(f"purpose: got {purpose!r}, wanted demo or choice")
    rows = pick_rows(len(labels), max_images)
    return Digits(to_model_input(pool, MEAN, STD), pool_labels, to_model_input(images[rows], MEAN, STD), labels[rows])


def pick_rows(total: int, limit: int | None) -> Tensor:
    """Rows of the images to use: all, or a fixed random part."""
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def accuracy_of(guess: Tensor, labels: Tensor) -> float:
    """Percent of (N,) guesses that are right."""
    return 100 * (guess == labels).float().mean().item()


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


def train_prompts(
    model: FastPromptedCLIP, images: Tensor, labels: Tensor, training: Training, on_step: Callable[[], object]
) -> None:
    """Train a model's prompts by SGD with one warm-up epoch and a cosine, the field's recipe.

    Args:
        model: any method's.
        images: (N, 3, H, W) normalised.
        labels: (N,)
        training: learning rate, seed of the order of the images and of their augmentation, recipe.
        on_step: called after each step.
    Raises:
        ValueError: the loss is not finite.
    """
    config, lr = training.config, training.lr
    generator = torch.Generator().manual_seed(training.seed)
    epochs = 1 + config.epochs  # the warm-up epoch learns next to nothing
    optimizer = torch.optim.SGD(
        model.prompt_learner.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = WarmupCosineLR(optimizer, epochs, lr, config.warmup_lr)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(config.batch_size):
            loss, _ = model.loss_and_logits(augment(images[rows], generator), labels[rows])
            if not torch.isfinite(loss):
                raise ValueError(
                    f"loss of {training.method}: got {loss.item()} in epoch {epoch}, wanted a finite one; lower lr={lr}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step()
        schedule.step()


def build_model(training: Training) -> FastPromptedCLIP:
    """The method on the tiny CLIP, its prompts drawn by the training's seed."""
    clip = load_tiny()  # before the seed: building it draws random numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        options = DEMO_METHODS[training.method].options
        return FastPromptedCLIP.from_loaded(clip, CLASS_NAMES, method=training.method, **options)


def run_training(training: Training, on_step: Callable[[], object] = lambda: None) -> Outcome:
    """Train and measure, in this process and on as many threads as torch has here.

    Raises:
        ValueError: the loss is not finite.
    """
    digits = load_digits(training.purpose, training.config.max_test_images)
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = sample_shots(digits.pool_labels, training.shots, training.seed)  # the first of each digit's
    model = build_model(training)
    train_prompts(model, digits.pool[rows], digits.pool_labels[rows], training, on_step)
    guess = predict(model, digits.images)
    return Outcome(
        guess.numpy(),
        accuracy_of(guess, digits.labels),
        sum(parameter.numel() for parameter in model.prompt_learner.parameters() if parameter.requires_grad),
        round(time.perf_counter() - began, 2),
        round(time.process_time() - cpu_began, 2),
        {name: value.numpy() for name, value in model.state_dict().items()} if training.keep else None,
    )


def default_workers() -> int:
    """As many as this process may use cores, four at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def run_trainings(trainings: Sequence[Training], workers: int | None = None, progress: bool = True) -> list[Outcome]:
    """Run trainings on one thread each; the outcomes do not depend on the number of workers.

    Ctrl-C ends the workers and raises KeyboardInterrupt here; a worker whose parent is gone ends by itself.

    Args:
        trainings: in the order of the outcomes; long ones are begun first.
        workers: processes; 1: this one alone. None: :func:`default_workers`.
        progress: show a progress bar, where stderr is a terminal.
    Raises:
        ValueError: workers is below 1, a loss is not finite, or a worker was ended from outside.
    """
    from tqdm import tqdm

    workers = min(default_workers() if workers is None else workers, max(1, len(trainings)))
    if workers < 1:
        raise ValueError(f"workers: got {workers}, wanted at least 1")
    total = sum(training.steps for training in trainings)
    with (
        tqdm(total=total, desc="training", unit="step", disable=None if progress else True, leave=False) as bar,
        InterruptBetweenSteps() as interrupt,
    ):

        def on_step(count: int = 1) -> None:
            interrupt.check()
            bar.update(count)

        if workers > 1:
            return _side_by_side(trainings, workers, on_step)
        with limited_threads(1):
            return [run_training(training, on_step) for training in trainings]


def _side_by_side(trainings: Sequence[Training], workers: int, on_step: Callable[[int], None]) -> list[Outcome]:
    context = get_context("spawn")
    steps = context.RawArray("q", len(trainings))  # each slot has one writer: no lock that a killed worker could keep
    outcomes: dict[int, Outcome] = {}
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (steps,))
    try:
        with _sigint_blocked():  # the workers inherit this: a terminal sends Ctrl-C to them, too
            longest_first = sorted(range(len(trainings)), key=lambda i: -trainings[i].steps)
            places = {pool.submit(_work, i, trainings[i]): i for i in longest_first}
        waiting, shown = set(places), 0
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            outcomes |= {places[future]: future.result() for future in done}
            now = sum(steps)
            on_step(now - shown)
            shown = now
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was ended from outside, or could not start; wanted enough memory, and in a script that "
            'calls the demo `if __name__ == "__main__":` around the call; workers=1 needs neither'
        ) from error
    except BaseException:
        for process in set(active_children()) - others:
            process.kill()  # nobody waits for their trainings any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [outcomes[i] for i in range(len(trainings))]


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A Ctrl-C waits until the end; processes that are started meanwhile never see one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_steps: Any = None  # in a worker: steps done of each training


def _start_worker(steps: Any) -> None:
    global _steps
    _steps = steps
    torch.set_num_threads(1)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(place: int, training: Training) -> Outcome:
    def on_step() -> None:
        _steps[place] += 1

    return run_training(training, on_step)
