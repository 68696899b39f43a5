"""The stream between a simulator's worker and its parent: frames over pipes. numpy only.

    frame = <u32 bytes of header> <u64 bytes of arrays> <header: JSON, padded to 8 bytes> <arrays: raw, in order>

``header["arrays"]`` lists name, dtype and shape of each array. Nothing is pickled, sizes are limited, and a received
array is a view of the frame's buffer.
"""

import json
import os
import struct
from typing import Any

import numpy as np

PREFIX = struct.Struct("<IQ")
MAX_HEADER = 1 << 20
MAX_ARRAYS = 1 << 28
"""Bytes. 256 MiB hold five 4K frames; anything larger is a corrupt stream."""
DTYPES = ("|u1", "<f4", "<f8")

Arrays = dict[str, np.ndarray]


def frame(header: dict, arrays: Arrays) -> list[bytes | memoryview]:
    """The frame's parts, to be written in order. Raises ``ValueError`` for a dtype that does not travel."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    for name, value in contiguous.items():
        if value.dtype.str not in DTYPES:
            raise ValueError(f"array {name!r} has dtype {value.dtype}, which is not among {DTYPES}")
    listed = [[name, value.dtype.str, list(value.shape)] for name, value in contiguous.items()]
    text = json.dumps({**header, "arrays": listed}, default=_plain).encode()
    text += b" " * (-len(text) % 8)  # aligned arrays
    size = sum(value.nbytes for value in contiguous.values())
    return [PREFIX.pack(len(text), size), text, *(value.data.cast("B") for value in contiguous.values() if value.size)]


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays among a simulator's credits."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not travel in a frame's header")


def write(descriptor: int, parts: list[bytes | memoryview]) -> None:
    """Write a frame at once where the pipe holds it: its reader then wakes once. Raises ``BrokenPipeError``."""
    left = [memoryview(part) for part in parts]
    while left:
        count = os.writev(descriptor, left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


class FrameReader:
    """Reads frames from a descriptor, blocking or not."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._expect(PREFIX.size, 0)

    def _expect(self, size: int, header_size: int) -> None:
        self._buffer, self._filled, self._header_size = bytearray(size), 0, header_size

    def read(self) -> tuple[dict, Arrays] | None:
        """The next frame; None where the descriptor does not block and the frame is not complete yet.

        Raises:
            EOFError: the other side closed.
            ValueError: not a frame.
        """
        while True:
            try:
                count = os.readv(self._descriptor, [memoryview(self._buffer)[self._filled :]])
            except BlockingIOError:
                return None
            if count == 0:
                raise EOFError
            self._filled += count
            if self._filled < len(self._buffer):
                continue
            if self._header_size == 0:
                header_size, arrays_size = PREFIX.unpack(self._buffer)
                if not 0 < header_size <= MAX_HEADER or arrays_size > MAX_ARRAYS:
                    raise ValueError(f"a frame of {header_size} + {arrays_size} bytes")
                self._expect(header_size + arrays_size, header_size)
                continue
            buffer, header_size = self._buffer, self._header_size
            self._expect(PREFIX.size, 0)
            return _unpack(buffer, header_size)


def _unpack(buffer: bytearray, header_size: int) -> tuple[dict, Arrays]:
    header = json.loads(buffer[:header_size])
    if not isinstance(header, dict) or not isinstance(header.get("arrays"), list):
        raise ValueError("a header that is not a mapping with 'arrays'")
    arrays: Arrays = {}
    offset = header_size
    for name, dtype, shape in header.pop("arrays"):
        if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"array {name!r} of dtype {dtype!r} and shape {shape!r}")
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    if offset != len(buffer):
        raise ValueError(f"{len(buffer) - header_size} bytes of arrays, {offset - header_size} listed")
    return header, arrays
