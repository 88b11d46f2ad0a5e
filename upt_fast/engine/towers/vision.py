"""The prompted image tower: image features from images and visual prompts shared by the images of a set.

Prompts that the next layer replaces act only as keys and values, shared by the batch; after the last prompted layer
they are ordinary rows of each image. The rows that enter layer 0 are constants, so layer 0 has gradients for the
prompts' keys and values only. The last layer has queries for the pooled rows only.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenVision
from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends.dispatch import TORCH, Asked
from upt_fast.engine.memory import Need, tower_need
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.folding import FrozenHead
from upt_fast.engine.workspace import Workspace


class VisionTower(nn.Module):
    """A frozen ViT with prompts.

    Args:
        vision: the tower's weights.
        dtype: dtype in which it computes.
        memory: see :class:`FrozenBlocks`.
        backend: see :class:`FrozenBlocks`.
        quantized: see :class:`FrozenBlocks`.
    """

    def __init__(
        self,
        vision: FrozenVision,
        dtype: torch.dtype,
        memory: str = "fast",
        backend: Asked | str = TORCH,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        of_blocks = vision.blocks, vision.num_heads, vision.activation
        length = len(vision.positional_embedding)
        self.blocks = FrozenBlocks(*of_blocks, dtype, memory, backend, quantized, length)
        self.head = FrozenHead(vision.ln_post, vision.projection, None, dtype)
        self.image_size, self.pooling, self.norm_after_pool = vision.image_size, vision.pooling, vision.norm_after_pool
        self.pre_eps = None if vision.ln_pre is None else vision.ln_pre.eps
        constants = {
            "conv_weight": vision.conv_weight,
            "conv_bias": vision.conv_bias,
            "class_row": vision.class_embedding.to(dtype) + vision.positional_embedding[0].to(dtype),
            "positions": vision.positional_embedding[1:],
            "pre_weight": None if vision.ln_pre is None else vision.ln_pre.weight,
            "pre_bias": None if vision.ln_pre is None else vision.ln_pre.bias,
        }
        for name, value in constants.items():
            self.register_buffer(name, None if value is None else value.to(dtype), persistent=False)

    conv_weight: Tensor  # (w, 3, patch height, patch width)
    conv_bias: Tensor | None  # (w,)
    class_row: Tensor  # (w,) class embedding plus its position
    positions: Tensor  # (G, w) of the patches
    pre_weight: Tensor | None  # (w,)
    pre_bias: Tensor | None  # (w,)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 1 + G, w) rows that enter layer 0: class token and patches of images (B, 3, H, W)."""
        # a constant of the images: without a graph, unless the caller differentiates with respect to them
        wanted = images.requires_grad or composing.composes(images)  # under a transform no tensor tells
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            patches = F.conv2d(
                images.to(self.conv_weight.dtype), self.conv_weight, self.conv_bias, self.conv_weight.shape[2:]
            )
            patches = patches.flatten(2).transpose(1, 2) + self.positions  # (B, G, w)
            return self._pre_norm(ops.prepend_rows(self.class_row[None, None], patches))

    def _pre_norm(self, x: Tensor) -> Tensor:
        if self.pre_eps is None:
            return x
        return F.layer_norm(x, x.shape[-1:], self.pre_weight, self.pre_bias, self.pre_eps)

    def forward(
        self, images: Tensor, prompts: Tensor | None, set_index: Tensor | None = None, after_ln_pre: bool = False
    ) -> Tensor:
        """Features of images.

        Args:
            images: (B, 3, H, W), normalised as the CLIP expects.
            prompts: (S, depth, n_visual, w) prompts of S sets, [:, i] entering layer i; None: none.
            set_index: (B,) int64, each image's set; None where S is 1.
            after_ln_pre: the prompts of layer 0 do not pass the LayerNorm in front of it.
        Returns:
            (B, e), not normalised.
        Raises:
            ValueError: the images are not (B, 3, H, W) of the model's size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"images of shape {tuple(images.shape)}; this CLIP takes (B, 3, {height}, {width})")
        if not images.is_floating_point():
            raise ValueError(
                f"images of {images.dtype}; wanted floating-point images normalised with the CLIP's mean and std"
            )
        features = functools.partial(self._features, set_index=set_index, after_ln_pre=after_ln_pre)
        return composing.twice_differentiable(features, images, prompts)

    def _features(self, images: Tensor, prompts: Tensor | None, set_index: Tensor | None, after_ln_pre: bool) -> Tensor:
        if composing.composes(images, self.class_row):
            self.blocks.check_composes()
        x = self.embed(images)
        prompts = x.new_empty(1, 1, 0, x.shape[2]) if prompts is None else prompts.to(x.dtype)
        first, *others = prompts.unbind(1)  # (S, n, w) each
        entering = [first if after_ln_pre else self._pre_norm(first), *others]
        x = self._run_stream(x, entering, set_index) if self.blocks.streams else self._run(x, entering, set_index)
        if self.pooling == "tok":
            return self.head(x[:, 0])
        return self.head(x.mean(1)) if self.norm_after_pool else self.head(x, mean_dim=1)

    def need(self, batch_size: int, length: int, depth: int, backward: bool) -> Need:
        """Memory of a step's pass; see upt_fast/engine/memory.py.

        Args:
            batch_size: B images.
            length: n prompts of an image.
            depth: layers with prompts of their own.
            backward: whether there is a gradient.
        """
        layers, own = self.blocks.num_layers, 1 + len(self.positions)
        replaced = depth if depth >= layers else depth - 1
        rows = [batch_size * (own + (length if i >= replaced else 0)) for i in range(layers)]
        return tower_need(self.blocks, rows, backward, key_rows=batch_size * length if replaced else 0)

    def _run(self, x: Tensor, entering: list[Tensor], set_index: Tensor | None) -> Tensor:
        """The pooled rows (B, ., w) after all layers; prompts that the next layer replaces are keys and values only.

        Args:
            x: (B, 1 + G, w) rows of the images.
            entering: for each prompted layer (S, n, w).
            set_index: (B,) int64 or None.
        """
        blocks, last = self.blocks, self.blocks.num_layers - 1
        length = entering[0].shape[1]
        prompt_kv, prompt_rows = self._split(entering)
        before_rows = None if prompt_rows is None else len(prompt_kv)
        first_row, workspace = 0, blocks.workspace(checkpointed=False, end=before_rows)
        for i in range(blocks.num_layers):
            if prompt_rows is not None and i == before_rows:
                x, first_row = ops.prepend_rows(prompt_rows, x, set_index), length
                workspace.end_forward()
                workspace = blocks.workspace(checkpointed=False)
            prefix = prompt_kv[i] if i < len(prompt_kv) else None
            if i < last:
                x = blocks.through(i, x, prefix, set_index, workspace)
            else:
                x = blocks.run(self._last_layer, i, x, prefix, set_index, first_row, blocks.workspace("last"))
        workspace.end_forward()
        return x

    def _split(self, entering: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Keys and values (S, n, 2, H, K) of prompts that act as nothing else, and those (S, n, w) that become rows.

        In the last prompted layer they become rows, unless no later layer reads those.
        """
        depth, length = len(entering), entering[0].shape[1]
        if not length:
            return [], None
        key_value_only = depth if depth >= self.blocks.num_layers else depth - 1
        rows = entering[key_value_only] if key_value_only < depth else None
        if not key_value_only:
            return [], rows
        return list(self.blocks.prompt_kv(torch.stack(entering[:key_value_only])).unbind()), rows

    def _run_stream(self, x: Tensor, entering: list[Tensor], set_index: Tensor | None) -> Tensor:
        """The same with each layer's last sum left to the next; beside xformers all prompts are rows, put in place."""
        blocks, length = self.blocks, entering[0].shape[1]
        y: Tensor | None = None
        prompt_kv: list[Tensor] = []
        prompt_rows = None
        if blocks.copies_prompts:
            stream = x.new_empty(x.shape[0], length + x.shape[1], x.shape[2])
            stream[:, length:] = x
            x, first_row = stream, length
        else:
            prompt_kv, prompt_rows = self._split(entering)
            first_row = 0
        for i in range(blocks.num_layers):
            if i == len(prompt_kv) and prompt_rows is not None:
                x, y = x if y is None else x + y, None
                x, first_row = ops.prepend_rows(prompt_rows, x, set_index), length
            prefix = prompt_kv[i] if i < len(prompt_kv) else None
            inserted = entering[i] if blocks.copies_prompts and length and i < len(entering) else None
            x, y = blocks.run(self._stream_layer, i, x, y, inserted, prefix, set_index, first_row)
        assert y is not None  # a tower has at least one layer
        return x + y

    def _stream_layer(
        self,
        i: int,
        x: Tensor,
        y: Tensor | None,
        inserted: Tensor | None,
        prefix: Tensor | None,
        set_index: Tensor | None,
        first_row: int,
    ) -> tuple[Tensor, Tensor]:
        """Layer i of the stream x (B, ., w) and of y, which the last layer left to add; the last one pools."""
        blocks, last = self.blocks, self.blocks.num_layers - 1
        eps, backend = blocks.eps_1[i], blocks.backend
        if inserted is not None:
            if blocks.memory == "lean":
                x = x.clone()  # what comes in is needed once more, to compute the layer again
            x, h = ops.prompt_insert(x, y, inserted, set_index, eps, backend)
        elif y is not None:
            x, h = ops.add_layer_norm(x, y, eps, backend)
        else:
            h = ops.layer_norm(x, eps, backend)
        q, k, v = blocks.stream_qkv(i, h)
        if i == last:
            pooled = slice(first_row, first_row + 1) if self.pooling == "tok" else slice(first_row + 1, None)
            x, q = x[:, pooled], q[:, pooled]
        if blocks.copies_prompts:
            attended = ops.stream_attention(q, k, v, backend)
        else:
            prefix_k, prefix_v = (None, None) if prefix is None else prefix.unbind(2)
            attended = ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index, backend)
        return blocks.stream_finish(i, x, attended)

    def _last_layer(
        self,
        i: int,
        x: Tensor,
        prefix: Tensor | None,
        set_index: Tensor | None,
        first_row: int,
        workspace: Workspace,
    ) -> Tensor:
        """Layer i for the pooled rows: the class token's, or all patches'."""
        pooled = slice(first_row, first_row + 1) if self.pooling == "tok" else slice(first_row + 1, None)
        rows = x[:, pooled]
        q, k, v = self.blocks.qkv(i, x, query_rows=rows)
        prefix_k, prefix_v = (None, None) if prefix is None else prefix.unbind(2)
        return self.blocks.finish(i, rows, ops.prefix_attention(q, k, v, prefix_k, prefix_v, set_index), workspace)
