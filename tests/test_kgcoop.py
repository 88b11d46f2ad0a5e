"""KgCoOp on the engine against its plain twin and against its equation, its published files, and a run."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from upt_fast import FastPromptedCLIP, ReferencePromptedCLIP
from upt_fast.cli import main
from upt_fast.clip.loading import load_clip
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error
from upt_fast.methods import find_method
from upt_fast.methods.kgcoop import KgCoOpConfig
from upt_fast.released import checkpoint_path, export_checkpoint, import_checkpoint, read_released, released_settings
from upt_fast.testing import random_clip, write_vectors
from upt_fast.tools.verify import run_verify

NAMES = ["cat", "golden_retriever", "hard-leaved pocket orchid", "dog"]
DIGITS = ["zero", "one", "two", "three"]
SMALL = dict(embed_dim=32, image_size=16, vision_layers=2, vision_width=64, text_layers=3, text_width=64, text_heads=2)
OPTIONS = {
    "words": {},
    "random": {"ctx_init": None, "n_ctx": 3, "weight": 1.5},
    "templates": {"templates": ["a photo of a {}, a type of pet.", "itap of a {}."]},
    "middle": {"ctx_init": None, "n_ctx": 3, "class_token_position": "middle"},
    "per_class": {"ctx_init": None, "n_ctx": 2, "class_specific": True, "weight": 0.25},
    "no_weight": {"weight": 0},
}


def pair(options, **more):
    torch.manual_seed(0)
    clip = random_clip(**SMALL).double()
    arguments = dict(method="kgcoop", tokenizer=clip_tokenizer(), **options)
    reference = ReferencePromptedCLIP(clip, NAMES, **arguments).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fast = FastPromptedCLIP(clip, NAMES, **arguments, **more).eval()
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=generator), torch.tensor([0, 3, 1, 1, 2])


def with_gradients(model, loss):
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_reference(options, memory):
    reference, fast = pair(options, memory=memory)
    images, labels = batch()
    assert max_error(fast(images), reference(images)) <= 1e-12
    wanted = with_gradients(reference, reference.loss(images, labels))
    for loss in (fast.loss(images, labels), fast.loss_and_logits(images, labels)[0]):
        for ours, theirs in zip(with_gradients(fast, loss), wanted, strict=True):
            assert max_error(ours, theirs) <= 1e-11


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_equation(options):
    """Written out with CoOp of the same words and with zero-shot CLIP of the same templates."""
    reference, fast = pair(options)
    clip, (images, labels) = reference.clip_model, batch()
    coop_options = {k: v for k, v in reference.config.to_dict().items() if k not in ("weight", "templates")}
    coop = ReferencePromptedCLIP(clip, NAMES, method="coop", tokenizer=clip_tokenizer(), **coop_options)
    coop.load_state_dict(reference.state_dict())
    fixed = ReferencePromptedCLIP(
        clip, NAMES, method="zeroshot", tokenizer=clip_tokenizer(), templates=reference.config.templates
    )
    w, w_0 = coop.encode_text(), fixed.encode_text()
    distance = 1 - F.cosine_similarity(w, w_0).mean()
    wanted = with_gradients(coop, F.cross_entropy(coop(images), labels) + reference.config.weight * distance)
    for model in (reference, fast):
        for ours, theirs in zip(with_gradients(model, model.loss(images, labels)), wanted, strict=True):
            assert max_error(ours, theirs) <= 1e-11
    assert float(distance.detach()) > 1e-3


def test_other_classes_have_other_fixed_texts():
    models = pair({})
    images, labels = batch()
    before = [model.loss(images, labels) for model in models]
    for model in models:
        model.set_classnames(["spoon", "fork", "knife", "cup", "plate"])
    assert max_error(*(model.loss(images, labels) for model in models)) <= 1e-12
    for model in models:
        model.set_classnames(NAMES)
    assert max_error(models[0].loss(images, labels), before[0]) <= 1e-13
    assert max_error(models[1].loss(images, labels), before[1]) <= 1e-13


def test_in_half_precision():
    reference, _ = pair({})
    images, labels = batch()
    wanted = float(reference.loss(images, labels).detach())
    state = reference.state_dict()
    clip = random_clip(**SMALL).bfloat16()
    for kind in (ReferencePromptedCLIP, FastPromptedCLIP):
        model = kind(clip, NAMES, method="kgcoop", tokenizer=clip_tokenizer())
        model.load_state_dict(state)
        loss = model.loss(images.bfloat16(), labels).detach()
        assert loss.dtype == torch.float32
        assert abs(float(loss) - wanted) <= 0.05 * wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"weight=-1\.0; wanted a number of at least 0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"weight": True}, "weight=True"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"templates": "a photo"}, "template 'a photo'"),
        ({"class_token_position": "back"}, "class_token_position='back'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KgCoOpConfig(**options)


# the published code's files


def published(rows=4, width=128, **more):
    """What its trainer saves of the prompt learner, but for the token buffers."""
    torch.manual_seed(2)
    state = {"ctx": torch.randn(rows, width), "bias_vectors": torch.randn(1, 512)}
    return state | {"meta_net.linear1.weight": torch.randn(512, 512), "meta_net.linear1.bias": torch.randn(512)} | more


def test_import(tmp_path):
    clip, path = load_clip("tiny-digits"), tmp_path / "model.pth.tar-100"
    width = FastPromptedCLIP.from_loaded(clip, DIGITS, method="coop").prompt_learner.ctx.shape[1]
    torch.save({"state_dict": published(width=width), "epoch": 100}, path)
    found = read_released(path, clip, DIGITS)
    assert found.model.method == "kgcoop"
    assert set(found.unused) == published().keys() - {"ctx"}
    assert torch.equal(found.model.prompt_learner.ctx, published(width=width)["ctx"])
    assert found.model.config == KgCoOpConfig()
    torch.save({"state_dict": published(16, width)}, path)
    config = import_checkpoint(path, clip, DIGITS, templates="a photo of the digit {}.").config
    assert (config.n_ctx, config.ctx_init, config.templates) == (16, None, "a photo of the digit {}.")
    with pytest.raises(ValueError, match="has 4 words"):
        import_checkpoint(path, clip, DIGITS, ctx_init="a photo of a")


def test_export_and_back(tmp_path):
    clip = load_clip("tiny-digits")
    model = FastPromptedCLIP.from_loaded(clip, DIGITS, method="kgcoop", weight=4.0)
    path = export_checkpoint(model, checkpoint_path(tmp_path, "kgcoop", 100), 100)
    assert path == tmp_path / "prompt_learner" / "model.pth.tar-100"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"ctx"}
    lines = "\n".join(released_settings(model))
    for setting in ("trainer KgCoOp", "COOP.N_CTX 4", "COOP.CTX_INIT ''", "COOP.W 4.0"):
        assert setting in lines
    again = import_checkpoint(path, clip, DIGITS, "kgcoop", weight=4.0)
    assert torch.equal(again.prompt_learner.ctx, model.prompt_learner.ctx)
    assert again.config == model.config
    assert import_checkpoint(path, clip, DIGITS, "coop").method == "coop"
    middle = FastPromptedCLIP.from_loaded(clip, DIGITS, method="kgcoop", class_token_position="middle")
    with pytest.raises(ValueError, match="cannot be exported: class_token_position='middle'"):
        export_checkpoint(middle, path)


# files of vectors, runs


def test_vectors_are_recorded_and_verified(tmp_path, capsys):
    geometry = dict(
        embed_dim=32, image_size=16, patch_size=8, vision_layers=2, vision_width=64, text_layers=2, text_width=64
    )
    write_vectors(tmp_path, "kg", KgCoOpConfig(), NAMES, geometry, method="kgcoop")
    assert run_verify(tmp_path) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "kg.json").read_text())
    sidecar["options"]["weight"] = 7.0  # another loss than the recorded one
    (tmp_path / "kg.json").write_text(json.dumps(sidecar))
    assert run_verify(tmp_path) == 1


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(10 * label + i).integers(0, 99, (34, 34, 3), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(150 * label)).save(root / name / f"{i}.png")
    return root


def test_a_run(tmp_path, data):
    options = ["--clip", "tiny-digits", "--shots", "2", "--epochs", "2", "--batch-size", "2", "--seed", "3"]
    options += ["--ctx-init", "null"]  # random, for these words start where the fixed texts are
    losses = {}
    for weight in ("0", "8"):
        out = tmp_path / f"weight{weight}"
        command = ["train", "--method", "kgcoop", "--weight", weight, "--data", str(data), "--out", str(out), *options]
        assert main(command) == 0
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[weight] = metrics[0]["loss"]
        assert main(["eval", "--checkpoint", str(out), "--data", str(data)]) == 0
    assert losses["8"] > losses["0"] + 1e-3
    model = FastPromptedCLIP.load(tmp_path / "weight8" / "last")
    assert model.config.weight == 8.0
    assert find_method("kgcoop").recipe == "kgcoop"
