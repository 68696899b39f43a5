"""CALVIN's npz folders (https://github.com/mees/calvin): the segments that are annotated with an instruction.

    episode_0000000.npz               a frame: rgb_static (200, 200, 3), rgb_gripper (84, 84, 3), rel_actions (7),
                                      robot_obs (15), and more that is not used
    lang_annotations/auto_lang_ann.npy  first and last frame of each segment, and what was done in it

``rel_actions`` stay in their units; the gripper, raw 1 = open and -1 = closed, becomes 1 and 0.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm4vla.convention import CALVIN
from vlm4vla.data.convert.base import Demonstration, Left
from vlm4vla.data.convert.unpickle import load_object_array
from vlm4vla.errors import UserError

ANNOTATIONS = Path("lang_annotations/auto_lang_ann.npy")
CAMERAS = {"main": "rgb_static", "wrist": "rgb_gripper"}
SEGMENTS = 64
"""In a shard: about 4,000 frames, 60 MB of film."""


@dataclass(frozen=True)
class Segment:
    first: int
    last: int
    """Inclusive."""
    task: str


@dataclass(frozen=True)
class Calvin:
    """``folder``: ``training`` or ``validation`` of a CALVIN data set."""

    folder: Path
    convention = CALVIN

    def identity(self) -> dict:
        digest = hashlib.sha256(self._annotations().read_bytes()).hexdigest()
        return {"source": "calvin", "annotations": digest}

    def shards(self) -> list[tuple[Segment, ...]]:
        annotations = load_object_array(self._annotations())
        try:
            bounds, texts = annotations["info"]["indx"], annotations["language"]["ann"]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("an instruction that is no text")
            segments = [Segment(int(a), int(b), str(text)) for (a, b), text in zip(bounds, texts, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._annotations()}: other contents ({error!r})", "info.indx and language.ann", "copy it again"
            ) from error
        return [tuple(segments[i : i + SEGMENTS]) for i in range(0, len(segments), SEGMENTS)]

    def demonstrations(self, shard: tuple[Segment, ...]) -> Iterator[Demonstration | Left | UserError]:
        for segment in shard:
            try:
                item = self._demonstration(segment)
            except UserError as error:
                item = error
            yield item

    def _demonstration(self, segment: Segment) -> Demonstration:
        where = f"{self.folder}, frames {segment.first} to {segment.last}"
        frames = [self._frame(number) for number in range(segment.first, segment.last + 1)]
        if not frames:
            raise UserError(f"{where}: an empty segment", "at least one frame", "mend or remove it in the annotations")
        for number, frame in enumerate(frames, segment.first):
            for name, values in frame.items():
                if values.shape != (shape := frames[0][name].shape):
                    raise UserError(
                        f"{self._path(number)}: {name} of {values.shape}",
                        f"{shape}, as in the segment's first frame",
                        "unpack the archive again",
                    )
        columns = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
        actions, width = columns["rel_actions"], len(self.convention.names)
        if actions.shape[1:] != (width,) or actions.dtype.kind not in "iuf":
            raise UserError(
                f"{where}: rel_actions as {actions.dtype} {actions.shape}",
                f"{width} numbers a frame",
                "unpack the archive again",
            )
        actions = actions.astype(np.float64)
        actions[:, 6] = actions[:, 6] > 0
        images = {camera: columns[key] for camera, key in CAMERAS.items()}
        return Demonstration(where, images, actions, columns["robot_obs"], segment.task)

    def _path(self, number: int) -> Path:
        return self.folder / f"episode_{number:07d}.npz"

    def _frame(self, number: int) -> dict[str, np.ndarray]:
        path = self._path(number)
        wanted = ("rel_actions", "robot_obs", *CAMERAS.values())
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in wanted}
        except FileNotFoundError as error:
            raise UserError(f"no {path}", "a frame of an annotated segment", "unpack the archive again") from error
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: damaged ({error})", f"an npz file with {wanted}", "unpack the archive again"
            ) from error

    def _annotations(self) -> Path:
        path = self.folder / ANNOTATIONS
        if not path.is_file():
            inside = [p.parent.parent.name for p in self.folder.glob(f"*/{ANNOTATIONS}")]
            mend = f"name a folder inside: {', '.join(inside)}" if inside else "check the path"
            raise UserError(f"no {path}", "training or validation of a CALVIN data set", mend)
        return path
