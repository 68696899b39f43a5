"""LIBERO (arXiv 2306.03310): its five suites in robosuite 1.4, evaluated as OpenVLA-OFT, openpi and VLM4VLA do.

Non-obvious behaviours:
- An initial state fixes the movable objects, not the fixtures (stove, cabinet, rack ...): LIBERO draws these anew from
  the global ``np.random`` with each reset, and each reset also draws more numbers than the one before, so a layout
  depends on how many resets a process has done. ``layouts="seeded"`` makes an episode from its seed alone (generator
  seeded with the episode's seed, a fresh environment). ``layouts="published"`` is what the published evaluations see:
  one environment a task, seeded with 0 after it is built, one more reset for each initial state; where another worker
  did the resets before, they are repeated without their episodes, so the number of workers changes nothing.
- A second environment in one process renders wrong pictures without an error. Here the old one is closed first.
- Frames are upside down; ``[::-1, ::-1]`` turns them by 180 degrees, as every published policy and data set has them.
  That mirrors left and right: the convention says ``upright_mirrored``.
- Ten settling steps with an open gripper come before the first observation and do not count; robosuite's own horizon
  (1000) is off. Success is asked for after every step and ends the episode.
- An action moves the goal relative to the *measured* pose; components beyond 1 are clipped by robosuite's controller.
  Three zero rotations keep the last orientation goal instead of the current orientation.
- The raw gripper is -1 open, 1 closed; ours is 1 open, 0 closed.
- The instruction is made of the task's file name (as everywhere), not taken from the BDDL file, which differs at times.
- robosuite takes pictures and states before a control step is over (after 24 of its 25 physics steps). A frame is
  rendered when it is asked for, but of that moment, which every control step copies: pixels and states are those of an
  environment that renders each step. (The copy knows positions, not colours: a burner glows one look earlier at most.)
- In each physics step robosuite computes everything that follows from positions and velocities three times, without a
  change in between, and asks 40 observables whether their time has come. Here once, and four of them: a third less
  work, the same to the bit (warm starts of the solver and pixels included).
- Initial states are pickles in a zip file. ``initial_states`` reads them without unpickling, and without torch.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib.util
import logging
import os
import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np

from vlm4vla import convention
from vlm4vla.errors import UserError, nearest
from vlm4vla.pictures import resized
from vlm4vla.sims.backend import choose_backend
from vlm4vla.sims.base import StepOutcome, check_actions
from vlm4vla.types import Observation

SUITES = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Suite -> steps of an episode (OpenVLA's evaluation: the longest demonstration and some)."""
TASKS = dict.fromkeys(SUITES, 10) | {"libero_90": 90}
NUM_STATES = 50
"""Initial states of each task."""
SETTLE_STEPS = 10
RENDER_SIZE = 256
"""Pixels; what the published evaluations render before they resize."""
CAMERAS = {"main": "agentview", "wrist": "robot0_eye_in_hand"}
PUBLISHED_SEED = 0
"""OpenVLA's and VLM4VLA's; openpi takes 7."""
STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
"""Observables that the state is made of."""
CONFIG = Path(__file__).parent / "libero_config"


class Libero:
    """One task at a time of a suite (see ``sims/base.py``). Cameras: ``main`` (agentview), and ``wrist`` (eye in
    hand) where it is asked for; both are turned by 180 degrees.

    State (8,): end-effector position in metres, its axis-angle in radians, the positions of both fingers in metres.
    """

    convention = convention.LIBERO

    def __init__(
        self,
        suite: str = "libero_10",
        layouts: Literal["seeded", "published"] = "seeded",
        image_size: int = RENDER_SIZE,
        max_steps: int | None = None,
        cameras: Sequence[str] = ("main",),
    ) -> None:
        """Episode seeds run from 0 to tasks x ``NUM_STATES`` - 1. ``seeded``: task = seed modulo tasks, so that the
        first episodes are spread over all tasks; ``published``: task after task.

        Raises ``UserError`` on unknown names and missing assets, ``ImportError`` where LIBERO is not installed.
        """
        if suite not in SUITES:
            raise UserError(
                f"the suite {suite!r}", f"one of {', '.join(SUITES)}", f"nearest: {nearest(suite, [*SUITES])}"
            )
        if layouts not in ("seeded", "published"):
            raise UserError(f"layouts {layouts!r}", "seeded or published", "name one of the two")
        if unknown := set(cameras) - CAMERAS.keys():
            raise UserError(f"the cameras {sorted(unknown)}", f"some of {', '.join(CAMERAS)}", "name those")
        self.suite, self.layouts, self.image_size, self.cameras = suite, layouts, image_size, cameras
        self.max_steps = SUITES[suite] if max_steps is None else max_steps
        self._root = _open_libero()
        self._names = _module(self._root / "benchmark" / "libero_suite_task_map.py").libero_task_map[suite]
        self._env: Any = None
        self._moment: Any = None
        self._task, self._resets = -1, 0
        self._instruction = ""
        self.steps, self.done = 0, True

    @property
    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        names = ("hf-libero", "robosuite", "mujoco")
        return {"OpenGL": choose_backend(), **{name: version(name) for name in names}}

    def reset(self, seed: int) -> None:
        tasks = TASKS[self.suite]
        if not 0 <= seed < tasks * NUM_STATES:
            raise ValueError(f"seed {seed}; {self.suite} has the episodes 0 to {tasks * NUM_STATES - 1}")
        if self.layouts == "seeded":
            task, state = seed % tasks, seed // tasks
            np.random.seed(seed)  # LIBERO draws from the global generator
            self._build(task)
            # What a reset does and the constructor does not: no markers in the picture, a first sample of everything.
            domain = self._env.env
            domain.visualize(vis_settings=dict.fromkeys(domain._visualizations, False))
            domain._get_observations(force_update=True)
        else:
            task, state = divmod(seed, NUM_STATES)
            if task != self._task or self._resets > state:
                self._build(task)
                np.random.seed(PUBLISHED_SEED)
            while self._resets <= state:
                self._env.reset()
                self._resets += 1
        name = self._names[task]
        self._instruction = instruction(name)
        self._env.set_init_state(initial_states(self._root / "init_files" / self.suite / f"{name}.pruned_init")[state])
        for observable in self._env.env._observables.values():
            if observable.name not in ("moment", *STATE):  # to enable one would shift when it samples
                observable.set_enabled(False)
        _compute_once(self._env.sim)
        for _ in range(SETTLE_STEPS):
            self._env.step(np.array([0.0] * 6 + [-1.0]))
        self.steps, self.done = 0, False

    def _build(self, task: int) -> None:
        """A fresh environment: constructed from the same random numbers, it equals a reset one to the bit."""
        from libero.libero.envs.env_wrapper import ControlEnv

        self.close()
        self._env = ControlEnv(
            bddl_file_name=str(self._root / "bddl_files" / self.suite / f"{self._names[task]}.bddl"),
            use_camera_obs=False,
            has_offscreen_renderer=True,
            camera_names=[CAMERAS["main"]],
            ignore_done=True,
        )
        self._task, self._resets = task, 0
        self._add_moment()

    def _add_moment(self) -> None:
        """Have the moment copied at which robosuite would take a picture, into ``self._moment``."""
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        env, copy_of = self._env, None

        @sensor(modality="moment")
        def moment(_: dict) -> np.ndarray:
            nonlocal copy_of
            model, data = env.sim.model._model, env.sim.data._data
            if copy_of is not model:  # each reset makes a new one
                copy_of, self._moment = model, mujoco.MjData(model)
            mujoco.mj_copyData(self._moment, model, data)
            return np.zeros(1)

        env.env.add_observable(Observable("moment", moment, sampling_rate=self.convention.control_hz))

    def execute(self, actions: np.ndarray) -> StepOutcome:
        actions = check_actions(actions, self.convention)
        if self.done:
            raise RuntimeError("no episode under way; reset first")
        success, count = False, 0
        for action in actions:
            gripper = -1.0 if action[6] > 0.5 else 1.0
            _, _, success, _ = self._env.step(np.append(action[:6], gripper))
            self.steps, count = self.steps + 1, count + 1
            self.done = bool(success) or self.steps >= self.max_steps
            if self.done:
                break
        domain = self._env.env
        met = [bool(domain._eval_predicate(goal)) for goal in domain.parsed_problem["goal_state"]]
        return StepOutcome(
            count, self.done, bool(success), {"task": self._task, "goals_met": sum(met), "goals": len(met)}
        )

    def observe(self) -> Observation:
        if self._env is None:
            raise RuntimeError("no episode under way; reset first")
        context, now = self._env.sim._render_context_offscreen, self._env.sim.data
        context.data = SimpleNamespace(_data=self._moment)
        try:
            images = {camera: self._render(CAMERAS[camera]) for camera in self.cameras}
        finally:
            context.data = now
        seen = self._env.env._get_observations()
        position, quaternion, fingers = (seen[name] for name in STATE)
        state = np.concatenate([position, axis_angle(quaternion), fingers])
        return Observation(images, self._instruction, state.astype(np.float32))

    def _render(self, camera: str) -> np.ndarray:
        image = self._env.sim.render(camera_name=camera, width=RENDER_SIZE, height=RENDER_SIZE)[::-1, ::-1]
        return np.ascontiguousarray(resized(image, self.image_size))

    def expert(self) -> np.ndarray:
        raise NotImplementedError("LIBERO has no scripted expert; its demonstrations are a data set")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env, self._task, self.done = None, -1, True


def _compute_once(sim: Any) -> None:
    """Have a robosuite simulation, stepped by its environment alone, skip what it has just computed.

    Between two integrations nothing moves: a second ``forward`` and the one within ``step`` need to repeat only what
    follows from forces, which the controller changes and from which the solver starts again.
    """
    import mujoco

    model, data, velocities = sim.model._model, sim.data._data, int(mujoco.mjtStage.mjSTAGE_VEL)
    known = False

    def forward() -> None:
        nonlocal known
        if known:
            mujoco.mj_forwardSkip(model, data, velocities, 0)
        else:
            mujoco.mj_forward(model, data)
        known = True

    def step(with_udd: bool = True) -> None:
        nonlocal known
        if known:
            mujoco.mj_step2(model, data)
        else:
            mujoco.mj_step(model, data)
        known = False

    sim.forward, sim.step = forward, step


def instruction(task: str) -> str:
    """``KITCHEN_SCENE3_turn_on_the_stove`` -> ``turn on the stove``, as OpenVLA, openpi and VLM4VLA have it."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", task).replace("_", " ")


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternion (x, y, z, w) -> rotation vector (3,) in radians; the angle is in [0, 2 pi), as published states
    have it, and not brought to [0, pi]."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else quaternion[:3] * (2.0 * np.arccos(w) / sine)


def initial_states(path: Path) -> np.ndarray:
    """The (N, D) float64 array of a ``.pruned_init`` file: a zip file around the pickle of one array.

    The pickle is read as what it is, a list of instructions, of which none is carried out: its bytes are the last
    string, its shape two of the numbers. Anything but exactly the instructions of a little-endian float64 matrix is
    refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickle = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
        told = [(op.name, value) for op, value, _ in pickletools.genops(pickle)]
    except (OSError, StopIteration, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: {error or 'no pickle inside'}", "LIBERO's initial states", "install hf-libero again"
        ) from error
    names, texts, numbers = (
        [value for name, value in told if name.startswith(kind)] for kind in ("GLOBAL", "BINUNICODE", "BININT")
    )
    known = ["numpy.core.multiarray _reconstruct", "numpy ndarray", "_codecs encode", "numpy dtype"]
    if names == known and texts[:-1] == ["b", "latin1", "f8", "<"] and len(numbers) == 8:
        data, shape = str(texts[-1]).encode("latin1"), (int(str(numbers[2])), int(str(numbers[3])))
        if len(data) == 8 * shape[0] * shape[1]:
            return np.frombuffer(data, "<f8").reshape(shape)
    raise UserError(f"{path} holds something else", "one matrix of float64", "install hf-libero again")


def _open_libero() -> Path:
    """Prepare the import of LIBERO -> the folder of its inner package."""
    backend = choose_backend()
    if backend == "glfw":
        raise UserError("MUJOCO_GL=glfw", "osmesa or egl, which robosuite renders with", "export MUJOCO_GL=osmesa")
    os.environ["MUJOCO_GL"] = backend
    os.environ["LIBERO_CONFIG_PATH"] = str(CONFIG)
    if (found := importlib.util.find_spec("libero")) is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'libero'", name="libero")
    root = Path(next(iter(found.submodule_search_locations))) / "libero"
    if not (root / "assets").is_dir() and not (Path.home() / ".cache/libero/assets").is_dir():
        raise UserError(f"no {root / 'assets'}", "LIBERO's meshes and textures there", "vlm4vla sims setup libero")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return root


def _module(path: Path) -> ModuleType:
    """Run one file of LIBERO alone: its package would import torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
