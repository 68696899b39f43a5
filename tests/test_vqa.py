"""Conversations about pictures, LLaVA's and ShareGPT's files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm4vla.data.vqa import Conversations
from vlm4vla.errors import UserError

LLAVA = {
    "id": "1",
    "image": "a/0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWas ist das – ein Tier?"},
        {"from": "gpt", "value": 'A "cat", {yes}.'},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
OPENAI = {
    "images": ["a/0.png", "a/1.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Compare."}]},
        {"role": "assistant", "content": "Alike."},
    ],
}
TEXT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.new("RGB", (3 + i, 2), (i, 2, 3)).save(tmp_path / f"a/{i}.png")
    return tmp_path


def write(path, records, form):
    if form == "list":
        text = json.dumps(records, ensure_ascii=False)
    elif form == "indented":
        text = "\n" + json.dumps(records, indent=2)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize("form", ["list", "indented", "lines"])
def test_records_are_read(pictures, form):
    data = Conversations.open(write(pictures / "data.json", [LLAVA, OPENAI, TEXT], form))
    assert len(data) == 3
    first, second, third = (data[i] for i in range(3))
    assert first.turns[0] == ("user", "Was ist das – ein Tier?")
    assert [role for role, _ in first.turns] == ["user", "assistant"] * 2
    assert first.turns[1][1] == 'A "cat", {yes}.'
    assert [image.shape for image in second.images] == [(2, 3, 3), (2, 4, 3)]
    assert second.turns == (("system", "Be brief."), ("user", "Compare."), ("assistant", "Alike."))
    assert (second.images[1] == np.array([1, 2, 3])).all()
    assert third.images == ()
    assert data[2] == third


@given(st.lists(st.text(), min_size=1, max_size=6), st.booleans())
def test_any_text_comes_back(tmp_path_factory, texts, as_list):
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": text}] for text in texts]
    path = tmp_path_factory.mktemp("text") / "data.json"
    records = [{"conversations": each} for each in turns]
    text = json.dumps(records, ensure_ascii=False) if as_list else "\n".join(json.dumps(r) for r in records)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if text.isprintable() else json.dumps(records).encode())
    data = Conversations.open(path)
    assert len(data) == len(texts)
    for i, text in enumerate(texts):
        assert "<image>" in text or data[i].turns[1][1] == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no conversations"),
        ("[]", "without a record"),
        ("\n\n", "without a record"),
        ('[{"a": 1}, {"b"', "no JSON"),
        ('[{"a": 1}', "does not end"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Conversations.open(path)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("Look at <image> and tell.", "Look at and tell."),
        ("Look at\n<image>\nand tell.", "Look at and tell."),
        ([{"text": "Look at"}, {"type": "image"}, {"text": "and tell."}], "Look at and tell."),
        (" As it is. ", " As it is. "),
    ],
)
def test_words_around_a_picture_stay_apart(pictures, text, read):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "A cat."}]
    path = write(pictures / "data.json", [{"image": "a/0.png", "messages": turns}], "list")
    assert Conversations.open(path)[0].turns[0] == ("user", read)


def test_pictures_that_are_none_are_named_with_their_record(pictures, monkeypatch):
    path = write(pictures / "data.json", [TEXT, LLAVA], "list")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(pictures / "a/0.png")
    whole = (pictures / "a/0.png").read_bytes()
    start, _, end = whole.rpartition(b"IDAT")
    assert b"IDAT" in start
    for broken in (b"text", whole[:40], start + b"I\0AT" + end):
        (pictures / "a/0.png").write_bytes(broken)
        with pytest.raises(UserError, match=r"record 1: .*a/0\.png"):
            Conversations.open(path)[1]
    (pictures / "a/0.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(UserError, match=r"record 1: .*a/0\.png .*decompression bomb"):
        Conversations.open(path)[1]


def test_broken_records_are_named(pictures):
    missing = {**LLAVA, "image": "a/9.png"}
    alone = {"conversations": LLAVA["conversations"][:1]}
    foreign = {"conversations": [{"from": "dog", "value": "wuff"}]}
    records = [missing, alone, foreign, {"text": "x"}]
    records += [{**LLAVA, "image": name} for name in ("../a/0.png", "a/../../0.png", str(pictures / "a/0.png"))]
    path = write(pictures / "data.jsonl", records, "lines")
    path.write_text(path.read_text() + "no json\n")
    data = Conversations.open(path)
    told = [r"a/9\.png", "turns", *["no conversation"] * 2, *["a path below"] * 3, "no conversation"]
    for i, message in enumerate(told):
        with pytest.raises(UserError, match=rf"(?s)record {i}.*{message}"):
            data[i]
    with pytest.raises(UserError, match=r"no conversations in"):
        Conversations.open(pictures / "nothing.json")
