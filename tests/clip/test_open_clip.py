"""The adapter of open_clip's models: what it reads, and that it refuses by name what the engine does not compute."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

from upt_fast import FastUPT, ReferenceUPT, UnsupportedModelError
from upt_fast.clip import frozen_clip
from upt_fast.clip.open_clip import SUPPORTED
from upt_fast.testing import random_clip

SMALL = dict(
    embed_dim=32, image_size=16, vision_layers=2, vision_width=64, text_layers=2, text_width=64, vocab_size=100
)


@cache
def _clip(custom_text: bool):
    return random_clip(**SMALL, custom_text=custom_text)


def clip(custom_text: bool = False):
    """A CLIP to be changed."""
    return copy.deepcopy(_clip(custom_text))


def refused(model, *parts: str) -> None:
    """Every way in refuses the model, and says which part and what is supported."""
    for enter in (frozen_clip, lambda m: FastUPT(m, ["cat"]), lambda m: ReferenceUPT(m, ["cat"])):
        with pytest.raises(UnsupportedModelError) as error:
            enter(model)
        message = str(error.value)
        assert message.endswith(SUPPORTED)
        assert all(part in message.removesuffix(SUPPORTED) for part in parts), message
    assert issubclass(UnsupportedModelError, ValueError)


@pytest.mark.parametrize("custom_text", [False, True])
def test_reads_without_copying(custom_text):
    model = clip(custom_text)
    frozen = frozen_clip(model)
    text = model.text if custom_text else model
    pairs = [
        (frozen.text.token_embedding, text.token_embedding.weight),
        (frozen.text.positional_embedding, text.positional_embedding),
        (frozen.text.projection, text.text_projection),
        (frozen.text.blocks[1].fc_weight, text.transformer.resblocks[1].mlp.c_fc.weight),
        (frozen.vision.conv_weight, model.visual.conv1.weight),
        (frozen.vision.blocks[0].in_proj_weight, model.visual.transformer.resblocks[0].attn.in_proj_weight),
        (frozen.vision.projection, model.visual.proj),
        (frozen.logit_scale, model.logit_scale),
    ]
    for got, wanted in pairs:
        assert got.data_ptr() == wanted.data_ptr()
        assert not got.requires_grad
    assert (frozen.text.width, frozen.vision.width) == (64, 64)
    assert (frozen.text.num_heads, frozen.vision.num_heads) == (2, 1)
    context = frozen.text.context
    assert (context.length, context.vocabulary, context.pooling) == (77, 100, "argmax")
    assert frozen.vision.image_size == (16, 16)
    assert frozen.text.activation == frozen.vision.activation == "quick_gelu"
    assert frozen.dtype == torch.float32
    assert frozen.logit_bias is None


@pytest.mark.parametrize(
    ("geometry", "read", "wanted"),
    [
        ({"quick_gelu": False}, lambda f: f.text.activation, "gelu"),
        ({"text": {"pool_type": "eos", "eos_id": 7}}, lambda f: (f.text.pooling, f.text.eos_id), ("eos", 7)),
        ({"text": {"pool_type": "last"}}, lambda f: f.text.pooling, "last"),
        ({"vision": {"pool_type": "avg"}}, lambda f: (f.vision.pooling, f.vision.norm_after_pool), ("avg", False)),
        ({"vision": {"final_ln_after_pool": True}}, lambda f: f.vision.norm_after_pool, True),
        ({"vision": {"no_ln_pre": True}}, lambda f: f.vision.ln_pre, None),
        ({"vision": {"norm_kwargs": {"eps": 0.5}}}, lambda f: (f.vision.ln_post.eps, f.text.ln_final.eps), (0.5, 1e-5)),
        ({"text": {"proj_type": "none"}, "embed_dim": 64}, lambda f: f.text.projection, None),
        ({"text": {"proj_bias": True}}, lambda f: tuple(f.text.projection_bias.shape), (32,)),
        ({"logit_bias": -4.0}, lambda f: float(f.logit_bias), -4.0),
        ({"text": {"ls_init_value": 0.1}}, lambda f: f.text.blocks[0].ls_1.shape[0], 64),
        ({"image_size": (16, 24)}, lambda f: f.vision.image_size, (16, 24)),
    ],
)
@pytest.mark.parametrize("custom_text", [False, True])
def test_reads_options(custom_text, geometry, read, wanted):
    assert read(frozen_clip(random_clip(**(SMALL | geometry), custom_text=custom_text))) == wanted


def test_norms_in_float32_are_read():
    from open_clip.transformer import LayerNormFp32

    model = clip()
    model.ln_final = LayerNormFp32(64, eps=0.25)
    assert frozen_clip(model).text.ln_final.eps == 0.25


# refused models as open_clip builds them


def test_resnet():
    model = random_clip(**SMALL)
    from open_clip.modified_resnet import ModifiedResNet

    model.visual = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=32, heads=2, image_size=32, width=8)
    refused(model, "image tower", "ModifiedResNet")


class TimmModel(nn.Module):
    """Stands for open_clip's, which has a trunk and a head and no CLIP blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Conv2d(3, 8, 4), nn.Linear(8, 32)


def test_timm():
    model = clip()
    model.visual = TimmModel()
    refused(model, "image tower", "TimmModel")


class HFTextEncoder(nn.Module):
    """Stands for open_clip's, whose Hugging Face model is called transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.proj = nn.Linear(4, 4), nn.Linear(4, 32)


def test_hugging_face_text():
    model = clip(custom_text=True)
    model.text = HFTextEncoder()
    refused(model, "text tower", "HFTextEncoder")


def test_coca():
    model = clip(custom_text=True)
    model.text_decoder = nn.Linear(2, 2)
    refused(model, "CoCa", "CustomTextCLIP")


def test_class_embedding_in_the_text():
    model = random_clip(**SMALL, custom_text=True, text={"embed_cls": True})
    refused(model, "text tower", "class embedding")


@pytest.mark.parametrize("kind", [True, "parallel"])
def test_attentional_pooling(kind):
    vision = {"attentional_pool": kind, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
    refused(random_clip(**SMALL, vision=vision), "image pooling", "attentional")


def test_patch_dropout_in_training_mode():
    model = random_clip(**SMALL, vision={"patch_dropout": 0.5})
    assert frozen_clip(model).vision.pooling == "tok"  # in eval mode it does nothing
    refused(model.train(), "patch_dropout=0.5", ".eval()")


@pytest.mark.parametrize("custom", ["qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn", "scale_fc"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_custom_blocks(tower, custom):
    where = {"vision": "image block 0", "text": "text block 0"}[tower]
    model = random_clip(**SMALL, **{tower: {"block_type": "custom", custom: True}})
    refused(model, where, "CustomResidualAttentionBlock")


def test_text_that_is_not_causal():
    refused(random_clip(**SMALL, custom_text=True, text={"no_causal_mask": True}), "not causal", "TextTransformer")


@pytest.mark.parametrize("edit", [lambda m: m[1, 2].zero_(), lambda m: m.mul_(0), lambda m: m[3, 2].fill_(-1.0)])
def test_another_mask(edit):
    model = clip()
    with torch.no_grad():
        edit(model.attn_mask)
    refused(model, "attn_mask", "(77, 77)", "not the causal mask")


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("pooling", ["first", "none"])
def test_text_pooling(pooling, custom_text):
    refused(random_clip(**SMALL, custom_text=custom_text, text={"pool_type": pooling}), "text pooling", repr(pooling))


def test_image_pooling():
    refused(random_clip(**SMALL, vision={"pool_type": "none"}), "image pooling", "'none'")


# refused changes of a supported model


def edit_block(name):
    def edit(model):
        block = model.visual.transformer.resblocks[1]
        if name == "norm":
            block.ln_1 = nn.GroupNorm(1, 64)
        elif name == "activation":
            block.mlp.gelu = nn.SiLU()
        elif name == "heads":
            block.attn.num_heads = 2
        elif name == "activations":
            block.mlp.gelu = nn.GELU()
        elif name == "hidden":
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(64, 32), nn.Linear(32, 64)
        elif name == "linear":
            block.mlp.c_fc = nn.Sequential(nn.Linear(64, 256))
        elif name == "dropout":
            block.attn.dropout = 0.1
        elif name == "zero":
            block.attn.add_zero_attn = True
        elif name == "widths":
            block.attn = nn.MultiheadAttention(64, 1, kdim=32, vdim=32)
        elif name == "scale":
            block.ls_1 = nn.Linear(64, 64)

    return edit


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("norm", ["norm at image block 1", "GroupNorm"]),
        ("activation", ["activation at image block 1", "SiLU", "QuickGELU"]),
        ("heads", ["image transformer", "differ"]),
        ("activations", ["image transformer", "differ"]),
        ("hidden", ["image transformer", "differ"]),
        ("linear", ["linear layer at image block 1", "Sequential"]),
        ("dropout", ["image block 1", "dropout"]),
        ("zero", ["image block 1", "zero attention"]),
        ("widths", ["image block 1", "key/value widths"]),
        ("scale", ["layer scale at image block 1", "Linear"]),
    ],
)
def test_changed_blocks(name, parts):
    model = clip()
    edit_block(name)(model)
    refused(model, *parts)


def test_no_blocks():
    model = clip()
    model.transformer.resblocks = nn.ModuleList()
    refused(model, "text transformer", "no residual blocks")


def test_overlapping_patches():
    model = clip()
    model.visual.conv1 = nn.Conv2d(3, 64, 8, stride=4, bias=False)
    refused(model, "patch embedding", "(4, 4)", "(8, 8)")
    model.visual.conv1 = nn.Conv2d(3, 64, 8, stride=8, padding=1, bias=False)
    refused(model, "patch embedding", "padding (1, 1)")


def test_positions_of_another_grid():
    model = clip()
    model.visual.image_size = (24, 16)
    refused(model, "5 positions for 6 patches")


def test_features_of_other_widths():
    model = clip()
    model.text_projection = nn.Parameter(torch.zeros(64, 48))
    refused(model, "width 48", "width 32")


def test_several_scales():
    model = clip()
    model.logit_scale = nn.Parameter(torch.zeros(3))
    refused(model, "logit_scale", "(3,)")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
def test_things_that_are_no_clip():
    refused(nn.Linear(2, 2), "Linear", ".visual")
    refused(None, "NoneType")
    refused("ViT-B-16", "str")
    refused(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "TorchScript")


def test_eos_without_an_id():
    model = random_clip(**SMALL, text={"pool_type": "eos"})
    model.text_eos_id = None
    refused(model, "'eos' without an eos_id")
