"""OUT/report.md: one page; the targets and whether they are met, what failed, and what to try next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gpu.record import PartFile
from gpu.report import Row, environment_line, table

MOST = 8  # lines of a list
STEP = {"model": "ViT-B/16", "precision": "bf16", "batch": 32}  # of the targets


class Target(NamedTuple):
    """A figure that is to be reached.

    Attributes:
        what: is measured.
        wanted: of it.
        figure: finds it; None where it was not measured.
        at_most: whether it is to be no more than wanted, instead of no less.
        unit: behind the number.
    """

    what: str
    wanted: float
    figure: Callable[[Results], float | None]
    at_most: bool = False
    unit: str = "x"


class Results:
    """What was measured in one environment.

    Args:
        files: of all parts.
        environment: its id.
    """

    def __init__(self, files: Sequence[PartFile], environment: str) -> None:
        self.left = {file.part: len(file.left) for file in files if file.left}
        self.rows = {
            file.part: [{"key": k, **row} for k, row in file.rows.items() if row["environment"] == environment]
            for file in files
        }

    def of(self, part: str, **wanted: object) -> list[Row]:
        """Measurements that went well, with these fields."""
        rows = self.rows.get(part, [])
        return [r for r in rows if r["status"] == "ok" and all(r.get(name) == value for name, value in wanted.items())]

    def least(self, name: str, provider: str, classes: int) -> float | None:
        """The least of a field of target steps over the providers that begin so."""
        rows = self.of("steps", **STEP, classes=classes)
        found = [row[name] for row in rows if row["provider"].startswith(provider) and row.get(name)]
        return min(found, default=None)

    def ratio(self, name: str, provider: str, classes: int) -> float | None:
        """A provider's figure over the least of the engine's; of a step's time a graph's, where that is less."""
        base, fast = self.least(name, provider, classes), self.least(name, "fast", classes)
        if name == "p50_ms":
            fast = min(filter(None, (fast, self.least("graph_ms", "fast", classes))), default=None)
        return base / fast if base and fast else None

    def share_of_peak(self) -> float | None:
        """The most of the GEMM peak that a step of the engine reaches, with any batch."""
        rows = self.of("steps", model=STEP["model"], precision=STEP["precision"])
        shares = [100 * row["of_gemm_peak"] for row in rows if row["provider"].startswith("fast") and "tflop" in row]
        return max(shares, default=None)


def _ratio(name: str, provider: str, classes: int) -> Callable[[Results], float | None]:
    return lambda results: results.ratio(name, provider, classes)


# the GPU's column of the table of targets
TARGETS = (
    Target("step, C=100, against reference", 4.0, _ratio("p50_ms", "reference", 100)),
    Target("step, C=100, against truncated", 2.0, _ratio("p50_ms", "truncated", 100)),
    Target("step, C=100, against truncated with torch.compile", 1.3, _ratio("p50_ms", "compiled", 100)),
    Target("step, C=1000, against reference", 10.0, _ratio("p50_ms", "reference", 1000)),
    Target("step, C=1000, against truncated", 3.0, _ratio("p50_ms", "truncated", 1000)),
    Target("text tower, C=100, against reference", 20.0, _ratio("text_ms", "reference", 100)),
    Target("text tower, C=100, against truncated", 3.0, _ratio("text_ms", "truncated", 100)),
    Target("image tower, against reference", 1.8, _ratio("image_ms", "reference", 100)),
    Target("peak memory of a step, C=1000, against reference", 10.0, _ratio("peak_mib", "reference", 1000)),
    Target("peak memory of a step, C=1000, against truncated", 3.0, _ratio("peak_mib", "truncated", 1000)),
    Target("peak memory of a step, C=1000", 4096.0, lambda r: r.least("peak_mib", "fast", 1000), True, " MiB"),
    Target("share of the best plain product, any batch", 60.0, Results.share_of_peak, unit=" %"),
)


def markdown(files: Sequence[PartFile], environment: str) -> str:
    """The page, of the measurements of the environment with this id."""
    described = next((f.environments[environment] for f in files if environment in f.environments), {})
    results = Results(files, environment)
    lines = ["# GPU suite", "", environment_line(described), "", "All measurements: details.md.", "", "## Targets", ""]
    lines += [f"{STEP['model']}, {STEP['precision']}, batch {STEP['batch']}; the engine's best backend.", ""]
    lines += table(["target", "wanted", "found", ""], [_cells(target, results) for target in TARGETS])
    lines += ["", "Measured elsewhere: published code, many tasks in one job, evaluation of many runs.", ""]
    tuned = list(chosen(results)) or ["not measured"]
    for title, found in (
        ("What the tuner chooses", tuned),
        ("Wrong", list(wrong(results))),
        ("What to try next", list(advice(results))),
    ):
        more = [f"{len(found) - MOST} more: details.md"] if len(found) > MOST else []
        lines += [f"## {title}", "", *(f"- {line}" for line in [*found[:MOST], *more] or ["nothing"]), ""]
    left = [f"{part} {count} left to measure" for part, count in results.left.items()]
    return "\n".join([*lines, *([f"Not done: {', '.join(left)}."] if left else [])]).rstrip() + "\n"


def _cells(target: Target, results: Results) -> list[str]:
    wanted = f"{'at most ' if target.at_most else ''}{target.wanted:g}{target.unit}"
    found = target.figure(results)
    if found is None:
        return [target.what, wanted, "", "not measured"]
    met = found <= target.wanted if target.at_most else found >= target.wanted
    return [target.what, wanted, f"{found:.3g}{target.unit}" if found < 1000 else f"{found:.0f}{target.unit}",
            "met" if met else "**not met**"]  # fmt: skip


def chosen(results: Results) -> Iterator[str]:
    """The tuner's choice for each size, and its margins, as it was timed apart."""
    for row in results.of("tune"):
        ms = row["apart_ms"]
        own, usual = ms[row["choice"]], row["entry"]["usual"]
        margins = [(ms[usual], usual)] if usual in ms and usual != row["choice"] else []
        if row["mode"] == "step":
            same = {name: row[name] for name in ("model", "precision", "classes", "batch")}
            plain = results.of("steps", **same, provider="compiled")
            margins += [(p["p50_ms"], "truncated with torch.compile") for p in plain]
        said = [f"{other / own:.2f} times as fast as {name}" for other, name in margins]
        yield ", ".join([f"{row['key']}: {row['choice']}: {own:.4g} ms", *said])


def wrong(results: Results) -> Iterator[str]:
    """Measurements whose numbers are wrong, or that could not be made."""
    for part, rows in results.rows.items():
        for row in rows:
            if row["status"] in ("failed", "error", "killed"):
                yield f"{part}: {row['key']}: {row['status']}: {row.get('message', '')}".replace("\n", " ")[:200]


def advice(results: Results) -> Iterator[str]:
    """What the figures point to, the most valuable first."""
    yield from _of_steps(results)
    yield from _of_profiles(results)
    yield from _of_ops(results)


def _of_steps(results: Results) -> Iterator[str]:
    for classes in (100, 1000):
        rows = results.of("steps", **STEP, classes=classes)
        fast = [row for row in rows if row["provider"].startswith("fast")]
        if not fast:
            continue
        best = min(fast, key=lambda row: min(row["p50_ms"], row.get("graph_ms", row["p50_ms"])))
        plain = next((row for row in fast if row["provider"] == "fast torch"), best)
        if best["provider"] != plain["provider"]:
            yield f"C={classes}: {best['provider'][5:]} is the fastest backend: its ops are candidates for the default"
        if best.get("graph_ms", best["p50_ms"]) < 0.8 * best["p50_ms"]:
            saved = best["p50_ms"] / best["graph_ms"]
            yield f"C={classes}: bound by launches: as a CUDA graph {saved:.2f} times as fast ({best['graph']})"
        elif "graph_ms" not in best:
            yield f"C={classes}: the step is no graph: {best.get('graph', 'not tried')}"
        compiled = next((row for row in rows if row["provider"] == "compiled"), None)
        if compiled and compiled["p50_ms"] < best["p50_ms"]:
            yield f"C={classes}: torch.compile of truncated is faster than the engine, eager: compile its blocks"


def _of_profiles(results: Results) -> Iterator[str]:
    for row in results.of("profile"):
        kinds, name = row.get("ms_by_kind", {}), f"{row['model']} C={row['classes']} B={row['batch']} {row['provider']}"
        if not row["provider"].startswith("fast"):
            continue
        if row.get("busy_of_step", 1.0) < 0.8:
            busy = 100 * row["busy_of_step"]
            yield f"{name}: the device is busy {busy:.0f} % of the time, with {row['launches']} launches: a graph"
        elif row.get("products_of_gemm_peak", 1.0) < 0.6:
            share = 100 * row["products_of_gemm_peak"]
            yield f"{name}: products reach {share:.0f} % of the GEMM peak: their shapes, layouts or epilogues"
        others = {kind: ms for kind, ms in kinds.items() if kind != "product"}
        if others and max(others.values()) > 0.25 * sum(kinds.values()):
            kind = max(others, key=lambda kind: others[kind])
            yield f"{name}: {kind} takes {100 * others[kind] / sum(kinds.values()):.0f} % of the device's time"


def _of_ops(results: Results) -> Iterator[str]:
    """Ops whose kernel is faster than PyTorch's or torch.compile's, then those that are slower."""
    faster, slower = [], []
    for row in results.of("ops", provider="triton") + results.of("ops", provider="xformers"):
        same = {name: row[name] for name in ("op", "shape", "dtype")}
        others = [
            r["p50_ms"] for provider in ("torch", "compiled") for r in results.of("ops", provider=provider, **same)
        ]
        if others:
            ratio = min(others) / row["p50_ms"]
            line = (
                f"{row['op']} {row['shape']} {row['dtype']}, {row['provider']}: {ratio:.2f} times the library's speed"
            )
            (faster if ratio >= 1.05 else slower if ratio <= 0.95 else []).append((ratio, line))
    if faster:
        yield f"{len(faster)} kernels beat the library: {'; '.join(line for _, line in sorted(faster)[-3:])}"
    if slower:
        yield f"{len(slower)} kernels are slower than it: {'; '.join(line for _, line in sorted(slower)[:3])}"
