"""CALVIN (arXiv 2112.03227), ABC->D: chains of five instructions in scene D, in PyBullet.

Non-obvious behaviours:
- One episode is one of 1000 chains (``calvin_chains.json``): an initial condition and five tasks. 360 steps for each
  instruction, success asked for after every step, nothing is reset in between; the first failure ends the chain. The
  chains are the official list: numpy's generator decides them, and no version since 1.24 changed it.
- The positions and angles of the blocks come from a generator seeded with a hash of the condition, pyhash's
  ``fnv1_32``: FNV-1 (32 bit) that starts from 0 and runs over UTF-16-LE. With the textbook's hash all 1000 initial
  states differ.
- A chunk stops where its instruction is fulfilled: the rest was predicted for another sentence.
- An action moves the *commanded* pose; its Euler angles add up. Components beyond 1 are clipped (recorded ones never
  are beyond). The raw gripper is exactly 1 (open) or -1.
- Rendering is left out between looks; CALVIN's own ``step`` renders both cameras each time.
- The training pictures are EGL's. The software renderer (``renderer="tiny"``) differs from it by 21 of 255 on average:
  its numbers belong to a protocol of their own.
- Replays in one process drift by up to 3e-3, so each episode gets a simulation of its own.
- CALVIN's code and sentences are read from a clone: ``sims setup calvin --assets CLONE``. What it imports and does not
  need (git, quaternion) is replaced by empty modules, gym by gymnasium.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib
import json
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from vlm4vla import convention
from vlm4vla.errors import UserError
from vlm4vla.pictures import resized
from vlm4vla.sims.base import StepOutcome, check_actions
from vlm4vla.types import Observation

CHAIN = 5
"""Instructions of a chain."""
STEPS = 360
"""Control steps for one instruction."""
NUM_CHAINS = 1000
CONDITION = ("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")
CHAINS = Path(__file__).parent / "calvin_chains.json"
SENTENCES = "calvin_models/conf/annotations/new_playtable_validation.yaml"
HOME = (0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963)
JOINTS = (-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928)
"""The robot at the start (CALVIN's evaluation): position, Euler angles and gripper width; joint angles."""
SLIDER_OPEN, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088
PLACES = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
TABLE = ((5.00000896e-02, -1.20000177e-01, 4.59990009e-01), (2.29995412e-01, -1.19995140e-01, 4.59990010e-01))
"""Metres, block centres (CALVIN's evaluation). Blocks lie at a right angle, give or take an eighth of pi."""


class Calvin:
    """One chain at a time (see ``sims/base.py``). Cameras: ``main`` (static, 200 px).

    State (15,): end-effector position and Euler angles, gripper width, seven joints, the last gripper command.
    """

    convention = convention.CALVIN

    def __init__(
        self, renderer: Literal["egl", "tiny"] = "egl", image_size: int = 200, max_steps: int = CHAIN * STEPS
    ) -> None:
        """``max_steps``: of a chain; each instruction has a fifth of them. Episode seeds are 0 to 999.

        Raises ``UserError`` on an unknown renderer or a clone without its parts, ``ImportError`` without packages.
        """
        if renderer not in ("egl", "tiny"):
            raise UserError(f"the renderer {renderer!r}", "egl or tiny", "name one of the two")
        self.renderer, self.image_size, self.limit = renderer, image_size, max_steps // CHAIN
        self._root = _open_calvin()
        self._sentences = _sentences(self._root)
        self._tasks = _tasks(self._root)
        self._env: Any = None
        self._chain: list[str] = []
        self._solved, self._steps, self.done = 0, 0, True
        self._before: dict = {}

    @property
    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"pybullet": version("pybullet"), "renderer": self.renderer}

    def reset(self, seed: int) -> None:
        if not 0 <= seed < NUM_CHAINS:
            raise ValueError(f"seed {seed}; there are the chains 0 to {NUM_CHAINS - 1}")
        condition, self._chain = chains()[seed]
        robot, scene = initial_state(condition)
        self.close()
        self._env = env = _environment(self._root, self.renderer)
        env.scene.reset(scene)
        env.robot.reset(robot)
        env.p.stepSimulation(physicsClientId=env.cid)
        self._solved, self._steps, self.done = 0, 0, False
        self._before = env.get_info()

    def execute(self, actions: np.ndarray) -> StepOutcome:
        actions = check_actions(actions, self.convention)
        if self.done:
            raise RuntimeError("no episode under way; reset first")
        env, count = self._env, 0
        for action in actions:
            env.robot.apply_action(np.append(action[:6].clip(-1, 1), 1 if action[6] > 0.5 else -1))
            for _ in range(env.action_repeat):
                env.p.stepSimulation(physicsClientId=env.cid)
            env.scene.step()
            self._steps, count = self._steps + 1, count + 1
            info, task = env.get_info(), self._chain[self._solved]
            if self._tasks.get_task_info_for_set(self._before, info, {task}):
                self._solved, self._steps, self._before = self._solved + 1, 0, info
                self.done = self._solved == CHAIN
                break
            if self._steps >= self.limit:
                self.done = True
                break
        solved = {f"success_{i}": self._solved >= i for i in range(1, CHAIN + 1)}
        return StepOutcome(count, self.done, self._solved == CHAIN, {"length": self._solved, **solved})

    def observe(self) -> Observation:
        if self._env is None:
            raise RuntimeError("no episode under way; reset first")
        pixels = resized(np.asarray(self._env.cameras[0].render()[0], np.uint8), self.image_size)
        sentence = self._sentences[self._chain[min(self._solved, CHAIN - 1)]]
        state = np.asarray(self._env.robot.get_observation()[0], np.float32)
        return Observation({"main": np.ascontiguousarray(pixels)}, sentence, state)

    def expert(self) -> np.ndarray:
        raise NotImplementedError("CALVIN has no scripted expert; its demonstrations are a data set")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env.ownsPhysicsClient = False  # its __del__ closes once more
        self._env, self.done = None, True


def fnv1_32(text: str) -> int:
    """pyhash's ``fnv1_32``: from 0, over UTF-16-LE."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = ((value * 0x01000193) & 0xFFFFFFFF) ^ byte
    return value


@cache
def chains() -> list[tuple[dict[str, Any], list[str]]]:
    """The 1000 official chains: ``(initial condition, five tasks)``."""
    values = json.loads(CHAINS.read_text())
    names = values["tasks"]
    return [
        (dict(zip(CONDITION, condition, strict=True)), [names[i] for i in tasks])
        for condition, tasks in values["chains"]
    ]


def initial_state(condition: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """An initial condition -> the robot's state (15,) and the scene's (24,), as CALVIN's evaluation has them."""
    rng = np.random.RandomState(fnv1_32(str(condition.values())))
    table = [np.array(place) for place in TABLE]
    rng.shuffle(table)
    scene = np.zeros(24)
    scene[0] = SLIDER_OPEN if condition["slider"] == "left" else 0.0
    scene[1] = DRAWER_OPEN if condition["drawer"] == "open" else 0.0
    scene[3] = SWITCH_ON if condition["lightbulb"] else 0.0
    scene[4:6] = condition["lightbulb"], condition["led"]
    first_free = {"red_block": 0, "blue_block": int(condition["red_block"] == "table"), "pink_block": 1}
    for start, block in zip((6, 12, 18), first_free, strict=True):
        place = condition[block]
        scene[start : start + 3] = table[first_free[block]] if place == "table" else PLACES[place]
        scene[start + 5] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array([*HOME, *JOINTS, 1.0]), scene


def _open_calvin() -> Path:
    """Make ``calvin_env`` importable -> the clone of CALVIN."""
    import gymnasium
    import gymnasium.utils.seeding

    link = Path(sysconfig.get_path("purelib")) / "calvin"
    root = link.resolve()
    for part in (SENTENCES, "calvin_env/calvin_env", "calvin_env/data", "calvin_env/conf"):
        if not (root / part).exists():
            raise UserError(
                f"no {link / part}",
                "a clone of CALVIN with its submodule calvin_env",
                "vlm4vla sims setup calvin --fetch, or --assets CLONE",
            )
    sys.path.insert(0, str(root / "calvin_env"))
    sys.modules.setdefault("gym", gymnasium)
    sys.modules.setdefault("gym.utils", gymnasium.utils)
    sys.modules.setdefault("gym.utils.seeding", gymnasium.utils.seeding)
    for name in ("git", "quaternion"):
        sys.modules.setdefault(name, ModuleType(name))
    return root


def _sentences(root: Path) -> dict[str, str]:
    """Task -> its one validation sentence."""
    import yaml

    return {task: sentences[0] for task, sentences in yaml.safe_load((root / SENTENCES).read_text()).items()}


def _tasks(root: Path) -> Any:
    """CALVIN's judge of what was done between two moments."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.load(root / "calvin_env" / "conf" / "tasks" / "new_playtable_tasks.yaml")
    return importlib.import_module("calvin_env.envs.tasks").Tasks(loaded.tasks)


def _environment(root: Path, renderer: str) -> Any:
    """Scene D with the static camera. Its configuration is put together by hand: hydra would want all of CALVIN."""
    import hydra
    from omegaconf import OmegaConf

    module = importlib.import_module("calvin_env.envs.play_table_env")
    module.get_git_commit_hash = lambda path: "unknown"
    conf = root / "calvin_env" / "conf"

    def load(*names: str) -> Any:
        parts = [OmegaConf.load(conf / name) for name in names]
        for part in parts:
            part.pop("defaults", None)
        return OmegaConf.merge(*parts)

    whole = OmegaConf.create(
        {
            "robot": load("robot/panda.yaml", "robot/panda_longer_finger.yaml"),
            "scene": load("scene/calvin_scene_D.yaml"),
            "cameras": {"static": load("cameras/cameras/static.yaml")},
            "env": load("env/play_table_env.yaml"),
            "data_path": str(root / "calvin_env" / "data"),
            "use_vr": False,
        }
    )
    return hydra.utils.instantiate(whole.env, use_egl=renderer == "egl", use_scene_info=True)
