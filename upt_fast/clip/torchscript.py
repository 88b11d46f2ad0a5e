"""Tensors of a TorchScript archive, read as data: no code of the file is compiled, imported or run.

OpenAI published CLIP this way. An archive is a zip file: ``data.pkl`` builds objects with the model's attributes by
pickle's opcodes and names storages, ``data/*`` are the storages' bytes, ``code/*`` is what torch.jit.load compiles.
Here the few opcodes that TorchScript writes are followed one by one: a name in the pickle is a name and is never looked
up, what it would call is one of the handful of cases below or an error, and every size is checked against the file's
before memory is taken for it.
"""

from __future__ import annotations

import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

MOST_PICKLE_BYTES = 16 << 20  # a CLIP's has a hundred kilobytes
MOST_CODE_BYTES = 4 << 20
MOST_NODES = 1 << 20  # opcodes, and attributes on the way through shared objects

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = tuple(f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor"))
_TAG = "torch.jit._pickle restore_type_tag"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_DICT = "collections OrderedDict"
_CLASS = re.compile(r"__torch__\.[\w.]+ \w+")


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names, "module name"; nothing is imported for it."""

    text: str


@dataclass(eq=False)
class _Object:
    """An object of a class of the archive's own: its attributes, no methods."""

    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Args:
        tensors: by dotted name, those of all attributes; in the archive's dtypes.
        activation: "quick_gelu" or "gelu", by what the archive's code calls; None: both, neither, or no code.
    """

    tensors: dict[str, Tensor]
    activation: str | None


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a TorchScript archive, rather than what torch.save writes or anything else."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.partition("/")[2] for name in file.namelist()]
    except Exception:  # zipfile raises many kinds on a damaged file, which the reader of other files names
        return False
    return any(name == "constants.pkl" or name.startswith("code/") for name in names)


def read_archive(path: str | os.PathLike[str]) -> Archive:
    """Read the tensors of a TorchScript archive.

    Raises:
        ValueError: the file is damaged, or its pickle does anything but build tensors and objects that hold them.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _read(file, os.path.getsize(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, zlib and struct raise many kinds on a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is a damaged TorchScript archive ({reason[:120]}): copy or download it again"
        ) from error


def _read(file: zipfile.ZipFile, size: int) -> Archive:
    records: dict[str, zipfile.ZipInfo] = {}
    for info in file.infolist():
        name = info.filename.partition("/")[2]  # every record lies in one folder, named as its author liked
        if name in records:
            _refuse(f"two records {name!r}")
        records[name] = info
    if "data.pkl" not in records:
        _refuse("no data.pkl; archives of PyTorch before 1.4 are not read: save it again with a later one")
    if "byteorder" in records and _text(file, records["byteorder"], 16) != sys.byteorder:
        _refuse("its numbers are in another byte order than this machine's")
    root = _Reader(_Storages(file, records, size)).read(_bytes(file, records["data.pkl"], MOST_PICKLE_BYTES))
    if not isinstance(root, _Object):
        _refuse(f"its data.pkl is a {type(root).__name__}, not a module")
    return Archive(_tensors(root), _activation(file, records))


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"not read as a TorchScript archive: {what}")


def _bytes(file: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    with file.open(info) as record:
        data = record.read(limit + 1)
    if len(data) > limit:
        _refuse(f"{info.filename} has more than {limit >> 20} MiB")
    return data


def _text(file: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> str:
    return _bytes(file, info, limit).decode("utf-8", "replace").strip()


def _activation(file: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> str | None:
    """The activation that the archive's code names: of a CLIP's functions QuickGELU alone calls sigmoid."""
    left, found = MOST_CODE_BYTES, set()
    for name, info in records.items():
        if name.startswith("code/") and name.endswith(".py") and left > 0:
            with file.open(info) as record:
                data = record.read(left)
            left -= len(data)
            found |= {kind for kind, call in (("gelu", b"gelu("), ("quick_gelu", b"sigmoid(")) if call in data}
    return found.pop() if len(found) == 1 and left > 0 else None


class _Storages:
    """The archive's storages, each read once, none larger than the file says it can be."""

    def __init__(self, file: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], size: int) -> None:
        self._file, self._records, self._left = file, records, size
        self._read: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, pid: Any) -> Tensor:
        """The storage that a persistent id names, as a tensor (numel,)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Name)):
            _refuse(f"a persistent id {pid!r:.80}")
        _, kind, key, _, numel = pid
        module, _, name = kind.text.rpartition(" ")
        if module != "torch" or name not in _DTYPES:
            _refuse(f"a storage of {kind.text.replace(' ', '.')}")
        if not isinstance(key, str) or not _is_size(numel):
            _refuse(f"a storage {key!r:.80} of {numel!r:.80} numbers")
        dtype = _DTYPES[name]
        if (key, dtype) not in self._read:
            self._read[key, dtype] = self._fetch(key, dtype, numel * dtype.itemsize)
        found = self._read[key, dtype]
        if len(found) != numel:
            _refuse(f"storage {key!r} has {len(found)} numbers, {numel} wanted")
        return found

    def _fetch(self, key: str, dtype: torch.dtype, nbytes: int) -> Tensor:
        info = self._records.get(f"data/{key}")
        if info is None:
            _refuse(f"no record data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != nbytes:
            _refuse(f"record data/{key} has {info.file_size} bytes, {nbytes} wanted, not compressed")
        self._left -= nbytes
        if self._left < 0:
            _refuse("its records have more bytes than the file")
        if not nbytes:
            return torch.empty(0, dtype=dtype)
        with self._file.open(info) as record:  # compares the checksum at the end
            data = bytearray(record.read(nbytes + 1))
        if len(data) != nbytes:
            _refuse(f"record data/{key} is cut short")
        return torch.frombuffer(data, dtype=dtype)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _tensor(args: Any) -> Tensor:
    """What ``torch._utils._rebuild_tensor_v2`` makes of a storage, an offset, a shape and strides."""
    if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], Tensor):
        _refuse(f"a tensor of {args!r:.80}")
    storage, offset, size, stride = args[:4]
    sizes = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not sizes or not all(map(_is_size, (offset, *size, *stride))):
        _refuse(f"a tensor of shape {size!r:.80} and strides {stride!r:.80}")
    numel, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        numel, last = numel * n, last + max(0, n - 1) * step
    if numel > len(storage) or (numel and last >= len(storage)):
        _refuse(f"a tensor of shape {size} that its {len(storage)} numbers do not fill")
    return storage.as_strided(size, stride, offset)


_MARK = object()


class _Reader:
    """Follows the opcodes that TorchScript writes."""

    def __init__(self, storages: _Storages) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """What a pickle builds."""
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if count > MOST_NODES:
                _refuse(f"more than {MOST_NODES} opcodes")
            name = opcode.name
            if name == "STOP":
                return self._pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(arg)
            elif name in _STEPS:
                _STEPS[name](self, arg)
            elif name not in ("PROTO", "FRAME"):
                _refuse(f"pickle opcode {name}")
        _refuse("data.pkl ends without its end")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            _refuse("data.pkl takes what it has not put")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            _refuse("data.pkl takes what it has not put")
        self._stack.pop()
        return items[::-1]

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _global(self, arg: str) -> None:
        # told before anything is built of it
        known = arg in (*_LISTS, _TAG, _TENSOR, _DICT) or _CLASS.fullmatch(arg)
        module, _, name = arg.rpartition(" ")
        if not known and not (module == "torch" and name in _DTYPES):
            _refuse(
                f"its data.pkl names {arg.replace(' ', '.')[:120]}; wanted tensors and the archive's own modules alone"
            )
        self._stack.append(_Name(arg))

    def _put(self, index: int) -> None:
        self._memo[index] = self._pop()
        self._stack.append(self._memo[index])

    def _get(self, index: int) -> None:
        if index not in self._memo:
            _refuse("data.pkl takes what it has not put")
        self._stack.append(self._memo[index])

    def _list(self, _: Any) -> None:
        self._stack.append([])

    def _dict(self, _: Any) -> None:
        self._stack.append({})

    def _append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._pop()
        if type(target) is not list:
            _refuse(f"data.pkl appends to {type(target).__name__}")
        target.extend(items)
        self._stack.append(target)

    def _set(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _sets(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._pop()
        if type(target) is not dict or len(items) % 2:
            _refuse(f"data.pkl sets items of {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool)):
                _refuse(f"data.pkl has a {type(key).__name__} as a key")
            target[key] = value
        self._stack.append(target)

    def _tuple(self, items: Sequence[Any]) -> None:
        self._stack.append(tuple(items))

    def _persistent(self, _: Any) -> None:
        self._stack.append(self._storages.get(self._pop()))

    def _new(self, _: Any) -> None:
        args, kind = self._pop(), self._pop()
        if not isinstance(kind, _Name) or not _CLASS.fullmatch(kind.text) or args != ():
            _refuse("data.pkl makes an object of another class than its own")
        self._stack.append(_Object())

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._pop()
        if not isinstance(target, _Object) or type(state) is not dict:
            _refuse(f"data.pkl gives a {type(state).__name__} to {type(target).__name__}")
        target.attributes.update((str(name), value) for name, value in state.items())
        self._stack.append(target)

    def _call(self, _: Any) -> None:
        args, kind = self._pop(), self._pop()
        name = kind.text if isinstance(kind, _Name) else ""
        if name == _TENSOR:
            self._stack.append(_tensor(args))
        elif name == _DICT and args == ():
            self._stack.append({})
        elif name in (*_LISTS, _TAG) and isinstance(args, tuple) and args:  # lists and dicts with their types beside
            self._stack.append(args[0])
        else:
            _refuse(f"data.pkl calls {name.replace(' ', '.') or type(kind).__name__}")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "MARK": _Reader._mark,
    "GLOBAL": _Reader._global,
    "BINPUT": _Reader._put,
    "LONG_BINPUT": _Reader._put,
    "BINGET": _Reader._get,
    "LONG_BINGET": _Reader._get,
    "EMPTY_LIST": _Reader._list,
    "EMPTY_DICT": _Reader._dict,
    "APPEND": _Reader._append,
    "APPENDS": _Reader._appends,
    "SETITEM": _Reader._set,
    "SETITEMS": _Reader._sets,
    "TUPLE": lambda reader, _: reader._tuple(reader._pop_to_mark()),
    "TUPLE1": lambda reader, _: reader._tuple([reader._pop()]),
    "TUPLE2": lambda reader, _: reader._tuple([reader._pop() for _ in range(2)][::-1]),
    "TUPLE3": lambda reader, _: reader._tuple([reader._pop() for _ in range(3)][::-1]),
    "BINPERSID": _Reader._persistent,
    "NEWOBJ": _Reader._new,
    "BUILD": _Reader._build,
    "REDUCE": _Reader._call,
}


def _tensors(root: _Object) -> dict[str, Tensor]:
    """The tensors of an object and of those in it, by dotted name."""
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, _Object, tuple[int, ...]]] = [("", root, (id(root),))]
    count = 0
    while todo:
        prefix, node, path = todo.pop()
        for name, value in node.attributes.items():
            count += 1
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Object):
                if id(value) in path or count > MOST_NODES or len(path) > 64:
                    _refuse("modules that hold themselves, or too many of them")
                todo.append((f"{prefix}{name}.", value, (*path, id(value))))
    return found
