"""SimplerEnv-Bridge (arXiv 2405.05941) on ManiSkill 3: four WidowX tasks with a real photograph as background.

ManiSkill 3's own version is another benchmark in four points, which are put right here (the reference is SimplerEnv's
code on ManiSkill 2):
- The eggplant has 8 positions x 3 rotations; ManiSkill 3 has 8 x 8, and its episodes 0 to 23 cover 3 positions only.
- "Completely on the target" means no contact but with the target and the robot; ManiSkill 3 asks for a contact force.
- A grasp needs an impulse of 1e-6 within 60 degrees of each finger's direction; ManiSkill 3: 0.5 N within 85.
- ``moved_correct_obj`` and ``moved_wrong_obj`` are computed, as they are after the last step; grasp flags stick.

Other non-obvious behaviours, beside those of ``sims/bridge.py``:
- Rendering needs Vulkan: a GPU, or Mesa's lavapipe from 25 on with ``render="cpu"``. Physics runs on the CPU.
- A class-level list leaks segmentation ids between environments: one per process, built anew for each episode.
- ManiSkill needs torch; so does its worker.
"""

# pyright: reportMissingImports=false

import importlib
import os
import sysconfig
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm4vla.sims.bridge import CAMERA, TASKS, Bridge, device

CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
MIN_IMPULSE, MAX_GRASP_DEGREES = 1e-6, 60.0
MOVED = 0.03
"""Metres in the plane from which an object counts as moved."""
SLACK_XY = 0.003
GRASP_STEPS = 5
"""Steps in a row after which a grasp is called consecutive."""
EGGPLANT_ROTATIONS = (1, 2, 0)
"""Of ManiSkill 3's eight settled rotations those of SimplerEnv's 0, 45 and -45 degrees, in its order."""


class Simpler(Bridge):
    """See ``Bridge``."""

    def __init__(self, render: Literal["gpu", "cpu", "none"] | None = None, **episode: Any) -> None:
        """``render``: ``none`` gives no pictures; by default the GPU where there is one, and results say which.
        ``episode``: see ``Bridge``.

        Raises ``UserError`` as ``Bridge`` does, ``ImportError`` without ManiSkill 3.
        """
        super().__init__(**episode)
        self.render = render or device()
        link = Path(sysconfig.get_path("purelib")) / "maniskill_assets"
        if link.is_dir():
            os.environ.setdefault("MS_ASSET_DIR", str(link.resolve()))
        os.environ["MS_SKIP_ASSET_DOWNLOAD_PROMPT"] = "1"
        import gymnasium

        importlib.import_module("mani_skill.envs")  # registers the environments

        if self.render == "none":
            from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv

            BaseBridgeEnv.rgb_overlay_mode, BaseBridgeEnv.SUPPORTED_OBS_MODES = "none", ["none"]
        self._make: Any = gymnasium.make
        self._places: dict[str, np.ndarray] = {}
        self._grasped_for, self._stuck = 0, {"grasped": False, "consecutive_grasp": False}

    @property
    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"mani_skill": version("mani_skill"), "sapien": version("sapien"), "renderer": self.render}

    def _start(self, episode: int) -> Any:
        env = self._make(
            f"{self.task.env}-v1",
            obs_mode="none" if self.render == "none" else "rgb+segmentation",
            control_mode=CONTROL,
            num_envs=1,
            sim_backend="physx_cpu",
            render_backend=self.render,
        ).unwrapped
        if self.task is TASKS["eggplant"]:
            env.quat_configs = env.quat_configs[list(EGGPLANT_ROTATIONS)]
        env.reset(seed=0, options={"episode_id": episode})
        self._places = {name: _place(actor) for name, actor in env.objs.items()}
        self._grasped_for, self._stuck = 0, dict.fromkeys(self._stuck, False)
        return env

    def _step(self, action: np.ndarray) -> tuple[bool, dict[str, bool]]:
        self._env._step_action(action)
        return self._judge()

    def _judge(self) -> tuple[bool, dict[str, bool]]:
        env = self._env
        source, target = (env.objs[name] for name in env.obj_names[:2])
        half_source = env.episode_source_obj_bbox_world.cpu().numpy() / 2
        half_target = env.episode_target_obj_bbox_world.cpu().numpy() / 2
        success = on_target(_place(source) - _place(target), half_source, half_target, self.task.slack_z)
        touching = contacts(env.scene.get_contacts(), source)
        if success and self.task.alone:
            allowed = {_entity(target), *(_entity(link) for link in env.agent.robot.get_links())}
            success = all(entity in allowed or size <= MIN_IMPULSE for entity, (size, _) in touching.items())
        grasped = self._grasping(touching)
        self._grasped_for = self._grasped_for + 1 if grasped else 0
        self._stuck["grasped"] |= grasped
        self._stuck["consecutive_grasp"] |= self._grasped_for >= GRASP_STEPS
        far = {name: float(np.linalg.norm((_place(env.objs[name]) - at)[:2])) for name, at in self._places.items()}
        return success, {**self._stuck, **moved(far.pop(env.obj_names[0]), list(far.values()))}

    def _grasping(self, touching: dict[Any, tuple[float, np.ndarray]]) -> bool:
        fingers = ((self._env.agent.finger1_link, 1.0), (self._env.agent.finger2_link, -1.0))
        for finger, sign in fingers:
            opening = sign * finger.pose.to_transformation_matrix()[0, :3, 1].cpu().numpy()
            _, impulse = touching.get(_entity(finger), (0.0, np.zeros(3)))
            if not presses(-impulse, opening):  # SimplerEnv takes the finger's side of the contact
                return False
        return True

    def _look(self) -> tuple[np.ndarray, str, np.ndarray]:
        env = self._env
        seen = env.get_obs(env.get_info())["sensor_data"][CAMERA]["rgb"][0].cpu().numpy().astype(np.uint8)
        return seen, env.get_language_instruction()[0], env.agent.robot.get_qpos()[0].cpu().numpy()


def on_target(offset: np.ndarray, half_source: np.ndarray, half_target: np.ndarray, slack_z: float) -> bool:
    """Whether the source's centre is over the target's box and close above it (offset: source minus target, (3,) m)."""
    within = np.linalg.norm(offset[:2]) <= np.linalg.norm(half_target[:2]) + SLACK_XY
    return bool(within and 0 < offset[2] <= half_target[2] + half_source[2] + slack_z)


def moved(source: float, others: list[float]) -> dict[str, bool]:
    """From how far (metres in the plane) the source and the other objects were moved."""
    return {
        "moved_correct_obj": source > MOVED and all(other < source for other in others),
        "moved_wrong_obj": any(other > MOVED for other in others) and any(other > source for other in others),
    }


def presses(impulse: np.ndarray, opening: np.ndarray) -> bool:
    """Whether a finger is pressed open: an impulse (3,) on it that is large enough and near its opening direction."""
    size = float(np.linalg.norm(impulse))
    if size < MIN_IMPULSE:
        return False
    cosine = float(impulse @ opening) / (size * float(np.linalg.norm(opening)))
    return bool(np.degrees(np.arccos(np.clip(cosine, -1, 1))) <= MAX_GRASP_DEGREES)


def contacts(found: list[Any], actor: Any) -> dict[Any, tuple[float, np.ndarray]]:
    """What touches ``actor``: entity -> size and vector (3,) of the summed impulse on ``actor``."""
    own, sums = _entity(actor), {}
    for contact in found:
        entities = [body.entity for body in contact.bodies]
        if own in entities:
            first = entities[0] == own
            impulse = np.sum([point.impulse for point in contact.points], axis=0) * (1 if first else -1)
            other = entities[1 if first else 0]
            sums[other] = sums.get(other, np.zeros(3)) + impulse
    return {entity: (float(np.linalg.norm(impulse)), impulse) for entity, impulse in sums.items()}


def _entity(thing: Any) -> Any:
    """The one sapien entity of a ManiSkill actor or link."""
    return getattr(thing._objs[0], "entity", thing._objs[0])


def _place(actor: Any) -> np.ndarray:
    """(3,) metres."""
    return actor.pose.p[0].cpu().numpy()
