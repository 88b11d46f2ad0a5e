"""What can be asked for: how it is written, read and refused."""

from __future__ import annotations

import pytest
import torch

from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import TORCH, UNASKED, Asked, AskedOfTowers
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.regions import Regions
from upt_fast.engine.towers.rows import Rows
from upt_fast.engine.towers.streams import ReservedStreams, Streams


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("auto", "auto"),
        ("torch", "torch"),
        ("triton, torch", "triton,torch"),
        ("triton,triton", "triton"),
        ("linear_gelu=torch,triton", "triton,linear_gelu=torch"),
        ("triton,linear_gelu = torch,activation=torch", "triton,activation=torch,linear_gelu=torch"),
        ("packed_attention=triton", "auto,packed_attention=triton"),
        ("torch/triton", "torch/triton"),
        ("triton / triton", "triton"),
        ("auto/triton,linear_gelu=torch", "auto/triton,linear_gelu=torch"),
    ],
)
def test_normal_form(text, normal):
    """Equal texts for what is equal, which say it again."""
    asked = AskedOfTowers.of(text)
    assert str(asked) == normal
    assert AskedOfTowers.of(normal) == asked


def test_parts():
    asked = AskedOfTowers.of("triton,xformers,linear_gelu=torch/torch")
    assert asked == (Asked(("triton", "xformers"), (("linear_gelu", "torch"),)), TORCH)
    assert asked.images.wanted("linear_gelu") == ("torch",)
    assert asked.images.wanted("layer_norm") == ("triton", "xformers")
    assert asked.images.everyone == ("triton", "xformers", "torch")
    assert AskedOfTowers.of("auto") == (UNASKED, UNASKED)
    assert UNASKED.wanted("layer_norm") == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fpga", "no backend 'fpga'"),
        ("triton,fpga", "no backend 'fpga'"),
        ("triton;xformers", "no backend 'triton;xformers'"),
        (",", "'' in ',' names no backend"),
        ("torch,", "'' in 'torch,' names no backend"),
        ("torch/", "'' in '' names no backend"),
        ("torch/torch/torch", "has 3 parts; wanted one, or IMAGES/TEXTS"),
        ("auto,torch", "'auto' stands beside other backends in 'auto,torch'"),
        ("torch,liner=torch", "no op 'liner': there are prompt_transform, "),
        ("torch,layer_norm=fpga", "no backend 'fpga'"),
        ("torch,layer_norm=", "'layer_norm=' in 'torch,layer_norm=' names no backend"),
        ("layer_norm=xformers", "xformers has no implementation of layer_norm: triton, torch have"),
        ("torch,activation=torch,activation=triton", "names two backends for activation"),
    ],
)
def test_what_cannot_be_read(text, why):
    with pytest.raises(ValueError) as caught:
        dispatch.resolve(text)
    message = str(caught.value)
    assert message.startswith(f"backend={text!r}: ")
    assert why in message
    assert "; wanted 'auto', one of 'triton', " in message
    assert message.endswith("OP=NAME among them, and IMAGES/TEXTS where the towers take different ones")


def test_a_tower_takes_no_slash():
    with pytest.raises(ValueError, match="no backend 'torch/triton'"):
        dispatch.read("torch/triton")


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("auto", Rows),
        ("torch", Rows),
        ("compiled", Rows),
        ("packed_attention=triton", Rows),
        ("torch,prefix_attention=triton", Rows),
        ("flash", Rows),
        ("auto,prefix_attention=cudnn", Rows),
        ("inductor", Regions),
        ("inductor,packed_attention=triton", Regions),
        ("flash,triton", Streams),
        ("varlen", ReservedStreams),
        ("flash,varlen", ReservedStreams),
        ("flash_attn", ReservedStreams),
        ("triton", Streams),
        ("torch,triton", Streams),
        ("auto,add_layer_norm=triton", Streams),
        ("triton,linear_gelu=torch", Streams),
        ("xformers", ReservedStreams),
        ("triton,xformers", ReservedStreams),
        ("torch,buffer_attention=xformers", ReservedStreams),
    ],
)
def test_routes(text, route):
    asked = Asked.of(text)
    found = routes.choose(asked)
    assert type(found) is route
    assert found.asked == asked
    assert found.packs == (text in ("auto", "compiled", "packed_attention=triton", "auto,prefix_attention=cudnn"))


@pytest.mark.parametrize(
    ("text", "whole", "other"),
    [
        ("compiled,triton", "compiled", "triton"),
        ("torch,compiled", "compiled", "torch"),
        ("inductor,triton", "inductor", "triton"),
        ("varlen,inductor,flash", "inductor", "varlen,flash"),
    ],
)
def test_who_computes_whole_layers_is_named_alone(text, whole, other):
    with pytest.raises(ValueError) as caught:
        routes.check(AskedOfTowers.of(text))
    assert f"backend='{text}': {whole} computes whole layers and leaves {other} nothing to do" in str(caught.value)
    assert f"'{whole}/{other}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("torch,linear_gelu=triton", "contrastive_loss, packed_attention, prefix_attention, prompt_transform"),
        ("triton,stream_attention=torch", "layer_norm, linear_gelu, packed_attention, prefix_attention"),
        ("xformers,packed_attention=triton", "insert_shared, layer_norm"),
        ("torch,packed_attention=torch/torch", "contrastive_loss, prefix_attention, prompt_transform"),
        ("torch/torch,prompt_transform=triton", "wanted one of packed_attention"),
    ],
)
def test_an_op_that_a_route_does_not_have(text, wanted):
    with pytest.raises(ValueError, match="changes nothing, for this route does not have") as caught:
        routes.check(AskedOfTowers.of(text))
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "text", ["triton,linear_gelu=torch", "torch,packed_attention=triton", "torch,contrastive_loss=triton/triton"]
)
def test_an_op_that_a_route_has(text):
    routes.check(AskedOfTowers.of(text))


def test_the_safe_route(monkeypatch):
    monkeypatch.delenv("UPT_FAST_CPU_OPS", raising=False)
    narrow, wide = (128, 2), (512, 8)
    assert dispatch.safe("cuda", torch.float32, wide, wide) == "torch"
    assert dispatch.safe("cpu", torch.float64, wide, wide) == "torch"
    runs = not dispatch.refusals("compiled", "cpu", torch.float32)
    best = "compiled" if runs else "torch"
    assert dispatch.safe("cpu", torch.float32, wide, wide) == best
    assert dispatch.safe("cpu", torch.float32, narrow, narrow) == "torch"
    assert dispatch.safe("cpu", torch.float32, narrow, wide) == ("torch/compiled" if runs else "torch")
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "0")
    assert dispatch.safe("cpu", torch.float32, wide, wide) == "torch"
