"""Questions and answers about card scenes: what the embedded VLM is taught before it ever sees an action.

Tasks: where is X (row scenes), what is on the left / in the middle / on the right, which of two is further left,
point at X (cards, block, gripper), is there an X, how many cards. Questions are drawn with a seed; none is
about a card that is hidden.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

POINT_BINS = 12
PLACES = ("left", "middle", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "where": ("where is the {}", "on which side is the {}", "find the {}"),
    "what": ("what is {}", "which card is {}", "name the card {}"),
    "left_of": ("which is further left the {} or the {}",),
    "point": ("point at the {}", "show the {}", "locate the {}"),
    "present": ("is there a {}", "do you see a {}"),
    "count": ("how many cards are there", "count the cards"),
}
PLACE_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
OBJECTS = ("block", "gripper")
_FILLER = (
    "what action should the robotic arm take to pick and place it onto put set drop move bring take block cube card "
    "on a the grab lift over lay down"
)
FILLER = tuple(_FILLER.split())
"""Words between which names stand in free sentences, those of robot instructions among them."""
CUES = {"where": "where", "point": "point"}
"""Tasks that can be asked in a free sentence: the cue, then a name somewhere among up to twelve random words.

A web-scale VLM has met a name in every kind of sentence. This one, taught with short questions only, found the card for
"where is the X" in 97 % and for "what action should the robotic arm take to place the block on X" hardly ever.
No instruction of the robot occurs as such.
"""


def words() -> list[str]:
    """Every word of questions, answers and instructions, in a fixed order."""
    texts = [text for group in TEMPLATES.values() for text in group]
    texts += [*PLACE_PHRASES.values(), *OBJECTS, *PLACES, *NUMBERS, "yes no none", *FILLER]
    return sorted({word for text in texts for word in text.replace("{}", " ").split()})


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is in them. N scenes, up to C cards; (u, v) in [0, 1] from the picture's top left."""

    images: np.ndarray
    """uint8 (N, S, S, 3)."""
    cards: np.ndarray
    """int16 (N, C): index into ``names``, -1 where there is none. In row scenes 0, 1, 2 are left, middle, right."""
    card_uv: np.ndarray
    """float32 (N, C, 2)."""
    card_size: np.ndarray
    """float32 (N, C, 2): the card's width and height in the picture."""
    row: np.ndarray
    """bool (N,): three cards side by side, as in the robot task."""
    block_uv: np.ndarray
    """float32 (N, 2), NaN where there is no block."""
    gripper_uv: np.ndarray
    """float32 (N, 2)."""
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Question:
    task: str
    question: str
    answer: str
    name: str = ""
    """The emoji that ``where``, ``what`` and ``point`` are about, where it is one."""


def point_answer(uv: np.ndarray) -> str:
    """(u, v) -> ``"x3 y7"`` on the 12 x 12 grid."""
    x, y = np.clip((np.asarray(uv) * POINT_BINS).astype(int), 0, POINT_BINS - 1)
    return f"x{x} y{y}"


def ask(
    scenes: Scenes,
    i: int,
    num: int,
    rng: np.random.Generator,
    free_share: float = 0.0,
    named: Collection[str] | None = None,
) -> list[Question]:
    """``num`` questions about scene ``i``. Row scenes: about a third each where, what and the rest.

    Args:
        free_share: share of ``where`` and ``point`` questions about cards that are free sentences.
        named: the emojis that questions and answers may name, by default all. Of a scene that shows none of them there
            is no question.
    """
    seen = np.flatnonzero(scenes.cards[i] >= 0)
    place = seen if named is None else seen[[scenes.names[k] in named for k in scenes.cards[i, seen]]]
    if not len(place):
        return []
    present = scenes.cards[i, place].tolist()
    name = [scenes.names[k] for k in present]

    def fill(task: str, *values: str) -> str:
        if free_share and task in CUES and values[0] not in OBJECTS and rng.random() < free_share:
            before, after = rng.choice(FILLER, rng.integers(11)), rng.choice(FILLER, rng.integers(3))
            return " ".join([CUES[task], *before, *values, *after])
        return TEMPLATES[task][rng.integers(len(TEMPLATES[task]))].format(*values)

    def absent() -> str:
        while (k := int(rng.integers(len(scenes.names)))) in present or (named and scenes.names[k] not in named):
            pass
        return scenes.names[k]

    def draw(task: str) -> Question:
        k = int(rng.integers(len(present)))
        if task == "where":
            if rng.random() < 0.15:
                stranger = absent()
                return Question(task, fill(task, stranger), "none", stranger)
            return Question(task, fill(task, name[k]), PLACES[place[k]], name[k])
        if task == "what":
            return Question(task, fill(task, PLACE_PHRASES[PLACES[place[k]]]), name[k], name[k])
        if task == "left_of":
            a, b = rng.choice(len(present), 2, replace=False)
            left = a if scenes.card_uv[i, place[a], 0] < scenes.card_uv[i, place[b], 0] else b
            return Question(task, fill(task, name[a], name[b]), name[left])
        if task == "point":
            if rng.random() < 0.3:
                thing = "block" if rng.random() < 0.6 and np.isfinite(scenes.block_uv[i, 0]) else "gripper"
                uv = scenes.block_uv[i] if thing == "block" else scenes.gripper_uv[i]
                return Question(task, fill(task, thing), point_answer(uv))
            return Question(task, fill(task, name[k]), point_answer(scenes.card_uv[i, place[k]]), name[k])
        if task == "present":
            here = rng.random() < 0.5
            return Question(task, fill(task, name[k] if here else absent()), "yes" if here else "no")
        return Question("count", fill("count"), NUMBERS[len(seen)])

    if scenes.row[i]:
        tasks = rng.choice(["where", "what", "left_of", "point", "present"], num, p=[0.35, 0.25, 0.08, 0.24, 0.08])
    else:
        tasks = rng.choice(["left_of", "point", "present", "count"], num, p=[0.1, 0.7, 0.1, 0.1])
    if len(present) < 2:
        tasks = np.where(tasks == "left_of", "point", tasks)
    return [draw(str(task)) for task in tasks]
