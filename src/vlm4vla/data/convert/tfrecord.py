"""TFRecord files of ``tf.train.Example`` messages, without TensorFlow.

A record is its length (uint64), a check sum of the length, the content, and a check sum of the content (CRC-32C,
"masked"). The content is the protocol buffer ``Example { Features { map<string, Feature> } }``, and a ``Feature`` is
one list of bytes, floats or integers. Little-endian throughout.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from vlm4vla.errors import UserError

Feature = list[bytes] | np.ndarray
"""Bytes, float32 (n,) or int64 (n,)."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Protocol buffer wire types."""


def examples(path: Path) -> Iterator[dict[str, Feature]]:
    """The records of a file, parsed.

    Raises:
        UserError: damaged, cut short, or of other contents.
    """
    with path.open("rb") as file:
        number = 0
        while header := file.read(12):
            where = f"{path}, record {number}"
            if len(header) < 12:
                raise _damaged(where, "it ends within a record")
            length, check = struct.unpack("<QI", header)
            if check != masked_crc(header[:8]):
                raise _damaged(where, "the check sum of its length is wrong")
            content, check = file.read(length), file.read(4)
            if len(content) < length or len(check) < 4:
                raise _damaged(where, "it ends within a record")
            if struct.unpack("<I", check)[0] != masked_crc(content):
                raise _damaged(where, "its check sum is wrong")
            try:
                yield parse(content)
            except (IndexError, KeyError, ValueError) as error:
                raise _damaged(where, f"no tf.train.Example ({error})") from error
            number += 1


def masked_crc(content: bytes) -> int:
    """TFRecord's check sum: CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse(content: bytes) -> dict[str, Feature]:
    """A serialised ``tf.train.Example`` -> its features by name."""
    result: dict[str, Feature] = {}
    for _, features in _fields(memoryview(content)):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            result[bytes(pair[1]).decode()] = _feature(pair.get(2, memoryview(b"")))
    return result


def _feature(message: memoryview) -> Feature:
    for kind, values in _fields(message):
        if kind == 1:
            return [bytes(value) for _, value in _fields(values)]
        packed = [value for _, value in _fields(values)]
        if kind == 2:
            return np.concatenate([np.frombuffer(part, "<f4") for part in packed] or [np.empty(0, np.float32)])
        # An entry is the varints of many numbers (packed) or of one.
        return np.array([number for part in packed for number in _varints(part)], np.uint64).view(np.int64)
    return []


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message as number and content."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == LENGTH:
            length, at = _varint(message, at)
        elif wire == VARINT:
            length = _varint(message, at)[1] - at
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(message):
            raise ValueError("a field that ends beyond its message")
        yield field, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _damaged(where: str, found: str) -> UserError:
    return UserError(f"{where}: {found}", "a whole TFRecord file of tf.train.Example", "download the file again")
