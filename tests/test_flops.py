"""The counted cost of a step, against torch's own count of the products that run."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from upt_fast import FastPromptedCLIP, MethodConfig, PromptLearner, Prompts, ReferencePromptedCLIP
from upt_fast.cli import main
from upt_fast.clip import frozen_clip
from upt_fast.clip.loading import clip_without_weights
from upt_fast.engine.flops import Flops
from upt_fast.engine.tuning import choices
from upt_fast.methods import BUILTIN_METHODS, find_method, list_methods
from upt_fast.testing import random_clip
from upt_fast.tools.step_cost import CPU_ATTENTION, step_cost

NAMES = ["cat", "dog", "golden retriever", "snow leopard", "a rather long class name"]
B = 3


@pytest.fixture(scope="module")
def clip(tokenizer):
    return random_clip(vision_layers=4, text_width=64, text_heads=1).double()


def counted(model, images, batch=B) -> Flops:
    """What torch counts.

    Attention on a CPU is registered by CPU_ATTENTION, at 4 products in backward as everywhere else.
    """
    labels = torch.arange(batch) % len(NAMES)
    model.train()
    with torch.no_grad():
        model.encode_text(images=images)  # fixed texts are encoded once, before the first step
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss = F.cross_entropy(model(images), labels)
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return Flops(forward, counter.get_total_flops() - forward)


CASES = [
    ("upt", {"preset": "paper"}),
    ("upt", {"depth_text": 2, "depth_vision": 3, "n_visual": 5}),
    ("upt", {"depth_text": 1, "depth_vision": 1, "class_token_position": "middle"}),
    ("upt", {"joint": True, "class_token_position": "front"}),
    ("coop", {}),
    ("coop", {"n_ctx": 3, "class_token_position": "middle"}),
    ("coop", {"n_ctx": 3, "class_specific": True}),
    ("cocoop", {"ctx_init": "a photo of a"}),
    ("vpt_shallow", {}),
    ("vpt_deep", {"templates": "imagenet_select"}),
    ("maple", {"depth": 2}),
    ("maple", {"depth": 3, "half_prompts": True}),
    ("ivlp", {"depth_vision": 0}),
    ("mvpt", {"depth": 2, "half_prompts": True}),
    ("zeroshot", {}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values())).replace(' ', '_')}" for name, options in CASES]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_counts_are_torch_s(clip, name, options):
    method = find_method(name)
    config = method.config.from_options(options)
    cost = step_cost(frozen_clip(clip), NAMES, method, config, B)
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    fast = FastPromptedCLIP(clip, NAMES, method=name, config=config)
    assert cost.parameters == sum(p.numel() for p in fast.parameters())
    assert cost.engine == counted(fast, images)
    plain = counted(ReferencePromptedCLIP(clip, NAMES, method=name, config=config), images)
    # within a percent: UPT's reference maps other rows of its prompts than the learner does. Without visual prompts
    # open_clip's attention is one fused call, which torch does not see
    unseen = 0 if cost.depth_vision else _attention_blocks(clip)
    assert cost.plain.forward == pytest.approx(plain.forward + unseen, rel=0.01)
    assert cost.plain.backward == pytest.approx(plain.backward, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ways", ["usual", "measured"])
@pytest.mark.parametrize(("name", "options"), [CASES[i] for i in (1, 4, 9)], ids=[IDS[i] for i in (1, 4, 9)])
def test_whoever_multiplies_is_counted(tokenizer, name, options, ways, dtype, monkeypatch, tmp_path):
    """A CLIP that is wide enough for the compiled operations, where there are some; oneDNN's product."""
    monkeypatch.setenv("UPT_FAST_MEASURE", "1" if ways == "measured" else "0")
    choices.forget()
    try:
        clip = random_clip(vision_layers=4, vision_width=256, text_width=256).to(dtype)
        method = find_method(name)
        config = method.config.from_options(options)
        fast = FastPromptedCLIP(clip, NAMES, method=name, config=config)
        cost = step_cost(frozen_clip(clip), NAMES, method, config, B)
        assert cost.engine == counted(fast, torch.randn(B, 3, 32, 32, dtype=dtype))
    finally:
        choices.forget()


def _attention_blocks(clip) -> int:
    """Attention with its projections in the plain image tower, forward."""
    rows, width, layers = 17, 128, 4
    return layers * B * rows * (2 * width * 4 * width + 4 * rows * width)


@pytest.mark.parametrize(
    "geometry",
    [
        {"vision": {"pool_type": "avg"}},
        {"vision": {"pool_type": "avg", "final_ln_after_pool": True}, "custom_text": True},
        {"vision_layers": 1, "text_layers": 1},
        {"image_size": 48, "patch_size": 16, "vision_width": 192, "embed_dim": 32, "context_length": 32},
    ],
    ids=["avg", "avg_then_norm", "one_layer", "odd"],
)
def test_other_towers(geometry, tokenizer):
    clip = random_clip(**geometry).double()
    method = find_method("upt")
    config = method.config.from_options({})
    cost = step_cost(frozen_clip(clip), NAMES, method, config, B)
    size = geometry.get("image_size", 32)
    images = torch.randn(B, 3, size, size, dtype=torch.float64)
    assert cost.engine == counted(FastPromptedCLIP(clip, NAMES), images)
    plain = counted(ReferencePromptedCLIP(clip, NAMES), images)
    assert (cost.plain.forward, cost.plain.backward) == pytest.approx((plain.forward, plain.backward), rel=0.01)


def test_groups_of_images_run_again(clip):
    method = find_method("cocoop")
    config = method.config.from_options({})
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    at_once = step_cost(frozen_clip(clip), NAMES, method, config, B).engine
    grouped = step_cost(frozen_clip(clip), NAMES, method, config, B, text_batch=2).engine
    assert grouped == counted(FastPromptedCLIP(clip, NAMES, method="cocoop", text_batch=2), images)
    assert grouped.backward > at_once.backward
    # the engine's own choice for a large batch
    model = FastPromptedCLIP(clip.float(), NAMES, method="cocoop")
    clip.double()
    batch = 4 * model._group(10**6)
    many = step_cost(frozen_clip(clip), NAMES, method, config, batch).engine
    assert many.backward / batch == pytest.approx(grouped.backward / B, rel=0.05)


class OwnConfig(MethodConfig):
    pass


class OwnMethod(PromptLearner):
    """Visual prompts beside a text without prompts or template, which every step encodes."""

    method = "own_flops"
    config_class = OwnConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.rows = torch.nn.Parameter(torch.zeros(2, setting.vision_width))

    def forward(self):
        return Prompts(visual=self.rows[None, None])


def test_a_method_from_outside(clip):
    cost = step_cost(frozen_clip(clip), NAMES, find_method(OwnMethod), OwnConfig(), B)
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    assert cost.engine == counted(FastPromptedCLIP(clip, NAMES, method=OwnMethod), images)
    assert (cost.depth_text, cost.depth_vision) == (0, 1)


def test_table(capsys):
    assert main(["methods", "--clip", "tiny-digits", "--classes", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size"] == 32
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == list_methods()
    assert set(BUILTIN_METHODS) <= set(rows)
    assert rows["coop"]["prompted_layers"] == {"text": 1, "image": 0}
    assert rows["coop"]["parameters"] == 16 * 128
    assert rows["zeroshot"]["flops"]["plain"]["backward"] == 0
    assert "depth=9; this CLIP's tower has 3 layers" in rows["maple"]["error"]
    assert rows["maple"]["source"] == "arXiv 2210.03117"
    assert main(["methods", "--clip", "tiny-digits", "--classes", "5", "--batch-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["method", "title", "parameters"]
    assert [line.split()[0] for line in lines[1 : 1 + len(rows)]] == list(rows)
    assert "CoOp" in lines[2]


def test_geometry_of_a_name_needs_no_weights(tokenizer):
    clip, _ = clip_without_weights("ViT-B-16")
    assert clip.vision.conv_weight.device.type == "meta"
    method = find_method("upt")
    cost = step_cost(clip, NAMES, method, method.config.from_options({}), 2)
    # eight prompts in each of 12 layers, and the shared transform
    transform = 4 * (512 * 512 + 512) + 2 * (512 * 512 + 512) + 4 * 512 + 512 * 768 + 768
    assert cost.parameters == 12 * 8 * 512 + transform
    assert cost.plain.total > cost.engine.total


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clip", "ViT-Q-7"], "unknown CLIP model 'ViT-Q-7'; did you mean"),
        (["--clip", "RN50"], "unsupported"),
        (["--clip", "roberta-ViT-B-32"], "unsupported text tower: HFTextEncoder"),
        (["--classes", "0"], "classes=0"),
        (["--classes", "2000"], "count=2000"),
        (["--batch-size", "-1"], "batch_size=-1"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(capfd, argv, message):
    capfd.readouterr()
    assert main(["methods", *argv]) == 2
    err = capfd.readouterr().err
    assert err.startswith("upt-fast: error: ")
    assert err.count("\n") == 1
    assert message in err
