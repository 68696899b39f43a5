"""An opened LeRobotDataset folder (files: ``layout.py``). N frames, E episodes, A action, S state.

Pictures are PNG files inside the data files (dtype ``image``: lossless, so training can be repeated to the bit) or
films (dtype ``video``: far smaller). lerobot's own loader opens our folders and we its (``tests/test_lerobot.py``).
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from vlm4vla.convention import Convention
from vlm4vla.data.hub import local
from vlm4vla.data.layout import (
    IMAGE,
    OWN_KEY,
    STATE,
    Clips,
    damaged,
    parquet,
    read,
    read_episodes,
    read_info,
    read_tasks,
    require,
    vectors,
)
from vlm4vla.errors import UserError

BATCH = 256
"""Frames that ``batches`` decodes at a time from films."""


@dataclass(frozen=True)
class Dataset:
    """An opened folder: numbers in memory, pictures on disk, no Python object per frame."""

    folder: Path
    info: dict
    """``meta/info.json``."""
    tasks: tuple[str, ...]
    """Instructions by task index."""
    task_index: np.ndarray
    """int64 (N,)."""
    episode_from: np.ndarray
    """int64 (E,): first frame of each episode; episodes lie back to back."""
    episode_to: np.ndarray
    """int64 (E,): one past the last frame of each episode."""
    actions: np.ndarray
    """float32 (N, A), native units."""
    recorded_states: np.ndarray | None
    """float32 (N, S), or None where no state was recorded."""
    files: tuple[Path, ...]
    """The data files in frame order."""
    row_groups: np.ndarray
    """int64 (G, 3): first frame, file number and number within the file of each row group."""
    clips: dict[str, Clips]
    """Where films are, by feature."""

    @classmethod
    def open(cls, folder: Path | str) -> "Dataset":
        """Open a LeRobotDataset folder, or ``hub:owner/name`` (downloaded on first use; ``hub.py``).

        Raises:
            UserError: nothing there, another format, or a file that is missing, damaged or at odds with the others.
        """
        folder = local(folder)
        info = read_info(folder)
        tasks = read_tasks(folder, info)
        episodes = read_episodes(folder, info)
        names = ["action", "episode_index", "index", "task_index"] + [STATE] * (STATE in info["features"])
        files = tuple(sorted((folder / "data").glob("*/*.parquet")))
        tables, groups, start = [], [], 0
        for number, path in enumerate(files):
            file = parquet(path)
            require(path, set(names) <= set(file.schema_arrow.names), f"{file.schema_arrow.names}", f"columns {names}")
            tables.append(read(path, names))
            for group in range(file.num_row_groups):
                groups.append((start, number, group))
                start += file.metadata.row_group(group).num_rows
        where, total = folder / "data", info["total_frames"]
        require(where, start == total, f"{start} frames in {len(files)} files", f"{total} as in meta/info.json")
        table = pa.concat_tables(tables)
        dataset = cls(
            folder=folder,
            info=info,
            tasks=tasks,
            task_index=table["task_index"].to_numpy(),
            episode_from=episodes.start,
            episode_to=episodes.stop,
            actions=_vectors(where, table, "action", info),
            recorded_states=_vectors(where, table, STATE, info) if STATE in names else None,
            files=files,
            row_groups=np.array(groups, np.int64),
            clips=episodes.clips,
        )
        numbers = np.repeat(np.arange(dataset.num_episodes), episodes.stop - episodes.start)
        in_order = np.array_equal(table["index"].to_numpy(), np.arange(start))
        agrees = np.array_equal(table["episode_index"].to_numpy(), numbers)
        require(where, in_order and agrees, "frames of other episodes than meta/episodes says", "the same episodes")
        known = dataset.task_index.min() >= 0 and dataset.task_index.max() < len(tasks)
        require(where, known, f"task {dataset.task_index.max()}", f"one of the {len(tasks)} in meta/tasks.parquet")
        return dataset

    @property
    def num_frames(self) -> int:
        return len(self.actions)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_to)

    @property
    def fps(self) -> float:
        return self.info["fps"]

    @cached_property
    def features(self) -> dict[str, str]:
        """Feature by camera name: the cameras that the folder's description names (``hub.describe``), else all, as
        ``main`` for ``observation.images.main``."""
        if given := self.info.get(OWN_KEY, {}).get("cameras"):
            return given
        pictures = [name for name, each in self.info["features"].items() if each.get("dtype") in ("image", "video")]
        return {name.removeprefix(IMAGE).removeprefix("observation."): name for name in pictures}

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Height and width by camera name."""
        sizes = {}
        for name, feature in self.features.items():
            about = self.info["features"][feature]
            height, width = about["shape"][:2] if about["shape"][-1] == 3 else about["shape"][1:]
            sizes[name] = (height, width)
        return sizes

    def camera_size(self, camera: str) -> tuple[int, int]:
        """Height and width of a camera's pictures; ``UserError`` where there is no such camera."""
        if camera not in self.cameras:
            raise UserError(
                f"{self.folder} with the cameras {list(self.cameras)}",
                f"a camera named {camera!r}",
                f"vlm4vla data describe {self.folder} --camera {camera}={next(iter(self.cameras), 'NAME')}",
            )
        return self.cameras[camera]

    @property
    def image_size(self) -> int:
        """Side of the main camera's pictures; ``UserError`` where they are not square."""
        height, width = self.camera_size("main")
        if height != width:
            raise UserError(
                f"{self.folder} with pictures of {height} x {width}",
                "square ones, or a size to bring them to",
                "add --set data.image_size=224",
            )
        return height

    @property
    def states(self) -> np.ndarray:
        """float32 (N, S); ``UserError`` where no state was recorded."""
        if self.recorded_states is None:
            raise UserError(f"{self.folder} without {STATE}", "recorded states", "train without proprioception")
        return self.recorded_states

    @property
    def convention(self) -> Convention:
        """What the actions mean; ``UserError`` where the folder does not say: a wrong guess moves a robot wrongly."""
        own = self.info.get(OWN_KEY, {})
        if "convention" not in own:
            raise UserError(
                f"{self.folder}/meta/info.json without {OWN_KEY}.convention",
                "what its actions mean, as in src/vlm4vla/convention.py",
                f"vlm4vla data describe {self.folder} --convention NAME",
            )
        return Convention.from_dict(own["convention"])

    def instructions(self, indices: np.ndarray) -> list[str]:
        """The instructions of the frames ``indices`` (B,)."""
        return [self.tasks[i] for i in self.task_index[indices]]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of all that training reads: data files, films, tasks, features, fps and convention. The same
        recording has the same hash wherever the folder lies; provenance and statistics do not enter."""
        own = self.info.get(OWN_KEY, {})
        meaning = [self.tasks, self.info["features"], self.fps, own.get("convention")]
        meaning += [own["cameras"]] if "cameras" in own else []
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        films = [path for name, clips in self.clips.items() if name in self.features.values() for path in clips.files]
        for path in (*self.files, *films):
            digest.update(path.relative_to(self.folder).as_posix().encode())
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except FileNotFoundError as error:
                raise damaged(path, "no such file", "a file of the data set") from error
        return digest.hexdigest()

    def images(self, indices: np.ndarray, camera: str = "main") -> np.ndarray:
        """Decode the pictures of the frames ``indices`` (B,): uint8 (B, height, width, 3). Each row group is read once;
        of films only the wanted frames, and the key frames before them, are decoded.

        Raises:
            IndexError: an index outside [0, N).
            UserError: no such camera, or a damaged picture or film.
        """
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise IndexError(f"frame indices in [{indices.min()}, {indices.max()}] of {self.num_frames} frames")
        size = self.camera_size(camera)
        if (feature := self.features[camera]) in self.clips:
            return self._films(indices, self.clips[feature], size)
        pictures = np.empty((len(indices), *size, 3), np.uint8)
        groups = np.searchsorted(self.row_groups[:, 0], indices, side="right") - 1
        for group in np.unique(groups):
            start, files = self.row_groups[group, 0], self._encoded(group, camera)
            for place in np.flatnonzero(groups == group):
                pictures[place] = self._decode(files[int(indices[place] - start)].as_py(), camera, indices[place])
        return pictures

    def batches(self, camera: str = "main") -> Iterator[np.ndarray]:
        """All pictures in order, a row group (of films: ``BATCH`` frames) at a time: uint8 (n, height, width, 3)."""
        self.camera_size(camera)
        if self.features[camera] in self.clips:
            for start in range(0, self.num_frames, BATCH):
                yield self.images(np.arange(start, min(start + BATCH, self.num_frames)), camera)
            return
        for group, (start, _, _) in enumerate(self.row_groups):
            files = self._encoded(group, camera).to_pylist()
            yield np.stack([self._decode(file, camera, start + i) for i, file in enumerate(files)])

    def _films(self, indices: np.ndarray, clips: Clips, size: tuple[int, int]) -> np.ndarray:
        from vlm4vla.data.video import decode  # PyAV, which folders of PNG pictures do not need

        pictures = np.empty((len(indices), *size, 3), np.uint8)
        episodes = np.searchsorted(self.episode_to, indices, side="right")
        times = clips.start[episodes] + (indices - self.episode_from[episodes]) / self.fps
        for number in np.unique(clips.number[episodes]):
            here = clips.number[episodes] == number
            pictures[here] = decode(clips.files[number], times[here], self.fps, size)
        return pictures

    def _encoded(self, group: int, camera: str) -> pa.ChunkedArray | pa.Array:
        """The picture files of one row group."""
        _, number, within = self.row_groups[group].tolist()
        feature = self.features[camera]
        column = read(self.files[number], [feature], within)[feature]
        return column.combine_chunks().field("bytes")

    def _decode(self, file: bytes | None, camera: str, index: int) -> np.ndarray:
        try:
            picture = np.asarray(Image.open(io.BytesIO(file or b"")).convert("RGB"))
        except OSError as error:
            raise damaged(self.folder / "data", f"frame {index}: {error}", "a PNG picture") from error
        shape = (*self.cameras[camera], 3)
        require(self.folder / "data", picture.shape == shape, f"frame {index} of {picture.shape}", f"{shape}")
        return picture


def _vectors(path: Path, table: pa.Table, name: str, info: dict) -> np.ndarray:
    """The same, checked against the feature's description."""
    dims = info["features"][name]["shape"][0]
    try:
        values = vectors(table, name)
    except ValueError as error:
        raise damaged(path, f"{name} with a varying number of numbers", f"{dims} a row") from error
    require(path, values.shape[1] == dims, f"{name} with {values.shape[1]} numbers a row", f"{dims}")
    return values
