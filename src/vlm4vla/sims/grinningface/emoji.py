"""Emojis: pictures from the system's colour-emoji font, names from Unicode, and the fixed splits of ``emojis.json``."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm4vla.errors import UserError

FONTS = tuple(Path(__file__).with_name("fonts.txt").read_text().splitlines())
"""Where colour-emoji fonts are looked for, in this order; ``scripts/setup.sh`` reads the same file."""
FONT_SIZES = (109, 160, 137)
"""Bitmap fonts render at their own size only: 109 Noto, 160 Apple; vector fonts (Segoe) at any."""
SPLITS = ("train", "val", "hard")
CATALOGUE = Path(__file__).with_name("emojis.json")
CATALOGUE_FONT = "NotoColorEmoji.ttf e5899ed38b"
"""``font_version`` of the font that ``emojis.json`` was chosen with: Debian 12's ``fonts-noto-color-emoji``."""


@dataclass(frozen=True)
class Emoji:
    name: str
    """The Unicode name in lower case, e.g. ``hot pepper``."""
    codepoint: int
    split: str
    group: str | None = None
    """The look-alike group (split ``hard`` only)."""


@cache
def catalogue() -> tuple[Emoji, ...]:
    """Every emoji of ``emojis.json``, in its order."""
    return tuple(Emoji(**row) for row in json.loads(CATALOGUE.read_text()))


def split(name: str) -> tuple[Emoji, ...]:
    """The emojis of one split. Raises ``UserError`` on an unknown one."""
    if name not in SPLITS:
        raise UserError(f"the emoji split {name!r}", f"one of {', '.join(SPLITS)}", "name one of them")
    return tuple(e for e in catalogue() if e.split == name)


@cache
def by_name(name: str) -> Emoji:
    """Raises ``KeyError``."""
    return {e.name: e for e in catalogue()}[name]


@cache
def font() -> ImageFont.FreeTypeFont:
    """The first colour-emoji font found. Raises ``UserError``."""
    problems = []
    for path in (Path(p).expanduser() for p in FONTS):
        if not path.is_file():
            continue
        for size in FONT_SIZES:
            try:
                return ImageFont.truetype(str(path), size)
            except OSError as error:
                problems.append(f"{path}: {error}")
    raise UserError(
        "; ".join(problems) or "no colour-emoji font in the usual places",
        "Noto Color Emoji (bitmaps), Apple Color Emoji or Segoe UI Emoji",
        "apt-get install fonts-noto-color-emoji (elsewhere: put NotoColorEmoji.ttf into ~/.local/share/fonts)",
    )


@cache
def font_version() -> str:
    """File name of the font and the first 10 hex digits of its SHA-256: other fonts draw other pictures."""
    path = Path(str(font().path))
    with path.open("rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:10]}"


def glyph(codepoint: int) -> Image.Image | None:
    """The emoji as an RGBA picture cropped to its ink, or None where the font has no such glyph."""
    size = round(font().size)
    image = Image.new("RGBA", (size * 2, size * 2), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((0, 0), chr(codepoint), font=font(), embedded_color=True)
    box = image.getbbox()
    return None if box is None else image.crop(box)


@cache
def picture(codepoint: int, size: int, margin: float = 0.06) -> np.ndarray:
    """uint8 (size, size, 3): the emoji centred on white, ``margin`` (fraction of the size) free on each side.

    The array is shared by all callers and read-only. Raises ``UserError`` where the font lacks the emoji.
    """
    ink = glyph(codepoint)
    if ink is None:
        raise UserError(
            f"no glyph for U+{codepoint:X} in {font().path}",
            "a colour-emoji font of Unicode 13 or later",
            "apt-get install fonts-noto-color-emoji",
        )
    inner = round(size * (1 - 2 * margin))
    scale = inner / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    card = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    card.alpha_composite(ink, ((size - ink.width) // 2, (size - ink.height) // 2))
    pixels = np.array(card.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


LOOKALIKES = {
    "hearts": ("blue heart", "green heart", "purple heart"),
    "books": ("green book", "blue book", "orange book"),
    "cats": ("tiger face", "lion face", "cat face"),
    "dogs": ("dog face", "wolf face", "fox face"),
    "balls": ("baseball", "softball", "volleyball"),
    "fish": ("fish", "tropical fish", "blowfish"),
    "trains": ("metro", "light rail", "train"),
    "fruits": ("red apple", "tangerine", "peach"),
    "blossoms": ("cherry blossom", "hibiscus", "blossom"),
    "faces": ("grinning face", "neutral face", "worried face"),
}
"""Emojis that share shape or kind, so that the name's other half decides."""
RANGES = ((0x1F300, 0x1F5FF), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x1FA70, 0x1FAFF))
_REJECTED = """
clock sign symbol button letter squared modifier regional japanese arrow arrows flag with keycap input restroom
component selector face heart hearts man woman men women person people boy girl baby hand hands finger fist index
adult child older princess prince santa father mother police guard guardsman worker dancer dancers family couple
bride superhero supervillain mage fairy vampire merperson elf genie zombie angel bust bow footprints ear ears nose
mouth tongue lips eye eyes leg foot bone biceps brain tooth kiss moon book books ball fish train tram metro rail
railway apple blossom flower triangle square circle diamond cross mark no non passport customs baggage wireless
envelope mailbox volume speaker page sheet curl currency card yen dollar euro pound chart increasing decreasing
place wc water closet litter potable pedestrians bicyclist bicycles vibration telephone cellphone pager fax lowered
raised closed open oncoming ideograph om menorah wheel peace atom star hexagram zodiac trigram religion sauna
haircut massage juggling wrestlers handball fencer rower surfer swimmer runner walking weight lifter golfer nail
rowboat canoe kayak ninja elevator cinema speech thought balloon control emblem calendar outbox inbox videocassette
minidisc frames desktop projector synagogue mosque church kaaba shinto fingers left pistol hole station monorail
horse racing bath standing shrug selfie palm pregnant breast feeding in of for and facing
"""
REJECTED_WORDS = frozenset(_REJECTED.split())


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def build_catalogue(num_train: int = 100, num_val: int = 50, min_distance: float = 51.0) -> list[Emoji]:
    """The rule by which ``emojis.json`` was chosen once (Noto Color Emoji of Debian 12).

    Candidates are pictographs with Unicode names of one or two words, without signs, people and other kinds listed in
    ``REJECTED_WORDS``. In the order of a seeded shuffle, one is taken when its 12 x 12 RGB thumbnail is at least
    ``min_distance`` (root mean square, 0 to 255) from all taken ones and from the look-alike groups.
    """
    hard = []
    for group, names in LOOKALIKES.items():
        hard += [Emoji(name, ord(unicodedata.lookup(name.upper())), "hard", group) for name in names]
    taken = [picture(e.codepoint, 12).astype(float) for e in hard]
    candidates = []
    for codepoint in (c for first, last in RANGES for c in range(first, last + 1)):
        name = unicodedata.name(chr(codepoint), "").lower()
        words = name.replace("-", " ").split()
        if not 1 <= len(words) <= 2 or REJECTED_WORDS & set(words) or "-" in name or glyph(codepoint) is None:
            continue
        candidates.append((name, codepoint))
    chosen: list[Emoji] = []
    for i in np.random.Generator(np.random.PCG64(0)).permutation(len(candidates)):
        name, codepoint = candidates[i]
        thumbnail = picture(codepoint, 12).astype(float)
        if len(chosen) < num_train + num_val and min(_distance(thumbnail, t) for t in taken) >= min_distance:
            taken.append(thumbnail)
            chosen.append(Emoji(name, codepoint, "train" if len(chosen) < num_train else "val"))
    if len(chosen) < num_train + num_val:
        raise ValueError(f"only {len(chosen)} of {len(candidates)} candidates are {min_distance} apart")
    return chosen + hard
