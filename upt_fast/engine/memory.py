"""What a training step needs at its peak, by formula: bytes of the tensors alive, above weights and inputs.

Numbers per row of a tower of width D with M hidden features, per layer but the last, that live until backward:

    fast        q, k, v, attention's output, the rows between the halves and behind the layer, the activation's input:
                6 D + M
    balanced    all but the activation's input: 6 D
    lean        the rows behind the layer: D

The text tower keeps no attention's output; the first q, k and v of rows that no prompt enters are constants. Beside
these numbers there are, once, hidden features and gradients of the layer at work (M + 3 D), what is computed again
(balanced: M; lean: M and, for images, 5 D), and, of the tower that has more of them, keys, values and gradients of the
last layer (7 D). Prompts that are only keys and values add 2 D a layer for each sequence that sees them. Where several
sets of prompts meet the same classes, a copy of the constants for each set stays from the first step on: 4 D per row.

Where PyTorch computes on a CPU what the compiled operations cannot, its temporary results come on top: a piece of the
hidden features where oneDNN multiplies, and of class names in half precision attention's float32 copies, gradients and
probabilities (18 D in place of the 7 D).

What a layer works with stays a tower's own where blocks of memory are reused (workspace.py); else, on a GPU and in half
precision op by op, the towers need it one after another.

Not counted are the prompts, their networks and the logits, which are small, and what an allocator holds back: the C
library's heap had 5 to 30 % more on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from upt_fast.engine.towers.blocks import FrozenBlocks


class Need(NamedTuple):
    """Bytes of one tower: what it keeps and works with, and the passing part that towers do not need together."""

    lasting: int = 0
    passing: int = 0


def tower_need(
    blocks: FrozenBlocks,
    rows: list[int],
    backward: bool,
    key_rows: int = 0,
    text: bool = False,
    constant: bool = False,
    widens: bool = False,
    memory: str | None = None,
) -> Need:
    """Of one pass through a tower and back.

    Args:
        blocks: of the tower.
        rows: of all sequences, by layer.
        backward: whether there is a gradient.
        key_rows: keys and values per layer that belong to no row, of all sequences.
        text: whether it is the text tower.
        constant: whether the first layer's queries, keys and values are constants.
        widens: whether attention goes from half precision to float32.
        memory: level; None: that of the blocks.
    """
    memory = blocks.memory if memory is None else memory
    width, hidden, itemsize = blocks.width, blocks.fc_bias.shape[1], blocks.fc_bias.dtype.itemsize
    most = max(rows)
    if not backward:
        work = most * (hidden + 6 * width) * itemsize
        return Need(work) if blocks.stack.pools(blocks) else Need(passing=work)
    attended = 0 if text else width
    kept = {"fast": 5 * width + attended + hidden, "balanced": 5 * width + attended, "lean": width}[memory]
    again = {"fast": 0, "balanced": hidden, "lean": hidden + 5 * attended}[memory]
    numbers, work = sum(rows[:-1]) * kept, most * (hidden + 3 * width + again)
    if memory != "lean":
        numbers += key_rows * 2 * width * (len(rows) - 1)
        if constant:
            numbers -= rows[0] * 3 * width
    passing = max(rows[-1] * 7, most * 18 if widens else 0) * width * itemsize
    passing += min(blocks.stack.piece_bytes(blocks), most * hidden * itemsize)
    if blocks.stack.pools(blocks):
        return Need((numbers + work) * itemsize, passing)
    return Need(numbers * itemsize, work * itemsize + passing)


def peak(*towers: Need) -> int:
    """Of towers that work one after another and keep what they have side by side."""
    return sum(need.lasting for need in towers) + max((need.passing for need in towers), default=0)


def peak_in_turn(*towers: Need) -> int:
    """Of passes that let go of what they have before the next begins, as those of parts of a step do."""
    return max(need.lasting + need.passing for need in towers)
