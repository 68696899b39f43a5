"""MessagePack with NumPy arrays, as other projects' policy servers write it. A decoder that admits only this.

    array    {__ndarray__: True, data: bytes, dtype: "<f4", shape: [...]}     openpi and StarVLA: keys are bytes
    scalar   {__npgeneric__: True, data: number, dtype: "<f4"}                vla-eval: keys are text
    picture  {__image__: True, format: "png" | "jpeg" | "raw", data: bytes, shape: [h, w, c]}      vla-eval only

Each form's own decoder reads the other's arrays as plain dicts without an error; this one takes both. Everything else
is refused before it costs memory: object, structured, complex and text arrays, extension types, sizes that do not
match, deep nesting, many small containers, pictures that are no PNG or JPEG or of another size than declared.
"""

import io
import math
from functools import partial
from typing import Any, Literal

import msgpack
import numpy as np
from PIL import Image

Keys = Literal["bytes", "text"]
"""How a dialect writes the keys of an array: openpi and StarVLA ``bytes``, vla-eval ``text``."""

DTYPES = frozenset({"|b1", "|i1", "|u1", *(f"<{kind}{size}" for kind in "iuf" for size in (2, 4, 8))} - {"<f1"})
MAX_DEPTH = 8
MAX_CONTAINERS = 1024
"""Dicts and lists in one message; an observation has about ten, a batch of 64 some hundreds."""
MAX_ITEMS = 1024
"""Entries of one dict or list. With MAX_CONTAINERS it bounds the objects that a message can turn into."""
MAX_TEXT = 1 << 16
"""Bytes of one text."""
MAX_DIMS = 8
MAX_PICTURES = 1 << 26
"""Decoded bytes of all compressed pictures in one message: two 4K frames, or hundreds of the usual sizes."""
FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class MalformedMessage(ValueError):  # noqa: N818 (what it is called in the dialects' replies)
    """Bytes that are none of the documented forms."""


def pack(value: Any, keys: Keys = "bytes") -> bytes:
    """Plain values, NumPy arrays and scalars -> one message. Raises ``TypeError`` for anything else."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic) and keys == "text":
            return value.item()
        if isinstance(value, np.generic | np.ndarray):
            value = value.astype(value.dtype.newbyteorder("<"), copy=False)
            if value.dtype.str not in DTYPES:
                raise TypeError(f"an array of dtype {value.dtype} does not travel")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        if isinstance(value, np.ndarray):
            fields = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": value.shape}
            return {name.encode(): field for name, field in fields.items()} if keys == "bytes" else fields
        raise TypeError(f"{type(value).__name__} does not travel in a message")

    message = msgpack.packb(value, default=plain)
    assert message is not None
    return message


def unpack(data: bytes, pictures: bool = True) -> Any:
    """One message -> plain values and arrays (views of ``data``'s copy, not writable). Takes both forms of arrays.

    Args:
        pictures: whether compressed ones are admitted. Without them decoding is a matter of microseconds.

    Raises:
        MalformedMessage: anything but the documented forms, or beyond the limits above.
    """
    containers, room = 0, _Room() if pictures else None

    def count(value: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise MalformedMessage(f"more than {MAX_CONTAINERS} dicts and lists")
        return value

    try:
        value = msgpack.unpackb(
            data,
            object_hook=count,
            list_hook=count,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=len(data),
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except MalformedMessage:
        raise
    # msgpack has no common base for what it raises on strange bytes; a defect of ours in `count` would show in tests.
    except Exception as error:
        raise MalformedMessage(f"not MessagePack within the limits ({type(error).__name__}: {error})") from None
    return _decode(value, 0, room)


class _Room:
    """What the compressed pictures of a message may still take: a blank one of 48 MiB travels as 48 KiB."""

    def __init__(self) -> None:
        self._left = MAX_PICTURES

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise MalformedMessage(f"pictures of more than {MAX_PICTURES >> 20} MiB in one message, decoded")


def _decode(value: Any, depth: int, room: _Room | None) -> Any:
    if depth > MAX_DEPTH:
        raise MalformedMessage(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_decode(item, depth + 1, room) for item in value]
    if isinstance(value, dict):
        named = {key.decode("utf-8", "replace") if isinstance(key, bytes) else key: item for key, item in value.items()}
        if len(named) != len(value):
            raise MalformedMessage("a key twice, as bytes and as text")
        picture = partial(_picture, room=room)
        for marker, decode in (("__ndarray__", _array), ("__npgeneric__", _scalar), ("__image__", picture)):
            if marker in named:
                if named.pop(marker) is not True:
                    raise MalformedMessage(f"{marker} that is not true")
                return decode(named)
        return {key: _decode(item, depth + 1, room) for key, item in named.items()}
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise MalformedMessage(f"a {type(value).__name__}")  # a timestamp


def _fields(value: dict, *names: str) -> list:
    if value.keys() != set(names):
        raise MalformedMessage(f"an array with the keys {sorted(map(str, value))[:8]}, not {sorted(names)}")
    return [value[name] for name in names]


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise MalformedMessage("a shape that is no list of at most 8 numbers")
    if not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise MalformedMessage(f"the shape {shape!r:.80}")
    return tuple(shape)


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise MalformedMessage(f"the dtype {name!r:.80}; admitted are {', '.join(sorted(DTYPES))}")
    return np.dtype(name)


def _array(value: dict) -> np.ndarray:
    return array(*_fields(value, "data", "dtype", "shape"))


def array(data: Any, name: Any, sizes: Any) -> np.ndarray:
    """Bytes, dtype and shape as they were received -> an array. Raises ``MalformedMessage`` unless they go together."""
    dtype, shape = _dtype(name), _shape(sizes)
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise MalformedMessage(f"an array of shape {shape} and dtype {dtype} with other bytes than that needs")
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(value: dict) -> bool | int | float:
    data, name = _fields(value, "data", "dtype")
    dtype = _dtype(name)
    if type(data) is not {"b": bool, "f": float}.get(dtype.kind, int):
        raise MalformedMessage(f"a scalar of dtype {dtype} that is a {type(data).__name__}")
    try:
        with np.errstate(over="ignore"):
            return np.array(data, dtype).item()
    except OverflowError:
        raise MalformedMessage(f"a scalar that {dtype} does not hold") from None


def _picture(value: dict, room: _Room | None) -> np.ndarray:
    if room is None:
        raise MalformedMessage("a compressed picture, which this dialect does not have")
    if value.get("format") == "raw":
        return array(*_fields(value, "format", "data", "dtype", "shape")[1:])
    form, data, sizes = _fields(value, "format", "data", "shape")
    shape = _shape(sizes)
    if not isinstance(form, str) or form not in FORMATS or not isinstance(data, bytes):
        raise MalformedMessage(f"a picture in the format {form!r:.80}; admitted are raw, png, jpeg")
    try:
        picture = Image.open(io.BytesIO(data), formats=[FORMATS[form]])
        channels = {"L": 1, "RGB": 3, "RGBA": 4}.get(picture.mode, 0)
        declared = (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
        if declared != (picture.height, picture.width, channels):
            raise MalformedMessage(f"a picture of {picture.size} in mode {picture.mode}, declared as {shape}")
        room.take(math.prod(shape))  # so far only its header has been read
        return np.asarray(picture).reshape(shape)
    except MalformedMessage:
        raise
    except Exception as error:  # pillow raises whatever its decoders do (SyntaxError, struct.error, OSError, ...)
        raise MalformedMessage(f"a damaged picture ({type(error).__name__})") from None
