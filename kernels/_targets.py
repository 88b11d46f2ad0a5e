"""The GPUs that kernels are compiled for in advance: what a multiprocessor offers, and what a kernel takes of it."""

from __future__ import annotations

import dataclasses

from upt_fast.kernels._instructions import Instructions

KIB = 1024
# A multiprocessor (SM, CU) of every target here has four partitions (SIMDs) with 512 registers of 4 bytes per lane,
# given to warps in steps of 8 per lane; a block has at most 1024 threads.
PARTITIONS, LANE_REGISTERS, REGISTER_STEP, BLOCK_THREADS = 4, 512, 8, 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one multiprocessor of it (SM, CU) offers; memory in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    max_warps: int  # resident at once
    max_blocks: int  # resident at once
    shared: int  # of the multiprocessor
    shared_limit: int  # what one block may ask for
    shared_reserved: int  # taken from each block on top
    shared_step: int  # allocated in multiples of

    def resident_warps(self, num_warps: int, registers: int, shared: int) -> int:
        """Warps that a multiprocessor holds of blocks of num_warps; 0 where not even one block fits."""
        per_lane = _round_up(max(registers, 1), REGISTER_STEP)
        block_shared = _round_up(shared + self.shared_reserved, self.shared_step)
        blocks = (
            self.max_blocks,
            self.max_warps // num_warps,
            LANE_REGISTERS // per_lane * PARTITIONS // num_warps,
            self.shared // block_shared if block_shared else self.max_blocks,
        )
        return num_warps * min(blocks)


# sm_*: CUDA Programming Guide, "Compute Capabilities", technical specifications; the steps, the 1 KiB that the driver
# reserves and the arithmetic are those of cuda_occupancy.h in the CUDA toolkit.
# gfx942: "AMD GPU specifications" of the ROCm documentation (LDS 64 KiB, VGPR file 512 KiB per CU), the CDNA3 ISA guide
# and LLVM's AMDGPU/Utils/AMDGPUBaseInfo.cpp (8 waves per SIMD, VGPRs and AGPRs in one file, LDS in steps of 512 bytes).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    "sm_90": Target("cuda", 90, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "sm_100": Target("cuda", 100, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "gfx942": Target("hip", "gfx942", 64, 32, 32, 64 * KIB, 64 * KIB, 0, 512),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, per thread but for shared_bytes of a block and seconds of compiling it."""

    num_warps: int
    registers: int
    spill_bytes: int  # stores and loads
    sgpr_spills: int  # AMD's scalar registers that went to lanes of vector registers: they touch no memory
    shared_bytes: int
    seconds: float
    instructions: Instructions | None = None  # of NVIDIA's GPUs
    stack_bytes: int = 0  # of a thread's own memory, spills not among them

    def problems(self, target: Target) -> list[str]:
        """Why the kernel should not or cannot run on a target."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.instructions is not None:
            found += self.instructions.problems
        if self.stack_bytes:
            found.append(f"has {self.stack_bytes} bytes of memory of its own")
        if self.shared_bytes > target.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, a block may use {target.shared_limit}")
        elif not target.resident_warps(self.num_warps, self.registers, self.shared_bytes):
            found.append(f"{self.num_warps} warps of {self.registers} registers do not fit")
        threads = self.num_warps * target.warp_size
        if threads > BLOCK_THREADS:
            found.append(f"has {threads} threads a block, at most {BLOCK_THREADS} can be launched")
        return found


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
