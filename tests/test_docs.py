"""The pictures are those that their script draws, and what the documents point at is there."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from drawing import Arrow, Box, draw, problems
from pictures import DATA_WAY, HOUSE, PICTURES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("bench", "configs", "docs", "kernels", "tests", "upt_fast")
SUFFIXES = (".cpp", ".h", ".md", ".py", ".svg", ".toml", ".txt", ".yaml")
# in examples: what is a user's, and words in the place of a name
EXAMPLES = (
    "my.py:Mine",
    "my_method.py",
    "names.txt",
    "bird/crane",
    "train/",
    "val/",
    "test/",
    "theirs/",
    "runs/",
    "~/",
)
PLACEHOLDERS = re.compile(r"(?:^|/)(?:DIR|FILE|NAME|OUT|OUTPUT|RUN)\b")


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_pictures_are_what_the_script_draws(picture):
    file = ROOT / "docs" / picture.name
    assert draw(picture) == file.read_text(encoding="utf-8"), "run: python docs/pictures.py"
    tree = ElementTree.parse(file)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags <= {"svg", "title", "rect", "text", "polyline", "polygon"}  # no script, no picture from elsewhere
    assert not any("href" in name or name.startswith("on") for element in tree.iter() for name in element.attrib)
    used = [box.name for box in picture.boxes]
    assert len(used) == len(set(used))


def changed(picture, name, **fields):
    boxes = tuple(replace(box, **fields) if box.name == name else box for box in picture.boxes)
    return replace(picture, boxes=boxes)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (changed(HOUSE, "clip", modules=("clap",)), "clip: there is no upt_fast/clap"),
        (
            changed(HOUSE, "data", lines=("image folders and class names",)),
            "'image folders and class names' does not fit",
        ),
        (changed(HOUSE, "data", area=(20, 506, 230, 592)), "data and engine overlap"),
        (changed(HOUSE, "data", area=(-5, 506, 170, 592)), "data leaves the picture"),
        (changed(HOUSE, "engine/ops", area=(222, 530, 588, 640)), "engine/ops covers words of engine"),
        (changed(HOUSE, "train", area=(20, 700, 170, 740)), "data is drawn above train"),
        (replace(HOUSE, arrows=(Arrow("clip", "methods"),)), "clip does not import methods"),
        (changed(HOUSE, "model", area=(210, 362, 600, 424)), "from model to features is too short"),
        (replace(HOUSE, arrows=(Arrow("train", "prompts"),)), "from train to prompts goes through model"),
        (replace(HOUSE, arrows=(Arrow("cli", "train", at=390, label="reads them all"),)), "lies on released"),
        (replace(HOUSE, boxes=HOUSE.boxes[:-1], arrows=()), "no box for common"),
        (
            replace(DATA_WAY, boxes=(Box("x", (0, 0, 300, 90), "#fff", ("a" * 50,), "x"),), arrows=()),
            "does not fit into x",
        ),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_pictures_that_are_refused(picture, message):
    assert any(message in problem for problem in problems(picture)), problems(picture)
    with pytest.raises(ValueError, match=re.escape(picture.name)):
        draw(picture)


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts write them."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in headings(found), target


@pytest.fixture(scope="module")
def paths() -> list[str]:
    """Files and folders of the repository, each with a slash in front; folders with one behind, too."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for name in TOP:
        found += [ROOT / name, *(path for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts)]
    return [f"/{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_files_are_there(document, paths):
    """Files and folders in code type: by their path in the repository or its end (``towers/text.py``)."""
    words = [word for code in re.findall(r"`([^`]+)`", prose(document)) for word in code.split()]
    for word in words:
        if not re.fullmatch(r"[\w./~:-]+", word) or not (word.endswith(SUFFIXES) or "/" in word):
            continue
        if word.startswith(EXAMPLES) or PLACEHOLDERS.search(word):
            continue
        wanted = f"/{word.rstrip('/')}"
        assert any(path.rstrip("/").endswith(wanted) for path in paths), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_modules_are_there(document):
    """Dotted names of the package in code type: the module, and in it the name."""
    for name in re.findall(r"`(upt_fast\.[\w.]+)", prose(document)):
        folder, parts = ROOT, name.split(".")
        if parts[1] in ("configs", "kernels"):  # as setup.py maps them
            parts = parts[1:]
        while parts and (folder / parts[0]).is_dir():
            folder /= parts.pop(0)
        file = folder / f"{parts[0]}.py" if parts and (folder / f"{parts[0]}.py").is_file() else folder / "__init__.py"
        rest = parts[1:] if file.name != "__init__.py" else parts
        source = file.read_text(encoding="utf-8") if file.is_file() else ""
        assert all(re.search(rf"\b{part}\b", source) for part in rest), name
        assert file.is_file(), name
