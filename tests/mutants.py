"""Spoiled messages: bytes flipped, cut, doubled and spliced, lengths blown up, wrong kinds in right places."""

import io
import random
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from vlm4vla.serving.codec import pack

HEADERS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\x91" * 600, b"\x81\xa1a" * 600, b"\xdc\x04\x00" * 50, b"\x80" * 500)  # noqa: E501  # fmt: skip
"""Headers that promise much: arrays, maps, bytes, text, extensions of 4 GiB; deep nests; many containers."""
ODD = (None, True, -1, 1 << 63, 1e308, float("nan"), "", "x" * 300, b"", b"\x00" * 9, [], {}, [[]] * 40, {"a": {"b": 1}}, ["O"], "|O", ">f8", "<c8", "|V8", "<U4", [1 << 40], [-1], [2, 3], {b"__ndarray__": True}, {"__image__": True, "format": "gif", "data": b"GIF89a", "shape": [1, 1, 3]})  # noqa: E501  # fmt: skip


def png(size: int = 8, declared: tuple[int, ...] | None = None, form: str = "PNG") -> dict:
    """A picture as vla-eval sends it."""
    data = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 100, np.uint8)).save(data, form)
    shape = list(declared or (size, size, 3))
    return {"__image__": True, "format": form.lower(), "data": data.getvalue(), "shape": shape}


def seeds(dialect: str) -> list[dict]:
    """Whole messages of a dialect, arrays already in their travelling form."""
    image = np.full((8, 8, 3), 100, np.uint8)
    if dialect == "openpi":
        values = {"observation/image": image, "observation/state": np.zeros(8), "prompt": "go", "n": np.float32(1)}
        return [msgpack.unpackb(pack(values), strict_map_key=False)]
    if dialect == "starvla":
        example = {"image": [image, image], "lang": "go", "state": np.zeros((1, 8), np.float32)}
        messages = [
            {"examples": [example] * 2},
            {"type": "infer", "request_id": "a", "payload": {"examples": [example]}},
        ]
        return [msgpack.unpackb(pack(each), strict_map_key=False) for each in messages]
    payloads = {
        "hello": {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "vla_eval.benchmarks.libero:X"},
        "episode_start": {"task": {"name": "go", "ids": [1, 2]}},
        "observation": {"images": {"agentview": png(), "wrist": png(form="JPEG")}, "task_description": "go"},
        "episode_end": {"success": True},
    }
    return [{"type": kind, "payload": payload, "seq": 1, "timestamp": 1.0} for kind, payload in payloads.items()]


def _replace(value: Any, rng: random.Random) -> Any:
    """A copy in which one random part is another thing, is missing, or is there under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = {**value, key: _replace(value[key], rng)}
        if rng.random() < 0.15:
            changed[rng.choice(["type", "__ndarray__", b"__ndarray__", "__image__", b"data"])] = changed.pop(key)
        elif rng.random() < 0.1:
            del changed[key]
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], _replace(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def _spoil(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    how = rng.randrange(7)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if how == 2:
        return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]
    if how == 3:
        return data[:place] + rng.choice(HEADERS) + data[place:]
    if how == 4:
        return data[:place] + data[rng.randrange(len(data)) :]
    if how == 5:
        return data[:place] + data[place + rng.randrange(1, 20) :]
    return data + data[: rng.randrange(len(data))]


def mutants(dialect: str, number: int, seed: int = 0) -> Iterator[bytes]:
    """``number`` spoiled messages of a dialect; the same for the same seed."""
    rng = random.Random(seed)
    values = seeds(dialect)
    for _ in range(number):
        value: Any = rng.choice(values)
        for _ in range(rng.choice((0, 1, 1, 2))):
            value = _replace(value, rng)
        data = msgpack.packb(value) or b""
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            data = _spoil(data, rng) if data else b""
        yield data
