"""Names of classes: their folders' own, WordNet's, or those of a file that says folder -> name.

CLIP reads a class by its name. Folders called n01440764, 0 or a train as well, on texts that mean nothing; so these are
told apart from names, and a file gives names to them.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from upt_fast.common.messages import shorten
from upt_fast.data.wordnet import WORDNET_ID, wordnet_names

FOLDER_NAMES = "folders"  # in the place of a file of names: the folders' own, whatever they are
EXAMPLES = 3  # of names that mean nothing
_MEANINGLESS = re.compile(r"[^\W\d_]|[-+]?\d[\d.,_ -]*|(?:class|cls|label|category|id|no|nr)?[ ._-]*\d+", re.IGNORECASE)
_HEADINGS = frozenset(
    (
        *("folder", "foldername", "folders", "dir", "directory", "path", "key", "index", "idx"),
        *("class", "classid", "classfolder", "id", "label", "labelid", "wnid", "wordnetid", "synset", "synsetid"),
    )
)


def means_nothing(name: str) -> bool:
    """Whether a class name is a WordNet id, a bare or numbered number (7, class_07) or one Latin letter."""
    text = plain_name(name)
    if len(text) == 1 and text.isalpha():
        return "LATIN" in unicodedata.name(text, "")  # one Chinese character is a word
    return bool(WORDNET_ID.fullmatch(text) or _MEANINGLESS.fullmatch(text))


def plain_name(name: str) -> str:
    """A class name as models see it: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def name_classes(
    folders: Sequence[str], classnames: str | Path | Mapping[str, str] | None, root: str | Path
) -> tuple[str, ...]:
    """The class name of each folder.

    Args:
        folders: C names, or paths like "animal/cat", whose last part is their own name.
        classnames: a JSON or CSV file or a mapping, folder -> name; "folders": their own; None: their own, with WordNet
            ids by their names, and a warning where names mean nothing.
        root: what the folders are in, for messages.
    Raises:
        ValueError: the file cannot be read or does not fit the folders; two folders have the same name.
    """
    if classnames is not None and classnames != FOLDER_NAMES:
        return given_names(classnames, folders, where=str(root))
    names = [folder.rpartition("/")[2] for folder in folders]
    if classnames is None:
        names = _told_names(names, root)
    _check_distinct(
        folders, names, f"class folders {{}} and {{}} of {root} read as the same class name {{}}: rename one, or"
    )
    return tuple(names)


def _told_names(names: Sequence[str], root: str | Path) -> list[str]:
    """Names with WordNet ids replaced; warns of these and of what means nothing."""
    known = wordnet_names(names)
    if known:
        examples = ", ".join(f"{name} is {known[name]!r}" for name in list(known)[:EXAMPLES])
        warnings.warn(
            f"{len(known)} class folder(s) of {root} have WordNet ids for names and are read by WordNet's: {examples}; "
            f"--classnames FILE gives others, --classnames {FOLDER_NAMES} keeps the ids",
            stacklevel=4,
        )
    if nothing := [name for name in names if name not in known and means_nothing(name)]:
        warnings.warn(
            f"{len(nothing)} of {len(names)} class folders of {root} have names that mean nothing to CLIP: "
            f"{shorten(map(repr, nothing), EXAMPLES)}; this costs accuracy. Give names with --classnames FILE (JSON or "
            f"CSV: folder, name), or keep these with --classnames {FOLDER_NAMES}",
            stacklevel=4,
        )
    return [known.get(name, name) for name in names]


def _check_distinct(folders: Sequence[str], names: Sequence[str], message: str) -> None:
    seen: dict[str, str] = {}
    for folder, name in zip(folders, names, strict=True):
        other = seen.setdefault(plain_name(name), folder)
        if other != folder:
            text = message.format(repr(other), repr(folder), repr(plain_name(name)))
            raise ValueError(f"{text} give each a name of its own with --classnames FILE")


def given_names(
    classnames: str | Path | Mapping[str, str],
    folders: Sequence[str],
    also: Iterable[str] = (),
    where: str = "the data",
) -> tuple[str, ...]:
    """The name of each folder in a file or mapping of folder -> name.

    A folder stands there as it is called, or, where that is one folder only, by the last part of its path or with
    spaces for underscores.

    Args:
        classnames: the file (.json: an object; .csv, .tsv: two columns, with a header or without) or the mapping.
        folders: C folders.
        also: folders that may stand there too.
        where: what has the folders, for messages.
    Raises:
        ValueError: the file cannot be read; a folder without a name or with two; an unknown folder; an empty name; two
            folders with the same name.
    """
    if isinstance(classnames, Mapping):
        source, entries = "classnames", list(classnames.items())
    else:
        path = Path(classnames)
        source, entries = f"class names {path}", read_entries(path)
        if path.suffix.lower() != ".json" and entries and _is_heading(entries[0], [*folders, *also]):
            entries = entries[1:]
    found = _by_folder(entries, folders, set(also), source, where)
    names = [found[folder] for folder in folders]
    _check_distinct(
        folders, names, f"{source}: the folders {{}} and {{}} have the same name {{}}; wanted one name for one class:"
    )
    return tuple(names)


def _by_folder(
    entries: Sequence[tuple[Any, Any]], folders: Sequence[str], also: set[str], source: str, where: str
) -> dict[str, str]:
    resolve = _Resolver(folders)
    found: dict[str, str] = {}
    unknown = []
    for key, name in entries:
        if not isinstance(key, str) or not isinstance(name, str):
            what = key if not isinstance(key, str) else name
            raise ValueError(f"{source}: {key!r} has {what!r}, {type(what).__name__}; wanted texts: folder -> name")
        folder = resolve(key)
        if folder is None:
            if not {key, key.strip(), plain_name(key)} & also:
                unknown.append(key)
        elif folder in found:
            raise ValueError(f"{source}: folder {folder!r} is there twice; wanted each folder once")
        elif not plain_name(name):
            raise ValueError(f"{source}: the name of folder {folder!r} is {name!r}, empty; wanted a word for its class")
        else:
            found[folder] = name.strip()
    missing = [folder for folder in folders if folder not in found]
    problems = []
    if unknown:
        close = [match for key in unknown for match in difflib.get_close_matches(key.strip(), missing, n=1)]
        guess = f" (did you mean {shorten(close, EXAMPLES)}?)" if close else ""
        problems.append(f"it names {len(unknown)} folder(s) that are not there: {shorten(map(repr, unknown))}{guess}")
    if missing:
        problems.append(f"{len(missing)} folder(s) have no name: {shorten(map(repr, missing))}")
    if problems:
        raise ValueError(
            f"{source} does not fit {where}: {'; '.join(problems)}; wanted each of its {len(folders)} class folders "
            f"({shorten(folders, EXAMPLES)}) once, and nothing else"
        )
    return found


class _Resolver:
    """Finds the folder that an entry means: its exact name first, then what is unambiguous."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.exact = set(folders)
        self.loose: dict[str, str | None] = {}
        for folder in folders:
            for form in {_loose(folder), _loose(folder.rpartition("/")[2])}:
                self.loose[form] = None if form in self.loose else folder

    def __call__(self, key: str) -> str | None:
        return key if key in self.exact else self.loose.get(_loose(key))


def _loose(name: str) -> str:
    return plain_name(unicodedata.normalize("NFC", name.strip().rstrip("/")))


def read_entries(path: Path) -> list[tuple[Any, Any]]:
    """The pairs of folder and name in a JSON or CSV file, in order, unchecked; a header row is one of them.

    Raises:
        ValueError: no such file, not UTF-8, no JSON object, or rows that are no pairs.
    """
    source = f"class names {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{source}: cannot read it: {error.strerror}; wanted a JSON or CSV file") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{source} is empty; wanted rows of folder,name or a JSON object {{folder: name}}")
    if path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "[")):
        return _json_entries(text, source)
    return _csv_entries(text, source)


def _json_entries(text: str, source: str) -> list[tuple[Any, Any]]:
    wanted = 'wanted an object {"folder": "name", ...}'
    pairs: list[list[tuple[Any, Any]]] = []

    def keep(found: list[tuple[Any, Any]]) -> dict[Any, Any]:  # a dict alone would hide a folder that is there twice
        pairs.append(found)
        return dict(found)

    try:
        value = json.loads(text, object_pairs_hook=keep)
    except ValueError as error:
        raise ValueError(f"{source} is no JSON: {error}; {wanted}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply; {wanted}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds {type(value).__name__}; {wanted}")
    return pairs[-1]  # the outermost object ends last


def _csv_entries(text: str, source: str) -> list[tuple[Any, Any]]:
    # what ends the first cell; spreadsheets write semicolons where a comma is in numbers
    first = re.match(r'\s*(?:"(?:[^"]|"")*"|[^",;\t\r\n]*)([,;\t])', text)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=first[1] if first else ",", strict=True))
    except csv.Error as error:
        raise ValueError(f"{source} is no CSV: {error}; wanted rows of folder,name") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(
                f"{source}: row {number} has {len(row)} column(s): {','.join(row)[:80]!r}; wanted two, folder,name: a "
                'name with a comma goes into quotes ("tench, Tinca tinca")'
            )
    return [(folder, name) for folder, name in rows]


def _is_heading(row: tuple[Any, Any], folders: Sequence[str]) -> bool:
    """Whether the first row of a CSV file says what the columns are."""
    word = re.sub(r"[\W_]", "", row[0]).casefold()
    return word in _HEADINGS and _Resolver(folders)(row[0]) is None
