"""Reads LeRobotDataset v3.0 folders with pyarrow alone. N frames, E episodes, A action, S state.

    meta/info.json                            version, fps, features; our convention and provenance under ``vlm4vla``
    meta/stats.json                           statistics per feature
    meta/tasks.parquet                        task_index by task (the instruction)
    meta/episodes/chunk-000/file-000.parquet  per episode: tasks, length, where its rows are, statistics
    data/chunk-000/file-000.parquet           per frame: pictures, state, action, counters; one row group per episode

Pictures are PNG files inside the data files (feature type ``image``): lossless, so training can be repeated to the bit.
Layout and types are those of huggingface/lerobot 0.4, whose own loader opens our folders (``tests/test_lerobot.py``).
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
import pyarrow.parquet as pq
from PIL import Image

from vlm4vla.convention import Convention
from vlm4vla.errors import UserError

VERSION = "v3.0"
OWN_KEY = "vlm4vla"
"""Our entry in ``meta/info.json``; lerobot passes over keys that it does not know."""
IMAGE = "observation.images."
STATE = "observation.state"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


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

    @classmethod
    def open(cls, folder: Path | str) -> "Dataset":
        """Open a LeRobotDataset v3.0 folder.

        Raises:
            UserError: nothing there, another format, or a file that is missing, damaged or at odds with the others.
        """
        folder = Path(folder)
        info = _read_info(folder)
        tasks = _read_tasks(folder / "meta" / "tasks.parquet")
        episode_from, episode_to = _read_episodes(folder)
        names = ["action", "episode_index", "index", "task_index"] + [STATE] * (STATE in info["features"])
        files = tuple(sorted((folder / "data").glob("*/*.parquet")))
        tables, groups, start = [], [], 0
        for number, path in enumerate(files):
            file = _parquet(path)
            _require(path, set(names) <= set(file.schema_arrow.names), f"{file.schema_arrow.names}", f"columns {names}")
            tables.append(_read(path, names))
            for group in range(file.num_row_groups):
                groups.append((start, number, group))
                start += file.metadata.row_group(group).num_rows
        where, total = folder / "data", info["total_frames"]
        _require(where, start == total, f"{start} frames in {len(files)} files", f"{total} as in meta/info.json")
        table = pa.concat_tables(tables)
        dataset = cls(
            folder=folder,
            info=info,
            tasks=tasks,
            task_index=table["task_index"].to_numpy(),
            episode_from=episode_from,
            episode_to=episode_to,
            actions=_vectors(where, table, "action", info),
            recorded_states=_vectors(where, table, STATE, info) if STATE in names else None,
            files=files,
            row_groups=np.array(groups, np.int64),
        )
        numbers = np.repeat(np.arange(dataset.num_episodes), episode_to - episode_from)
        in_order = np.array_equal(table["index"].to_numpy(), np.arange(start))
        agrees = np.array_equal(table["episode_index"].to_numpy(), numbers)
        _require(where, in_order and agrees, "frames of other episodes than meta/episodes says", "the same episodes")
        known = dataset.task_index.min() >= 0 and dataset.task_index.max() < len(tasks)
        _require(where, known, f"task {dataset.task_index.max()}", f"one of the {len(tasks)} in meta/tasks.parquet")
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

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Height and width by camera name."""
        features = {n.removeprefix(IMAGE): f for n, f in self.info["features"].items() if n.startswith(IMAGE)}
        return {name: (feature["shape"][0], feature["shape"][1]) for name, feature in features.items()}

    def camera_size(self, camera: str) -> tuple[int, int]:
        """Height and width of a camera's pictures; ``UserError`` where there is no such camera."""
        if camera not in self.cameras:
            raise UserError(
                f"{self.folder} with the cameras {list(self.cameras)}",
                f"a camera named {camera!r}",
                f"rename the feature in {self.folder}/meta/info.json and the data files, or record it again",
            )
        return self.cameras[camera]

    @property
    def image_size(self) -> int:
        """Side of the main camera's pictures; ``UserError`` where they are not square."""
        height, width = self.camera_size("main")
        if height != width:
            raise UserError(f"{self.folder} with pictures of {height} x {width}", "square ones", "convert it again")
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
                f'add "{OWN_KEY}": {{"convention": {{...}}}} to that file',
            )
        return Convention.from_dict(own["convention"])

    def instructions(self, indices: np.ndarray) -> list[str]:
        """The instructions of the frames ``indices`` (B,)."""
        return [self.tasks[i] for i in self.task_index[indices]]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of all that training reads: data files, tasks, features, fps and convention. The same recording
        has the same hash wherever the folder lies; provenance and statistics do not enter."""
        meaning = [self.tasks, self.info["features"], self.fps, self.info.get(OWN_KEY, {}).get("convention")]
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        for path in self.files:
            digest.update(path.relative_to(self.folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def images(self, indices: np.ndarray, camera: str = "main") -> np.ndarray:
        """Decode the pictures of the frames ``indices`` (B,): uint8 (B, height, width, 3). Each row group is read once.

        Raises:
            IndexError: an index outside [0, N).
            UserError: no such camera, or a damaged picture.
        """
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise IndexError(f"frame indices in [{indices.min()}, {indices.max()}] of {self.num_frames} frames")
        pictures = np.empty((len(indices), *self.camera_size(camera), 3), np.uint8)
        groups = np.searchsorted(self.row_groups[:, 0], indices, side="right") - 1
        for group in np.unique(groups):
            start, files = self.row_groups[group, 0], self._encoded(group, camera)
            for place in np.flatnonzero(groups == group):
                pictures[place] = self._decode(files[int(indices[place] - start)].as_py(), camera, indices[place])
        return pictures

    def batches(self, camera: str = "main") -> Iterator[np.ndarray]:
        """All pictures in order, a row group at a time: uint8 (n, height, width, 3)."""
        for group, (start, _, _) in enumerate(self.row_groups):
            files = self._encoded(group, camera).to_pylist()
            yield np.stack([self._decode(file, camera, start + i) for i, file in enumerate(files)])

    def _encoded(self, group: int, camera: str) -> pa.ChunkedArray | pa.Array:
        """The picture files of one row group."""
        _, number, within = self.row_groups[group].tolist()
        column = _read(self.files[number], [IMAGE + camera], within)[IMAGE + camera]
        return column.combine_chunks().field("bytes")

    def _decode(self, file: bytes | None, camera: str, index: int) -> np.ndarray:
        try:
            picture = np.asarray(Image.open(io.BytesIO(file or b"")).convert("RGB"))
        except OSError as error:
            raise _damaged(self.folder / "data", f"frame {index}: {error}", "a PNG picture") from error
        shape = (*self.cameras[camera], 3)
        _require(self.folder / "data", picture.shape == shape, f"frame {index} of {picture.shape}", f"{shape}")
        return picture


def _damaged(path: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"{path}: {found}", expected, "delete the data set's folder, then record, convert or copy it again"
    )


def _require(path: Path, true: bool, found: str, expected: str) -> None:
    if not true:
        raise _damaged(path, found, expected)


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise _damaged(path, "no such file", "a Parquet file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, f"damaged ({error})", "a whole Parquet file") from error


def _read(path: Path, columns: list[str], group: int | None = None) -> pa.Table:
    """Columns of one row group, or of the whole file."""
    file = _parquet(path)
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, f"damaged ({error})", "a whole Parquet file") from error


def _read_info(folder: Path) -> dict:
    path = folder / "meta" / "info.json"
    partial = folder.with_name(folder.name + ".partial")
    if not folder.exists() and partial.exists():
        raise UserError(f"{partial}, unfinished", f"the data set {folder}", "run the command that records it again")
    if not path.is_file():
        raise UserError(f"no {path}", "a LeRobotDataset v3.0 folder", "check the path, or: vlm4vla data record --help")
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, f"no JSON ({error})", "lerobot's info.json") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path} with codebase_version {version!r}",
            VERSION,
            "convert v2.1 folders with lerobot: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30",
        )
    features = info.get("features", {})
    missing = [key for key in ("fps", "total_frames", "total_episodes") if key not in info]
    missing += ["features.action"] * ("action" not in features)
    _require(path, not missing, f"no {', '.join(missing)}", "all of lerobot's keys")
    if videos := [name for name, feature in features.items() if feature.get("dtype") == "video"]:
        raise UserError(f"{path} with the videos {videos}", "pictures (dtype image)", "convert it with dtype image")
    return info


def _read_tasks(path: Path) -> tuple[str, ...]:
    table = _read(path, _parquet(path).schema_arrow.names)
    names = [name for name in table.column_names if name != "task_index"]
    # The task is pandas' index: ``task`` in newer folders, without a name in older ones.
    _require(path, "task_index" in table.column_names and len(names) == 1, f"{names}", "task_index by task")
    order = np.argsort(table["task_index"].to_numpy())
    tasks = table[names[0]].to_pylist()
    return tuple(tasks[i] for i in order)


def _read_episodes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries of all episodes."""
    where = folder / "meta" / "episodes"
    columns = ["episode_index", "dataset_from_index", "dataset_to_index"]
    files = sorted(where.glob("*/*.parquet"))
    _require(where, bool(files), "no Parquet file", "chunk-000/file-000.parquet")
    for path in files:
        names = _parquet(path).schema_arrow.names
        _require(path, set(columns) <= set(names), f"columns {names}", f"{columns} among them")
    table = pa.concat_tables([_read(path, columns) for path in files])
    index, start, end = (table[name].to_numpy() for name in columns)
    whole = np.array_equal(index, np.arange(len(index))) and np.array_equal(start, np.r_[0, end[:-1]])
    _require(where, whole and bool((end > start).all()), "gaps, overlaps or empty episodes", "episodes back to back")
    return start, end


def vectors(table: pa.Table, name: str) -> np.ndarray:
    """A column of vectors, or of plain numbers, as float32 (N, D). Raises ``ValueError`` where lengths differ."""
    column = table[name].combine_chunks()
    flat = column.flatten() if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)


def _vectors(path: Path, table: pa.Table, name: str, info: dict) -> np.ndarray:
    """The same, checked against the feature's description."""
    dims = info["features"][name]["shape"][0]
    try:
        values = vectors(table, name)
    except ValueError as error:
        raise _damaged(path, f"{name} with a varying number of numbers", f"{dims} a row") from error
    _require(path, values.shape[1] == dims, f"{name} with {values.shape[1]} numbers a row", f"{dims}")
    return values


def inspect(folder: Path | str) -> str:
    """What ``vlm4vla data inspect`` prints: contents, statistics and what looks suspicious.

    Raises:
        UserError: as ``Dataset.open``.
    """
    dataset = Dataset.open(folder)
    lengths = dataset.episode_to - dataset.episode_from
    own = dataset.info.get(OWN_KEY, {})
    names = dataset.info["features"]["action"].get("names")
    if not isinstance(names, list) or len(names) != dataset.actions.shape[1]:
        names = [f"action_{d}" for d in range(dataset.actions.shape[1])]
    convention = own.get("convention", {"none": "training will refuse this folder"})
    state = "none" if dataset.recorded_states is None else f"{dataset.states.shape[1]} numbers"
    lines = [
        f"{dataset.folder}: LeRobotDataset {VERSION}, {sum(f.stat().st_size for f in dataset.files) / 1e6:.1f} MB",
        f"episodes    {dataset.num_episodes}",
        f"frames      {dataset.num_frames} ({lengths.min()} to {lengths.max()} an episode, mean {lengths.mean():.1f})",
        f"fps         {dataset.fps:g}",
        "cameras     " + ", ".join(f"{name} {h}x{w}" for name, (h, w) in dataset.cameras.items()),
        f"action      {len(names)} numbers; state: {state}",
        f"tasks       {len(dataset.tasks)}, e.g. {dataset.tasks[0]!r}",
        f"content     sha256 {dataset.content_hash}",
        *(f"convention  {key}: {value}" for key, value in convention.items()),
        *(f"provenance  {key}: {json.dumps(value)}" for key, value in own.get("provenance", {}).items()),
        "",
    ]
    return "\n".join([*lines, *_statistics_lines(dataset.actions, names)])


def _statistics_lines(actions: np.ndarray, names: list[str]) -> list[str]:
    """A table of statistics over the finite actions, then warnings."""
    finite = np.isfinite(actions).all(1)
    lines = [f"{'dimension':12}{'mean':>10}{'std':>10}{'min':>10}{'q01':>10}{'q99':>10}{'max':>10}  at min / max"]
    warnings = []
    if not finite.all():
        warnings.append(f"warning: {int((~finite).sum())} frames have NaN or infinite actions (left out above)")
    for name, column in zip(names, actions[finite].T, strict=True):
        if not len(column):
            break
        low, high = column.min(), column.max()
        q01, q99 = np.quantile(column.astype(np.float64), [0.01, 0.99])
        numbers = (column.mean(dtype=np.float64), column.std(dtype=np.float64), low, q01, q99, high)
        at = f"{(column == low).mean():6.1%} /{(column == high).mean():6.1%}"
        lines.append(f"{name:12}" + "".join(f"{number:10.4f}" for number in numbers) + "  " + at)
        if low == high:
            warnings.append(f"note: {name} is constant ({low:g}); training predicts that constant")
    return lines + warnings
