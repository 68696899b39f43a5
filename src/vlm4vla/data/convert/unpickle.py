"""Object arrays of ``.npy`` files (CALVIN's annotations) without running anything that they say.

Such a file holds a pickle. Python's unpickler executes what a pickle names; this one knows five names, those by which
numpy describes arrays, and answers each with a passive class or function of this module. Nothing else can be reached,
numpy's own C code included: arrays are made afterwards from what was noted down, of plain numbers and text only.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlm4vla.errors import UserError

PLAIN = re.compile(r"[biufSU?]\d*")
"""Types of plain numbers and text, as numpy writes them: ``f4``, ``i8``, ``U12``."""


def load_object_array(path: Path) -> Any:
    """The content of a ``.npy`` file of dtype object: dictionaries, lists, text and numbers as Python's own, arrays of
    numbers as arrays.

    Raises:
        UserError: no such file, damaged, or naming anything else.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                version
            ]
            _, _, dtype = read_header(file)
            if not dtype.hasobject:
                raise ValueError(f"an array of {dtype}")
            return _plain(_Unpickler(io.BytesIO(file.read())).load(), {})
    # What a forged pickle can make the unpickler raise is not limited to its own errors.
    except Exception as error:
        raise UserError(
            f"{path}: {type(error).__name__}: {error}", "a .npy file of dictionaries, text and numbers", "copy it again"
        ) from error


class _Type:
    """``numpy.dtype(text, align, copy)`` and its state ``(version, byte order, ...)``."""

    __slots__ = ("order", "text")

    def __init__(self, text: str, align: bool = False, copy: bool = True):
        self.text, self.order = text, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype:
        if self.order not in ("<", ">", "|", "=") or not PLAIN.fullmatch(self.text):
            raise pickle.UnpicklingError(f"the type {self.order}{self.text}")
        return np.dtype(self.order + self.text)


class _Array:
    """``numpy.core.multiarray._reconstruct(ndarray, shape, code)`` and its state, noted down."""

    __slots__ = ("state",)

    def __init__(self, subtype: object, shape: tuple, code: bytes):
        self.state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def plain(self, done: dict[int, Any]) -> Any:
        assert self.state is not None
        _, shape, kind, fortran, content = self.state
        if kind.text in ("O", "O8"):
            values = [_plain(value, done) for value in content]
            return values[0] if shape == () else values
        return np.frombuffer(content, kind.plain()).reshape(shape, order="F" if fortran else "C")


def _scalar(kind: _Type, content: bytes) -> Any:
    return np.frombuffer(content, kind.plain())[0].item()


def _encode(text: str, codec: str) -> bytes:
    """Bytes in pickles of protocol 2."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"the codec {codec!r}")
    return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): object(),
    ("numpy", "dtype"): _Type,
    ("multiarray", "_reconstruct"): _Array,
    ("multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}


_InPython: Any = pickle._Unpickler
"""Python's own unpickler, the one that is written in Python."""


class _Unpickler(_InPython):
    """Written in Python, because C's hashes what becomes a key before anyone can look at it, and sixty tuples, each of
    which holds the one before twice, take longer to hash than anyone waits."""

    dispatch: ClassVar[dict] = {**_InPython.dispatch}

    def load_setitem(self) -> None:
        _require_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _require_keys(self.stack[::2])
        super().load_dict()

    def load_set(self) -> None:
        raise pickle.UnpicklingError("a set")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = load_set

    def find_class(self, module: str, name: str) -> Any:
        module = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")
        return _KNOWN[module, name]


def _require_keys(keys: list) -> None:
    for key in keys:
        if not isinstance(key, str | bytes | int | float | None):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as the key of a dictionary")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Arrays and types that were noted down -> what they describe.

    Args:
        done: by ``id``, what has been made. A value that is referred to twice is made once: else a hundred bytes, of
            lists that hold the one before twice, would take hours.
    """
    if value is None or isinstance(value, str | bytes | int | float | bool):
        return value
    if id(value) not in done:
        if isinstance(value, _Array):
            made = value.plain(done)
        elif isinstance(value, dict):
            made = {key: _plain(each, done) for key, each in value.items()}
        elif isinstance(value, list | tuple):
            made = type(value)(_plain(each, done) for each in value)
        else:
            raise pickle.UnpicklingError(f"a {type(value).__name__}")
        done[id(value)] = made
    return done[id(value)]
