"""Posed scenes without an episode, for vision-language data: a picture and the truth about what is in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm4vla.sims.grinningface.control import DOWN, rotation_from_vector
from vlm4vla.sims.grinningface.emoji import Emoji
from vlm4vla.sims.grinningface.episode import CARD_JITTER, CUBE_CENTRE, ROW, random_colour
from vlm4vla.sims.grinningface.model import CARD_HALF, CUBE_HALF, FINGER_OPEN, MAX_CARDS, TABLE_COLOUR, WALL_COLOUR
from vlm4vla.sims.grinningface.scene import AWAY, Scene

GRID = np.array([[x, y] for x in (0.17, 0.33, 0.49) for y in (-0.2, 0.0, 0.2)])
"""Nine places for scattered cards; card edges stay apart under ``GRID_JITTER``."""
GRID_JITTER = 0.0095
ARM_LOW, ARM_HIGH = np.array([0.16, -0.28, 0.02]), np.array([0.50, 0.28, 0.22])
"""Random gripper positions, metres: everywhere an episode can take it."""
MAX_RANDOM_TILT = 0.15
CUBE_PLACES = ("hand", "table", "absent")


@dataclass(frozen=True)
class StagedScene:
    """(u, v) in [0, 1] from the picture's top left. C cards."""

    image: np.ndarray
    """uint8 (image_size, image_size, 3)."""
    names: tuple[str, ...]
    """On the cards. Row scenes: left, middle, right as seen in the picture."""
    card_uv: np.ndarray
    """(C, 2) centres."""
    card_size: np.ndarray
    """(C, 2) width and height in the picture."""
    card_visible: np.ndarray
    """(C,) fraction of nine points of each card that the camera sees, neither hidden by arm or cube nor out of view."""
    cube: str
    """``hand``, ``table`` or ``absent``."""
    cube_uv: np.ndarray | None
    gripper_uv: np.ndarray
    """Of the point between the finger pads."""
    gripper_in_view: bool


class Stage:
    """Draws scenes from a seed: the same calls in the same order give the same scenes to the bit."""

    def __init__(self, image_size: int = 96, seed: int = 0):
        """Raises ``UserError`` where fonts or OpenGL are missing (with the first scene)."""
        self._scene = Scene(image_size)
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def row(self, emojis: Sequence[Emoji], random_colours: bool = False, cube: str | None = None) -> StagedScene:
        """Three cards side by side as in the robot task: ``emojis`` left, middle, right."""
        if len(emojis) != 3:
            raise ValueError(f"{len(emojis)} emojis, expected 3")
        places = ROW + CARD_JITTER * self._rng.uniform(-1, 1, (3, 2))
        return self._pose(emojis, places, random_colours, cube)

    def scatter(self, emojis: Sequence[Emoji], random_colours: bool = False, cube: str | None = None) -> StagedScene:
        """One to nine cards in random places of a jittered grid."""
        if not 1 <= len(emojis) <= MAX_CARDS:
            raise ValueError(f"{len(emojis)} emojis, expected 1 to {MAX_CARDS}")
        places = GRID[self._rng.permutation(len(GRID))[: len(emojis)]]
        places = places + GRID_JITTER * self._rng.uniform(-1, 1, places.shape)
        return self._pose(emojis, places, random_colours, cube)

    def close(self) -> None:
        self._scene.close()

    def _pose(self, emojis: Sequence[Emoji], places: np.ndarray, random_colours: bool, cube: str | None) -> StagedScene:
        if cube not in (None, *CUBE_PLACES):
            raise ValueError(f"cube {cube!r}, expected one of {', '.join(CUBE_PLACES)}, or None for a random one")
        rng, scene = self._rng, self._scene
        colours, hand = rng.random((2, 3)), rng.uniform(ARM_LOW, ARM_HIGH)
        tilt, opening = rng.normal(0, 1, 3), rng.uniform(0.3, 1) * FINGER_OPEN
        spot = CUBE_CENTRE + [0.06, 0.12] * rng.uniform(-1, 1, 2)
        cube = cube or CUBE_PLACES[rng.integers(3)]
        tilt *= MAX_RANDOM_TILT * rng.random() / np.linalg.norm(tilt)

        scene.clear()
        if random_colours:
            scene.set_colours(random_colour(*colours[0]), random_colour(*colours[1]))
        else:
            scene.set_colours(TABLE_COLOUR, WALL_COLOUR)
        scene.set_cards([e.codepoint for e in emojis], places)
        scene.set_arm(hand, rotation_from_vector(tilt) @ DOWN, CUBE_HALF if cube == "hand" else float(opening))
        scene.set_cube({"hand": hand, "table": np.array([*spot, CUBE_HALF]), "absent": AWAY}[cube])
        scene.forward()
        boxes, gripper = scene.card_boxes(), scene.pixel(scene.ee_position)
        return StagedScene(
            image=scene.render(),
            names=tuple(e.name for e in emojis),
            card_uv=boxes[:, :2],
            card_size=boxes[:, 2:],
            card_visible=self._visible(),
            cube=cube,
            cube_uv=None if cube == "absent" else scene.pixel(scene.cube_position),
            gripper_uv=gripper,
            gripper_in_view=bool(((gripper >= 0) & (gripper <= 1)).all()),
        )

    def _visible(self) -> np.ndarray:
        offsets = np.array([[dx, dy] for dx in (-0.7, 0, 0.7) for dy in (-0.7, 0, 0.7)]) * CARD_HALF
        points = self._scene.card_positions[:, None] + offsets
        return self._scene.sees(np.pad(points, ((0, 0), (0, 0), (0, 1)))).mean(axis=1)
