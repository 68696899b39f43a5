"""GrinningFace: place a cube on the emoji card that the instruction names (arXiv 2511.06619), in MuJoCo.

Non-obvious behaviours and deviations from the paper's ManiSkill environment (``PickCubeWidowX-v8``):
- Control at 5 Hz and at most 50 steps instead of 20 Hz and 200: the same 10 s. One step simulates 40 x 5 ms and
  moves the joint targets linearly over its first three quarters.
- An action moves the *commanded* pose, so a tracking error does not add up. Deltas are limited to 0.05 m and 0.25 rad
  per component and step (ManiSkill: 0.1 and 0.1), the commanded position to a box, the tilt to 0.8 rad; a pose out of
  the arm's reach leaves the command where it was. ``limited_steps`` in the credits counts the steps a limit acted on.
- The arm has longer links than a WidowX 250s (see ``model.py``). It collides with nothing but through its finger pads.
- The cube is grasped by contact and friction alone. At ``place`` resets it hangs in the gripper after 0.3 s of physics.
- The camera looks at the robot from the front: +y (the robot's left) is right in the picture.
- The episode ends when the cube rests, released, on *any* card: success needs the target. The nearest card counts.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's names come from compiled modules without type stubs.)

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.sims.backend import choose_backend
from vlm4vla.sims.base import StepOutcome, check_actions
from vlm4vla.sims.grinningface import emoji
from vlm4vla.sims.grinningface.control import DOWN, euler_from_rotation, limit_command
from vlm4vla.sims.grinningface.episode import Episode, check_names, draw_episode
from vlm4vla.sims.grinningface.expert import next_action
from vlm4vla.sims.grinningface.model import CARD_HALF, CUBE_HALF, FINGER_OPEN, TIMESTEP
from vlm4vla.sims.grinningface.scene import NUM_ARM, Scene
from vlm4vla.types import Observation

CONTROL_HZ = 5.0
PLACED_RADIUS = CARD_HALF * 2**0.5
"""Metres, cube centre to card centre (the paper's released code)."""
STATIC_JOINT_SPEED = 0.2
"""rad/s (the paper's released code: ManiSkill's ``is_static``)."""
STATIC_CUBE_SPEED = 0.05
RESTING_HEIGHT = CUBE_HALF + 0.008
"""The cube's centre is lower than this when it lies on a card or the table."""
SEGMENTS, RAMP_SEGMENTS, SUBSTEPS = 8, 6, 5
"""A control step: joint targets move over the first 6 of 8 segments of 5 physics steps."""
SETTLE_STEPS = 60
REACH_ERROR = 0.005
CONVENTION = Convention(
    names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    control="delta_ee",
    frame="base",
    rotation="euler_xyz",
    position_unit="metre",
    gripper="1=open,0=closed",
    control_hz=CONTROL_HZ,
    camera="upright",
)
assert round(SEGMENTS * SUBSTEPS * TIMESTEP * CONTROL_HZ, 9) == 1


class GrinningFace:
    """One environment (see ``sims/base.py``). Cameras: ``main``. State: position, Euler angles, gripper width (7,)."""

    convention = CONVENTION

    def __init__(
        self,
        level: str = "place",
        split: str = "train",
        variant: str = "base",
        image_size: int = 96,
        max_steps: int = 50,
    ) -> None:
        """``level``: place or pick_place; ``split``: train, val or hard; ``variant``: see ``episode.VARIANTS``.

        Raises ``UserError`` on unknown names and where fonts or OpenGL are missing, ``ValueError`` on sizes.
        """
        check_names(level, split, variant)
        if max_steps < 1:
            raise ValueError(f"max_steps {max_steps}, expected at least 1")
        self.level, self.split, self.variant, self.max_steps = level, split, variant, max_steps
        self.scene = Scene(image_size)
        self._pads = {self.scene.model.geom(n).id for n in ("finger_left", "finger_right")}
        self._cube_geom = self.scene.model.geom("cube").id
        self._cube_dof = int(self.scene.model.jnt_dofadr[self.scene.model.joint("cube").id])
        self.episode: Episode | None = None
        self.steps, self.limited_steps, self.done = 0, 0, True

    @property
    def versions(self) -> dict[str, str]:
        """What else than packages decides on pixels: the emoji font and the OpenGL backend."""
        return {"emoji font": emoji.font_version(), "OpenGL": choose_backend()}

    def reset(self, seed: int) -> None:
        episode = draw_episode(int(seed), self.level, self.split, self.variant)
        scene, data = self.scene, self.scene.data
        scene.clear()
        scene.set_colours(episode.table, episode.wall)
        scene.set_cards([e.codepoint for e in episode.emojis], episode.cards)
        held = self.level == "place"
        self._joints = scene.set_arm(episode.start, opening=CUBE_HALF if held else FINGER_OPEN)
        self._position, self._rotation = episode.start.copy(), DOWN.copy()
        scene.set_cube(episode.start if held else np.array([*episode.cube, CUBE_HALF]))
        data.ctrl[:NUM_ARM] = self._joints
        data.ctrl[NUM_ARM:] = 0.0 if held else FINGER_OPEN
        mujoco.mj_step(scene.model, data, SETTLE_STEPS)
        scene.forward()
        self.episode = episode
        self.steps, self.limited_steps, self.done = 0, 0, False

    def execute(self, actions: np.ndarray) -> StepOutcome:
        actions = check_actions(actions, self.convention)
        if self.done:
            raise RuntimeError("no episode under way; reset first")
        before = self.steps
        for action in actions:
            self._step(action)
            if self.done:
                break
        card = self.placed_card()
        return StepOutcome(
            self.steps - before, self.done, card is not None and card == self.target, self._credits(card)
        )

    def _step(self, action: np.ndarray) -> None:
        scene, data = self.scene, self.scene.data
        position, rotation, limited = limit_command(self._position, self._rotation, action)
        joints, error = scene.ik.solve(position, rotation, self._joints)
        if error > REACH_ERROR:
            position, rotation, joints, limited = self._position, self._rotation, self._joints, True
        data.ctrl[NUM_ARM:] = FINGER_OPEN if action[6] > 0.5 else 0.0
        for segment in range(1, SEGMENTS + 1):
            data.ctrl[:NUM_ARM] = self._joints + min(1.0, segment / RAMP_SEGMENTS) * (joints - self._joints)
            mujoco.mj_step(scene.model, data, SUBSTEPS)
        scene.forward()
        self._position, self._rotation, self._joints = position, rotation, joints
        self.steps += 1
        self.limited_steps += limited
        self.done = self.steps >= self.max_steps or self.placed_card() is not None

    def observe(self) -> Observation:
        if self.episode is None:
            raise RuntimeError("no episode under way; reset first")
        scene = self.scene
        state = [*scene.ee_position, *euler_from_rotation(scene.ee_rotation), scene.gripper_width]
        return Observation({"main": scene.render()}, self.episode.instruction, np.array(state, np.float32))

    def expert(self) -> np.ndarray:
        return next_action(self)

    def close(self) -> None:
        self.scene.close()
        self.episode, self.done = None, True

    # What is judged. ---------------------------------------------------------------------------------------------

    @property
    def grasped(self) -> bool:
        """Both finger pads touch the cube."""
        contact = self.scene.data.contact
        touching = {int(g) for pair in contact.geom if self._cube_geom in pair for g in pair}
        return self._pads <= touching

    @property
    def resting(self) -> bool:
        """The cube lies still, released, and the robot's joints are still."""
        velocity = self.scene.data.qvel
        return bool(
            self.cube_position[2] < RESTING_HEIGHT
            and np.abs(velocity[:NUM_ARM]).max() < STATIC_JOINT_SPEED
            and np.linalg.norm(velocity[self._cube_dof : self._cube_dof + 3]) < STATIC_CUBE_SPEED
            and not self.grasped
        )

    def nearest_card(self) -> tuple[int, float]:
        """The card whose centre is nearest to the cube's, and the horizontal distance in metres."""
        distances = np.linalg.norm(self.card_positions - self.cube_position[:2], axis=1)
        return int(distances.argmin()), float(distances.min())

    def placed_card(self) -> int | None:
        """The card on which the cube is placed, or None."""
        if not self.resting:
            return None
        card, distance = self.nearest_card()
        return card if distance <= PLACED_RADIUS else None

    def _credits(self, placed: int | None) -> dict[str, Any]:
        card, distance = self.nearest_card()
        moved = distance <= PLACED_RADIUS  # no episode starts within that radius of a card
        return {
            "execution": placed is not None,
            "recognition": card == self.target if moved else None,
            "target": self.target,
            "nearest": card if moved else None,
            "limited_steps": self.limited_steps,
        }

    # What the expert and data generation may know. ---------------------------------------------------------------

    def _current(self) -> Episode:
        if self.episode is None:
            raise RuntimeError("no episode under way; reset first")
        return self.episode

    @property
    def emojis(self) -> tuple[str, ...]:
        """Names on the cards, in card order."""
        return tuple(e.name for e in self._current().emojis)

    @property
    def target(self) -> int:
        return self._current().target

    @property
    def card_positions(self) -> np.ndarray:
        """(n, 2) metres."""
        return self.scene.card_positions

    @property
    def cube_position(self) -> np.ndarray:
        """(3,) metres."""
        return self.scene.cube_position

    @property
    def ee_position(self) -> np.ndarray:
        """(3,) metres, between the finger pads."""
        return self.scene.ee_position

    def pixel(self, point: Sequence[float] | np.ndarray) -> np.ndarray:
        """World point (3,) -> (u, v) in [0, 1] from the picture's top left."""
        return self.scene.pixel(np.asarray(point))
