"""The prompted image tower: image features from images and visual prompts shared by the images of a set.

Prompts that the next layer replaces act only as keys and values, shared by the batch; after the last prompted layer
they are ordinary rows of each image. The rows that enter layer 0 are constants, so layer 0 has gradients for the
prompts' keys and values only. The last layer has queries for the pooled rows only.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.clip.frozen import FrozenVision
from upt_fast.engine import ops
from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import UNASKED, Asked
from upt_fast.engine.memory import Need, tower_need
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.blocks import FrozenBlocks
from upt_fast.engine.towers.folding import FrozenHead
from upt_fast.engine.towers.tower import Tower

# rows of an image that leave the last layer of :meth:`VisionTower.alone`
ALONE_ROWS = 16


class VisionTower(Tower):
    """A frozen ViT with prompts.

    Args:
        vision: the tower's weights.
        dtype: dtype in which it computes.
        memory: see :class:`FrozenBlocks`.
        backend: of the operations; it decides on the route through the layers (routes.py).
        quantized: see :class:`FrozenBlocks`.
    """

    def __init__(
        self,
        vision: FrozenVision,
        dtype: torch.dtype,
        memory: str = "fast",
        backend: Asked | str = UNASKED,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.route = routes.choose(dispatch.read(backend))
        of_blocks, length = (vision.blocks, vision.num_heads, vision.activation), len(vision.positional_embedding)
        self.blocks = FrozenBlocks(*of_blocks, dtype, memory, quantized, self.route.packs, length)
        self.route.check(self.blocks)
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

    def alone(self, images: Tensor) -> Tensor:
        """Features of images without prompts and gradients, whose bits should not hang on the image's place in a batch.

        A single query is a product of a vector, which libraries round as its address lies: that of the thread, and so
        of the image's place. More queries, of which one is read, are a product of matrices.

        Args:
            images: (B, 3, H, W), normalised as the CLIP expects; as many in each batch.
        Returns:
            (B, e), not normalised.
        """
        with torch.no_grad():
            return self._features(images, None, None, False, ALONE_ROWS)

    def _features(
        self, images: Tensor, prompts: Tensor | None, set_index: Tensor | None, after_ln_pre: bool, rows: int = 1
    ) -> Tensor:
        if composing.composes(images, self.class_row):
            self.blocks.stack.check_composes()
            self.route.check_composes()
        x = self.embed(images)
        prompts = x.new_empty(1, 1, 0, x.shape[2]) if prompts is None else prompts.to(x.dtype)
        first, *others = prompts.unbind(1)  # (S, n, w) each
        entering = [first if after_ln_pre else self._pre_norm(first), *others]
        x = self.route.images(self.blocks, x, entering, set_index, functools.partial(self._pooled, rows=rows))
        if self.pooling == "tok":
            return self.head(x[:, 0])
        return self.head(x.mean(1)) if self.norm_after_pool else self.head(x, mean_dim=1)

    def need(self, batch_size: int, length: int, depth: int, backward: bool, memory: str | None = None) -> Need:
        """Memory of a step's pass; see upt_fast/engine/memory.py.

        Args:
            batch_size: B images.
            length: n prompts of an image.
            depth: layers with prompts of their own.
            backward: whether there is a gradient.
            memory: level; None: the tower's.
        """
        layers, own = self.blocks.num_layers, 1 + len(self.positions)
        replaced = depth if depth >= layers else depth - 1
        rows = [batch_size * (own + (length if i >= replaced else 0)) for i in range(layers)]
        key_rows = batch_size * length if replaced else 0
        return tower_need(self.blocks, rows, backward, key_rows, memory=memory)

    def _pooled(self, first_row: int, rows: int = 1) -> tuple[slice, slice]:
        """Index of the rows that are pooled, of (B, ., w): the class token's (and those behind it), or all patches'."""
        return slice(None), slice(first_row, first_row + rows) if self.pooling == "tok" else slice(first_row + 1, None)
