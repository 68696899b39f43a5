"""The codec takes what the projects write, in both forms, and nothing else; no message takes the server down."""

import math
import resource
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL.PngImagePlugin import PngImageFile

from mutants import mutants, png
from policy_server import running, service
from vlm4vla.serving import codec
from vlm4vla.serving.codec import DTYPES, MAX_CONTAINERS, MAX_DEPTH, MAX_ITEMS, MAX_TEXT, MalformedMessage, pack, unpack

DIALECTS = ("openpi", "vla-eval", "starvla")


@given(
    arrays.arrays(
        st.sampled_from(sorted(DTYPES)).map(np.dtype),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.sampled_from(["bytes", "text"]),
)
def test_arrays_travel_in_both_forms(array, keys):
    back = unpack(pack({"a": [array]}, keys))["a"][0]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    )
)
def test_plain_values_travel(value):
    def depth(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=-1) if isinstance(value, dict | list) else 0

    if depth(value) <= MAX_DEPTH:
        assert unpack(pack(value)) == value


def test_scalars_and_byte_orders():
    assert unpack(pack({"a": np.float32(0.5), "b": np.int64(-3), "c": np.bool_(True)})) == {
        "a": 0.5,
        "b": -3,
        "c": True,
    }
    assert unpack(pack({"a": np.float32(0.5)}, "text")) == {"a": 0.5}
    big = np.arange(3, dtype=">i4")
    np.testing.assert_array_equal(unpack(pack(big)), big)
    for kind in (np.array([None]), np.zeros(2, "c8"), np.array(["a"]), object()):
        with pytest.raises(TypeError, match="does not travel"):
            pack(kind)


def test_pictures():
    for form in ("PNG", "JPEG"):
        picture = unpack(msgpack.packb(png(form=form)))
        assert (picture.shape, picture.dtype) == ((8, 8, 3), np.uint8)
        assert abs(int(picture[0, 0, 0]) - 100) <= 1
    raw = {"__image__": True, "format": "raw", "data": bytes(12), "dtype": "|u1", "shape": [2, 2, 3]}
    assert unpack(msgpack.packb(raw)).shape == (2, 2, 3)
    damaged = png() | {"data": png()["data"][:45]}
    bomb = png() | {
        "data": png()["data"][:16] + b"\x7f\xff\xff\xff" * 2 + png()["data"][24:],
        "shape": [1 << 30] * 2 + [3],
    }
    for wrong in (
        png(declared=(8, 9, 3)),
        png(declared=(8, 8)),
        png() | {"format": "gif"},
        damaged,
        bomb,
        {"__image__": 1},
    ):
        with pytest.raises(MalformedMessage):
            unpack(msgpack.packb(wrong))


def test_the_pictures_of_a_message_share_a_budget_that_is_checked_before_decoding(monkeypatch):
    decoded = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    large = png(size=2048)  # 12 MiB that travel as some KiB
    fits = codec.MAX_PICTURES // math.prod(large["shape"])
    message = msgpack.packb({"images": [large] * 12})
    assert len(message) < 1 << 20
    with pytest.raises(MalformedMessage, match="64 MiB"):
        unpack(message)
    assert 0 < len(decoded) <= fits
    assert len(unpack(msgpack.packb([large] * fits))) == fits, "the next message has its own"


def array(**changes):
    return {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2], **changes}


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "wrong",
    [
        *(array(dtype=name) for name in ("|O", "<c8", "<U2", "|V4", "<M8[s]", ">f4", "f4", "<f16", "<f4,<f4", 4, [])),
        *(array(shape=shape) for shape in ([3], [-2], [2.0], ["2"], 2, [1 << 40, 0], [True, 2], [2] + [1] * 8, None)),
        *(array(data=data) for data in (bytes(7), "12345678", [0] * 8, None)),
        array(__ndarray__=False), array(more=1), {"__ndarray__": True},
        {"__npgeneric__": True, "data": 300, "dtype": "|u1"}, {"__npgeneric__": True, "data": "1", "dtype": "<f4"},
        {"__npgeneric__": True, "data": 1, "dtype": "|O"}, {"__npgeneric__": True, "data": [1], "dtype": "<f4"},
        {"a": 1, b"a": 2}, {1: 2}, nested(MAX_DEPTH + 1), [0] * (MAX_ITEMS + 1),
        [[[]] * 600] * 2 + [[]] * MAX_CONTAINERS,
        {str(i): i for i in range(MAX_ITEMS + 1)}, "x" * (MAX_TEXT + 1),
        msgpack.ExtType(5, b"code"), msgpack.Timestamp(1),
    ],
)  # fmt: skip
def test_everything_else_is_refused(wrong):
    with pytest.raises(MalformedMessage):
        unpack(msgpack.packb({"value": wrong} if not isinstance(wrong, dict) else wrong))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x80\x80", b"\xdc\x03\xff" * 1000]
)
def test_bytes_that_promise_too_much_are_refused(data):
    with pytest.raises(MalformedMessage):
        unpack(data)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mutants_of_messages_raise_nothing_else(dialect):
    refused = 0
    for data in mutants(dialect, 2000):
        try:
            unpack(data)
        except MalformedMessage:
            refused += 1
    assert 500 < refused < 1950, "mutants that are all whole, or all broken at the first byte, test nothing"


def bombard(server, dialect, number, seed):
    """Send mutants one after the other, connecting again where the dialect ends the connection; returns the slowest
    answer's seconds and the number that were not refused."""
    slowest, todo, taken = 0.0, iter(mutants(dialect, number, seed)), 0
    data = next(todo, None)
    while data is not None:
        with server.connect(dialect, close_timeout=1) as client:
            if dialect != "vla-eval":
                client.recv(10)
            while data is not None:
                started = time.monotonic()
                client.send(data)
                reply = b"" if dialect == "vla-eval" and _silent(data) else client.recv(10)
                slowest = max(slowest, time.monotonic() - started)
                taken += b"actions" in reply if isinstance(reply, bytes) else 0
                data = next(todo, None)
                if isinstance(reply, str):
                    break
    return slowest, taken


def _silent(data):
    """Whether vla-eval's protocol has no reply to this."""
    try:
        value = unpack(data)
    except MalformedMessage:
        return False
    whole = isinstance(value, dict) and value.keys() >= {"type", "payload", "seq", "timestamp"}
    return (
        whole
        and isinstance(value["type"], str)
        and value["type"] in ("episode_start", "episode_end", "error")
        and isinstance(value["payload"], dict)
        and type(value["seq"]) is int
        and 0 <= value["seq"] < 1 << 63
    )


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_lives_through_mutants(dialect, caplog):
    with running(service(form="native")) as server:
        slowest, taken = bombard(server, dialect, 500, seed=1)
        assert taken > 0
        assert slowest < 2
    assert caplog.text == "", "every one of them was refused on purpose"


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_lives_through_40000_mutants_with_flat_memory(dialect, caplog):
    """120,000 over the three dialects."""
    with running(service()) as server:
        bombard(server, dialect, 4_000, seed=1)
        before = peak_mib()
        slowest, taken = bombard(server, dialect, 40_000, seed=2)
        grown = peak_mib() - before
        print(f"\n{dialect}: {taken} of 40,000 mutants got actions, slowest reply {slowest:.3f} s, +{grown:.1f} MiB")
        assert grown < 20
        assert slowest < 5
    assert caplog.text == ""
