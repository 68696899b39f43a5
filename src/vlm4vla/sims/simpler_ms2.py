"""SimplerEnv-Bridge (arXiv 2405.05941) on ManiSkill2_real2sim, SimplerEnv's own simulator: what papers report.

Success, grasps, settings (``prepackaged_config``: robot and camera, 5 Hz over 500 Hz, photograph, robot's place) and
episodes are its own code, untouched. Non-obvious behaviours, beside those of ``sims/bridge.py``:
- The rule is asked for once a step: asking counts the steps of a grasp.
- Objects fall onto the table and settle before an episode, so its first state is the physics engine's.
- It is no package but a clone, with robots, objects and photographs in it; sapien 2.2.2 wants Python 3.11 or older and
  numpy below 2. No torch.
- Rendering needs Vulkan with ``VK_KHR_external_semaphore_fd``: a GPU's driver has it, Mesa's lavapipe (25.0.7) has not.
  Where there are several devices sapien 2 takes a GPU. Physics runs on the CPU.
- Floats are truncated to bytes, not rounded, as by SimplerEnv's observation wrapper.
"""

# pyright: reportMissingImports=false

import importlib
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla.sims.bridge import CAMERA, Bridge


class SimplerMs2(Bridge):
    """See ``Bridge``."""

    def __init__(self, **options: Any) -> None:
        """``options``: see ``Bridge``.

        Raises ``UserError`` as ``Bridge`` does and where sapien 2 does not render, ``ImportError`` without
        ManiSkill2_real2sim.
        """
        super().__init__(**options)
        sys.path.insert(0, str((Path(sysconfig.get_path("purelib")) / "ManiSkill2_real2sim").resolve()))
        importlib.import_module("mani_skill2_real2sim.envs")  # registers the environments
        known = importlib.import_module("mani_skill2_real2sim.utils.registration").REGISTERED_ENVS
        self._make: Any = known[f"{self.task.env}-v0"].cls
        if self.devices:
            core: Any = importlib.import_module("sapien.core")
            self._renderer = self._started(
                lambda: core.SapienRenderer(offscreen_only=True),  # no display is asked for
                "a GPU and its Vulkan driver (Mesa's software driver lacks VK_KHR_external_semaphore_fd)",
                "a machine with a GPU, or the same task on ManiSkill 3: simpler_bridge/ms3/carrot/v2",
            )
        else:
            self._make = _blind(self._make)

    def _start(self, episode: int) -> Any:
        env = self._make(obs_mode="image" if self.devices else "none", prepackaged_config=True)
        env.reset(seed=0, options={"obj_init_options": {"episode_id": episode}})
        return env

    def _step(self, action: np.ndarray) -> tuple[bool, dict[str, bool]]:
        self._env.step_action(action)
        found = self._env.evaluate()
        stats = found["episode_stats"]
        credits = {
            "grasped": stats["is_src_obj_grasped"],
            **{name: stats[name] for name in ("consecutive_grasp", "moved_correct_obj", "moved_wrong_obj")},
        }
        return bool(found["success"]), {name: bool(value) for name, value in credits.items()}

    def _look(self) -> tuple[np.ndarray, str, np.ndarray]:
        env = self._env
        seen = env.get_obs()["image"][CAMERA]["Color"][..., :3]
        picture = np.clip(seen * 255, 0, 255).astype(np.uint8)
        return picture, env.get_language_instruction(), env.agent.robot.get_qpos()


def _blind(environment: Any) -> Any:
    """The same environment without renderer, cameras and lights."""
    core: Any = importlib.import_module("sapien.core")

    class Renderer:
        def set_log_level(self, level: str) -> None: ...

    core.SapienRenderer, core.Engine.set_renderer = Renderer, lambda engine, renderer: None
    nothing: Any = dict.fromkeys(("_setup_cameras", "_setup_lighting"), lambda self: None)
    return type(environment.__name__, (environment,), nothing)
