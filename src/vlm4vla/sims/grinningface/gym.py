"""GrinningFace as Gymnasium environments; importing this module registers them.

``gymnasium.make("vlm4vla/GrinningFacePlace-v0", split="val", image_size=96)``. Reward 1 on success, else 0. The action
is the simulator's own (see ``env.py``); ``info`` holds the credits.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vlm4vla.sims.grinningface.control import MAX_POSITION_STEP, MAX_ROTATION_STEP
from vlm4vla.sims.grinningface.env import CONTROL_HZ, GrinningFace

MAX_STEPS = {"place": 30, "pick_place": 50}
"""As in the evaluation protocols."""
MAX_INSTRUCTION = 200


class GrinningFaceEnv(gymnasium.Env):
    """Observations: ``image`` uint8 (S, S, 3), ``instruction`` text, ``state`` float32 (7,). Actions: float32 (7,)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(
        self,
        level: str,
        split: str = "train",
        variant: str = "base",
        image_size: int = 96,
        render_mode: str | None = None,
    ):
        self.render_mode = render_mode
        self.sim = GrinningFace(level, split, variant, image_size, max_steps=MAX_STEPS[level])
        high = np.array([MAX_POSITION_STEP] * 3 + [MAX_ROTATION_STEP] * 3 + [1.0], np.float32)
        low = np.append(-high[:6], np.float32(0))
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "instruction": spaces.Text(MAX_INSTRUCTION, charset=[chr(c) for c in range(32, 127)]),  # type: ignore
                "state": spaces.Box(-10.0, 10.0, (7,), np.float32),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """The episode of ``seed``; without one, the next of the generator that the last seed started."""
        super().reset(seed=seed)
        self.sim.reset(seed if seed is not None else int(self.np_random.integers(2**31)))
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        outcome = self.sim.execute(np.asarray(action)[None])
        placed = bool(outcome.credits["execution"])
        info = {**outcome.credits, "success": outcome.success}
        return self._observation(), float(outcome.success), placed, outcome.done and not placed, info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        return self.sim.observe().images["main"] if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.sim.close()

    def _observation(self) -> dict[str, Any]:
        seen = self.sim.observe()
        return {"image": seen.images["main"], "instruction": seen.instruction, "state": seen.state}


for _level, _name in (("place", "Place"), ("pick_place", "PickPlace")):
    gymnasium.register(
        f"vlm4vla/GrinningFace{_name}-v0",
        entry_point="vlm4vla.sims.grinningface.gym:GrinningFaceEnv",
        kwargs={"level": _level},
    )
