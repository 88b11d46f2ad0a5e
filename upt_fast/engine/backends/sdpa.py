"""Attention of images by PyTorch's scaled_dot_product_attention, held to one of its kernels: three backends.

flash       FlashAttention 2 (Dao 2023, arXiv 2307.08691)
efficient   memory-efficient attention (Rabe and Staats 2021, arXiv 2112.05682)
cudnn       cuDNN's attention

Prompts are copied in front of each image's keys and values, as for PyTorch's own choice. A kernel that does not take an
input is an error with PyTorch's reasons, never another kernel.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import packages, pytorch

HALF = (torch.float16, torch.bfloat16)


class OneKernel:
    """A backend as the files beside this one are.

    Args:
        kernel: PyTorch's name of it.
        capability: compute capability that it needs of an NVIDIA card.
        dtypes: that it takes there.

    Attributes:
        devices: kinds of devices that it runs on, and what it takes there; tests may add "cpu".
    """

    OPS = frozenset({"prefix_attention", "stream_attention"})

    def __init__(self, kernel: SDPBackend, capability: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
        self.kernel, self.capability = kernel, capability
        self.devices = {"cuda": dtypes}

    def refusals(self, device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
        """See upt_fast.engine.backends.dispatch.refusals."""
        reasons = packages.other_dtype(dtype, self.devices.get(device, self.devices["cuda"]))
        if device not in self.devices:
            return [*reasons, f"{device} (runs on {', '.join(self.devices)})"]
        return [*reasons, *packages.older_card(device, self.capability)]

    def stream_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See upt_fast.engine.ops.stream_attention.

        Raises:
            ValueError: the kernel does not take this input, as its head width; with PyTorch's reasons.
        """
        if torch.compiler.is_compiling():
            return self._attend(q, k, v)
        try:
            return self._attend(q, k, v)
        except RuntimeError as error:
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            raise ValueError(self._refused(q, k, v, error)) from error

    def prefix_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        set_index: Tensor | None = None,
    ) -> Tensor:
        """See upt_fast.engine.ops.prefix_attention."""
        if composing.composes(q, k, v):
            return pytorch.prefix_attention(q, k, v, prefix_k, prefix_v, set_index)
        return self.stream_attention(q, *pytorch.behind_prefix(k, v, prefix_k, prefix_v, set_index))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self.kernel):
            return pytorch.stream_attention(q, k, v)

    def _refused(self, q: Tensor, k: Tensor, v: Tensor, error: RuntimeError) -> str:
        """PyTorch gives its reasons as warnings, once per place: called again, it says them once more."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with contextlib.suppress(RuntimeError):
                self._attend(q, k, v)
        reasons = [str(line.message) for line in said] or [str(error)]
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} {str(q.dtype).removeprefix('torch.')} {q.device}"
        return "\n    ".join([f"no backend for attention: PyTorch's {self.kernel.name} refuses", shapes, *reasons])


flash = OneKernel(SDPBackend.FLASH_ATTENTION, (8, 0), HALF)
efficient = OneKernel(SDPBackend.EFFICIENT_ATTENTION, (5, 0), (torch.float32, *HALF))
cudnn = OneKernel(SDPBackend.CUDNN_ATTENTION, (8, 0), HALF)
