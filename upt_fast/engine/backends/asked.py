"""What a user asks for: who computes the operations of each tower.

    IMAGES/TEXTS    what the image tower takes, and what the text tower takes; without a slash both the same
    NAME,NAME       backends in their order: the first that has an op computes it; "auto" is none of them
    OP=NAME         among them: who computes one op, whatever the order says

The ops of neither tower, prompt_transform and contrastive_loss, follow the image tower's.
"""

from __future__ import annotations

from typing import NamedTuple

AUTO = "auto"


class Asked(NamedTuple):
    """What was asked for of one tower.

    Attributes:
        names: backends, in their order; none: "auto".
        ops: who computes single ops, (op, backend) sorted by op.
    """

    names: tuple[str, ...] = ()
    ops: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, backend: Asked | str) -> Asked:
        """Of a text without a slash.

        Raises:
            ValueError: "auto" beside another backend, an op twice, or an empty part.
        """
        if not isinstance(backend, str):
            return backend
        names: list[str] = []
        ops: dict[str, str] = {}
        for part in backend.split(","):
            op, equals, name = (word.strip() for word in part.partition("="))
            if not op or (equals and not name):
                raise ValueError(f"{part.strip()!r} in {backend!r} names no backend")
            if not equals:
                names.append(op)
            elif op in ops:
                raise ValueError(f"{backend!r} names two backends for {op}")
            else:
                ops[op] = name
        if AUTO in names and len(set(names)) > 1:
            raise ValueError(f"{AUTO!r} stands beside other backends in {backend!r}; wanted it alone, or only them")
        return cls(tuple(dict.fromkeys(name for name in names if name != AUTO)), tuple(sorted(ops.items())))

    @property
    def everyone(self) -> tuple[str, ...]:
        """All backends that are named, for all ops or for one."""
        return tuple(dict.fromkeys([*self.names, *(name for _, name in self.ops)]))

    def wanted(self, op: str) -> tuple[str, ...]:
        """Who may compute an op, in order; none: "auto"."""
        found = dict(self.ops).get(op)
        return self.names if found is None else (found,)

    def __str__(self) -> str:
        return ",".join([*(self.names or [AUTO]), *(f"{op}={name}" for op, name in self.ops)])


class AskedOfTowers(NamedTuple):
    """What was asked for of both towers."""

    images: Asked = Asked()
    texts: Asked = Asked()

    @classmethod
    def of(cls, backend: AskedOfTowers | str) -> AskedOfTowers:
        """Of a text with at most one slash.

        Raises:
            ValueError: more slashes, or what :meth:`Asked.of` does not take.
        """
        if not isinstance(backend, str):
            return backend
        parts = backend.split("/")
        if len(parts) > 2:
            raise ValueError(f"{backend!r} has {len(parts)} parts; wanted one, or IMAGES/TEXTS")
        return cls(Asked.of(parts[0]), Asked.of(parts[-1]))

    def __str__(self) -> str:
        return str(self.images) if self.images == self.texts else f"{self.images}/{self.texts}"


UNASKED = Asked()
TORCH = Asked(("torch",))
