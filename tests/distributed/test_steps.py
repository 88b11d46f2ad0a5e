"""Steps divided over 2 and 4 processes are those of one, in float64, also where nothing divides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upt_fast import DistributedStep, FastPromptedCLIP
from upt_fast.clip.tokens import clip_tokenizer
from upt_fast.common.closeness import max_error
from upt_fast.distributed import ONE_PROCESS
from upt_fast.engine.towers import groups
from upt_fast.methods import BUILTIN_METHODS
from upt_fast.testing import random_clip

WORKER = Path(__file__).with_name("steps_worker.py")
CLOSE = 1e-10


# of four processes: one class each or none, one image each or none
FOR_FOUR = ("upt_dropout", "coop_csc", "kgcoop_parts", "cocoop", "maple_half", "vpt_deep", "terms", "terms_by_image")
FOR_FOUR += ("one_image", "two_classes", "one_image_by_image", "one_image_two_classes")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "cases"), [(2, ()), (4, FOR_FOUR)], ids=["2", "4"])
def test_every_method(tmp_path, count, cases):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run([*command, str(WORKER), str(file), *cases], capture_output=True, text=True, timeout=300)
    assert file.exists(), done.stderr
    found = json.loads(file.read_text())
    assert set(found) >= set(cases or BUILTIN_METHODS)
    assert {name: error for name, error in found.items() if isinstance(error, str) or error > CLOSE} == {}


def small_clip():
    return random_clip(
        embed_dim=32, image_size=16, vision_layers=2, vision_width=64, text_layers=2, text_width=64, text_heads=1
    ).double()


@pytest.fixture
def model():
    return FastPromptedCLIP(small_clip(), ["cat", "golden_retriever", "dog"], tokenizer=clip_tokenizer(), dropout=0.0)


def test_shares_of_classes(model):
    (packed,) = model.packed
    for count in (1, 2, 3, 4, 7):
        shares = groups.shares(packed, count)
        assert len(shares) == count
        assert [first for first, _ in shares] == [0, *(end for _, end in shares[:-1])]
        assert shares[-1][1] == 3


def test_shares_of_images():
    assert ONE_PROCESS.sizes(5) == [5]
    assert ONE_PROCESS.share(5) == slice(0, 5)


def test_one_process(model):
    """The same code alone, where gradients are there already."""
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2, 1, 0])
    loss, logits = model.loss_and_logits(images, labels)
    (2 * loss).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    step = DistributedStep(model)
    for _ in range(2):
        found = step.backward(images, labels)
    assert max_error(found[0], loss) <= 1e-12
    assert max_error(found[1], logits) <= 1e-12
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert max_error(parameter.grad, grad) <= 1e-12


@pytest.mark.parametrize(
    ("count", "labels", "more", "message"),
    [
        (4, 3, {}, r"labels of shape \(3,\) for 4 images; wanted as many"),
        (4, 4, {"sizes": [3]}, r"sizes=\[3\] for 4 images of process 0 of 1 and 4 labels"),
        (0, 0, {}, "no process has an image; wanted at least 1"),
        (None, 4, {}, "neither images nor image_features"),
    ],
)
def test_refusals(model, count, labels, more, message):
    images = None if count is None else torch.zeros(count, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        DistributedStep(model).backward(images, torch.zeros(labels, dtype=torch.int64), **more)
