"""OUT/details.md: tables of what has been measured in one environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu.record import PartFile

Row = dict[str, Any]
MARKS = {"failed": "WRONG", "error": "error", "skipped": "-", "killed": "killed", "running": "running"}


def markdown(files: Sequence[PartFile], environment: str) -> str:
    """The report.

    Args:
        files: of all parts, in order.
        environment: id of the one whose measurements are shown.
    """
    described = next((f.environments[environment] for f in files if environment in f.environments), {})
    lines = ["# GPU suite: details", "", environment_line(described)]
    for file in files:
        rows = {key: row for key, row in file.rows.items() if row["environment"] == environment}
        others = len(file.rows) - len(rows)
        if not file.rows and not file.left:
            continue
        counts = [f"{n} {s}" for s in ("ok", *MARKS) if (n := sum(r["status"] == s for r in rows.values()))]
        notes = counts + [f"{len(file.left)} left to measure"] * bool(file.left)
        notes += [f"{others} of another environment not shown"] * bool(others)
        lines += ["", f"## {file.part}", "", f"{', '.join(notes)}."]
        if rows:
            lines += ["", *SECTIONS.get(file.part, _plain)([{"key": key, **row} for key, row in rows.items()])]
        lines += _messages(rows)
    return "\n".join(lines) + "\n"


def environment_line(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.get("packages", {}).items())
    parts = [
        f"{found.get('device')}, driver {found.get('driver')}, CUDA {found.get('cuda')}, Python {found.get('python')}",
        f"{packages}; commit {found.get('commit')}, sources {found.get('source')}",
    ]
    if found.get("dry"):
        parts.append("A dry run on a CPU at tiny sizes: no figure below says anything about speed")
    return ".\n".join(parts) + "."


def _messages(rows: dict[str, Row]) -> list[str]:
    """What every measurement that is not ok says, those that say the same in one line."""
    said: dict[tuple[str, str], list[str]] = {}
    for key, row in rows.items():
        if row["status"] != "ok":
            said.setdefault((row["status"], row.get("message", "")), []).append(key)
    lines = []
    for (status, message), keys in said.items():
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        lines.append(f"- {status}: {'; '.join(keys[:3])}{more}: {message}".replace("\n", " "))
    return ["", *lines] if lines else []


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> list[str]:
    """Markdown, the first columns flush left."""
    rules = [":--" if i < left else "--:" for i in range(len(headings))]
    return [f"| {' | '.join(map(_text, cells))} |" for cells in (headings, rules, *rows)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _mark(row: Row | None, shown: str | None) -> str:
    """A cell: what is shown, with a mark where the measurement is not ok."""
    if row is None:
        return ""
    mark = MARKS.get(row["status"], "")
    return " ".join(part for part in (shown, mark) if part)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _per(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some of their fields, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _software_and_device(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        if "square_tflops" in row:
            cells.append([f"{row['precision']} product, large and square, TFLOP/s", row["square_tflops"]])
            shape = "x".join(map(str, row["mlp_shape"]))
            cells.append([f"{row['precision']} product {shape}, TFLOP/s", row["mlp_tflops"]])
        if "copy_gb_per_s" in row:
            cells.append(["copy on the device, read and written, GB/s", row["copy_gb_per_s"]])
            cells.append(["launch of a small operation, us", row["launch_us"]])
        if "clip" in row:
            cells.append(["CLIP with random weights", row["clip"]])
    return table(["what", "found"], cells)


def _closeness(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        errors, ratios = row.get("errors", {}), row.get("ratios", {})
        numbers = [f"{errors[n]:.2e} ({ratios[n]:.2f}x)" if n in errors else "" for n in ("logits", "gradients")]
        cells.append([row["model"], row["precision"], row["provider"], *numbers, _mark(row, "")])
    headings = ["model", "precision", "provider", "logits (times the reference's error)", "gradients", ""]
    return ["Relative RMS against the reference in float64.", "", *table(headings, cells, 3)]


def _tests(rows: Sequence[Row]) -> list[str]:
    return table(
        ["tests", "passed", "failed", "skipped", ""],
        [[row["key"], row.get("passed"), row.get("failed"), row.get("skipped"), _mark(row, "")] for row in rows],
    )


def _steps(rows: Sequence[Row]) -> list[str]:
    lines = ["Forward, loss and backward; `x` is truncated's time over this one's, and its memory over this one's."]
    headings = [
        "provider",
        "ms (p20 to p80)",
        "x",
        "images/s",
        "peak MiB",
        "x",
        "of GEMM peak",
        "text ms",
        "image ms",
        "as a graph",
    ]
    for (model, precision, classes, batch), group in _per(rows, "model", "precision", "classes", "batch").items():
        plain = next((row for row in group if row["provider"] == "truncated"), {})
        tflop = {"fast": _first(group, "fast", "tflop"), "compiled": plain.get("tflop")}
        cells = []
        for row in group:
            ms = row.get("p50_ms")
            operations = row.get("tflop") or tflop.get(row["provider"].split()[0])
            of_peak = 1e3 * operations / ms / row["gemm_peak_tflops"] if operations and ms else None
            cells.append(
                [
                    row["provider"],
                    _mark(row, ms and f"{ms:.4g} ({row['p20_ms']:.4g} to {row['p80_ms']:.4g})"),
                    _ratio(plain, row, "p50_ms"),
                    row.get("images_per_s"),
                    row.get("peak_mib"),
                    _ratio(plain, row, "peak_mib"),
                    _percent(of_peak),
                    row.get("text_ms"),
                    row.get("image_ms"),
                    f"{row['graph_ms']:.4g} ({row['graph']})" if "graph_ms" in row else row.get("graph"),
                ]
            )
        lines += ["", f"### {model} {precision}, {classes} classes, batch {batch}", "", *table(headings, cells)]
    return lines


def _first(rows: Sequence[Row], start: str, name: str) -> Any:
    return next((row[name] for row in rows if row["provider"].startswith(start) and name in row), None)


def _ratio(base: Row, row: Row, name: str) -> str | None:
    return f"{base[name] / row[name]:.2f}" if base.get(name) and row.get(name) else None


def _tune(rows: Sequence[Row]) -> list[str]:
    lines = ["Candidates in the tuner's own process; `ms apart`: the first ones again, on models of the suite's own."]
    headings = ["candidate", "ms", "spread", "rounds", "peak MiB", "error (plain's)", "ms apart", "ready after s", ""]
    for row in rows:
        if "entry" not in row:
            continue
        entry, apart, cells = row["entry"], row.get("apart_ms", {}), []
        for name in sorted(entry["ms"], key=entry["ms"].__getitem__):
            details = entry["details"].get(name, {})
            error = f"{details['error']:.1e} ({details['plain_error']:.1e})" if "error" in details else None
            marks = [mark for mark, key in (("chosen", "choice"), ("usual", "usual")) if entry[key] == name]
            numbers = entry["ms"][name], _percent(entry["spread"][name]), entry["rounds"][name]
            memory, ready = details.get("peak_mib"), details.get("prepare_s")
            cells.append([name, *numbers, memory, error, apart.get(name), ready, ", ".join(marks)])
        blank = [None] * (len(headings) - 2)
        cells += [[name, *blank, f"not: {reason}"] for name, reason in entry["refused"].items()]
        lines += ["", f"### {_mark(row, row['key'])}", "", *table(headings, cells)]
    return lines


def _ops(rows: Sequence[Row]) -> list[str]:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells = []
    for (op, shape, dtype), group in _per(rows, "op", "shape", "dtype").items():
        by_provider = {row["provider"]: row for row in group}
        line: list[object] = [op, shape, dtype]
        for provider in providers:
            row = by_provider.get(provider)
            us = row and row.get("p50_ms") and f"{1e3 * row['p50_ms']:.4g} ({_percent(row['of_copy_bandwidth'])})"
            line.append(_mark(row, us))
        cells.append(line)
    note = (
        "Microseconds of forward and backward with a cold cache (in brackets: bytes that have to move, over the time, "
        "as a share of the copy bandwidth)."
    )
    return [note, "", *table(["op", "shape", "dtype", *providers], cells, 3)]


def _profile(rows: Sequence[Row]) -> list[str]:
    headings = ["step", "ms", "device busy", "launches", "longest gap us", "of GEMM peak", "ms by kind"]
    cells, details = [], []
    for row in rows:
        name = f"{row['model']} {row['precision']} C={row['classes']} B={row['batch']} {row['provider']}"
        kinds = ", ".join(f"{kind} {ms:.3g}" for kind, ms in row.get("ms_by_kind", {}).items())
        busy = _percent(row.get("busy_of_step"))
        numbers = [busy, row.get("launches"), row.get("longest_gap_us"), _percent(row.get("of_gemm_peak")), kinds]
        cells.append([_mark(row, name), row.get("p50_ms"), *numbers])
        if "top" in row:
            top = [[k["name"][:90], k["kind"], k["calls"], k["ms"], _percent(k["share"])] for k in row["top"][:12]]
            details += ["", f"### {name}", "", *table(["kernel", "kind", "calls", "ms", "share"], top, 2)]
    return [*table(headings, cells), *details]


def _memory(rows: Sequence[Row]) -> list[str]:
    sizes = sorted({row["gib"] for row in rows})
    cells = []
    for key, group in _per(rows, "model", "precision", "classes", "provider", "memory").items():
        by_size = {row["gib"]: row for row in group}
        line: list[object] = [*key[:2], f"C={key[2]}", f"{key[3]} {key[4]}".strip()]
        for size in sizes:
            row = by_size.get(size)
            shown = None if row is None or "largest_batch" not in row else str(row["largest_batch"])
            if shown and "images_per_s" in row:
                shown += f" ({row['images_per_s']:.4g}/s)"
            line.append(_mark(row, shown))
        cells.append(line)
    headings = ["model", "precision", "classes", "provider", *(f"{size:g} GiB" for size in sizes)]
    note = "Largest batch of a training step within 95 % of the memory (images per second at it)."
    return [note, "", *table(headings, cells, 4)]


def _sanitizer(rows: Sequence[Row]) -> list[str]:
    cells = [[row["key"], row.get("summary") or ", ".join(row.get("ops", [])), _mark(row, "")] for row in rows]
    return table(["kernel and tool", "summary", ""], cells, 3)


def _plain(rows: Sequence[Row]) -> list[str]:
    """Of a part that has no table of its own: the time of each measurement."""
    cells = [[_mark(row, row["key"]), row.get("p50_ms"), row.get("message")] for row in rows]
    return table(["measurement", "ms", ""], cells)


SECTIONS: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "environment": _software_and_device,
    "closeness": _closeness,
    "tests": _tests,
    "steps": _steps,
    "tune": _tune,
    "ops": _ops,
    "profile": _profile,
    "memory": _memory,
    "sanitizer": _sanitizer,
}
