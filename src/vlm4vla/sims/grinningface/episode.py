"""What an episode is made of, drawn from its seed: layout, target, colours, instruction and emojis.

The draw order is fixed and the counts do not depend on split or variant, so one seed has the same layout jitter and
start pose in every split and variant, and the same target in all but ``cards5``, where the same draw falls among five
cards; the emojis are drawn last.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.sims.grinningface import emoji
from vlm4vla.sims.grinningface.model import TABLE_COLOUR, WALL_COLOUR

LEVELS = ("place", "pick_place")
SPLITS = emoji.SPLITS
VARIANTS = ("base", "cards5", "lookalike", "layout", "colours", "paraphrase")
INSTRUCTIONS = {"place": "place the block on {}", "pick_place": "pick the block and place it on {}"}
"""``pick_place``: the paper's."""
PARAPHRASES = {
    "place": (
        "put the cube onto the {} card",
        "set the block down on {}",
        "drop the cube on the {}",
        "lay the block onto the card {}",
        "move the cube over to {}",
    ),
    "pick_place": (
        "grab the cube and drop it onto the {} card",
        "take the block and set it down on {}",
        "lift the cube and put it on the {}",
        "move the block over to {}",
        "bring the cube to the {} card",
    ),
}
"""Never used in demonstrations."""
CARD_X, CARD_Y = 0.46, (-0.2, 0.0, 0.2)
CARD_JITTER = 0.02
CUBE_CENTRE, CUBE_JITTER = np.array([0.27, 0.0]), 0.05
START_CENTRE, START_JITTER = np.array([0.25, 0.0, 0.15]), np.array([0.04, 0.06, 0.03])
"""Of the gripper, metres; for ``place`` the cube hangs in it."""
ROW = np.array([[CARD_X, y] for y in CARD_Y])
SIDE_CARDS = np.array([[0.27, -0.21], [0.27, 0.21]])
"""``cards5``: two more cards, left and right of the cube."""
LAYOUTS = (
    np.array([[0.37, -0.22], [0.47, 0.0], [0.37, 0.22]]),
    np.array([[0.40, -0.20], [0.45, 0.0], [0.49, 0.18]]),
    np.array([[0.49, -0.18], [0.45, 0.0], [0.40, 0.20]]),
)
"""``layout``: an arc around the robot and two stairs; no card jitters into a place of the base row's left or right."""


@dataclass(frozen=True)
class Episode:
    instruction: str
    emojis: tuple[emoji.Emoji, ...]
    target: int
    cards: np.ndarray
    """(n, 2) metres."""
    cube: np.ndarray
    """(2,) metres; for ``place`` overruled by the gripper's start."""
    start: np.ndarray
    """(3,) metres, of the gripper."""
    table: tuple[float, float, float]
    wall: tuple[float, float, float]


def check_names(level: str, split: str, variant: str) -> None:
    """Raise ``UserError`` on a name or combination that does not exist."""
    for what, name, known in (("level", level, LEVELS), ("split", split, SPLITS), ("variant", variant, VARIANTS)):
        if name not in known:
            raise UserError(
                f"the GrinningFace {what} {name!r}", f"one of {', '.join(known)}", f"name a {what} that exists"
            )
    if variant == "lookalike" and split != "hard":
        raise UserError(
            f"look-alike cards in the split {split!r}", "the split hard, which has look-alike groups", "take split hard"
        )


def random_colour(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Three uniform numbers in [0, 1) -> RGB, bright enough for cube and arm to stand out, never of the wood's hue."""
    return colorsys.hsv_to_rgb(0.15 + 0.78 * hue, 0.08 + 0.37 * saturation, 0.55 + 0.4 * value)


def draw_episode(seed: int, level: str, split: str, variant: str) -> Episode:
    """The episode of ``seed``. Raises ``ValueError`` on a negative seed."""
    if seed < 0:
        raise ValueError(f"the seed {seed}, expected 0 or more")
    rng = np.random.Generator(np.random.PCG64(seed))
    cube = CUBE_CENTRE + CUBE_JITTER * rng.uniform(-1, 1, 2)
    start = START_CENTRE + START_JITTER * rng.uniform(-1, 1, 3)
    jitter = CARD_JITTER * rng.uniform(-1, 1, (5, 2))
    target_draw, layout_draw, text_draw = rng.random(3)
    table_draw, wall_draw = rng.random((2, 3))

    cards = ROW
    if variant == "cards5":
        cards = np.concatenate([ROW, SIDE_CARDS])
    elif variant == "layout":
        cards = LAYOUTS[int(layout_draw * len(LAYOUTS))]
    target = int(target_draw * len(cards))

    pool = emoji.split(split)
    picked = [pool[i] for i in rng.permutation(len(pool))[: len(cards)]]
    if variant == "lookalike":
        others = [e for e in pool if e.group == picked[target].group and e is not picked[target]]
        order = iter(rng.permutation(len(others)))
        picked = [e if i == target else others[next(order)] for i, e in enumerate(picked)]

    templates = PARAPHRASES[level] if variant == "paraphrase" else (INSTRUCTIONS[level],)
    coloured = variant == "colours"
    return Episode(
        instruction=templates[int(text_draw * len(templates))].format(picked[target].name),
        emojis=tuple(picked),
        target=target,
        cards=cards + jitter[: len(cards)],
        cube=cube,
        start=start,
        table=random_colour(*table_draw) if coloured else TABLE_COLOUR,
        wall=random_colour(*wall_draw) if coloured else WALL_COLOUR,
    )
