"""RLDS data sets (TFRecord files of one episode a record) by a mapping: Bridge V2, LIBERO, any of Open X-Embodiment.

A mapping is a YAML file with the keys of ``Mapping``; ``bridge`` and ``libero`` are shipped beside this file.
T steps, A action, S state.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vlm4vla.convention import NAMED, Convention
from vlm4vla.data.convert.base import Demonstration, Left
from vlm4vla.data.convert.tfrecord import Feature, examples
from vlm4vla.errors import UserError, nearest
from vlm4vla.spec import Strict, load_yaml, parse, yaml_file

SHIPPED = Path(__file__).parent
EXTREME = 0.05
"""Closer to open or closed than this share of their distance is an extreme (OpenVLA's ``binarize_gripper_actions``)."""


class Gripper(Strict):
    """How the last number of an action becomes 1 (open) or 0 (closed)."""

    open: float
    closed: float
    between: Literal["nearest", "next_extreme"] = "nearest"
    """A number in between counts as the nearer of the two, or as what it is about to become (OpenVLA's for Bridge)."""


class Mapping(Strict):
    """Where an RLDS data set has what is needed, and what must be done with it."""

    images: dict[str, str] = Field(min_length=1)
    """Feature by camera; ``main`` is what policies see. JPEG or PNG."""
    action: str
    """Feature of the actions, A numbers a step, the gripper last."""
    state: str | None = None
    instruction: str
    convention: str | dict
    """What the converted actions mean: a name (``vlm4vla.convention.NAMED``) or all fields of ``Convention``."""
    drop_first: bool = False
    """Leave out each episode's first step."""
    gripper: Gripper
    relabel: Literal["none", "next_state_minus_state"] = "none"
    """``next_state_minus_state``: pose actions are how the first six numbers of the state change, angles the short way
    round; the last step, which has no next one, is left out."""

    def meaning(self) -> Convention:
        if isinstance(self.convention, dict):
            return Convention.from_dict(self.convention)
        if self.convention not in NAMED:
            raise UserError(
                f"the convention {self.convention!r}", f"one of {', '.join(NAMED)}, or its fields", "mend the mapping"
            )
        return NAMED[self.convention]


def load_mapping(name: str) -> Mapping:
    """A shipped mapping by name, or a YAML file."""
    path = yaml_file(name, "mapping", SHIPPED)
    mapping = parse(Mapping, load_yaml(path), str(path))
    mapping.meaning()
    if "main" not in mapping.images:
        raise UserError(f"{path} with the cameras {list(mapping.images)}", "one named main", f"rename one in {path}")
    return mapping


@dataclass(frozen=True)
class Rlds:
    """``folder``: the version folder of a TFDS data set, with its ``*.tfrecord-*`` files. A file is a shard."""

    folder: Path
    mapping: Mapping

    @property
    def convention(self) -> Convention:
        return self.mapping.meaning()

    def identity(self) -> dict:
        files = [[path.name, path.stat().st_size] for path in self.shards()]
        return {"source": "rlds", "files": files, "mapping": self.mapping.model_dump(mode="json")}

    def shards(self) -> list[Path]:
        files = sorted(self.folder.glob("*.tfrecord*"))
        if not files:
            inside = [str(path.parent) for path in self.folder.glob("*/*.tfrecord*")]
            mend = f"name the folder that holds them: {inside[0]}" if inside else "check the path"
            raise UserError(f"no *.tfrecord* file in {self.folder}", "a TFDS data set in RLDS form", mend)
        return files

    def demonstrations(self, shard: Path) -> Iterator[Demonstration | Left | UserError]:
        records = enumerate(examples(shard))
        while True:
            try:
                number, features = next(records)
            except StopIteration:
                return
            except UserError as error:  # the rest of the file cannot be found any more
                yield error
                return
            try:
                yield from self._episode(f"{shard}, record {number}", features)
            except UserError as error:
                yield error

    def _episode(self, where: str, features: dict[str, Feature]) -> Iterator[Demonstration | Left]:
        mapping = self.mapping
        texts = _bytes(where, features, mapping.instruction)
        pictures = {camera: _bytes(where, features, name) for camera, name in mapping.images.items()}
        counts = {camera: len(files) for camera, files in pictures.items()}
        steps = next(iter(counts.values()))
        if set(counts.values()) != {steps}:
            raise UserError(f"{where}: pictures {counts}", "the same number of each camera", "download the file again")
        actions, width = _numbers(where, features, mapping.action, steps).astype(np.float64), len(self.convention.names)
        if actions.shape[1] != width:
            raise UserError(
                f"{where}: {actions.shape[1]} numbers a step in {mapping.action!r}",
                f"{width}, as in the mapping's convention",
                "mend the mapping, or the raw data",
            )
        states = None if mapping.state is None else _numbers(where, features, mapping.state, steps)
        task = texts[0].decode(errors="replace").strip() if texts else ""
        if not task:
            yield Left("episodes without an instruction", 1)
            return
        first, last = int(mapping.drop_first), steps - (mapping.relabel != "none")
        if last <= first:
            yield Left("episodes that are too short", 1)
            return
        actions[:, -1] = binary_gripper(actions[first:, -1], mapping.gripper, first)
        if mapping.relabel == "next_state_minus_state":
            if states is None or states.shape[1] < 6:
                raise UserError(
                    f"{where}: no state of six numbers", "one, to relabel actions by", "name it in the mapping"
                )
            actions[:-1, :6] = change(states[:, :6].astype(np.float64))
        images = {}
        for camera, files in pictures.items():
            frames = [_decode(where, file) for file in files[first:last]]
            if len(sizes := {frame.shape for frame in frames}) > 1:
                raise UserError(f"{where}: pictures of {sorted(sizes)}", "one size", "download the file again")
            images[camera] = np.stack(frames)
        kept = None if states is None else states[first:last]
        if left := first + steps - last:
            yield Left("first and last steps, by the mapping", left)
        yield Demonstration(where, images, actions[first:last], kept, task)


def binary_gripper(values: np.ndarray, gripper: Gripper, pad: int = 0) -> np.ndarray:
    """(T,) raw -> (pad + T,) of 1 (open) and 0 (closed), the first ``pad`` of them 0."""
    share = (values - gripper.closed) / (gripper.open - gripper.closed)
    result = (share >= 0.5).astype(np.float64)
    if gripper.between == "next_extreme":
        for step in range(len(share) - 2, -1, -1):
            if EXTREME <= share[step] <= 1 - EXTREME:
                result[step] = result[step + 1]
    return np.concatenate([np.zeros(pad), result])


def change(poses: np.ndarray) -> np.ndarray:
    """(T, 6) positions and Euler angles -> (T - 1, 6) from each to the next, angles in [-pi, pi)."""
    delta = np.diff(poses, axis=0)
    delta[:, 3:] = (delta[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    return delta


def _find(where: str, features: dict[str, Feature], name: str) -> Feature:
    if name not in features:
        raise UserError(
            f"{where}: no feature {name!r}",
            f"one of {', '.join(sorted(features))}",
            f"mend the mapping (nearest: {nearest(name, list(features))})",
        )
    return features[name]


def _bytes(where: str, features: dict[str, Feature], name: str) -> list[bytes]:
    values = _find(where, features, name)
    if not isinstance(values, list):
        raise UserError(f"{where}: numbers in {name!r}", "pictures or text", "mend the mapping")
    return values


def _numbers(where: str, features: dict[str, Feature], name: str, steps: int) -> np.ndarray:
    """(T, D)"""
    values = _find(where, features, name)
    if isinstance(values, list) or not steps or not len(values) or len(values) % steps:
        kind = "texts" if isinstance(values, list) and values else "numbers"
        raise UserError(
            f"{where}: {len(values)} {kind} in {name!r} at {steps} steps",
            "the same number of numbers at each step",
            "mend the mapping, or the raw data",
        )
    return values.reshape(steps, -1)


def _decode(where: str, file: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # a broken PNG is a SyntaxError
        raise UserError(f"{where}: a damaged picture ({error})", "JPEG or PNG", "download the file again") from error
