"""LIBERO's HDF5 files (https://github.com/Lifelong-Robot-Learning/LIBERO), one a task.

    data/demo_0     actions (T, 7); obs/{agentview_rgb, eye_in_hand_rgb} (T, 128, 128, 3), upside down;
                    obs/{ee_pos (T, 3), ee_ori (T, 3), gripper_states (T, 2)}

Pictures are turned by 180 degrees, as all published data sets and policies have them. Steps in which nothing happens
are dropped by OpenVLA's rule. Its ``no_noops`` data sets are also rendered anew at 256 x 256 and without demonstrations
whose replay fails: that needs the simulator, and is not done here. Raw gripper: -1 = open, 1 = closed.
The instruction is that of the file name, as in the simulator; the file's own ``problem_info`` words many differently.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vlm4vla.convention import LIBERO
from vlm4vla.data.convert.base import Demonstration, Left
from vlm4vla.errors import UserError
from vlm4vla.sims.libero import instruction

CAMERAS = {"main": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
STATES = ("ee_pos", "ee_ori", "gripper_states")
NAME = re.compile(r"demo_\d+")
SUFFIX = "_demo"
"""Of a file's name behind that of its task."""
NOOP = 1e-4
"""Norm of the pose below which an action is none (OpenVLA's ``regenerate_libero_dataset.py``)."""
DEMONSTRATIONS = 10
"""In a shard: about 3,000 frames."""


@dataclass(frozen=True)
class Shard:
    path: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Libero:
    """``path``: a folder of ``*.hdf5`` files, or one of them."""

    path: Path
    keep_noops: bool = False
    convention = LIBERO

    def identity(self) -> dict:
        files = [[path.name, path.stat().st_size] for path in self._files()]
        return {"source": "libero", "files": files, "keep_noops": self.keep_noops}

    def shards(self) -> list[Shard]:
        result = []
        for path in self._files():
            with _opened(path) as file:
                # In the order of their numbers; what is called otherwise is told of later.
                names = sorted(file["data"], key=lambda name: (len(name), name))
            result += [Shard(path, tuple(names[i : i + DEMONSTRATIONS])) for i in range(0, len(names), DEMONSTRATIONS)]
        return result

    def demonstrations(self, shard: Shard) -> Iterator[Demonstration | Left | UserError]:
        with _opened(shard.path) as file:
            task = instruction(shard.path.stem.removesuffix(SUFFIX))
            for name in shard.names:
                where = f"{shard.path}, {name}"
                try:
                    if not NAME.fullmatch(name):
                        raise KeyError("a group of another name than demo_NUMBER")
                    demo = file["data"][name]
                    actions: np.ndarray = demo["actions"][:].astype(np.float64)
                    pictures = {camera: demo["obs"][key][:] for camera, key in CAMERAS.items()}
                    parts = [demo["obs"][key][:] for key in STATES]
                    lengths = [len(actions), *map(len, pictures.values()), *map(len, parts)]
                    if actions.ndim != 2 or actions.shape[1] != 7 or len(set(lengths)) != 1:
                        raise ValueError(f"actions {actions.shape}, and {lengths} steps by feature")
                    keep = np.arange(len(actions)) if self.keep_noops else np.flatnonzero(moves(actions))
                    images = {camera: frames[keep, ::-1, ::-1] for camera, frames in pictures.items()}
                    states = np.concatenate(parts, 1)[keep]
                except (AttributeError, KeyError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
                    yield _damaged(where, error)
                    continue
                if dropped := len(actions) - len(keep):
                    yield Left("steps without motion", dropped)
                if not np.isin(actions[:, 6], (-1, 1)).all():
                    yield UserError(f"{where}: other gripper actions than -1 and 1", "LIBERO's", "copy the file again")
                    continue
                actions[:, 6] = actions[:, 6] < 0
                yield Demonstration(where, images, actions[keep], states, task)

    def _files(self) -> list[Path]:
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.hdf5"))
        if not files:
            raise UserError(f"no *.hdf5 in {self.path}", "LIBERO's demonstrations", "check the path")
        for path in files:
            if not path.stem.endswith(SUFFIX):
                raise UserError(
                    f"the name of {path}",
                    f"TASK{SUFFIX}.hdf5, which the instruction is made of",
                    "name it as LIBERO does",
                )
        return files


def moves(actions: np.ndarray) -> np.ndarray:
    """bool (T,): which of the raw actions (T, 7) move the arm, or the gripper against the last kept action."""
    still = np.linalg.norm(actions[:, :6], axis=1) < NOOP
    keep, gripper = np.ones(len(actions), bool), None
    for step in np.arange(len(actions)):
        if still[step] and (gripper is None or actions[step, 6] == gripper):
            keep[step] = False
        else:
            gripper = actions[step, 6]
    return keep


def _opened(path: Path) -> Any:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _damaged(str(path), error) from error
    if not isinstance(file.get("data"), h5py.Group):
        raise _damaged(str(path), KeyError("the group data"))
    return file


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: damaged or foreign ({error})", "a file of LIBERO's demonstrations", "download it again")
