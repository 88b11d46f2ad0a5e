"""Weights of a CLIP in files: OpenAI's TorchScript archives as data, and the activation that a file tells or not."""

import json
import logging
import pickle
import struct
import warnings
import zipfile

import open_clip
import pytest
import torch
from torch import nn

from upt_fast import FastPromptedCLIP, FastUPT
from upt_fast.clip import load_clip
from upt_fast.clip.tiny_clip import TINY_CLIP_NAME
from upt_fast.clip.torchscript import is_archive, read_archive
from upt_fast.testing import random_clip

NAMES = ["cat", "golden_retriever"]
GEOMETRY = dict(
    embed_dim=32, image_size=16, vision_layers=2, vision_width=64, vision_head_width=32, text_layers=2, text_width=64
)
MARKS = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}


def config_of(patch_size: int = 8) -> dict:
    return {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "head_width": 32, "patch_size": patch_size},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    """open_clip's names of a small geometry: small-8 with its QuickGELU twin, and small-16 with larger patches."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (
        ("small-8", config_of()),
        ("small-8-quickgelu", config_of() | {"quick_gelu": True}),
        ("small-16", config_of(16)),
        ("lonely-8", config_of()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(config))
    before = list(open_clip.factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS[:] = before
    open_clip.factory._rescan_model_configs()


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "upt_fast")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records if "GELU" in record.message]


def half_clip(quick_gelu: bool = True, marks: bool = True, seed: int = 0) -> nn.Module:
    model = random_clip(**GEOMETRY, quick_gelu=quick_gelu, seed=seed).half()
    if marks:
        for name, value in MARKS.items():
            model.__dict__.pop(name, None)
            model.register_buffer(name, torch.tensor(value))
    return model


def save_archive(path, model: nn.Module) -> None:
    inputs = torch.randn(1, 3, 16, 16).half(), torch.randint(0, 100, (1, 77))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs, check_trace=False).save(str(path))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    save_archive(path, half_clip())
    return path


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name not in MARKS}


def wanted_logits(quick_gelu: bool, images: torch.Tensor) -> torch.Tensor:
    plain = random_clip(**GEOMETRY, quick_gelu=quick_gelu)
    plain.load_state_dict(weights_of(half_clip()))
    torch.manual_seed(0)
    return FastUPT(plain, NAMES).eval()(images)


def logits_of(images: torch.Tensor, name: str, file, **options) -> torch.Tensor:
    clip = load_clip(name, str(file), **options)
    torch.manual_seed(0)
    return FastUPT.from_loaded(clip, NAMES).eval()(images)


@pytest.mark.parametrize("name", ["small-8", "small-8-quickgelu"])
def test_openais_archive_runs_with_quick_gelu_in_single_precision(archive, name, told):
    images = torch.randn(2, 3, 16, 16)
    logits = logits_of(images, name, archive)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wanted_logits(True, images))
    assert not torch.allclose(logits, wanted_logits(False, images), atol=1e-4)
    assert told() == [("INFO", f"{name} has QuickGELU: the file is OpenAI's TorchScript archive")]


def test_the_archives_tensors_are_those_that_torch_loads(archive):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.jit.load(str(archive)).state_dict()
    found = read_archive(archive)
    assert found.activation == "quick_gelu"
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(found.tensors[k], v) and found.tensors[k].dtype == v.dtype for k, v in wanted.items())


def test_the_activation_can_be_given(archive, told):
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits_of(images, "small-8", archive, quick_gelu=False), wanted_logits(False, images))
    assert told() == [("INFO", "small-8 has GELU: quick_gelu=False was given")]
    with pytest.raises(ValueError, match="quick_gelu='yes'; wanted True, False or None"):
        load_clip("small-8", str(archive), quick_gelu="yes")
    with pytest.raises(ValueError, match="brings its own activation"):
        load_clip(TINY_CLIP_NAME, quick_gelu=not load_tiny_quick_gelu())


def load_tiny_quick_gelu() -> bool:
    return FastUPT.from_pretrained(TINY_CLIP_NAME, classnames=NAMES).clip_quick_gelu


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_an_archive_without_marks_goes_by_its_code(tmp_path, quick_gelu, told):
    save_archive(tmp_path / "a.pt", half_clip(quick_gelu, marks=False))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits_of(images, "small-8", tmp_path / "a.pt"), wanted_logits(quick_gelu, images))
    ((level, text),) = told()
    assert (level, "the code in the TorchScript archive" in text) == ("INFO", True)


def test_openais_marks_on_code_with_gelu_are_a_warning(tmp_path, told):
    save_archive(tmp_path / "a.pt", half_clip(quick_gelu=False))
    load_clip("small-8", str(tmp_path / "a.pt"))
    ((level, text),) = told()
    assert (level, "GELU is used" in text, "--quick-gelu true" in text) == ("WARNING", True, True)


@pytest.mark.parametrize("kind", ["marked", "bare", "open_clip", "safetensors"])
def test_a_state_dict_says_what_it_says(tmp_path, kind, told):
    model = half_clip()
    path, values = tmp_path / "weights.pt", model.state_dict() if kind == "marked" else weights_of(model)
    if kind == "open_clip":
        values = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in values.items()}}
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file(values, path)
    else:
        torch.save(values, path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits_of(images, "small-8", path), wanted_logits(kind == "marked", images))
    ((level, text),) = told()
    assert level == ("WARNING" if kind in ("bare", "safetensors") else "INFO")
    assert ("--quick-gelu true" in text) == (level == "WARNING")
    # the name tells it, or has no twin
    for name, has in (("small-8-quickgelu", "QuickGELU"), ("lonely-8", "QuickGELU" if kind == "marked" else "GELU")):
        load_clip(name, str(path))
        level, text = told()[-1]
        assert (level, text.partition(":")[0]) == ("INFO", f"{name} has {has}")


def test_checkpoints_keep_the_activation(archive, tmp_path, caplog):
    model = FastPromptedCLIP.from_pretrained("small-8", str(archive), classnames=NAMES, method="coop").eval()
    images = torch.randn(2, 3, 16, 16)
    torch.save(weights_of(half_clip()), archive.parent / "bare.pt")
    for pretrained in (archive, archive.parent / "bare.pt"):  # even where the file alone would say otherwise
        model.clip_pretrained = str(pretrained)
        model.save_pretrained(tmp_path)
        loaded = FastPromptedCLIP.load(tmp_path)
        assert loaded.clip_quick_gelu
        assert torch.equal(loaded(images), model(images))
    FastPromptedCLIP.load(tmp_path, random_clip(**GEOMETRY, quick_gelu=False))
    assert "trained on a CLIP with QuickGELU; the one given has GELU" in caplog.text


def test_checkpoints_from_before_the_activation_was_kept_load(archive, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    torch.save(weights_of(half_clip()), tmp_path / "bare.pt")
    options = dict(classnames=NAMES, method="coop")
    model = FastPromptedCLIP.from_pretrained("small-8", str(tmp_path / "bare.pt"), **options).eval()
    path = model.save_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["upt_fast"])
    del description["clip_quick_gelu"]
    save_file(load_file(path), path, {"upt_fast": json.dumps(description)})
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(FastPromptedCLIP.load(tmp_path)(images), model(images))


def test_another_architecture_is_one_message_with_both_shapes(archive, tmp_path):
    torch.save(weights_of(half_clip()), tmp_path / "bare.pt")
    for path in (archive, tmp_path / "bare.pt"):
        with pytest.raises(ValueError) as caught:
            load_clip("small-16", str(path))
        message = str(caught.value)
        assert "\n" not in message
        assert "visual.conv1.weight is (64, 3, 8, 8) in the file, (64, 3, 16, 16) in the architecture" in message


def test_a_prompt_learners_file_is_no_clip(tmp_path):
    torch.save({"ctx": torch.zeros(4, 64)}, tmp_path / "prompts.pt")
    with pytest.raises(ValueError, match=r"does not fit small-8: the file lacks .* has no ctx"):
        load_clip("small-8", str(tmp_path / "prompts.pt"))


# what archives could do to a reader


def with_pickle(source, target, data: bytes, **records: bytes) -> None:
    """An archive with another data.pkl, and other storages."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            if name == "data.pkl":
                new.writestr(info.filename, data)
            elif name == "constants.pkl":
                new.writestr(info.filename, old.read(info))
        for name, content in records.items():
            new.writestr(f"archive/{name.replace('_', '/')}", content)


class Runs:
    """Runs a function where it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def touch(path: str) -> None:
    open(path, "w").close()


def short(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


MODULE = b"\x80\x02c__torch__.clip\nCLIP\n)\x81}"
STORAGE = b"(" + short("storage") + b"ctorch\nFloatStorage\n" + short("0") + short("cpu")
TENSOR = MODULE + b"(" + short("x") + b"ctorch._utils\n_rebuild_tensor_v2\n("
HOSTILE = {
    "system": pickle.dumps(Runs(exec, "raise SystemExit"), 2),
    "system, protocol 4": pickle.dumps(Runs(exec, "raise SystemExit"), 4),
    "eval in a module": MODULE + b"(" + short("x") + b"cbuiltins\neval\n" + short("1/0") + b"\x85Rub.",
    "torch function": MODULE + b"(" + short("x") + b"ctorch\nload\n" + short("/etc/passwd") + b"\x85Rub.",
    "class called": MODULE + b"(" + short("x") + b"c__torch__.clip\nCLIP\n)Rub.",
    "object with arguments": b"\x80\x02c__torch__.clip\nCLIP\n" + short("x") + b"\x85\x81.",
    "state on a name": b"\x80\x02ctorch\nFloatStorage\n}(" + short("__call__") + short("x") + b"ub.",
    "memo that is not there": MODULE + b"(" + short("x") + b"h\x07ub.",
    "nothing on the stack": b"\x80\x020R.",
    "no end": MODULE,
    "unknown opcode": b"\x80\x02\xff.",
    "a long text": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a number": b"\x80\x02K\x01.",
    "absurd storage": TENSOR + STORAGE + b"\x8a\x06\x00\x00\x00\x00\x00\x01tQK\x00)))t" + b"Rub.",
    "absurd shape": TENSOR + STORAGE + b"K\x04tQK\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89}tRub.",
    "past the storage": TENSOR + STORAGE + b"K\x04tQK\x01K\x04\x85K\x01\x85\x89}tRub.",
    "strides past the storage": TENSOR + STORAGE + b"K\x04tQK\x00K\x04\x85K\x02\x85\x89}tRub.",
    "negative offset": TENSOR + STORAGE + b"K\x04tQJ\xff\xff\xff\xffK\x04\x85K\x01\x85\x89}tRub.",
    "a missing record": TENSOR + STORAGE.replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x009") + b"K\x04tQK\x00)))tRub.",
    "a module in itself": b"\x80\x02c__torch__.clip\nCLIP\n)\x81q\x00}(" + short("x") + b"h\x00ub.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused(archive, tmp_path, data):
    path = tmp_path / "hostile.pt"
    with_pickle(archive, path, data, data_0=bytes(16))
    assert is_archive(path)
    with pytest.raises(ValueError, match=r"hostile\.pt"):
        read_archive(path)
    with pytest.raises(ValueError, match="could not load 'small-8'"):
        load_clip("small-8", str(path))


def test_a_tensor_by_hand_is_read(archive, tmp_path):
    """What the refusals above differ from by little."""
    path = tmp_path / "good.pt"
    data = TENSOR + STORAGE + b"K\x04tQK\x01K\x03\x85K\x01\x85\x89}tRub."
    with_pickle(archive, path, data, data_0=struct.pack("4f", *range(4)))
    assert read_archive(path).tensors["x"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("in_archive", [True, False])
def test_nothing_that_a_file_names_is_called(archive, tmp_path, in_archive):
    path, made = tmp_path / "hostile.pt", tmp_path / "made"
    if in_archive:
        with_pickle(archive, path, pickle.dumps(Runs(touch, str(made)), 2))
    else:
        torch.save({"state_dict": Runs(touch, str(made))}, path)
    with pytest.raises(ValueError, match=r"more than tensors: \S+touch|names \S+touch") as caught:
        load_clip("small-8", str(path))
    assert "weights_only" not in str(caught.value)
    assert not made.exists()


def test_damaged_archives_are_named(archive, tmp_path):
    whole = archive.read_bytes()
    path = tmp_path / "cut.pt"
    for size in (len(whole) // 2, len(whole) - 30, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pt is (cut short|damaged)"):
            load_clip("small-8", str(path))
    with zipfile.ZipFile(archive) as file:
        info = max(file.infolist(), key=lambda info: info.file_size)
    middle = info.header_offset + info.file_size // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"cut\.pt is a damaged TorchScript archive"):
        load_clip("small-8", str(path))


def test_modules_shared_without_end_are_refused(archive, tmp_path):
    """Twenty-five modules, each twice in the next: 2^25 paths to one tensor."""
    module = b"c__torch__.clip\nCLIP\n)\x81}("
    data = b"\x80\x02" + module + b"ub" + b"q\x00"
    for level in range(25):
        inner = b"h" + bytes([level])
        data += module + short("a") + inner + short("b") + inner + b"ubq" + bytes([level + 1])
    with_pickle(archive, tmp_path / "deep.pt", data + b".")
    with pytest.raises(ValueError, match="too many"):
        read_archive(tmp_path / "deep.pt")
