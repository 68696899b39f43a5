"""The fixed emoji splits and their pictures."""

import unicodedata
from collections import Counter

import numpy as np
import pytest

from vlm4vla.errors import UserError
from vlm4vla.sims.grinningface import emoji


def test_splits_are_disjoint_and_of_the_fixed_sizes():
    everything = emoji.catalogue()
    assert Counter(e.split for e in everything) == {"train": 100, "val": 50, "hard": 30}
    assert len({e.codepoint for e in everything}) == len({e.name for e in everything}) == len(everything)
    assert sum((emoji.split(name) for name in emoji.SPLITS), ()) == everything


def test_names_are_unicode_names_of_one_or_two_words():
    for each in emoji.catalogue():
        assert each.name == unicodedata.name(chr(each.codepoint)).lower()
        assert 1 <= len(each.name.split()) <= 2


def test_look_alike_groups_exist_in_hard_only():
    groups = Counter(e.group for e in emoji.split("hard"))
    assert len(groups) >= 8
    assert min(groups.values()) >= 3
    assert None not in groups
    assert all(e.group is None for e in emoji.catalogue() if e.split != "hard")


def test_the_font_has_every_emoji_and_all_look_different():
    pictures = [emoji.picture(e.codepoint, 24) for e in emoji.catalogue()]
    missing = emoji.glyph(0x1FAFF)  # unassigned in Unicode 15: a font's "no such glyph"
    for each, pixels in zip(emoji.catalogue(), pictures, strict=True):
        assert pixels.shape == (24, 24, 3)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 8, each.name
        if missing is not None:
            assert not np.array_equal(np.asarray(missing), np.asarray(emoji.glyph(each.codepoint))), each.name
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_pictures_have_colour_a_white_margin_and_cannot_be_written():
    strawberry = emoji.picture(emoji.by_name("strawberry").codepoint, 64)
    red, green, blue = strawberry[20:44, 20:44].reshape(-1, 3).mean(0)
    assert red > green + 50
    assert red > blue + 50
    assert (strawberry[0] == 255).all()
    with pytest.raises(ValueError, match="read-only"):
        strawberry[0, 0] = 0


def test_a_missing_font_names_the_package(monkeypatch):
    monkeypatch.setattr(emoji, "FONTS", ("/nowhere/NotoColorEmoji.ttf",))
    emoji.font.cache_clear()
    try:
        with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
            emoji.font()
    finally:
        emoji.font.cache_clear()


def test_unknown_split():
    with pytest.raises(UserError, match="train, val, hard"):
        emoji.split("test")


@pytest.mark.slow
def test_the_rule_still_gives_the_file():
    """Only where the font is the one it was chosen with (Noto of Debian 12): another drawing, another distance."""
    if "Noto" not in str(emoji.font().path):
        pytest.skip("needs Noto Color Emoji: apt-get install fonts-noto-color-emoji")
    assert tuple(emoji.build_catalogue()) == emoji.catalogue()
