"""Boxes and arrows as an SVG file, which is refused where it would be hard to read or untrue.

Hard to read: text wider than its box, boxes over each other, an arrow through a box. Untrue: a box that names a module
that is not there; and in a picture of imports an arrow without an import behind it, a layer of ``[tool.importlinter]``
left out, or drawn above one that may import it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from html import escape
from itertools import combinations, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels": ROOT / "kernels"}  # of the package, where they are not in upt_fast/

INK, RULE, PAPER = "#1b2430", "#51606f", "#ffffff"
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, monospace"
TITLE, TEXT = 14, 12  # pixels
WIDE = 0.64  # of a character, in font sizes: more than fonts have on average
LINE, PAD = 17, 8
HEAD = 7  # of an arrow

Point = tuple[float, float]
Area = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Box:
    """A box.

    Args:
        name: what arrows call it; without a title, the module that it is.
        area: left, top, right, bottom.
        colour: of its inside.
        lines: below the title; shapes begin with "(" or "[".
        title: first line; empty: the name.
        modules: what it stands for, as paths in upt_fast without a suffix; empty without a title: the name.
        frame: other boxes may lie in it, below its text.
    """

    name: str
    area: Area
    colour: str
    lines: tuple[str, ...] = ()
    title: str = ""
    modules: tuple[str, ...] = ()
    frame: bool = False

    @property
    def stands_for(self) -> tuple[str, ...]:
        """The modules that must exist."""
        return self.modules if self.title or self.modules else (self.name,)

    def texts(self) -> list[tuple[float, float, str, bool, int]]:
        """Each line with its middle, baseline, whether it is code, and size; at the top of a frame, else centred."""
        left, top, right, bottom = self.area
        rows = [(self.title or self.name, not self.title, TITLE)]
        rows += [(line, line[0] in "([" or line in self.modules, TEXT) for line in self.lines]
        start = top + PAD if self.frame else (top + bottom - LINE * len(rows)) / 2
        return [((left + right) / 2, start + LINE * (i + 0.76), *row) for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Arrow:
    """An arrow between two boxes, straight unless it turns.

    Args:
        start: name of the box that it leaves.
        end: name of the box that it reaches.
        at: x of an arrow up or down, y of one to the side; None: the middle of what the boxes face each other with.
        turn: x at which an arrow that leaves to the side goes up or down.
        label: words beside it, "|" between lines.
        dashed: no import: what the label says.
    """

    start: str
    end: str
    at: float | None = None
    turn: float | None = None
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture: the name of its file, its size, what it says to who cannot see it, boxes and arrows."""

    name: str
    size: tuple[int, int]
    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    imports: bool = False  # whether arrows say who imports whom, and heights in which layer

    def box(self, name: str) -> Box:
        return next(box for box in self.boxes if box.name == name)

    def points(self, arrow: Arrow) -> list[Point]:
        """The corners of an arrow's line."""
        a, b = self.box(arrow.start).area, self.box(arrow.end).area
        if arrow.turn is not None:
            y = (a[1] + a[3]) / 2 if arrow.at is None else arrow.at
            side = a[0] if arrow.turn < a[0] else a[2]
            return [(side, y), (arrow.turn, y), (arrow.turn, b[1] if b[1] > y else b[3])]
        low, high = max(a[0], b[0]), min(a[2], b[2])
        if low < high:
            x = (low + high) / 2 if arrow.at is None else arrow.at
            return [(x, a[3]), (x, b[1])] if a[3] <= b[1] else [(x, a[1]), (x, b[3])]
        y = (max(a[1], b[1]) + min(a[3], b[3])) / 2 if arrow.at is None else arrow.at
        return [(a[2], y), (b[0], y)] if a[2] <= b[0] else [(a[0], y), (b[2], y)]

    def label(self, arrow: Arrow) -> list[tuple[float, float, str]]:
        """The lines of an arrow's label, each with its left and baseline: right of it, or above where it is level."""
        (x0, y0), (x1, y1) = self.points(arrow)[-2:]
        rows = [row for row in arrow.label.split("|") if row]
        if y0 == y1:
            widest = max((width(row, TEXT) for row in rows), default=0.0)
            return [((x0 + x1 - widest) / 2, y0 - 6 - LINE * (len(rows) - 1 - i), row) for i, row in enumerate(rows)]
        middle = (y0 + y1 - LINE * len(rows)) / 2
        return [(x0 + 8, middle + LINE * (i + 0.76), row) for i, row in enumerate(rows)]


def width(text: str, size: int) -> float:
    """Pixels that a text needs at most."""
    return len(text) * size * WIDE


def source(module: str) -> Path | None:
    """The folder or file of a module, named by its path in the package; None where there is none."""
    top, _, rest = module.partition("/")
    place = FOLDERS.get(top, ROOT / "upt_fast" / top) / rest
    return next((path for path in (place, place.with_suffix(".py")) if path.exists()), None)


def layers() -> list[list[str]]:
    """Modules by the layers of pyproject.toml, the highest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(r"^layers = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    return [[name.strip().removeprefix("upt_fast.") for name in row.split("|")] for row in ast.literal_eval(found)]


def imported(module: str) -> set[str]:
    """What a module, or any of a package, imports of upt_fast, as paths in it."""
    path = source(module)
    assert path is not None, module
    found = set()
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return {name.removeprefix("upt_fast.").replace(".", "/") for name in found if name.startswith("upt_fast.")}


def inside(a: Area, b: Area) -> bool:
    """Whether a lies in b."""
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def touch(a: Area, b: Area) -> bool:
    """Whether two areas have more than an edge in common; one may be a line."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_area(left: float, baseline: float, text: str, size: int) -> Area:
    """Where a text is at most."""
    return (left, baseline - size, left + width(text, size), baseline + size * 0.3)


def problems(picture: Picture) -> list[str]:
    """What is wrong with a picture, one line each; nothing where it may be drawn."""
    return unreadable(picture) + untrue(picture)


def unreadable(picture: Picture) -> list[str]:
    """Texts, boxes and arrows that are in each other's way."""
    found = []
    taken: list[tuple[str, Area]] = []  # what nothing may be drawn over
    for box in picture.boxes:
        if not inside(box.area, (0, 0, *picture.size)):
            found.append(f"{box.name} leaves the picture")
        for middle, baseline, text, _, size in box.texts():
            area = text_area(middle - width(text, size) / 2, baseline, text, size)
            taken.append((f"{text!r} of {box.name}", area))
            if not inside(area, box.area):
                found.append(f"{text!r} does not fit into {box.name}")
        if not box.frame:
            taken.append((box.name, box.area))
    for a, b in combinations(picture.boxes, 2):
        if (
            touch(a.area, b.area)
            and not (a.frame and inside(b.area, a.area))
            and not (b.frame and inside(a.area, b.area))
        ):
            found.append(f"{a.name} and {b.name} overlap")
    for frame in picture.boxes:
        words = [text_area(m - width(t, s) / 2, y, t, s) for m, y, t, _, s in frame.texts()] if frame.frame else []
        found += [
            f"{box.name} covers words of {frame.name}"
            for box in picture.boxes
            for w in words
            if box != frame and touch(w, box.area)
        ]
    for arrow in picture.arrows:
        name = f"the arrow from {arrow.start} to {arrow.end}"
        points = picture.points(arrow)
        if (points[-1][0] - points[-2][0]) ** 2 + (points[-1][1] - points[-2][1]) ** 2 < (2 * HEAD) ** 2:
            found.append(f"{name} is too short")
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 != x1 and y0 != y1:
                found.append(f"{name} is askew")
            line = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            found += [f"{name} goes through {other}" for other, area in taken if touch(line, area)]
        labels = [(row, text_area(left, y, row, TEXT)) for left, y, row in picture.label(arrow)]
        found += [f"{row!r} lies on {other}" for row, own in labels for other, area in taken if touch(own, area)]
    return found


def untrue(picture: Picture) -> list[str]:
    """Modules that are not there, and arrows and heights that the sources or pyproject.toml do not bear out."""
    missing = [(box.name, module) for box in picture.boxes for module in box.stands_for if source(module) is None]
    found = [f"{name}: there is no upt_fast/{module}" for name, module in missing]
    if found or not picture.imports:
        return found
    for arrow in picture.arrows:
        ends = picture.box(arrow.end).stands_for
        names = {name for module in picture.box(arrow.start).stands_for for name in imported(module)}
        if not arrow.dashed and not any(f"{name}/".startswith(f"{end}/") for name in names for end in ends):
            found.append(f"{arrow.start} does not import {arrow.end}")
    drawn = {module: box for box in picture.boxes for module in box.stands_for}
    rows = layers()
    found += [f"no box for {module}" for row in rows for module in row if module not in drawn]
    for high, low in combinations(rows, 2):
        pairs = [(a, b) for a in high for b in low if a in drawn and b in drawn]
        found += [f"{b} is drawn above {a}" for a, b in pairs if drawn[b].area[1] < drawn[a].area[1]]
    return found


def draw(picture: Picture) -> str:
    """The SVG file's text.

    Raises:
        ValueError: the picture has :func:`problems`.
    """
    if wrong := problems(picture):
        raise ValueError(f"{picture.name}: {'; '.join(wrong)}")
    wide, high = picture.size
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        'role="img">',
        f"<title>{escape(picture.title)}</title>",
        f'<rect width="{wide}" height="{high}" rx="8" fill="{PAPER}"/>',  # whatever the page's colour
    ]
    for box in picture.boxes:
        left, top, right, bottom = box.area
        place = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"'
        rows.append(f'<rect {place} rx="5" fill="{box.colour}" stroke="{RULE}"/>')
        for i, (middle, baseline, text, code, size) in enumerate(box.texts()):
            weight = ' font-weight="bold"' if i == 0 else ""
            rows.append(_text(middle, baseline, text, size, MONO if code else SANS, f' text-anchor="middle"{weight}'))
    for arrow in picture.arrows:
        points = picture.points(arrow)
        dashes = ' stroke-dasharray="5 4"' if arrow.dashed else ""
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        rows.append(f'<polyline points="{line}" fill="none" stroke="{RULE}" stroke-width="1.5"{dashes}/>')
        rows.append(f'<polygon points="{_head(*points[-2:])}" fill="{RULE}"/>')
        rows += [_text(left, baseline, row, TEXT, SANS, "") for left, baseline, row in picture.label(arrow)]
    return "\n".join([*rows, "</svg>", ""])


def _text(x: float, y: float, text: str, size: int, font: str, more: str) -> str:
    place = f'x="{x:g}" y="{y:.1f}" font-family="{font}" font-size="{size}" fill="{INK}"'
    return f"<text {place}{more}>{escape(text)}</text>"


def _head(before: Point, tip: Point) -> str:
    """The corners of the triangle at an arrow's end."""
    (x0, y0), (x, y) = before, tip
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back, half = (x - HEAD * dx, y - HEAD * dy), HEAD * 0.6
    corners = [tip, (back[0] - half * dy, back[1] + half * dx), (back[0] + half * dy, back[1] - half * dx)]
    return " ".join(f"{cx:g},{cy:g}" for cx, cy in corners)
