"""What a compiled kernel's PTX says of it: who multiplies, how wide it loads, whether it has memory of its own."""

from __future__ import annotations

import re
from typing import NamedTuple

_ASYNC_COPY = re.compile(
    r"cp\.async\.c[ag]\.shared(?:::cta)?\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)"
)
_LOAD = re.compile(r"\bld\.(?:global|relaxed\S*?global|volatile\.global)(?:\.[\w:]+?)*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
_DOT = re.compile(r"tt\.dot\w* .*: tensor<[\dx]*x(\w+)[^>]*> \* tensor<")
_PRODUCTS = (
    ("wgmma", re.compile(r"\bwgmma\.mma_async\S*\.f32\.(bf16|f16|tf32)")),
    ("tcgen05", re.compile(r"\btcgen05\.mma\S*\.kind::(f16|tf32)")),
    ("mma", re.compile(r"\bmma\.sync\S*\.f32\.(bf16|f16|tf32)")),
)
HALF = ("bf16", "f16")
LEAST_LOAD_BYTES = 8  # a vector: memory gives its all from there on


class Instructions(NamedTuple):
    """What matters of a kernel's instructions.

    Attributes:
        dots: types of the factors of its dots, as they are written, in order: "bf16", "f16", "f32".
        products: matrix instructions with the types of their factors, "wgmma bf16"; tcgen05 calls both 16-bit types
            f16. Without one, products run on the ordinary units.
        load_bytes: of the widest load from global memory that a thread makes; 0: it loads nothing.
        local: loads from and stores to a thread's own memory.
    """

    dots: tuple[str, ...]
    products: tuple[str, ...]
    load_bytes: int
    local: int

    @property
    def problems(self) -> list[str]:
        """Why the kernel would be slower than it need be."""
        found = [f"multiplies {dtype} without a matrix instruction" for dtype in self.slow_dots]
        if self.local:
            found.append(f"has {self.local} loads and stores of memory of its own")
        if 0 < self.load_bytes < LEAST_LOAD_BYTES:
            found.append(f"loads {self.load_bytes} bytes at once, and never more")
        return found

    @property
    def slow_dots(self) -> list[str]:
        """16-bit types that are multiplied without a matrix instruction."""
        fast = {product.split()[1] for product in self.products}
        fast |= {"bf16"} if "tcgen05 f16" in self.products else set()
        return [dtype for dtype in self.dots if dtype in HALF and dtype not in fast]


def read_instructions(ttir: str, ptx: str) -> Instructions:
    """Of a kernel, from Triton's intermediate code and the compiler's PTX."""
    products = {f"{name} {dtype}": None for name, pattern in _PRODUCTS for dtype in pattern.findall(ptx)}
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in _LOAD.findall(ptx)]
    widths += [int(size, 0) for size in _ASYNC_COPY.findall(ptx)]
    local = len(re.findall(r"\b(?:ld|st)\.local\b", ptx))
    return Instructions(tuple(sorted(set(_DOT.findall(ttir)))), tuple(products), max(widths, default=0), local)
