"""The frozen residual blocks of one tower, folded for speed and stacked over layers.

Folded once, in float64, and exact: LayerNorm's affine goes into the linear that follows, attention's scale into W_q,
LayerScale into the linear before it; the value bias passes through the softmax, whose rows sum to one, into the output
bias; the key bias shifts all scores of a query alike and is dropped; QuickGELU(u) = u sigmoid(1.702 u) is
silu(1.702 u) / 1.702, whose factors go into the linears around it.

Nothing here has a weight gradient, so autograd saves per token and layer only the inputs of the two LayerNorms, the
attention's q, k, v and output, and the activation's input: 10 D numbers, whatever the activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upt_fast.clip.frozen import FrozenBlock, FrozenNorm
from upt_fast.engine import fp8, ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.autograd.frozen_block import BlockWeights, MLPWeights
from upt_fast.engine.backends.dispatch import TORCH, Asked
from upt_fast.engine.cpu import library, ways
from upt_fast.engine.cpu.library import FrozenWeight
from upt_fast.engine.fp8 import Fp8Weight
from upt_fast.engine.workspace import MemoryPool, Workspace

QUICK_GELU_SLOPE = 1.702
MEMORY_LEVELS = ("fast", "balanced", "lean")
# rows at which the CPU's products are chosen: of a batch of images, and of a hundred class names
TYPICAL_BATCH, MOST_ROWS, TEXT_ROWS = 8, 2048, 384


def fold_norm(weight: Tensor, bias: Tensor | None, norm: FrozenNorm | None) -> tuple[Tensor, Tensor]:
    """(W, b) in float64 such that W n + b = weight norm(x) + bias, n being x normalised without affine.

    Args:
        weight: (N, D) of the linear after the LayerNorm.
        bias: (N,) or None.
        norm: the LayerNorm, or None for none.
    """
    w = weight.double()
    b = w.new_zeros(len(w)) if bias is None else bias.double()
    if norm is not None and norm.bias is not None:
        b = b + w @ norm.bias.double()
    if norm is not None and norm.weight is not None:
        w = w * norm.weight.double()
    return w, b


class FrozenBlocks(nn.Module):
    """L frozen pre-LayerNorm blocks of width D, H heads and M hidden features.

    Args:
        blocks: the tower's blocks.
        num_heads: H.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        dtype: dtype of the folded weights, in which the blocks compute.
        memory: "fast": keep what backward needs; "balanced": recompute the MLP's hidden features in backward;
            "lean": recompute the whole block from its input.
        backend: of the ops, as dispatch.resolve returns it.
        quantized: the linears' weights are in fp8 (upt_fast/engine/fp8.py) beside dtype, and whole blocks run op by op.
        length: rows of an image; 0: the rows are those of packed class names.
    """

    def __init__(
        self,
        blocks: tuple[FrozenBlock, ...],
        num_heads: int,
        activation: str,
        dtype: torch.dtype,
        memory: str = "fast",
        backend: Asked | str = TORCH,
        quantized: bool = False,
        length: int = 0,
    ) -> None:
        super().__init__()
        self.backend = Asked.of(backend)
        self.streams = self.backend.names not in ((), ("torch",))  # on which kernels work
        self.copies_prompts = "xformers" in self.backend.names  # into reserved rows, for its attention
        self.num_layers, self.num_heads, self.activation, self.memory = len(blocks), num_heads, activation, memory
        self.width = blocks[0].out_proj_weight.shape[0]
        self.quantized, self.length = quantized, length
        self._pool = MemoryPool()
        self.eps_1 = tuple(b.ln_1.eps for b in blocks)
        self.eps_2 = tuple(b.ln_2.eps for b in blocks)
        if quantized:
            folded = [_quantize(_fold_block(b, num_heads, activation, torch.float32), dtype) for b in blocks]
        else:
            folded = [_fold_block(b, num_heads, activation, dtype) for b in blocks]
        for name in list(folded[0]):
            self.register_buffer(name, torch.stack([f.pop(name) for f in folded]), persistent=False)
        self._pack()

    qkv_weight: Tensor  # (L, 3D, D) rows q, k, v
    qkv_bias: Tensor  # (L, 3D) zero for k and v
    out_weight: Tensor  # (L, D, D)
    out_bias: Tensor  # (L, D)
    fc_weight: Tensor  # (L, M, D)
    fc_bias: Tensor  # (L, M)
    proj_weight: Tensor  # (L, D, M)
    proj_bias: Tensor  # (L, D)
    # quantised, in the place of the four weights: those of Fp8Weight for "q", "kv", "out", "fc" and "proj", as
    # {name}_{field} (L, ...), and
    kv_weight: Tensor  # (L, 2D, D) rows k, v in dtype, for prompt_kv

    def qkv(self, i: int, x: Tensor, query_rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows x entering layer i.

        Args:
            x: (..., D) rows.
            query_rows: (..., D) the rows that need queries, if not all do.
        Returns:
            three of (..., H, K).
        """
        eps, q_bias = self.eps_1[i], self.qkv_bias[i, : self.width]
        h_q = None if query_rows is None else ops.layer_norm(query_rows, eps)
        packed = self._packed.get(("qkv" if h_q is None else "kv", i))
        if packed is None:
            return ops.qkv(ops.layer_norm(x, eps), self._qkv_weight(i), q_bias, self.num_heads, h_q)
        if h_q is None:
            q, k, v = ops.norm_linear(x, packed, self.qkv_bias[i], eps, parts=3)
        else:
            q = ops.linear(h_q, self.qkv_weight[i, : self.width], q_bias)
            k, v = ops.norm_linear(x, packed, None, eps, parts=2)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return q, k, v

    def layer(
        self, i: int, x: Tensor, prefix_kv: Tensor | None, set_index: Tensor | None, workspace: Workspace
    ) -> Tensor:
        """All of layer i for sequences that see [shared prefix ; own rows].

        Args:
            x: (B, L, D) rows that enter the layer.
            prefix_kv: (S, P, 2, H, K) keys and values of S prompt sets, or None.
            set_index: (B,) int64, each sequence's set; None where S is 1.
            workspace: memory of this pass.
        """
        prefix_k, prefix_v = (None, None) if prefix_kv is None else prefix_kv.unbind(2)
        if self.quantized:
            return self.run(self._layer_by_ops, i, x, prefix_k, prefix_v, set_index, workspace)
        return ops.block(x, prefix_k, prefix_v, self.weights(i), set_index, self.memory, workspace, i)

    def _layer_by_ops(
        self,
        i: int,
        x: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        set_index: Tensor | None,
        workspace: Workspace,
    ) -> Tensor:
        q, k, v = self.qkv(i, x)
        return self.finish(i, x, ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index), workspace)

    def weights(self, i: int) -> BlockWeights:
        """The weights of layer i."""
        qkv, out, fc, proj = (self._frozen_weight(name, i) for name in ("qkv", "out", "fc", "proj"))
        mlp = MLPWeights(fc, self.fc_bias[i], proj, self.proj_bias[i], self.eps_2[i], self.activation)
        eps, heads = self.eps_1[i], self.num_heads
        return BlockWeights(qkv, self.qkv_bias[i], out, self.out_bias[i], eps, heads, mlp, self._fill)

    def weight(self, name: str, i: int) -> FrozenWeight | Fp8Weight:
        """Layer i's weight "out", "fc" or "proj" as the ops take it, quantised or packed where it is."""
        return self._fp8_weight(name, i) if self.quantized else self._frozen_weight(name, i)

    def _frozen_weight(self, name: str, i: int) -> FrozenWeight:
        packed = self._packed.get((name, i))
        return FrozenWeight(getattr(self, f"{name}_weight")[i]) if packed is None else packed

    def _fp8_weight(self, name: str, i: int) -> Fp8Weight:
        return Fp8Weight(*(getattr(self, f"{name}_{field}")[i] for field in Fp8Weight._fields))

    def _linear_weight(self, name: str, i: int) -> Tensor | Fp8Weight:
        """Layer i's weight "out", "fc" or "proj", not packed."""
        return self._fp8_weight(name, i) if self.quantized else getattr(self, f"{name}_weight")[i]

    def _qkv_weight(self, i: int) -> Tensor | tuple[Fp8Weight, Fp8Weight]:
        """Layer i's weight as ops.qkv takes it."""
        if self.quantized:
            return self._fp8_weight("q", i), self._fp8_weight("kv", i)
        return self.qkv_weight[i]

    def _pack(self) -> None:
        """Pack the weights for the CPU operations where those run."""
        self._packed: dict[tuple[str, int], FrozenWeight] = {}
        self._fill = False
        if self.quantized or not composing.has_data(self.qkv_bias):
            return
        weight = self.qkv_weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            ways.float32_product()  # now, so that a run can write it down
        if weight.device.type != "cpu" or self.streams or library.refusal(weight.dtype, self.width, self.num_heads):
            return
        rows = min(TYPICAL_BATCH * self.length, MOST_ROWS) or TEXT_ROWS
        if self.length:
            self._fill = ways.fills(self.num_heads, self.width, self.length, weight.dtype)
        for name in ("qkv", "out", "fc", "proj"):
            for i, plain in enumerate(getattr(self, f"{name}_weight")):
                if name == "qkv" and i == self.num_layers - 1:  # its queries are those of few rows
                    self._packed["kv", i] = ways.prepare("kv", plain[self.width :], rows)
                else:
                    self._packed[name, i] = ways.prepare(name, plain, rows)

    def _apply(self, fn: Callable, recurse: bool = True) -> FrozenBlocks:
        if self.quantized:
            fp8.check_apply(fn, self.qkv_bias.device)
        super()._apply(fn, recurse)
        self._pack()
        return self

    def prompt_kv(self, prompts: Tensor, first: int = 0) -> Tensor:
        """Keys and values of prompts that act as nothing else, of several layers in one product.

        Args:
            prompts: (I, S, P, D), prompts[i] entering layer first + i.
            first: the first layer.
        Returns:
            (I, S, P, 2, H, K), keys then values.
        """
        depth, sets, length, width = prompts.shape
        eps = self.eps_1[first : first + depth]
        if len(set(eps)) == 1:
            h = ops.layer_norm(prompts, eps[0])
        else:
            h = torch.stack([ops.layer_norm(p, e) for p, e in zip(prompts, eps, strict=True)])
        layers = slice(first, first + depth)
        weight = self.kv_weight[layers] if self.quantized else self.qkv_weight[layers, width:]
        kv = torch.bmm(h.reshape(depth, sets * length, width), weight.transpose(1, 2))
        return kv.view(depth, sets, length, 2, self.num_heads, width // self.num_heads)

    def finish(self, i: int, x: Tensor, attended: Tensor, workspace: Workspace) -> Tensor:
        """The rest of layer i: output projection, residual, MLP, residual.

        Args:
            x: (..., D) rows that entered the layer.
            attended: (..., H, K) attention's output for these rows.
            workspace: memory of this pass.
        """
        x = ops.linear_residual(x, attended.flatten(-2), self.weight("out", i), self.out_bias[i])
        return self.mlp(i, x, workspace)

    def mlp(self, i: int, x: Tensor, workspace: Workspace) -> Tensor:
        """The MLP of layer i with its residual, for rows (..., D)."""
        weights = (self.weight("fc", i), self.fc_bias[i], self.weight("proj", i), self.proj_bias[i])
        recompute = self.memory == "balanced"
        return ops.mlp(x, *weights, self.eps_2[i], self.activation, recompute=recompute, workspace=workspace, layer=i)

    def stream_qkv(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, three of (..., H, K), of the normalised rows h (..., D) of layer i's stream."""
        if self.quantized:
            return ops.qkv(h, self._qkv_weight(i), self.qkv_bias[i, : self.width], self.num_heads)
        qkv = ops.linear(h, self.qkv_weight[i], self.qkv_bias[i])
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def stream_finish(self, i: int, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of layer i, its last sum left to the next layer's LayerNorm.

        Args:
            x: (..., D) rows that entered the layer.
            attended: (..., H, K) attention's output for these rows.
        Returns:
            rows (..., D), and what the MLP adds to them.
        """
        out = ops.linear(attended.flatten(-2), self._linear_weight("out", i), self.out_bias[i])
        x, h = ops.add_layer_norm(x, out, self.eps_2[i], self.backend)
        return x, self._stream_mlp(i, h)

    def _stream_mlp(self, i: int, h: Tensor) -> Tensor:
        weights = self._linear_weight("fc", i), self.fc_bias[i], self._linear_weight("proj", i), self.proj_bias[i]
        return ops.linear_gelu(h, *weights, self.activation, self.memory == "balanced", self.backend)

    def workspace(self, label: str = "rows", checkpointed: bool = True, end: int | None = None) -> Workspace:
        """Memory for one pass through the layers.

        Args:
            label: of the kind of pass.
            checkpointed: whether :meth:`run` runs the layers, which recomputes them where memory is "lean".
            end: the layer before which the pass ends; None: the last.
        """
        keeps = not (checkpointed and self.memory == "lean")
        end = self.num_layers - 1 if end is None else min(end, self.num_layers - 1)
        return Workspace(end if keeps else 0, self._pool, label)

    def check_composes(self) -> None:
        """Raise a ValueError where the rows of a pass cannot be computed op by op, as composing asks for."""
        if self.quantized:
            raise ValueError(
                "dtype='fp8' has no second derivatives and no torch.func transforms, its products being inexact; "
                "wanted another dtype"
            )
        if self.streams:
            raise ValueError(
                f"backend='{self.backend}' has no second derivatives, no torch.func transforms and no shapes without "
                "data; wanted 'auto' or 'torch'"
            )

    def train(self, mode: bool = True) -> FrozenBlocks:
        if not mode:
            self._pool.clear()
        return super().train(mode)

    def run(self, layer, *args):  # type: ignore[no-untyped-def]
        """Call layer(*args), recomputed in backward where ``memory="lean"`` asks for it."""
        if self.memory == "lean" and torch.is_grad_enabled() and not composing.composes(self.qkv_bias):
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return layer(*args)


class FrozenHead(nn.Module):
    """A tower's last LayerNorm and projection, folded.

    Args:
        norm: the LayerNorm over D features.
        projection: (D, e), or None: the features are the normalised rows.
        bias: (e,) or None.
        dtype: dtype of the folded weights.
    """

    def __init__(self, norm: FrozenNorm, projection: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.norm_only = norm.eps, projection is None
        self.weight: Tensor
        self.bias: Tensor | None
        if projection is None:
            self.register_buffer("weight", None if norm.weight is None else norm.weight.to(dtype), persistent=False)
            self.register_buffer("bias", None if norm.bias is None else norm.bias.to(dtype), persistent=False)
            return
        weight, folded = fold_norm(projection.t(), bias, norm)
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.register_buffer("bias", folded.to(dtype), persistent=False)

    def forward(self, x: Tensor, mean_dim: int | None = None) -> Tensor:
        """Features of rows.

        Args:
            x: (..., D).
            mean_dim: a dimension to average over between LayerNorm and projection.
        Returns:
            (..., e), without mean_dim.
        """
        if self.norm_only:
            x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        else:
            x = ops.layer_norm(x, self.eps)
        if mean_dim is not None:
            x = x.mean(mean_dim)
        return x if self.norm_only else F.linear(x, self.weight, self.bias)


def _quantize(folded: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A folded block's tensors, its weights in fp8 and the rest in dtype; see :class:`FrozenBlocks` for the names."""
    found = {name: value.to(dtype) for name, value in folded.items() if name.endswith("_bias")}
    q, kv = folded["qkv_weight"].split([len(folded["out_bias"]), 2 * len(folded["out_bias"])])
    found["kv_weight"] = kv.to(dtype)
    weights = {"q": q, "kv": kv} | {name: folded[f"{name}_weight"] for name in ("out", "fc", "proj")}
    for name, weight in weights.items():
        for field, value in Fp8Weight.quantize(weight)._asdict().items():
            found[f"{name}_{field}"] = value
    return found


def _fold_block(block: FrozenBlock, num_heads: int, activation: str, dtype: torch.dtype) -> dict[str, Tensor]:
    width = block.out_proj_weight.shape[0]
    qkv_weight, qkv_bias = fold_norm(block.in_proj_weight, block.in_proj_bias, block.ln_1)
    scale = (width // num_heads) ** -0.5
    query_scale = qkv_weight.new_ones(3 * width)
    query_scale[:width] = scale
    qkv_weight, qkv_bias = qkv_weight * query_scale[:, None], qkv_bias * query_scale
    value_bias = qkv_bias[2 * width :]
    qkv_bias = F.pad(qkv_bias[:width], (0, 2 * width))

    out_weight, out_bias = fold_norm(block.out_proj_weight, block.out_proj_bias, None)
    out_bias = out_bias + out_weight @ value_bias
    fc_weight, fc_bias = fold_norm(block.fc_weight, block.fc_bias, block.ln_2)
    proj_weight, proj_bias = fold_norm(block.proj_weight, block.proj_bias, None)
    if block.ls_1 is not None:
        out_weight, out_bias = out_weight * block.ls_1.double()[:, None], out_bias * block.ls_1.double()
    if block.ls_2 is not None:
        proj_weight, proj_bias = proj_weight * block.ls_2.double()[:, None], proj_bias * block.ls_2.double()
    if activation == "quick_gelu":
        fc_weight, fc_bias = fc_weight * QUICK_GELU_SLOPE, fc_bias * QUICK_GELU_SLOPE
        proj_weight = proj_weight / QUICK_GELU_SLOPE
    weights = {
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
        "fc_weight": fc_weight,
        "fc_bias": fc_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}
