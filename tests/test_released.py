"""Checkpoints of the released repositories: in, out, and what is refused."""

import json
import pickle
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from upt_fast import FastPromptedCLIP
from upt_fast.cli import main
from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.common.closeness import max_error
from upt_fast.common.files import load_safetensors, save_safetensors
from upt_fast.methods import list_releases
from upt_fast.released import (
    TOKEN_NAMES,
    checkpoint_path,
    export_checkpoint,
    import_checkpoint,
    read_file,
    read_released,
    released_settings,
)
from upt_fast.released.commands import parse_options, read_classnames
from upt_fast.saving import LEARNER_FILE
from upt_fast.testing import golden_clip
from upt_fast.tools.verify import method_of
from upt_fast.train.checkpoint import STATE_FILE

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p.stem for p in GOLDEN.glob("*.json") if not p.stem.startswith(("clip_", "zsclip")))
WITH_BUFFERS = [name for name in FILES if not name.startswith(("vpt", "mvpt", "upt_paper"))]
EXPORTED = [name for name in FILES if not name.startswith("upt_paper")]
# options that no shape tells
GIVEN = {
    "coop_front": {"class_token_position": "front"},
    "coop_middle": {"class_token_position": "middle"},
    "upt_paper_partial": {"n_text": 4},
}
DIGITS = ["zero", "one", "two", "three"]


def sidecar_of(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def method_name(name: str) -> str:
    return method_of(sidecar_of(name), load_safetensors(GOLDEN / f"{name}.safetensors")[0])[0]


def options_of(name: str) -> dict:
    templates = sidecar_of(name).get("templates")
    return GIVEN.get(name, {}) | ({"templates": templates} if templates and "vpt" in name else {})


def trained(name: str) -> dict[str, torch.Tensor]:
    tensors, _ = load_safetensors(GOLDEN / f"{name}.safetensors")
    return {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}


def buffers(name: str) -> dict[str, torch.Tensor]:
    tensors, _ = load_safetensors(GOLDEN / f"{name}.safetensors")
    return {n.removeprefix("buffer."): t for n, t in tensors.items() if n.startswith("buffer.")}


def write(path: Path, state: dict, **more) -> Path:
    """A file as Dassl writes it."""
    optimizer = {"state": {}, "param_groups": [{"lr": 0.002, "params": [0]}]}
    values = {"state_dict": state, "epoch": 50, "optimizer": optimizer, "scheduler": {"last_epoch": 50}}
    torch.save(values | {"val_result": None} | more, path)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.pth.tar-50"


@lru_cache(maxsize=1)
def clip_file(name: str, tokenizer) -> LoadedCLIP:
    return LoadedCLIP(golden_clip(GOLDEN / name), tokenizer, {}, "golden", None)


@pytest.fixture
def clip_of(tokenizer):
    return lambda name: clip_file(sidecar_of(name)["clip_file"], tokenizer)


@pytest.fixture
def bring(file, clip_of):
    """Import a state dict as a golden file's, with its CLIP, class names and options."""

    def call(name: str, state: dict, names: list[str] | None = None, **more) -> FastPromptedCLIP:
        classnames = sidecar_of(name)["classnames"] if names is None else names
        return import_checkpoint(write(file, state), clip_of(name), classnames, **(options_of(name) | more))

    return call


def logits_error(model: FastPromptedCLIP, name: str, kind: str = "") -> float:
    tensors, _ = load_safetensors(GOLDEN / f"{name}.safetensors")
    with torch.no_grad():
        return max_error(model(tensors["images"].double()), tensors[f"{kind}out.logits"])


def test_every_released_method_is_here():
    assert {method_name(name) for name in FILES} == set(list_releases()) - {"kgcoop"}


@pytest.mark.parametrize("name", FILES)
def test_import(name, bring):
    model = bring(name, trained(name) | buffers(name), method=method_name(name))
    assert model.method == method_name(name)
    assert not model.training
    assert logits_error(model, name) <= 1e-9


@pytest.mark.parametrize("name", FILES)
def test_import_finds_the_method(name, bring):
    state = trained(name) | buffers(name)
    if not name.startswith("vpt_deep"):
        model = bring(name, state)
        assert model.method == method_name(name)
        assert logits_error(model, name) <= 1e-9
        return
    # 12 n rows: so many prompts in one layer would have this shape
    with pytest.raises(ValueError, match=r"can be vpt_deep or vpt_shallow.*--method"):
        bring(name, state)


@pytest.mark.parametrize("name", ["maple", "ivlp", "mvpt"])
def test_import_with_half_prompts(name, bring):
    model = bring(name, trained(name) | buffers(name), half_prompts=True)
    assert model.config.half_prompts
    assert logits_error(model, name, "half.") <= 1e-9
    # the prompts of the other two are exact in float16
    assert (logits_error(model, name) > 1e-9) == (name == "maple")


def module_of(state: dict[str, torch.Tensor]) -> nn.Module:
    """A module that has parameters of these names, as the released ones have."""
    root = nn.Module()
    for name, value in state.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(last, nn.Parameter(torch.zeros_like(value, dtype=torch.float32)))
    return root


def load_as_they_do(module: nn.Module, path: Path):
    """Their trainers' load_model."""
    checkpoint = torch.load(path, map_location="cpu")
    state = checkpoint["state_dict"]
    assert checkpoint["epoch"] == 7
    for name in ("token_prefix", "token_suffix", "prompt_learner.token_prefix", "prompt_learner.token_suffix"):
        state.pop(name, None)
    return module.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, bring, clip_of, tmp_path):
    values = trained(name)
    model = bring(name, values | buffers(name), method=method_name(name))
    path = checkpoint_path(tmp_path / "out", model.method, 7)
    assert path.parent.name == list_releases()[model.method].registered
    assert export_checkpoint(model, path, 7) == path
    written = torch.load(path, weights_only=True)
    assert written.keys() == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}
    state = written["state_dict"]
    assert state.keys() == values.keys()
    assert all(torch.equal(state[n], values[n].double()) for n in values)
    # theirs has its token buffers and the CLIP besides
    theirs = module_of(values | buffers(name) | {"logit_scale": torch.zeros(())})
    found = load_as_they_do(theirs, path)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == {*buffers(name), "logit_scale"}
    assert all(torch.equal(theirs.get_parameter(n), values[n].float()) for n in values)
    # and back
    options = {k: v for k, v in model.config.to_dict().items() if v is not None}
    again = import_checkpoint(path, clip_of(name), model.classnames, model.method, **options)
    assert again.config == model.config or {**again.config.to_dict(), **options} == again.config.to_dict()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert logits_error(again, name) <= 1e-9
    assert all(isinstance(line, str) and line for line in released_settings(model))


def test_export_in_single_precision_is_bit_equal(tmp_path):
    clip = load_clip("tiny-digits")
    for method in list_releases():
        options = {"preset": "released"} if method == "upt" else {}
        options |= {"depth": None} if method == "maple" else {}
        model = FastPromptedCLIP.from_loaded(clip, DIGITS, method=method, **options)
        path = export_checkpoint(model, checkpoint_path(tmp_path, method, 1))
        again = import_checkpoint(path, clip, DIGITS, method)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def test_settings_name_their_options(bring):
    def settings(name: str) -> str:
        return "\n".join(released_settings(bring(name, trained(name) | buffers(name))))

    assert "TRAINER.COOP.N_CTX 4 TRAINER.COOP.CTX_INIT '' TRAINER.COOP.CSC True" in settings("coop_csc")
    assert "TRAINER.COOP.CLASS_TOKEN_POSITION 'middle'" in settings("coop_middle")
    assert "TRAINER.MAPLE.PROMPT_DEPTH 3" in settings("maple")
    assert "TRAINER.IVLP.PROMPT_DEPTH_VISION 3" in settings("ivlp")
    assert "float16" in settings("mvpt")
    assert "Unified_v6" in settings("upt")


def test_export_refuses(bring, tmp_path, clip_of):
    clip, names = clip_of("upt"), sidecar_of("upt")["classnames"]

    def model(method: str, **options) -> FastPromptedCLIP:
        return FastPromptedCLIP.from_loaded(clip, names, method=method, **options)

    for refused, message in [
        (model("upt"), "preset 'paper'"),
        (model("upt", shared=True), "preset 'paper'"),
        (model("upt", preset="released", n_text=3), "literal"),
        (model("zeroshot"), "no parameters"),
        (model("vpt_shallow", templates=["a {}.", "the {}."]), "mean of 2 templates"),
        (model("mvpt", templates="art of the {}."), "art of the"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_checkpoint(refused, tmp_path / "out.pth.tar")
        assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ValueError, match="epoch=-1"):
        export_checkpoint(model("coop"), tmp_path / "out.pth.tar", -1)
    with pytest.raises(ValueError, match="'zeroshot' is not of"):
        checkpoint_path(tmp_path, "zeroshot", 1)
    other = model("coop")
    other.method = "mine"
    with pytest.raises(ValueError, match="no such method"):
        export_checkpoint(other, tmp_path / "out.pth.tar")


# what files look like


def frozen_clip_tensors() -> dict[str, torch.Tensor]:
    names = ("image_encoder.conv1.weight", "image_encoder.transformer.resblocks.0.ln_1.weight", "logit_scale")
    return {n: torch.randn(3) for n in (*names, "text_encoder.transformer.resblocks.1.mlp.c_fc.weight")}


@pytest.mark.parametrize("name", ["coop_end", "upt", "maple", "ivlp", "mvpt"])
def test_prefix_half_precision_and_frozen_clip(name, bring, file):
    values = trained(name) | buffers(name)
    wanted = bring(name, values).state_dict()
    whole = {
        n if "." in n and name in ("maple", "ivlp", "mvpt") else f"prompt_learner.{n}": t for n, t in values.items()
    }
    forms = {
        "DataParallel": {f"module.{n}": t for n, t in values.items()},
        "single": {n: t.float() for n, t in values.items()},
        "whole": whole | frozen_clip_tensors(),
        "all": {f"module.{n}": t for n, t in (whole | frozen_clip_tensors()).items()},
    }
    for state in forms.values():
        got = bring(name, state, method=method_name(name)).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[n], t) for n, t in wanted.items())
    assert read_file(file).frozen == 4


def test_vpt_with_the_network_of_its_unused_loss(bring, file, clip_of):
    extra = {f"mlp.layer{i}.{n}": torch.zeros(2) for i in (1, 3) for n in ("weight", "bias")}
    name = "vpt_shallow"
    model = bring(name, trained(name) | extra | {"clip_model.logit_scale": torch.zeros(())})
    assert logits_error(model, name) <= 1e-9
    found = read_released(file, clip_of(name), model.classnames, **options_of(name))
    assert found.unused == tuple(extra)
    assert "ignored mlp.layer1.weight" in "\n".join(found.describe())
    # with that network 12 n rows are no deep prompts
    bring(name, {"visual_ctx": torch.randn(12, 128)} | extra)


def test_plain_state_dict(bring, file, clip_of):
    torch.save(trained("coop_end"), file)
    found = read_released(file, clip_of("coop_end"), sidecar_of("coop_end")["classnames"])
    assert logits_error(found.model, "coop_end") <= 1e-9
    assert not found.checked
    assert "not checked" in "\n".join(found.describe())


def test_legacy_format(file, clip_of):
    values = {"state_dict": trained("coop_end") | buffers("coop_end"), "epoch": 3}
    torch.save(values, file, _use_new_zipfile_serialization=False)
    found = read_released(file, clip_of("coop_end"), sidecar_of("coop_end")["classnames"])
    assert logits_error(found.model, "coop_end") <= 1e-9
    assert found.checkpoint.epoch == 3
    assert found.checked


class WarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Keeps the scheduler that follows it, as Dassl's do."""

    def __init__(self, optimizer, successor) -> None:
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return list(self.base_lrs)


def dassl_state(parameter: nn.Parameter) -> dict:
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0)
    scheduler = WarmupScheduler(optimizer, successor)
    parameter.sum().backward()
    optimizer.step()
    scheduler.step()
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


@pytest.mark.parametrize("zipped", [True, False])
def test_schedulers_that_keep_their_optimizer(file, clip_of, zipped):
    """What Dassl writes: torch's weights_only alone refuses it."""
    import numpy as np

    state = {n: nn.Parameter(t.float()) for n, t in trained("coop_end").items()}
    more = dassl_state(state["ctx"])
    state = {n: t.detach().clone() for n, t in state.items()}
    values = {"state_dict": state | buffers("coop_end"), "epoch": 5, "val_result": np.float64(71.5), **more}
    torch.save(values, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="was not an allowed global"):
        torch.load(file, weights_only=True)
    found = read_released(file, clip_of("coop_end"), sidecar_of("coop_end")["classnames"])
    assert found.checkpoint.epoch == 5
    assert torch.equal(found.checkpoint.trained["ctx"], state["ctx"])
    # nothing stays allowed
    with pytest.raises(pickle.UnpicklingError, match="was not an allowed global"):
        torch.load(file, weights_only=True)


class Touch:
    """Unpickled by pickle, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Shell:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_objects_are_refused_and_not_run(file, tmp_path):
    for value, name in ((Touch(tmp_path / "ran"), "getattr"), (Shell(), "system"), (nn.Linear(1, 1), "Linear")):
        write(file, trained("coop_end"), optimizer=value)
        with pytest.raises(ValueError, match="holds more than tensors") as caught:
            read_file(file)
        assert name in str(caught.value)
        assert "torch.save({'state_dict'" in str(caught.value)
        assert "weights_only=False" not in str(caught.value)
        assert not (tmp_path / "ran").exists()


def test_bad_files(file, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        read_file(file)
    with pytest.raises(ValueError, match="is a folder"):
        read_file(tmp_path)
    whole = write(file, {"ctx": torch.randn(4, 192)}).read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged or was not written by torch\.save"):
            read_file(file)
    file.write_text("no checkpoint, but long enough to be read as something")
    with pytest.raises(ValueError, match="damaged"):
        read_file(file)
    save_safetensors(file, {"ctx": torch.zeros(4, 192)}, {})
    with pytest.raises(ValueError, match="is a safetensors file"):
        read_file(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds list"),
        ({}, "wanted a dict of tensors"),
        ({"state_dict": None}, "state_dict is None"),
        ({"state_dict": {}}, "wanted a dict of tensors"),
        ({"state_dict": {"ctx": 3}}, "'ctx' is int"),
        ({"state_dict": {3: torch.zeros(1)}}, "3 is Tensor"),
        ({"epoch": 3}, "'epoch' is int"),
        ({"ctx": torch.zeros(4, 8), "prompt_learner.ctx": torch.zeros(4, 8)}, "'ctx' twice"),
        ({"ctx": torch.zeros(4, 8, dtype=torch.int64)}, "int64"),
        ({"ctx": torch.full((4, 8), float("nan"))}, "NaN"),
    ],
)
def test_bad_contents(file, value, message):
    torch.save(value, file)
    with pytest.raises(ValueError, match=message):
        read_file(file)


# what the token buffers tell


@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_class_names_are_checked(name, bring, file, clip_of):
    state, names = trained(name) | buffers(name), sidecar_of(name)["classnames"]
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(ValueError, match=r"another order.*2 of 7 class names, first 'golden retriever' \(class 0\)"):
        bring(name, state, swapped)
    with pytest.raises(ValueError, match="other texts than these: 1 of 7 class names, first 'dog'"):
        bring(name, state, [*names[:6], "dog"])
    with pytest.raises(ValueError, match=r"of 7 classes; 6 class names"):
        bring(name, state, names[:6])
    # rounded to float16 as theirs, stored wider
    assert read_released(write(file, state), clip_of(name), names, **options_of(name)).checked
    noisy = {n: t.float() * (1 + 3e-4) if "token_" in n else t for n, t in state.items()}
    bring(name, noisy)
    wrong = {n: t.float() * 1.01 if "token_" in n else t for n, t in state.items()}
    with pytest.raises(ValueError, match="another CLIP"):
        bring(name, wrong)


def test_other_token_buffers(bring):
    name = "coop_end"
    state = trained(name)
    suffix = buffers(name)["token_suffix"]
    with pytest.raises(ValueError, match=r"token_suffix is \(7, 70, 192\).* make \(7, 72, 192\)"):
        bring(name, state | {"token_suffix": suffix[:, :70]})
    ids = load_safetensors(GOLDEN / f"{name}.safetensors")[0]["tokenized_prompts"]
    bring(name, state | {"tokenized_prompts": ids})
    with pytest.raises(ValueError, match="another order"):
        bring(name, state | {"tokenized_prompts": ids.flip(0)})


def test_initial_words(bring):
    state = trained("maple") | buffers("maple")
    assert bring("maple", state).config.ctx_init == "a photo of a"
    with pytest.raises(ValueError, match=r"ctx_init; here 'none'|token_suffix"):
        bring("maple", state, ctx_init=None)
    # saved by a run that started at random: nothing stands between prompts and name
    random = buffers("coop_end")["token_suffix"]
    pad = random[:, -1:].expand(-1, 2, -1)
    state["prompt_learner.token_suffix"] = torch.cat([random, pad], dim=1)
    assert bring("maple", state).config.ctx_init is None
    state = trained("coop_end") | buffers("coop_end")
    assert bring("coop_end", state, ctx_init="a photo of a").config.ctx_init == "a photo of a"
    with pytest.raises(ValueError, match="has 2 words"):
        bring("coop_end", state, ctx_init="a photo")
    with pytest.raises(ValueError, match="has 4 words"):
        bring("coop_csc", trained("coop_csc"), ctx_init="a photo of a")


# methods, options, names, shapes


def test_ambiguous_methods(bring):
    ctx = torch.randn(4, 192)
    with pytest.raises(ValueError, match=r"can be coop or ivlp: say which by method \(--method coop\)"):
        bring("coop_end", {"prompt_learner.ctx": ctx})
    assert bring("coop_end", {"prompt_learner.ctx": ctx}, method="coop").method == "coop"
    model = bring("ivlp", {"prompt_learner.ctx": ctx, "logit_scale": torch.zeros(())}, method="ivlp")
    assert (model.config.depth_text, model.config.depth_vision) == (1, 0)
    assert bring("coop_csc", {"prompt_learner.ctx": torch.randn(7, 4, 192)}).config.class_specific
    assert bring("vpt_shallow", {"visual_ctx": torch.randn(12, 128)}, method="vpt_deep").config.n_ctx == 1
    assert bring("vpt_shallow", {"visual_ctx": torch.randn(12, 128)}, method="vpt_shallow").config.n_ctx == 12


def test_language_only_and_partial_depths(bring):
    state = {n: t for n, t in trained("ivlp").items() if not n.startswith("image_encoder.")}
    config = bring("ivlp", state | buffers("ivlp")).config
    assert (config.n_text, config.depth_text, config.depth_vision) == (2, 3, 0)
    state = {n: t for n, t in trained("maple").items() if ".1" not in n}
    assert bring("maple", state).config.depth == 2
    state = {n: t for n, t in trained("mvpt").items() if ".2" not in n}
    assert bring("mvpt", state).config.depth == 2


def test_upt_presets(bring):
    released, paper = trained("upt"), trained("upt_paper")
    assert bring("upt", released).config.preset == "released"
    assert bring("upt", released, preset="paper").config.depth_text == 1
    assert bring("upt", released, n_text=3).config.n_visual == 5
    assert bring("upt", released, n_visual=3).config.n_text == 5
    config = bring("upt_paper", paper, depth_text=1).config
    assert (config.depth_text, config.depth_vision) == (1, 3)
    with pytest.raises(ValueError, match=r"are no equal halves.*n_text"):
        bring("upt_paper", trained("upt_paper_partial"))
    with pytest.raises(ValueError, match="preset='released'; the file's shapes say 'paper'"):
        bring("upt_paper", paper, preset="released")
    with pytest.raises(ValueError, match="wanted the deeper tower's to be 3"):
        bring("upt_paper", paper, depth_text=2, depth_vision=1)
    with pytest.raises(ValueError, match="each class's own"):
        bring("upt_paper", paper | buffers("upt"))
    with pytest.raises(ValueError, match="n_text=8 leaves no sense"):
        bring("upt", released, n_text=8)
    with pytest.raises(ValueError, match=r"uni_ctx is \(8, 192\)"):
        bring("upt", released | {"uni_ctx": torch.randn(8, 192)})
    with pytest.raises(ValueError, match="unexpected: self_attn"):
        bring("upt_paper", paper, transform="mlp")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coop_end", {"n_ctx": 8}, "n_ctx=8; the file's shapes say 4"),
        ("coop_end", {"class_specific": True}, "class_specific=True; the file's shapes say False"),
        ("maple", {"depth": 2}, "depth=2; the file's shapes say 3"),
        ("ivlp", {"n_visual": 2}, "n_visual=2; the file's shapes say 3"),
        ("mvpt", {"depth": 1}, "depth=1; the file's shapes say 3"),
        ("coop_end", {"depth": 1}, "unknown option depth"),
        ("coop_end", {"class_token_position": "back"}, "class_token_position='back'"),
        ("maple", {"half_prompts": "yes"}, "half_prompts='yes'"),
        ("coop_end", {"method": "maple"}, "method='maple' was given; the file is of coop"),
        ("coop_end", {"method": "zeroshot"}, "has no released checkpoints"),
        ("coop_end", {"method": "copo"}, "method='copo'; wanted one of"),
        ("vpt_deep", {"method": "vpt_deep", "n_ctx": 48}, "n_ctx=48; the file's shapes say 4"),
    ],
)
def test_bad_options(name, options, message, bring):
    with pytest.raises(ValueError, match=message):
        bring(name, trained(name) | buffers(name), **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("upt", {"norm1.bias": None}, "missing: norm1.bias"),
        ("cocoop", {"meta_net.linear2.bias": None, "ctx": None}, "ctx is missing"),
        ("cocoop", {"meta_net.linear3.bias": torch.zeros(3)}, "unexpected: meta_net.linear3.bias"),
        ("cocoop", {"ctx": torch.zeros(4)}, r"ctx is \(4,\)"),
        ("maple", {"prompt_learner.compound_prompts_text.0": None}, "missing: compound_prompts_text.0"),
        ("ivlp", {"image_encoder.VPT": None}, "image_encoder.VPT is missing"),
        ("ivlp", {"image_encoder.transformer.resblocks.9.VPT_shallow": torch.zeros(3, 128)}, "depth_vision=10"),
        ("ivlp", {"text_encoder.VPT": torch.zeros(2, 192)}, "unexpected: text_encoder.VPT"),
        ("coop_end", {"ctx": torch.zeros(4, 512)}, r"ctx is \(4, 512\), wanted \(4, 192\): another CLIP"),
        ("mvpt", {"image_encoder.VPT": torch.zeros(4, 768)}, r"wanted \(4, 128\)"),
        ("coop_end", {"ctx": None}, "no method of upt, coop"),
        ("coop_end", {"visual_ctx": torch.zeros(4, 128)}, "no method of"),
        ("vpt_shallow", {"visual_ctx": torch.zeros(())}, r"visual_ctx is \(\)"),
    ],
)
def test_other_names_and_shapes(name, change, message, bring):
    state = trained(name) | change
    with pytest.raises(ValueError, match=message) as caught:
        bring(name, {n: t for n, t in state.items() if t is not None} or {"token_prefix": torch.zeros(7, 1, 192)})
    assert "model.pth.tar-50: " in str(caught.value)


# the commands


@pytest.fixture
def digits(tmp_path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(DIGITS) + "\n")
    return path


def saved(path: Path, method: str, **options) -> FastPromptedCLIP:
    """A checkpoint as theirs, token buffers included, of a model on the CLIP of the package."""
    clip = load_clip("tiny-digits")
    torch.manual_seed(1)
    model = FastPromptedCLIP.from_loaded(clip, DIGITS, method=method, **options).eval()
    from upt_fast.reference import ReferencePromptedCLIP

    twin = ReferencePromptedCLIP(clip.model, DIGITS, method=method, tokenizer=clip.tokenizer, **options)
    embedded = twin.embed_classes()
    whole = {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + twin.n_text :]}
    state = {n.removeprefix("prompt_learner."): t for n, t in model.state_dict().items()} | whole
    if method == "maple":
        state = {f"prompt_learner.{n}": t for n, t in state.items()} | {"logit_scale": torch.zeros(())}
    write(path, state)
    return model


def error_of(capfd, argv: list[str]) -> str:
    capfd.readouterr()
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("upt-fast: error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize("method", ["coop", "maple"])
def test_commands(method, file, digits, tmp_path, capfd):
    options = {"n_ctx": 4} if method == "coop" else {"depth": 2}
    model = saved(file, method, **options)
    out = tmp_path / "model"
    command = ["import-checkpoint", str(file), "--clip", "tiny-digits", "--classnames", str(digits), "--out", str(out)]
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert f"method {method}, epoch 50" in printed
    assert f"n_ctx={4 if method == 'coop' else 2}" in printed
    assert "ignored token_prefix, token_suffix" in printed
    assert ("half_prompts=true" in printed) == (method == "maple")
    assert "the class names are those of the file's token buffers" in printed
    again = FastPromptedCLIP.load(out)
    assert again.clip_name == "tiny-digits"
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert "holds a model already" in error_of(capfd, command)

    theirs = tmp_path / "theirs"
    assert main(["export-checkpoint", str(out), "--out", str(theirs), "--epoch", "9"]) == 0
    printed = capfd.readouterr().out
    folder = {"coop": "prompt_learner", "maple": "MultiModalPromptLearner"}[method]
    assert f"{folder}/model.pth.tar-9" in printed
    assert "--load-epoch 9" in printed
    assert f"TRAINER.{method.upper()}.N_CTX" in printed
    written = torch.load(theirs / folder / "model.pth.tar-9")
    values = torch.load(file)["state_dict"]
    dropped = {n for n in values if n.rpartition(".")[2] in (*TOKEN_NAMES, "logit_scale")}
    assert written["state_dict"].keys() == values.keys() - dropped
    assert all(torch.equal(t, values[n]) for n, t in written["state_dict"].items())
    assert "exists; wanted another --out" in error_of(
        capfd, ["export-checkpoint", str(out), "--out", str(theirs), "--epoch", "9"]
    )
    assert main(["export-checkpoint", str(out / LEARNER_FILE), "--out", str(theirs), "--clip", "tiny-digits"]) == 0
    assert (theirs / folder / "model.pth.tar-1").is_file()
    # in a run's checkpoint stands the epoch
    (out / STATE_FILE).write_text('{"epoch": 12, "step": 24, "best_epoch": 3, "best_metric": 0.5}')
    assert main(["export-checkpoint", str(out), "--out", str(theirs)]) == 0
    assert torch.load(theirs / folder / "model.pth.tar-12")["epoch"] == 12


def test_import_options_on_the_command_line(file, digits, tmp_path, capfd):
    saved(file, "maple", depth=2)
    command = ["import-checkpoint", str(file), "--clip", "tiny-digits", "--classnames", str(digits)]
    options = ["--method", "maple", "--options", "half_prompts=true", "ctx_init=a photo of a"]
    assert main([*command, "--out", str(tmp_path / "model"), *options]) == 0
    assert "half_prompts=true reproduces" not in capfd.readouterr().out
    config = FastPromptedCLIP.load(tmp_path / "model").config
    assert config.half_prompts is True
    assert config.ctx_init == "a photo of a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "/nowhere.pth.tar"}, "no file /nowhere.pth.tar"),
        ({"--clip": "ViT-Q-7"}, "unknown CLIP model 'ViT-Q-7'"),
        ({"--pretrained": "openai"}, "leave it out"),
        ({"--classnames": "/nowhere.txt"}, "cannot read /nowhere.txt"),
        ({"--method": "copo"}, "method='copo'"),
        ({"--method": "maple"}, "the file is of coop"),
        ({"--options": "half"}, "option 'half'; wanted KEY=VALUE"),
        ({"--options": "half_prompts=true"}, "unknown option half_prompts"),
        ({"--options": "n_ctx=7"}, "n_ctx=7; the file's shapes say 4"),
        ({"--outt": "x"}, "--outt"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change, message, file, digits, tmp_path, capfd):
    saved(file, "coop", n_ctx=4)
    given = {"--clip": "tiny-digits", "--classnames": str(digits), "--out": str(tmp_path / "model")} | change
    source = given.pop("file", str(file))
    argv = ["import-checkpoint", source, *(part for pair in given.items() for part in pair)]
    assert message in error_of(capfd, argv)
    assert not (tmp_path / "model").exists()


def test_wrong_folders_and_exports(file, digits, tmp_path, capfd):
    saved(file, "coop", n_ctx=4)
    command = ["import-checkpoint", str(file), "--clip", "tiny-digits", "--classnames", str(digits)]
    assert "--out" in error_of(capfd, command)
    assert "is a file" in error_of(capfd, [*command, "--out", str(file)])
    digits.write_text("one\nzero\ntwo\nthree\n")
    assert "another order" in error_of(capfd, [*command, "--out", str(tmp_path / "model")])
    export = ["export-checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "theirs")]
    assert "does not exist" in error_of(capfd, export)
    clip = load_clip("tiny-digits")
    FastPromptedCLIP.from_loaded(clip, DIGITS).save_pretrained(tmp_path / "paper")
    export[1] = str(tmp_path / "paper")
    assert "preset 'paper'" in error_of(capfd, export)
    assert "--clip too" in error_of(capfd, [*export, "--pretrained", "openai"])
    assert "--epoch" in error_of(capfd, [*export, "--epoch", "last"])
    assert not (tmp_path / "theirs").exists()


def test_class_name_files(tmp_path):
    path = tmp_path / "names"
    path.write_text("\ufeffcat\n\n  snow leopard \r\nstop_sign", encoding="utf-8")
    assert read_classnames(path) == ["cat", "snow leopard", "stop_sign"]
    path.write_text('["cat", "snow leopard", 7]')
    assert read_classnames(path) == ["cat", "snow leopard", "7"]
    path.write_text('["cat", ')
    with pytest.raises(ValueError, match="starts as JSON, but is none"):
        read_classnames(path)
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_classnames(path)


def test_option_texts():
    given = ["half_prompts=true", "n_ctx=4", "ctx_init=a photo of a", "depth=null", 'templates=["a {}."]', "x="]
    assert parse_options(given) == {
        "half_prompts": True,
        "n_ctx": 4,
        "ctx_init": "a photo of a",
        "depth": None,
        "templates": ["a {}."],
        "x": "",
    }
    with pytest.raises(ValueError, match="given twice"):
        parse_options(["a=1", "a=2"])
