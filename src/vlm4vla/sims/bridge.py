"""SimplerEnv-Bridge (arXiv 2405.05941), whatever simulates it: four WidowX tasks before a real photograph.

What ``simpler`` (ManiSkill 3) and ``simpler_ms2`` (ManiSkill2_real2sim, SimplerEnv's own) have in common:

- Success is the state after the *last* step, and nothing ends an episode before. ``success="any"`` stops at the first
  success, as others do: a protocol of its own, for a stack that falls again counts there.
- An action moves the commanded pose; its Euler angles (Bridge's form) become the controller's rotation vector. Limits
  of the controller: 1 m and half of pi. The raw gripper is 1 open, -1 closed.
- The picture is 640 x 480, and bicubic to a square without keeping its proportions, as VLM4VLA has it.
- Each episode has an environment of its own, as in SimplerEnv's evaluation.
- Pictures need Vulkan; results name the device as ``renderer`` (several that sapien may choose from: all of them). The
  renderer starts with the simulator and not with its first episode.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlm4vla import convention
from vlm4vla.errors import UserError, nearest
from vlm4vla.pictures import resized
from vlm4vla.sims import vulkan
from vlm4vla.sims.base import StepOutcome, check_actions
from vlm4vla.types import Observation

NUM_EPISODES = 24
"""Of each task: positions x rotations."""
CAMERA = "3rd_view_camera"
LIMITS = np.array([1.0] * 3 + [np.pi / 2] * 3)


@dataclass(frozen=True)
class Task:
    env: str
    """Its name in both simulators, but for its version."""
    steps: int
    alone: bool
    """Whether the object may touch nothing but its target (and the robot)."""
    slack_z: float = 0.02
    """Metres above the target that still count as on it."""


TASKS = {
    "carrot": Task("PutCarrotOnPlateInScene", 60, alone=True),
    "stack": Task("StackGreenCubeOnYellowCubeBakedTexInScene", 60, alone=True),
    "spoon": Task("PutSpoonOnTableClothInScene", 60, alone=False),
    "eggplant": Task("PutEggplantInBasketScene", 120, alone=False, slack_z=0.06),
}


class Bridge(ABC):
    """One episode at a time (see ``sims/base.py``). Cameras: ``main`` (third person).

    State (8,): joint angles of the arm and positions of both fingers, as the simulator gives them.
    Credits: ``grasped`` and ``consecutive_grasp`` (five steps in a row) stick; ``moved_correct_obj`` and
    ``moved_wrong_obj`` are as after the last step.
    """

    convention = convention.BRIDGE

    def __init__(
        self,
        task: str = "carrot",
        success: Literal["last", "any"] = "last",
        image_size: int = 224,
        max_steps: int | None = None,
        render: Literal["vulkan", "none"] = "vulkan",
    ) -> None:
        """Episode seeds are 0 to 23: SimplerEnv's episode ids. ``render``: ``none`` is physics alone, without pictures.

        Raises ``UserError`` on unknown names, and where pictures are wanted and Vulkan has no device or no answer.
        """
        if task not in TASKS:
            raise UserError(f"the task {task!r}", f"one of {', '.join(TASKS)}", f"nearest: {nearest(task, [*TASKS])}")
        if success not in ("last", "any"):
            raise UserError(f"success={success!r}", "last or any", "name one of the two")
        if render not in ("vulkan", "none"):
            raise UserError(f"render={render!r}", "vulkan or none", "name one of the two")
        self.devices = vulkan.chosen() if render == "vulkan" else ()
        if render == "vulkan" and not self.devices:
            raise UserError("no Vulkan device", "one, which SimplerEnv's pictures need", vulkan.MEND)
        self.task, self.rule, self.image_size = TASKS[task], success, image_size
        self.max_steps = self.task.steps if max_steps is None else max_steps
        self._env: Any = None
        self._steps, self.done = 0, True

    @property
    def versions(self) -> dict[str, str]:
        return {"renderer": " or ".join(dict.fromkeys(device.name for device in self.devices)) or "none"}

    def _started(self, renderer: Callable[[], Any], expected: str, next_step: str) -> Any:
        """What ``renderer`` makes. Later ones share what it has compiled for as long as it is kept.

        Raises ``UserError`` where it does not start.
        """
        try:
            return renderer()
        except RuntimeError as error:
            found = f"sapien does not render on {self.versions['renderer']}: {error}"
            raise UserError(found, expected, next_step) from error

    @abstractmethod
    def _start(self, episode: int) -> Any:
        """A new environment at the start of ``episode``."""

    @abstractmethod
    def _step(self, action: np.ndarray) -> tuple[bool, dict[str, bool]]:
        """One control step of the controller's action (7,) -> whether the object is on its target, and the credits."""

    @abstractmethod
    def _look(self) -> tuple[np.ndarray, str, np.ndarray]:
        """The picture over the photograph, uint8 (480, 640, 3), the instruction and the state."""

    def reset(self, seed: int) -> None:
        if not 0 <= seed < NUM_EPISODES:
            raise ValueError(f"seed {seed}; there are the episodes 0 to {NUM_EPISODES - 1}")
        self.close()
        self._env = self._start(seed)
        self._steps, self.done = 0, False

    def execute(self, actions: np.ndarray) -> StepOutcome:
        actions = check_actions(actions, self.convention)
        if self.done:
            raise RuntimeError("no episode under way; reset first")
        success, credits, count = False, {}, 0
        for action in actions:
            success, credits = self._step(controller_action(action))
            self._steps, count = self._steps + 1, count + 1
            self.done = self._steps >= self.max_steps or (success and self.rule == "any")
            if self.done:
                break
        return StepOutcome(count, self.done, success, credits)

    def observe(self) -> Observation:
        if self._env is None:
            raise RuntimeError("no episode under way; reset first")
        picture, instruction, state = self._look()
        return Observation({"main": resized(picture, self.image_size)}, instruction, state.astype(np.float32))

    def expert(self) -> np.ndarray:
        raise NotImplementedError("SimplerEnv has no scripted expert")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env, self.done = None, True


def controller_action(action: np.ndarray) -> np.ndarray:
    """Ours (7,) -> the controller's: metres, rotation vector, gripper 1 open and -1 closed."""
    from scipy.spatial.transform import Rotation

    pose = action[:6].clip(-LIMITS, LIMITS)
    turn = Rotation.from_euler("xyz", pose[3:]).as_rotvec()
    return np.concatenate([pose[:3], turn, [1.0 if action[6] > 0.5 else -1.0]]).astype(np.float32)
