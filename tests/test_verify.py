"""``upt-fast verify``: the recorded vectors hold, others recorded from the reference hold, corrupted ones do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import upt_fast.tools.verify
from upt_fast import FastUPT, UPTConfig
from upt_fast.common.closeness import max_error, relative_rms
from upt_fast.common.files import load_safetensors
from upt_fast.engine import fp8
from upt_fast.engine.fp8 import Fp8Weight
from upt_fast.testing import write_vectors
from upt_fast.tools.verify import DTYPES, TOLERANCES, measure, run_verify

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("clip_"))
SMALL = dict(embed_dim=16, image_size=16, patch_size=8, vision_layers=1, vision_width=64, text_layers=1, text_width=64)


def lines(capsys) -> dict[str, str]:
    """What was printed, by the first word of each line."""
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    write_vectors(folder, "small", UPTConfig(n_text=2, n_visual=1), ["cat", "snow leopard"], SMALL, images=2)
    return folder


@pytest.fixture
def vectors(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "vectors")


def change(folder: Path, tensors: dict, stem: str = "small") -> None:
    """Replace tensors of a file; None removes one."""
    from safetensors.torch import save_file

    old, _ = load_safetensors(folder / f"{stem}.safetensors")
    save_file({n: t for n, t in (old | tensors).items() if t is not None}, folder / f"{stem}.safetensors")


def change_sidecar(folder: Path, **entries) -> None:
    path = folder / "small.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def tensor(folder: Path, name: str) -> torch.Tensor:
    return load_safetensors(folder / "small.safetensors")[0][name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(capsys, dtype):
    assert run_verify(GOLDEN, dtype=dtype) == 0
    printed = lines(capsys)
    for name in FILES:
        assert " ok " in printed[name]
        numbers = [float(word) for word in printed[name].split() if "e-" in word or "e+" in word]
        # outputs and gradients of both, and of what rounding to half precision does
        assert len(numbers) == (6 if dtype in ("float16", "bfloat16") else 4)
        # far below the tolerances, which allow for other machines
        assert max(numbers) <= {"float64": 1e-12, "float32": 2e-5}.get(dtype, 1)
    assert printed[str(len(FILES))] == f"{len(FILES)} passed, 0 failed, 0 skipped"


def test_rounded_prompts_count(vectors, capsys):
    """A file with half.* is run with half_prompts as well, and fails where only that is wrong."""
    from upt_fast.methods.maple import MaPLeConfig

    small = SMALL | {"text_layers": 2, "vision_layers": 2}
    write_vectors(vectors, "rounded", MaPLeConfig(depth=2), ["cat", "snow leopard"], small, images=2, method="maple")
    assert run_verify(vectors) == 0
    tensors, _ = load_safetensors(vectors / "rounded.safetensors")
    assert 1e-8 < max_error(tensors["half.out.logits"], tensors["out.logits"]) < 1e-2
    name = "half.grad.proj.weight"
    change(vectors, {name: tensors[name] * (1 + 1e-6)}, "rounded")
    assert run_verify(vectors) == 1
    assert " FAIL " in lines(capsys)["rounded"]


def test_unknown_methods_are_named(vectors, capsys):
    shutil.copy(vectors / "small.safetensors", vectors / "other.safetensors")
    sidecar = json.loads((vectors / "small.json").read_text(encoding="utf-8"))
    (vectors / "other.json").write_text(json.dumps(sidecar | {"method": "tpt"}), encoding="utf-8")
    assert run_verify(vectors) == 0
    out = capsys.readouterr().out
    assert "skipped, methods not supported: other (tpt)" in out
    assert "1 passed, 0 failed, 1 skipped" in out


@pytest.mark.parametrize("dtype", DTYPES)
def test_package_vectors(capsys, dtype):
    assert run_verify(None, dtype=dtype) == 0
    printed = lines(capsys)
    assert " ok " in printed["small_paper"]
    assert " ok " in printed["small_released"]
    assert printed["2"] == "2 passed, 0 failed, 0 skipped"


VECTORS = {
    "wide_text": (UPTConfig(n_text=1), ["cat"], {"text_width": 128, "text_layers": 2}),
    "wide_vision": (UPTConfig(n_text=7, n_visual=3), ["cat", "dog"], {"vision_width": 128, "vision_layers": 3}),
    "shallow": (
        UPTConfig(n_text=3, depth_text=1, depth_vision=2),
        ["cat", "dog"],
        {"text_layers": 3, "vision_layers": 3},
    ),
    "deeper_text": (
        UPTConfig(n_text=5, depth_text=3, depth_vision=1),
        ["a", "b"],
        {"text_layers": 5, "vision_layers": 1},
    ),
    "front": (
        UPTConfig(n_text=4, class_token_position="front"),
        ["cat", "hard-leaved pocket orchid"],
        {"text_layers": 2},
    ),
    "middle": (UPTConfig(n_text=5, class_token_position="middle", depth_text=1), ["cat", "x_y"], {"text_layers": 3}),
    "middle_of_one": (UPTConfig(n_text=1, class_token_position="middle"), ["cat", "dog"], {}),
    "names": (UPTConfig(n_text=2), ["日本犬", "Ærøskøbing", "?!", "chien_de_berger", "lorem " * 30], {}),
    "heads": (UPTConfig(n_text=2, attention_heads=4), ["cat", "dog"], {"text_width": 128, "embed_dim": 40}),
    "image": (UPTConfig(n_text=2), ["cat", "dog"], {"image_size": 32, "patch_size": 4}),
    "released": (UPTConfig("released", n_text=2, n_visual=6), ["cat", "dog"], {"text_layers": 3, "vision_layers": 2}),
    "released_front": (
        UPTConfig("released", n_text=6, n_visual=1, class_token_position="front"),
        ["cat", "snow leopard"],
        {"text_width": 192},
    ),
}


@pytest.mark.parametrize(("config", "names", "geometry"), VECTORS.values(), ids=VECTORS)
def test_other_vectors(tmp_path, capsys, config, names, geometry):
    write_vectors(tmp_path, "v", config, names, SMALL | geometry, images=2, seed=len(names))
    assert run_verify(tmp_path) == 0, capsys.readouterr().out
    assert run_verify(tmp_path, dtype="float32") == 0, capsys.readouterr().out


CORRUPTED = ["out.logits", "out.loss", "out.image_features", "out.text_features", "mid.text_prompts"]
CORRUPTED += [
    "mid.visual_prompts",
    "grad.uni_ctx",
    "grad.norm1.bias",
    "grad.mlp.weight",
    "grad.self_attn.in_proj_weight",
]


@pytest.mark.parametrize("name", CORRUPTED)
def test_one_wrong_number_fails(vectors, capsys, name):
    wrong = tensor(vectors, name).clone()
    wrong.view(-1)[-1] += 1e-7 * max(1.0, float(wrong.abs().max()))
    change(vectors, {name: wrong})
    assert run_verify(vectors) == 1
    printed = lines(capsys)
    assert " FAIL " in printed["small"]
    assert printed["0"] == "0 passed, 1 failed, 0 skipped"
    assert run_verify(vectors, dtype="float32") == 0  # whose tolerance is wider


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["out.logits", "grad.linear1.weight", "param.norm2.weight"])
def test_not_a_number_fails(vectors, capsys, name, dtype):
    wrong = tensor(vectors, name).clone()
    wrong.view(-1)[0] = float("nan")
    change(vectors, {name: wrong})
    assert run_verify(vectors, dtype=dtype) == 1
    assert " FAIL " in lines(capsys)["small"]


@pytest.mark.parametrize(
    "changes",
    [
        {"grad.uni_ctx": None},
        {"grad.other": torch.zeros(3, dtype=torch.float64)},
        {"out.logits": torch.zeros(2, 3, dtype=torch.float64)},
        {"grad.norm1.bias": torch.zeros(65, dtype=torch.float64)},
    ],
    ids=["gradient_missing", "gradient_of_nothing", "shape_of_logits", "shape_of_gradient"],
)
def test_other_names_and_shapes_fail(vectors, capsys, changes):
    change(vectors, changes)
    assert run_verify(vectors) == 1
    assert " FAIL " in lines(capsys)["small"]


def test_other_token_ids_fail(vectors, capsys):
    ids = tensor(vectors, "tokenized_prompts").clone()
    ids[0, 3] += 1
    change(vectors, {"tokenized_prompts": ids})
    assert run_verify(vectors) == 1
    line = lines(capsys)["small"]
    assert " FAIL " in line
    assert "tokenizer gave other ids" in line


def test_ids_of_the_placeholders_do_not_matter(vectors):
    ids = tensor(vectors, "tokenized_prompts").clone()
    ids[:, 1:3] = 5
    change(vectors, {"tokenized_prompts": ids})
    assert run_verify(vectors) == 0


class WrongLogits(FastUPT):
    def forward(self, images):
        return super().forward(images) * (1 + 1e-7)


class WrongGradient(FastUPT):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_learner.linear2.bias.register_hook(lambda grad: grad + 1e-7)


class NoGradient(FastUPT):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_learner.mlp.requires_grad_(False)


@pytest.mark.parametrize("broken", [WrongLogits, WrongGradient, NoGradient])
def test_a_wrong_engine_fails(vectors, monkeypatch, capsys, broken):
    monkeypatch.setattr(upt_fast.tools.verify, "FastPromptedCLIP", broken)
    assert run_verify(vectors) == 1
    line = lines(capsys)["small"]
    reference, fast = (float(max(part.split()[1::2], key=float)) for part in line.split(": ")[1:])
    assert " FAIL " in line
    assert reference <= 1e-12 < 1e-8 < fast


class Rounded(FastUPT):
    """As a kernel that keeps too few bits."""

    def forward(self, images):
        logits = super().forward(images)
        return logits + 0.3 * torch.arange(logits.numel()).view(logits.shape).sin()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_judged_against_the_reference(vectors, monkeypatch, capsys, dtype):
    assert run_verify(vectors, dtype=dtype) in (0, 1)  # of one small file the ratio is chance
    assert "reference: outputs" in lines(capsys)["all"]
    monkeypatch.setattr(upt_fast.tools.verify, "FastPromptedCLIP", Rounded)
    assert run_verify(vectors, dtype=dtype) == 1
    assert " FAIL " in lines(capsys)["all"]


def _square(weight):
    return weight.shape[0] == weight.shape[1]


WRONG_SCALES = {
    "twice": lambda f, w: f._replace(forward_scale=2 * f.forward_scale),
    "half_in_mlp": lambda f, w: f._replace(forward_scale=f.forward_scale / 2) if w.shape[1] > w.shape[0] else f,
    "twice_backward": lambda f, w: f._replace(backward_scale=2 * f.backward_scale),
    "half_backward": lambda f, w: f._replace(backward_scale=f.backward_scale / 2),
    "of_columns": lambda f, w: f._replace(forward_scale=f.backward_scale) if _square(w) else f,
    "not_transposed": lambda f, w: f._replace(backward=f.forward) if _square(w) else f,
}


@pytest.mark.parametrize("wrong", [None, *WRONG_SCALES])
def test_fp8_fails_where_a_scale_is_wrong(monkeypatch, capsys, wrong):
    """Rounding passes, with its ratio to that of bfloat16 shown; a wrong scale or copy does not."""
    quantize = Fp8Weight.quantize
    assert fp8.refusal(torch.device("cpu")) == ""  # found once, by a product that must be right
    if wrong is not None:
        monkeypatch.setattr(Fp8Weight, "quantize", lambda weight: WRONG_SCALES[wrong](quantize(weight), weight))
    assert run_verify(None, dtype="fp8") == (wrong is not None)
    line = lines(capsys)["all"]
    assert (" FAIL " in line) == (wrong is not None)
    words = line.replace("rounding (bfloat16): ", "").replace("fast (fp8): ", "").split()
    errors, ratios = [float(word) for word in words if "e-" in word or "e+" in word], words[-2:]
    assert words[-3] == "ratio"
    for i in range(2):
        assert float(ratios[i]) == pytest.approx(errors[2 + i] / errors[i], rel=0.1)


def test_fp8_fails_where_nothing_is_a_number(vectors, capsys):
    """Nor does a reference that has none either excuse it."""
    wrong = tensor(vectors, "param.norm2.weight").clone()
    wrong[0] = float("nan")
    change(vectors, {"param.norm2.weight": wrong})
    assert run_verify(vectors, dtype="fp8") == 1
    assert " FAIL " in lines(capsys)["all"]


def test_folders_without_vectors(tmp_path, vectors):
    with pytest.raises(ValueError, match="no directory"):
        run_verify(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="no vectors in"):
        run_verify(tmp_path)
    change_sidecar(vectors, method="tpt")
    with pytest.raises(ValueError, match=r"no vectors of a supported method.*upt, coop, cocoop"):
        run_verify(vectors)


def test_bad_files(vectors):
    (vectors / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        run_verify(vectors)
    (vectors / "broken.json").unlink()
    (vectors / "small.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"small\.safetensors is not a safetensors file"):
        run_verify(vectors)
    (vectors / "small.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file .*small\.safetensors"):
        run_verify(vectors)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"dtype": "float8"}, "dtype='float8'; wanted one of 'float64'"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_options(vectors, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        run_verify(vectors, **options)


def test_unknown_options_of_a_file(vectors):
    change_sidecar(vectors, options={"n_ctx": 3})
    with pytest.raises(ValueError, match="n_ctx"):
        run_verify(vectors)


def test_measures():
    a = torch.tensor([3.0, 4.0])
    assert relative_rms(a, a) == 0.0
    assert relative_rms(1.1 * a, a) == pytest.approx(0.1, rel=1e-5)
    assert relative_rms(a, torch.zeros(2)) == pytest.approx(12.5**0.5)
    assert max_error(a + torch.tensor([0.0, 0.4]), a) == pytest.approx(0.1, rel=1e-5)
    assert max_error(torch.tensor([0.3]), torch.tensor([0.1])) == pytest.approx(0.2)
    nan = torch.tensor([3.0, float("nan")])
    for f in (relative_rms, max_error):
        assert f(nan, a) == f(a, nan) == f(a[:1], a) == f(a[None], a) == float("inf")


def test_measure_takes_models_of_either_kind(recorded, tokenizer):
    from upt_fast import ReferenceUPT
    from upt_fast.testing import golden_clip

    tensors, _ = load_safetensors(recorded / "small.safetensors")
    clip = golden_clip(recorded / "clip_small.safetensors")
    state = {f"prompt_learner.{n[6:]}": t.double() for n, t in tensors.items() if n.startswith("param.")}
    for build in (ReferenceUPT, FastUPT):
        model = build(clip, ["cat", "snow leopard"], tokenizer=tokenizer, n_text=2, n_visual=1).eval()
        model.load_state_dict(state)
        assert measure(model, tensors).worst <= 1e-12
        model.prompt_learner.norm1.weight.data[0] += 1e-6
        model.zero_grad()
        assert measure(model, tensors).worst > 1e-9
