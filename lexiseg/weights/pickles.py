"""Reading pickled checkpoints (``torch.save`` of any age, TorchScript, plain pickles of arrays) without running them.

A pickle is a program that builds objects. Here it builds plain Python values only: whatever class or function it names
becomes a `Stub`, a note of the name and of what it was to be made from. Nothing is imported or called for it. Tensors
and numpy arrays are then made from such notes by this file, once it has seen that the file holds their values.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.words import counted, shorten

_TENSOR = re.compile(r"torch\.(_utils\._rebuild_(tensor(_v2)?|parameter(_with_state)?)|_tensor\._rebuild_from_type_v2)")
_ARRAY = re.compile(r"numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)")
_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")
_HPARAMS = re.compile(r"(pytorch_)?lightning(\.\w+)+\.AttributeDict")
# What may lie beside weights. None of it is made either; what is not named here is refused, so that somebody looks.
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.deque|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|(builtins|__builtin__)\.(set|frozenset|complex|bytes|bytearray|list|dict|tuple|int|long|float|str|unicode|bool"
    r"|object|range|xrange|slice)|_codecs\.encode|numpy\._?core\.multiarray\.scalar|numpy\.dtype|numpy\.\w+"
    r"|torch\.(Size|device|torch_version\.TorchVersion|serialization\._get_layout)"
    r"|mmengine\.logging\.history_buffer\.HistoryBuffer|__torch__\..+|torch\.jit\._pickle\.\w+"
)
# Types that are only named, as a value; as an object they are refused.
_TYPES = re.compile(r"torch(\.storage|\.nn\.parameter)?\.\w+|numpy(\.\w+)*\.\w+|(pytorch_)?lightning(\.\w+)+")
_KINDS = {
    "sparse": "sparse tensor",
    "qtensor": "quantised tensor",
    "meta": "tensor without values (meta)",
    "Complex": "complex tensor",
    "tensor_v3": "tensor of a type such as float8",
}
_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_MAX_SHARED = 1 << 26  # bytes of values that tensors have in common, beside four times the file's
_MAGIC = 0x1950A86A20F9469CFC6C
_PLAIN = "get the checkpoint with plain values in 16 or 32 bits"
_REMEDY = "save its state dict alone: torch.save(model.state_dict(), FILE)"


class Stub:
    """What a pickle says of an object: whose it is, its arguments, its state and its items. It does nothing."""

    name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    pairs: list[tuple[Any, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        """Take the arguments."""
        stub = object.__new__(cls)
        stub.args, stub.state, stub.items, stub.pairs = (*args, *kwargs.values()), None, [], []
        return stub

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        """Take the arguments of what an object's method would give."""
        return type(self)(self, *args, *kwargs.values())

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def append(self, item: Any) -> None:
        """Take an item of a list."""
        self.items.append(item)

    def extend(self, items: Any) -> None:
        """Take items of a list."""
        self.items.extend(items)

    add = append
    update = extend


# A tuple that is hashed as an object: a pickle can nest tuples so that their own hash takes all of the stack, or years.
_Tuple = type("tuple", (tuple,), {"__hash__": object.__hash__})


def _load_tuple(load: Callable[[Any], None], unpickler: Any) -> None:
    load(unpickler)
    unpickler.stack[-1] = _Tuple(unpickler.stack[-1])


_TUPLES = {
    code[0]: partial(_load_tuple, pickle._Unpickler.dispatch[code[0]])
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
}


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    number: int


class _Unpickler(pickle._Unpickler):  # the one in Python: that in C fills gigabytes where a pickle says a large number
    """Builds plain values and `Stub`s."""

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, **_TUPLES}

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin-1")  # pickles of Python 2 hold their arrays as text
        self._classes: dict[str, type[Stub]] = {}
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return self._classes.setdefault(full, type("Stub", (Stub,), {"name": full}))

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, *view = pid
        if not isinstance(key, str | int):  # the text of nested tuples may have no end
            raise ValueError("no key")
        name = kind.name.rpartition(".")[2].removesuffix("Storage")
        dtype = torch.uint8 if name == "Untyped" else _STORAGES.get(name)
        if dtype is None or (view and view[0] is not None):
            return self.find_class("torch", f"{name}Storage")()
        return self.storages.setdefault(str(key), _Storage(dtype, str(key), int(count)))

    def load_bytearray8(self) -> None:
        """Read what is there; the standard one first makes room for as much as the pickle says."""
        (size,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(size)))  # type: ignore[attr-defined]

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def unreadable(path: Path) -> LexisegError:
    """What to say of a file that holds no weights, or none that can be read."""
    with path.open("rb") as file:
        start = file.read(20)
    if start == b"version https://git-":
        return LexisegError(f"'{path}' is a Git LFS pointer, not the weights; fetch the file with git lfs pull.")
    try:
        with zipfile.ZipFile(path) as archive:
            foreign = not any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # no archive, or a damaged one
        foreign = start[:2] == b"\x1f\x8b"  # gzip
    if foreign:
        return LexisegError(f"'{path}' is an archive; unpack it and give the checkpoint inside.")
    return LexisegError(f"'{path}' cannot be read as weights (it is damaged or not a checkpoint); download it again.")


class PickledFile:
    """A checkpoint in a pickle, opened.

    ``content``: plain values and `Stub`s. Raises LexisegError if it is damaged, no pickle, or holds objects that are
    neither tensors nor harmless; the first is named with its type and where it lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = 0  # of the tensors that were made
        self._read: Callable[[_Storage], bytes] | None = None
        try:
            self.content = self._open_zip() if zipfile.is_zipfile(path) else self._open_plain()
        except Exception as error:  # a file of noise makes an unpickler raise almost anything
            raise unreadable(path) from error
        self._refuse_foreign()

    def _open_zip(self) -> Any:
        archive = zipfile.ZipFile(self.path)  # stays open as long as its tensors may be asked for
        items = {item.filename: item for item in archive.infolist()}
        record = min((name for name in items if name.endswith("/data.pkl") or name == "data.pkl"), key=len)
        root = record.removesuffix("data.pkl")
        used = [item for name, item in items.items() if name == record or name.startswith(f"{root}data/")]
        if any(item.compress_type for item in used) or sum(item.file_size for item in used) > self.path.stat().st_size:
            raise ValueError("compressed or overlapping records")
        if root + "byteorder" in items and archive.read(root + "byteorder") != b"little":
            raise ValueError("of a big-endian machine")
        self._read = lambda storage: archive.read(f"{root}data/{storage.key}")
        return _Unpickler(BytesIO(archive.read(record))).load()

    def _open_plain(self) -> Any:
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content = _Unpickler(data).load()
            if content != _MAGIC:
                return content
            _Unpickler(data).load(), _Unpickler(data).load()  # the version, and notes on the machine
            unpickler = _Unpickler(data)
            content = unpickler.load()
            places: dict[str, int] = {}
            for key in _Unpickler(data).load():
                if not isinstance(key, str) or (storage := unpickler.storages.get(key)) is None:
                    break  # of a kind that is refused
                places[key] = data.tell() + 8  # behind the number of its elements
                data.seek(places[key] + storage.number * storage.dtype.itemsize)

        def read(storage: _Storage) -> bytes:
            with self.path.open("rb") as file:
                file.seek(places[storage.key])
                return file.read(storage.number * storage.dtype.itemsize)

        self._read = read
        return content

    def _refuse_foreign(self) -> None:
        found: list[tuple[str, str]] = []
        for value, where in _walk(self.content):
            kind = _name(value)
            if kind is None or kind in _MAPPINGS or (isinstance(value, type) and _TYPES.fullmatch(kind)):
                continue
            if any(known.fullmatch(kind) for known in (_TENSOR, _ARRAY, _HPARAMS, _HARMLESS)):
                continue
            known_as = (text for part, text in _KINDS.items() if part in kind and kind.startswith("torch."))
            found.append((next(known_as, kind), where()))
        if found:
            kind, where_ = found[0]
            remedy = _PLAIN if kind in _KINDS.values() else _REMEDY
            more = f" (and {counted(len(found) - 1, 'more such object')})" if len(found) > 1 else ""
            place = f" at '{where_}'" if where_ else ""
            raise LexisegError(
                f"'{self.path}' holds a {shorten(kind)}{place}{more}, which lexiseg does not read; {remedy}."
            )

    def tensor(self, value: Any, where: str) -> Tensor:
        """Make the tensor that ``value`` (see `is_tensor`) is a note of.

        Raises LexisegError if the file does not hold its values; ``where`` says which tensor it is.
        """
        try:
            made = self._array(value) if _ARRAY.fullmatch(value.name) else self._tensor(value)
        except Exception as error:
            raise LexisegError(
                f"'{self.path}' is damaged: the values of {shorten(where)} are missing or cut off; download it again."
            ) from error
        self._bytes += made.nbytes
        if self._bytes > 4 * self.path.stat().st_size + _MAX_SHARED:
            raise LexisegError(
                f"'{self.path}' would take far more memory than it is large, because many of its tensors share their "
                f"values; {_REMEDY}."
            )
        return made

    def _tensor(self, stub: Stub) -> Tensor:
        args = stub.args
        if "_rebuild_parameter" in stub.name:
            return self._tensor(args[0])
        if stub.name.endswith("_from_type_v2"):
            return self._tensor(args[0](*args[2]))
        storage, offset, size, stride = args[:4]
        if not isinstance(storage, _Storage) or self._read is None:
            raise ValueError("no storage")
        size, stride = (value.args[0] if isinstance(value, Stub) else value for value in (size, stride))
        if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
            raise ValueError("no sizes")
        count = math.prod(size)
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if count > storage.number or (count and last >= storage.number):
            raise ValueError("more than its storage")
        if not count:
            return torch.zeros(size, dtype=storage.dtype)
        values = torch.frombuffer(bytearray(self._read(storage)), dtype=storage.dtype, count=storage.number)
        return values.as_strided(size, stride, offset).clone()

    def _array(self, stub: Stub) -> Tensor:
        if stub.name.endswith("_frombuffer"):
            data, dtype, shape, order = stub.args
            fortran = order == "F"
        else:
            _, shape, dtype, fortran, data = stub.state
        if isinstance(data, Stub):
            data = data.args[0].encode("latin-1") if data.args else b""
        if isinstance(data, str):
            data = data.encode("latin-1")
        code, order = dtype.args[0], dtype.state[1] if dtype.state else "<"
        if not re.fullmatch(r"[fiub][1248]", code):
            raise ValueError("no numbers")
        array = np.frombuffer(data, dtype=np.dtype(code).newbyteorder(order if order in "<>" else "="))
        array = array.reshape(tuple(shape), order="F" if fortran else "C")
        return torch.from_numpy(array.astype(code).copy())


def is_tensor(value: Any) -> bool:
    """Say whether a value of `PickledFile.content` is a tensor or a numpy array."""
    return isinstance(value, Stub) and any(known.fullmatch(value.name) for known in (_TENSOR, _ARRAY))


def entries(value: Any) -> dict[str, Any] | None:
    """What a value of `PickledFile.content` holds by name, if it is a mapping; of a TorchScript, all its tensors."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items() if isinstance(key, str | int)}
    if isinstance(value, Stub) and (value.name in _MAPPINGS or _HPARAMS.fullmatch(value.name)):
        given = value.args[0] if value.args and isinstance(value.args[0], list) else []
        pairs = [pair for pair in given if isinstance(pair, list | tuple) and len(pair) == 2]
        return {str(key): item for key, item in [*pairs, *value.pairs] if isinstance(key, str | int)}
    if isinstance(value, Stub) and value.name.startswith("__torch__."):
        return {where(): item for item, where in _walk(value) if is_tensor(item)}
    return None


def _name(value: Any) -> str | None:
    """The name a stub or a stub's class stands for; None for plain values."""
    stub = value if isinstance(value, Stub) else None
    if stub is not None and stub.name in ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"):
        return _name(stub.args[0]) if stub.args else stub.name
    if stub is not None or (isinstance(value, type) and issubclass(value, Stub)):
        return str(value.name)
    return None


def _walk(content: Any) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Everything in a value, once each and in its order, with a function that says where it lies."""
    seen: set[int] = set()
    # Where a value lies is a chain of (key, chain): deep nesting would make texts of quadratic length.
    stack: list[tuple[Any, Any]] = [(content, None)]
    while stack:
        value, chain = stack.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | None):
            continue
        seen.add(id(value))
        yield value, lambda chain=chain: _path(chain)  # type: ignore[misc]
        inside: list[tuple[Any, Any]] = []
        if isinstance(value, Mapping):
            inside += [(key, chain) for key in value]
            inside += [(item, (key, chain)) for key, item in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            inside += [(item, (index, chain)) for index, item in enumerate(value)]
        elif isinstance(value, Stub):
            # What an object is made from lies where it lies; a state has names.
            inside += [(item, chain) for item in (*value.args, *value.items, value.state)]
            inside += [(item, (key, chain)) for key, item in value.pairs]
        stack.extend(reversed(inside))


def _path(chain: Any) -> str:
    keys: list[str] = []
    while chain is not None and len(keys) < 12:
        key, chain = chain
        keys.insert(0, shorten(str(key)) if isinstance(key, str | int | float) else "?")
    return ".".join(keys)
