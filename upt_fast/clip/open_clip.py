"""open_clip's ``CLIP`` and ``CustomTextCLIP`` with a ViT and a causal text tower -> :class:`FrozenCLIP`.

Read by attribute, so that any module laid out like open_clip's is taken and open_clip itself need not be imported.
Whatever the engine would compute differently from the model is refused by name; nothing is approximated.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from upt_fast.clip.frozen import (
    TEXT_POOLINGS,
    VISION_POOLINGS,
    FrozenBlock,
    FrozenCLIP,
    FrozenNorm,
    FrozenText,
    FrozenVision,
)

SUPPORTED = (
    "supported: open_clip CLIP and CustomTextCLIP with a VisionTransformer (ResidualAttentionBlock; QuickGELU, GELU or "
    "tanh GELU; LayerScale; with or without ln_pre; tok or avg pooling) and a causal TextTransformer "
    "(argmax, eos or last pooling), for example ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336, ViT-H-14, ViT-g-14"
)


class UnsupportedModelError(ValueError):
    """The model has a part that the engine does not compute."""


def refuse(part: str, got: str) -> NoReturn:
    raise UnsupportedModelError(f"unsupported {part}: {got}; {SUPPORTED}")


def frozen_clip(model: Any) -> FrozenCLIP:
    """Describe an open_clip model; its weights are referred to, not copied.

    Args:
        model: open_clip ``CLIP`` or ``CustomTextCLIP``, any device, weights in one floating dtype (LayerNorms,
            embeddings and logit_scale may be float32 beside half-precision linears, as open_clip's ``fp16`` has them).
    Raises:
        UnsupportedModelError: a part is not supported; the message names it and what is supported.
    """
    if isinstance(model, torch.jit.ScriptModule):
        refuse("model", "a TorchScript archive (load it without jit)")
    if not isinstance(model, nn.Module):
        refuse("model", f"{type(model).__name__} is not a torch.nn.Module")
    visual: Any = getattr(model, "visual", None)
    if visual is None or not hasattr(model, "logit_scale"):
        refuse("model", f"{type(model).__name__} has no .visual or no .logit_scale")
    if hasattr(model, "text_decoder"):
        refuse("model", f"{type(model).__name__} (CoCa: a captioning decoder and attentional pooling)")
    text = _text(getattr(model, "text", model), model)
    vision = _vision(visual)
    text_dim = text.width if text.projection is None else text.projection.shape[1]
    vision_dim = vision.width if vision.projection is None else vision.projection.shape[1]
    if text_dim != vision_dim:
        refuse("model", f"text features of width {text_dim} beside image features of width {vision_dim}")
    logit_scale: Any = model.logit_scale
    logit_bias: Any = getattr(model, "logit_bias", None)
    return FrozenCLIP(
        text=text,
        vision=vision,
        logit_scale=_scalar(logit_scale, "logit_scale"),
        logit_bias=None if logit_bias is None else _scalar(logit_bias, "logit_bias"),
    )


def _scalar(value: Tensor, name: str) -> Tensor:
    if value.numel() != 1:
        refuse(name, f"shape {tuple(value.shape)}, one number wanted")
    return value.detach().reshape(())


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _norm(module: Any, where: str) -> FrozenNorm:
    if not isinstance(module, nn.LayerNorm):
        refuse(f"norm at {where}", f"{type(module).__name__} (LayerNorm and LayerNormFp32 are supported)")
    return FrozenNorm(_detached(module.weight), _detached(module.bias), float(module.eps))


def _activation(module: Any, where: str) -> str:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    refuse(f"activation at {where}", f"{type(module).__name__} (QuickGELU, GELU and tanh GELU are supported)")


def has_quick_gelu(model: Any) -> bool | None:
    """Whether the MLPs of an open_clip model, or of its description, have QuickGELU; None: the towers differ.

    Args:
        model: what :func:`frozen_clip` takes or returns.
    """
    clip = model if isinstance(model, FrozenCLIP) else frozen_clip(model)
    quick = {tower.activation == "quick_gelu" for tower in (clip.text, clip.vision)}
    return quick.pop() if len(quick) == 1 else None


def _layer_scale(module: Any, where: str) -> Tensor | None:
    if isinstance(module, nn.Identity):
        return None
    if not hasattr(module, "gamma"):
        refuse(f"layer scale at {where}", type(module).__name__)
    return module.gamma.detach()


def _linear(module: Any, where: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        refuse(f"linear layer at {where}", f"{type(module).__name__} (floating-point nn.Linear is supported)")
    return module.weight.detach(), _detached(module.bias)


def _blocks(transformer: Any, where: str) -> tuple[tuple[FrozenBlock, ...], int, str]:
    blocks, heads, activations = [], set(), set()
    resblocks = getattr(transformer, "resblocks", None)
    if resblocks is None or len(resblocks) == 0:
        refuse(f"{where} transformer", f"{type(transformer).__name__} has no residual blocks")
    for i, block in enumerate(resblocks):
        name = f"{where} block {i}"
        attn = getattr(block, "attn", None)
        if type(block).__name__ == "CustomResidualAttentionBlock" or not isinstance(attn, nn.MultiheadAttention):
            refuse(name, f"{type(block).__name__} with {type(attn).__name__} attention")
        if hasattr(block, "ln_1_kv"):
            refuse(name, "cross-attention")
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or attn.dropout:
            refuse(name, "attention with separate key/value widths, extra key biases, zero attention or dropout")
        out_weight, out_bias = _linear(attn.out_proj, name)
        fc_weight, fc_bias = _linear(block.mlp.c_fc, name)
        proj_weight, proj_bias = _linear(block.mlp.c_proj, name)
        activations.add(_activation(block.mlp.gelu, name))
        heads.add(attn.num_heads)
        blocks.append(
            FrozenBlock(
                ln_1=_norm(block.ln_1, name),
                in_proj_weight=attn.in_proj_weight.detach(),
                in_proj_bias=_detached(attn.in_proj_bias),
                out_proj_weight=out_weight,
                out_proj_bias=out_bias,
                ls_1=_layer_scale(getattr(block, "ls_1", nn.Identity()), name),
                ln_2=_norm(block.ln_2, name),
                fc_weight=fc_weight,
                fc_bias=fc_bias,
                proj_weight=proj_weight,
                proj_bias=proj_bias,
                ls_2=_layer_scale(getattr(block, "ls_2", nn.Identity()), name),
            )
        )
    if len(heads) > 1 or len(activations) > 1 or len({b.fc_weight.shape for b in blocks}) > 1:
        refuse(f"{where} transformer", "blocks that differ in heads, activation or width")
    return tuple(blocks), heads.pop(), activations.pop()


def _text(text: Any, root: Any) -> FrozenText:
    if not hasattr(text, "token_embedding") or not hasattr(text, "transformer"):
        refuse("text tower", f"{type(text).__name__} (HFTextEncoder and others without token_embedding)")
    if getattr(text, "cls_emb", None) is not None:
        refuse("text tower", "an appended class embedding (CoCa)")
    # CLIP carries the text tower on the root under other names than TextTransformer does
    pooling = getattr(text, "text_pool_type" if text is root else "pool_type", "argmax")
    eos_id = getattr(text, "text_eos_id" if text is root else "eos_id", None)
    if pooling not in TEXT_POOLINGS:
        refuse("text pooling", f"{pooling!r} ({', '.join(TEXT_POOLINGS)} are supported)")
    if pooling == "eos" and eos_id is None:
        refuse("text pooling", "'eos' without an eos_id")
    blocks, num_heads, activation = _blocks(text.transformer, "text")
    positions = text.positional_embedding.detach()
    _require_causal(getattr(text, "attn_mask", None), len(positions), type(text).__name__)
    projection, projection_bias = text.text_projection, None
    if isinstance(projection, nn.Linear):
        weight, projection_bias = _linear(projection, "text_projection")
        projection = weight.t()
    return FrozenText(
        token_embedding=text.token_embedding.weight.detach(),
        positional_embedding=positions,
        blocks=blocks,
        num_heads=num_heads,
        activation=activation,
        ln_final=_norm(text.ln_final, "ln_final"),
        projection=_detached(projection),
        projection_bias=projection_bias,
        pooling=pooling,
        eos_id=eos_id,
    )


def _require_causal(mask: Tensor | None, length: int, name: str) -> None:
    """Class names may be truncated and prompt rows shared between classes only where no row sees a later one."""
    if mask is None:
        refuse("text tower", f"{name} is not causal (no attn_mask): its prompts cannot be shared between classes")
    wanted = torch.full((length, length), float("-inf"), device=mask.device).triu(1)
    no_numbers = mask.is_meta or isinstance(mask, FakeTensor)  # then its shape is all that can be looked at
    if mask.shape != wanted.shape or not (no_numbers or torch.equal(mask.float(), wanted)):
        refuse("text tower", f"{name} has an attn_mask of shape {tuple(mask.shape)} that is not the causal mask")


def _vision(visual: Any) -> FrozenVision:
    name = type(visual).__name__
    if not hasattr(visual, "class_embedding") or not hasattr(visual, "transformer") or not hasattr(visual, "conv1"):
        refuse("image tower", f"{name} (TimmModel, ModifiedResNet and others without ViT blocks)")
    if getattr(visual, "attn_pool", None) is not None:
        refuse("image pooling", "attentional pooling")
    pooling = getattr(visual, "pool_type", "tok")
    if pooling not in VISION_POOLINGS:
        refuse("image pooling", f"{pooling!r} ({', '.join(VISION_POOLINGS)} are supported)")
    dropout: Any = getattr(visual, "patch_dropout", None)
    if getattr(dropout, "prob", 0.0) and visual.training:
        refuse("image tower", f"patch_dropout={dropout.prob} in training mode (call .eval() on the CLIP model first)")
    conv = visual.conv1
    if tuple(conv.stride) != tuple(conv.kernel_size) or any(conv.padding if conv.padding != "valid" else ()):
        refuse("patch embedding", f"stride {conv.stride} and padding {conv.padding} with patches of {conv.kernel_size}")
    ln_pre = getattr(visual, "ln_pre", nn.Identity())
    blocks, num_heads, activation = _blocks(visual.transformer, "image")
    positions = visual.positional_embedding.detach()
    height, width = (int(size) for size in _pair(visual.image_size))
    patches = (height // conv.kernel_size[0]) * (width // conv.kernel_size[1])
    if len(positions) != patches + 1:
        refuse("image tower", f"{len(positions)} positions for {patches} patches and a class token")
    return FrozenVision(
        conv_weight=conv.weight.detach(),
        conv_bias=_detached(conv.bias),
        class_embedding=visual.class_embedding.detach(),
        positional_embedding=positions,
        ln_pre=None if isinstance(ln_pre, nn.Identity) else _norm(ln_pre, "ln_pre"),
        blocks=blocks,
        num_heads=num_heads,
        activation=activation,
        ln_post=_norm(visual.ln_post, "ln_post"),
        projection=_detached(visual.proj),
        pooling=pooling,
        norm_after_pool=bool(getattr(visual, "final_ln_after_pool", False)),
        image_size=(height, width),
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
