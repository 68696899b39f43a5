"""SimplerEnv-Bridge (arXiv 2405.05941) on ManiSkill 3: four WidowX tasks with a real photograph as background.

ManiSkill 3's own version is another benchmark in these points, which are put right here (the reference is SimplerEnv's
code on ManiSkill 2, the adapter ``simpler_ms2``; figures: docs/reproductions/simpler.md):
- The commanded pose is turned by a rotation vector, about the hand; ManiSkill 3: by Euler angles, about itself.
- Fingers have friction 2 and patches of 1 cm, table and arm friction 1; ManiSkill 3 has 0.3 and none. Contact offset,
  solver, and the damping of objects are SimplerEnv's too.
- Objects fall from half a metre and settle, upright at first. ManiSkill 3 sets them down; its eggplant lies otherwise,
  and has 8 rotations, not 3: its episodes 0 to 23 cover 3 of 8 positions only.
- "On the target" compares centres of mass; ManiSkill 3: origins of meshes.
- "Completely on the target" means no contact but with the target and the robot; ManiSkill 3 asks for a contact force.
- A grasp needs an impulse of 1e-6 within 60 degrees of each finger's direction; ManiSkill 3: 0.5 N within 85.
- ``moved_correct_obj`` and ``moved_wrong_obj`` are computed, as they are after the last step; grasp flags stick.

What stays different: meshes are made convex by another PhysX, so a few objects settle otherwise; the closed fingers
press with 11 N, not 6.5.

Other non-obvious behaviours, beside those of ``sims/bridge.py``:
- Rendering needs Vulkan: a GPU's, or Mesa's lavapipe from 25 on. Its ``gpu`` means CUDA's, its ``cpu`` the best of the
  others. Physics runs on the CPU.
- A class-level list leaks segmentation ids between environments: one per process, built anew for each episode.
- ManiSkill needs torch; so does its worker.
"""

# pyright: reportMissingImports=false

import importlib
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla.sims import vulkan
from vlm4vla.sims.bridge import CAMERA, TASKS, Bridge

CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
MIN_IMPULSE, MAX_GRASP_DEGREES = 1e-6, 60.0
MOVED = 0.03
"""Metres in the plane from which an object counts as moved."""
SLACK_XY = 0.003
GRASP_STEPS = 5
"""Steps in a row after which a grasp is called consecutive."""
PHYSICS: dict[str, dict[str, Any]] = {
    "scene_config": {"contact_offset": 0.005, "solver_position_iterations": 25, "enable_pcm": False},
    "default_materials_config": {"static_friction": 1.0, "dynamic_friction": 1.0},
}
"""SimplerEnv's, where ManiSkill 3's differ."""
DAMPING = 0.1
"""Of objects, linear and angular."""
GRIPPER = {"static_friction": 2.0, "dynamic_friction": 2.0, "restitution": 0.0}
FINGER = {"material": "gripper", "patch_radius": 0.01, "min_patch_radius": 0.01}
EGGPLANT_TURNS = (0.0, np.pi / 4, -np.pi / 4)
"""Of the source about the vertical. ManiSkill 3's rotations of the other tasks are SimplerEnv's."""
DROP = 1.37
"""Metres: objects fall from half a metre above the table."""
CALM = {"linear_velocity": 1e-3, "angular_velocity": 1e-2}
"""m/s and rad/s, summed over the objects, from which they get more time to settle."""


class Simpler(Bridge):
    """See ``Bridge``."""

    def __init__(self, **options: Any) -> None:
        """``options``: see ``Bridge``.

        Raises ``UserError`` as ``Bridge`` does and where sapien 3 does not render, ``ImportError`` without ManiSkill 3.
        """
        super().__init__(**options)
        self._backend = "none"
        link = Path(sysconfig.get_path("purelib")) / "maniskill_assets"
        if link.is_dir():
            os.environ.setdefault("MS_ASSET_DIR", str(link.resolve()))
        os.environ["MS_SKIP_ASSET_DOWNLOAD_PROMPT"] = "1"
        import gymnasium

        importlib.import_module("mani_skill.envs")  # registers the environments
        scenes = importlib.import_module("mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env")
        robot = scenes.WidowX250SBridgeDatasetFlatTable  # the sink's is derived from it
        robot.urdf_config = {
            "_materials": {"gripper": GRIPPER},
            "link": {"left_finger_link": FINGER, "right_finger_link": FINGER},
        }
        robot.load_multiple_collisions = True
        if self.devices:
            sapien = importlib.import_module("sapien")
            self._backend, device = ("gpu", "cuda") if self.devices[0].vendor == vulkan.NVIDIA else ("cpu", "cpu")
            self._renderer = self._started(
                lambda: sapien.render.RenderSystem(sapien.Device(device)), "a GPU's driver, or Mesa 25", vulkan.MEND
            )
        else:
            scenes.BaseBridgeEnv.rgb_overlay_mode, scenes.BaseBridgeEnv.SUPPORTED_OBS_MODES = "none", ["none"]
        self._make: Any = gymnasium.make
        self._places: dict[str, np.ndarray] = {}
        self._halves = [np.zeros(3), np.zeros(3)]
        self._grasped_for, self._stuck = 0, {"grasped": False, "consecutive_grasp": False}

    @property
    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"mani_skill": version("mani_skill"), "sapien": version("sapien"), **super().versions}

    def _start(self, episode: int) -> Any:
        env = self._make(
            f"{self.task.env}-v1",
            obs_mode="rgb+segmentation" if self.devices else "none",
            control_mode=CONTROL,
            num_envs=1,
            sim_backend="physx_cpu",
            render_backend=self._backend,
            sim_config=PHYSICS,
        ).unwrapped
        env.reset(seed=0, options={"episode_id": episode})
        self._halves = _settle(env, episode, EGGPLANT_TURNS if self.task is TASKS["eggplant"] else None)
        self._places = {name: _place(actor) for name, actor in env.objs.items()}
        self._grasped_for, self._stuck = 0, dict.fromkeys(self._stuck, False)
        return env

    def _step(self, action: np.ndarray) -> tuple[bool, dict[str, bool]]:
        arm = self._env.agent.controller.controllers["arm"]
        lag = (arm._target_pose.p - arm.ee_pose_at_base.p)[0].cpu().numpy()
        self._env._step_action(their_action(action, lag))
        return self._judge()

    def _judge(self) -> tuple[bool, dict[str, bool]]:
        env = self._env
        source, target = (env.objs[name] for name in env.obj_names[:2])
        half_source, half_target = self._halves
        success = on_target(_centre(source) - _centre(target), half_source, half_target, self.task.slack_z)
        touching = contacts(env.scene.get_contacts(), source)
        if success and self.task.alone:
            allowed = {_entity(target), *(_entity(link) for link in env.agent.robot.get_links())}
            success = all(entity in allowed or size <= MIN_IMPULSE for entity, (size, _) in touching.items())
        grasped = self._grasping(touching)
        self._grasped_for = self._grasped_for + 1 if grasped else 0
        self._stuck["grasped"] |= grasped
        self._stuck["consecutive_grasp"] |= self._grasped_for >= GRASP_STEPS
        far = [
            float(np.linalg.norm((at - self._places[actor.name])[:2]))
            for actor, at in ((source, _centre(source)), (target, _place(target)))  # as SimplerEnv mixes them
        ]
        return success, {**self._stuck, **moved(far[0], far[1:])}

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


def _settle(env: Any, episode: int, turns: tuple[float, ...] | None) -> list[np.ndarray]:
    """Let the objects of an episode fall and settle as SimplerEnv does -> half the extents (3,) of source and target in
    the world, as SimplerEnv turns them.

    ``turns``: of the source about the vertical, where ManiSkill 3's own rotations are not SimplerEnv's.
    """
    import sapien
    from mani_skill.utils.structs import Pose

    turned = env.quat_configs.cpu().numpy() if turns is None else [_turned(angle) for angle in turns]
    position, rotation = divmod(episode, len(turned))
    robot = env.agent.robot
    pose, joints = robot.pose, robot.get_qpos().clone()
    robot.set_pose(sapien.Pose([-10, 0, 0]))
    actors = [env.objs[name] for name in env.obj_names]
    bodies = [actor._bodies[0] for actor in actors]
    for actor, place, quaternion in zip(actors, env.xyz_configs[position].cpu().numpy(), turned[rotation], strict=True):
        actor.set_pose(Pose.create_from_pq([*place[:2], DROP], quaternion))

    def run(seconds: float) -> None:
        for _ in range(round(env.sim_freq * seconds)):
            env.scene.step()

    for body in bodies:
        body.linear_damping = body.angular_damping = DAMPING
        body.set_locked_motion_axes([False, False, False, True, True, False])
        body.linear_velocity = body.angular_velocity = np.zeros(3)
    run(0.5)
    for body in bodies:
        body.set_locked_motion_axes([False] * 6)
        body.entity.pose = body.entity.pose  # wakes it
        body.linear_velocity = body.angular_velocity = np.zeros(3)
    run(0.5)
    if any(sum(np.linalg.norm(getattr(body, speed)) for body in bodies) > calm for speed, calm in CALM.items()):
        run(1.5)
    robot.set_pose(pose)
    robot.set_qpos(joints)
    robot.set_qvel(joints * 0)
    sizes = [env.episode_model_bbox_sizes[name].cpu().numpy() for name in env.obj_names]
    frames = [actor.pose.to_transformation_matrix()[0, :3, :3].cpu().numpy() for actor in actors]
    return [frame @ size / 2 for frame, size in zip(frames, sizes, strict=True)]


def _turned(angle: float) -> np.ndarray:
    """Rotations (2, 4) wxyz of the source, by an angle about the vertical, and of the target."""
    return np.array([[np.cos(angle / 2), 0, 0, np.sin(angle / 2)], [1, 0, 0, 0]])


def their_action(action: np.ndarray, lag: np.ndarray) -> np.ndarray:
    """SimplerEnv's controller action (7,) -> ManiSkill 3's, given by how far (3,) m the commanded pose leads the hand:
    SimplerEnv turns it by a rotation vector and about the hand, ManiSkill 3 by Euler angles and about itself."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_rotvec(action[3:6])
    return np.concatenate([action[:3] + turn.apply(lag) - lag, turn.as_euler("XYZ"), action[6:]]).astype(np.float32)


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


def _centre(actor: Any) -> np.ndarray:
    """Its centre of mass, (3,) metres."""
    body = actor._bodies[0]
    return (body.entity.pose * body.cmass_local_pose).p
