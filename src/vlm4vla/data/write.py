"""Writes LeRobotDataset v3.0 folders (files: ``layout.py``). T frames of an episode, A action, S state, D numbers."""

import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm4vla.convention import Convention
from vlm4vla.data.layout import DATA_PATH, FILE, IMAGE, OWN_KEY, STATE, VERSION, VIDEO_PATH
from vlm4vla.errors import UserError

if TYPE_CHECKING:
    from vlm4vla.sims.film import Film

DATA_FILE_MB, VIDEO_FILE_MB, CHUNK_FILES = 100, 200, 1000
"""lerobot's defaults: data files of about 100 MB, films of about 200, at most 1000 files in a chunk folder."""
EPISODE_ROWS = 1000
"""Episodes whose metadata is held as Python objects at a time."""
ROWS = 65_536
"""Rows of a row group where pictures are in films: many episodes in one, so that millions of frames open quickly."""
PNG_LEVEL = 1
"""zlib level. Level 6 takes 2.5 times as long and saves a fifth of the bytes (renders of 96 and 224 px)."""
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class Clip:
    """An episode's pictures in a finished MP4."""

    file: Path
    start: float
    """Seconds of its first frame within the file."""


@dataclass(frozen=True)
class Episode:
    """One demonstration of T frames, ready to be stored."""

    images: dict[str, list[bytes]]
    """T PNG files by camera; empty where the pictures are in films."""
    clips: dict[str, Clip]
    """Where the pictures lie in films, by camera; empty where they are PNG files."""
    pixels: dict[str, np.ndarray]
    """int64 (3, 256) by camera: how often each channel has each value. Exact statistics without decoding again."""
    sizes: dict[str, tuple[int, int]]
    """Height and width by camera."""
    actions: np.ndarray
    """float32 (T, A): what was demonstrated at each frame, in native units."""
    states: np.ndarray | None
    """float32 (T, S)."""
    task: str
    """The instruction."""

    @classmethod
    def encode(
        cls,
        images: dict[str, np.ndarray],
        actions: np.ndarray,
        states: np.ndarray | None,
        task: str,
        films: "dict[str, Film] | None" = None,
    ) -> "Episode":
        """From uint8 (T, height, width, 3) pictures by camera: as PNG files, or appended to ``films``."""
        pixels = {camera: pixel_counts(frames) for camera, frames in images.items()}
        sizes = {camera: (frames.shape[1], frames.shape[2]) for camera, frames in images.items()}
        files, clips = {}, {}
        if films is None:
            files = {camera: [encode_png(frame) for frame in frames] for camera, frames in images.items()}
        else:
            clips = {camera: Clip(films[camera].path, films[camera].add(frames)) for camera, frames in images.items()}
        return cls(files, clips, pixels, sizes, actions, states, task)

    def numbers(self) -> dict[str, np.ndarray]:
        """(T, D) by feature name."""
        return {"action": self.actions} | ({} if self.states is None else {STATE: self.states})

    def table(self) -> pa.Table:
        """The recorded columns, one row per frame."""
        columns: dict[str, pa.Array] = {}
        for camera, files in self.images.items():
            paths = pa.array([f"frame-{i:06d}.png" for i in range(len(files))])
            files = pa.array(files, pa.binary())
            columns[IMAGE + camera] = pa.StructArray.from_arrays([files, paths], ["bytes", "path"])
        for name, values in self.numbers().items():
            flat = pa.array(values.astype(np.float32).ravel())
            # lerobot stores vectors of one number as plain numbers.
            dims = values.shape[1]
            columns[name] = flat if dims == 1 else pa.FixedSizeListArray.from_arrays(flat, dims)
        return pa.table(columns)


def pixel_counts(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, height, width, 3) -> int64 (3, 256): how often each channel has each value."""
    return np.stack([np.bincount(frames[..., c].ravel(), minlength=256) for c in range(3)])


def encode_png(frame: np.ndarray) -> bytes:
    """uint8 (height, width, 3) -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def write(
    folder: Path,
    episodes: Iterable[Episode],
    convention: Convention,
    provenance: dict,
    staging: Path | None = None,
) -> None:
    """Write ``episodes``, in order, as the data set ``folder``, which appears only when it is complete.

    Args:
        provenance: JSON values kept in ``meta/info.json``: where the data came from.
        staging: where it grows until then, on the same file system; replaced if it exists. Default:
            ``<folder>.partial``.

    Raises:
        UserError: ``folder`` exists, there is no episode, or one has other features than the first.
    """
    if folder.exists():
        raise UserError(f"{folder} exists", "a folder that does not exist yet", f"name another, or: rm -r {folder}")
    staging = staging or folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "meta" / "episodes").mkdir(parents=True)
    writer = _Writer(staging, convention)
    try:
        for episode in episodes:
            writer.add(episode)
    finally:
        writer.close()
    writer.write_meta(provenance)
    for path in filter(Path.is_file, staging.rglob("*.*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.rename(folder)


class _Writer:
    """Data files as episodes come; what the metadata needs is gathered on the way."""

    def __init__(self, root: Path, convention: Convention):
        self.root, self.convention = root, convention
        self.fps = int(hz) if (hz := convention.control_hz) == int(hz) else hz
        self.features: dict[str, dict] = {}
        self.tasks: dict[str, int] = {}
        self.rows: list[dict] = []
        self.tables: list[pa.Table] = []
        self.num_frames = self.num_episodes = self.num_files = 0
        self.films: dict[str, tuple[Path, int]] = {}
        self.numbers: dict[str, list[np.ndarray]] = {}
        self.pixels: dict[str, np.ndarray] = {}
        self.parquet: pq.ParquetWriter | None = None
        self.waiting: list[pa.Table] = []

    def add(self, episode: Episode) -> None:
        length, index = len(episode.actions), self.num_episodes
        if (features := self.describe(episode)) != (self.features or features):
            raise UserError(f"episode {index} with {features}", f"{self.features}, as before", "record it again")
        self.features = features
        frames = np.arange(length)
        counters = {
            "timestamp": (frames / self.fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, index),
            "index": self.num_frames + frames,
            "task_index": np.full(length, self.tasks.setdefault(episode.task, len(self.tasks))),
        }
        table = episode.table()
        for name, values in counters.items():
            table = table.append_column(name, pa.array(values))
        chunk_index, file_index = self.append(table)

        numbers = episode.numbers() | {name: values[:, None] for name, values in counters.items()}
        statistics = {name: number_statistics(values) for name, values in numbers.items()}
        statistics |= {IMAGE + name: pixel_statistics(counts, length) for name, counts in episode.pixels.items()}
        row = {
            "episode_index": index,
            "tasks": [episode.task],
            "length": length,
            "data/chunk_index": chunk_index,
            "data/file_index": file_index,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for camera, clip in episode.clips.items():
            place = self.place(camera, clip.file)
            values = (*place, clip.start, clip.start + length / self.fps)
            names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            row |= {f"videos/{IMAGE + camera}/{name}": value for name, value in zip(names, values, strict=True)}
        row |= {f"stats/{feature}/{key}": value for feature, s in statistics.items() for key, value in s.items()}
        self.rows.append(row)
        if len(self.rows) == EPISODE_ROWS:
            self.gather()
        self.num_episodes += 1
        self.num_frames += length
        for name, values in numbers.items():
            self.numbers.setdefault(name, []).append(values)
        for name, counts in episode.pixels.items():
            self.pixels[name] = self.pixels.get(name, 0) + counts

    def gather(self) -> None:
        """Rows of Python objects become a compact table: statistics of 60,000 episodes are a gigabyte of objects."""
        self.tables += [pa.Table.from_pylist(self.rows)] if self.rows else []
        self.rows = []

    def describe(self, episode: Episode) -> dict[str, dict]:
        """lerobot's description of each column."""
        features: dict[str, dict] = {}
        for camera, size in episode.sizes.items():
            picture = {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
            if camera in episode.clips:
                about = {"height": size[0], "width": size[1], "channels": 3, "fps": self.fps, "is_depth_map": False}
                about |= {"codec": "h264", "pix_fmt": "yuv420p"}
                info = {f"video.{key}": value for key, value in about.items()} | {"has_audio": False}
                picture |= {"dtype": "video", "info": info}
            features[IMAGE + camera] = picture
        for name, values in episode.numbers().items():
            dims = values.shape[1]
            names = list(self.convention.names) if name == "action" else [f"state_{d}" for d in range(dims)]
            features[name] = {"dtype": "float32", "shape": [dims], "names": names}
        for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
        return features

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Write or keep back the rows of an episode; returns chunk and file number.

        With PNG pictures a row group is an episode, so that one can be read alone; without, it holds ``ROWS`` rows.
        """
        if self.parquet and self.sink.tell() > DATA_FILE_MB * 2**20:
            self.close()
        if not self.parquet:
            chunk_index, file_index = divmod(self.num_files, CHUNK_FILES)
            path = self.root / DATA_PATH.format(chunk_index=chunk_index, file_index=file_index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.sink = path.open("wb")
            self.schema = table.schema.with_metadata({"huggingface": json.dumps({"info": {"features": self.hints()}})})
            # PNG neither compresses nor repeats: no dictionary.
            self.parquet = pq.ParquetWriter(self.sink, self.schema, compression="snappy", use_dictionary=False)
            self.num_files += 1
        self.waiting.append(table.cast(self.schema))
        pictures = any(feature["dtype"] == "image" for feature in self.features.values())
        if pictures or sum(map(len, self.waiting)) >= ROWS:
            self.flush()
        return divmod(self.num_files - 1, CHUNK_FILES)

    def flush(self) -> None:
        """What is kept back becomes a row group."""
        if self.parquet and self.waiting:
            table = pa.concat_tables(self.waiting)
            self.parquet.write_table(table, row_group_size=len(table))
        self.waiting = []

    def close(self) -> None:
        if self.parquet:
            self.flush()
            self.parquet.close()
            self.sink.close()
            self.parquet = None

    def place(self, camera: str, film: Path) -> tuple[int, int]:
        """Chunk and file number of ``film`` among those of its camera; a new one is linked into the data set."""
        last, number = self.films.get(camera, (None, -1))
        number += last != film
        chunk_index, file_index = divmod(number, CHUNK_FILES)
        if last != film:
            self.films[camera] = film, number
            names = {"video_key": IMAGE + camera, "chunk_index": chunk_index, "file_index": file_index}
            path = self.root / VIDEO_PATH.format(**names)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.hardlink_to(film)
            except OSError:  # another disk, or one without links
                shutil.copyfile(film, path)
        return chunk_index, file_index

    def hints(self) -> dict[str, dict]:
        """Column types as the ``datasets`` library notes them in a schema: by them the Hub's viewer shows pictures."""
        hints: dict[str, dict] = {}
        for name, feature in self.features.items():
            number = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["dtype"] == "video":
                continue
            if feature["dtype"] == "image":
                hints[name] = {"_type": "Image"}
            elif feature["shape"] == [1]:
                hints[name] = number
            else:
                hints[name] = {"feature": number, "length": feature["shape"][0], "_type": "Sequence"}
        return hints

    def write_meta(self, provenance: dict) -> None:
        self.gather()
        if not self.tables:
            raise UserError("no episode to write", "at least one", "check where the episodes come from")
        meta = self.root / "meta"
        numbers = {name: np.concatenate(values) for name, values in self.numbers.items()}
        statistics = {name: number_statistics(values) for name, values in numbers.items()}
        statistics |= {IMAGE + name: pixel_statistics(counts, self.num_frames) for name, counts in self.pixels.items()}
        info = {
            "codebase_version": VERSION,
            "robot_type": None,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.films else None,
            "features": self.features,
            OWN_KEY: {"convention": self.convention.to_dict(), "provenance": provenance},
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (meta / "stats.json").write_text(json.dumps(statistics, indent=4))
        episodes = meta / "episodes" / f"{FILE.format(chunk_index=0, file_index=0)}.parquet"
        episodes.parent.mkdir()
        pq.write_table(pa.concat_tables(self.tables), episodes)
        pq.write_table(tasks_table(list(self.tasks)), meta / "tasks.parquet")


def tasks_table(tasks: list[str]) -> pa.Table:
    """``task_index`` by ``task``, with pandas' metadata: lerobot's reader is pandas and wants ``task`` as the index."""
    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in columns
        ],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def number_statistics(values: np.ndarray) -> dict[str, list]:
    """lerobot's statistics of (T, D) numbers, exact."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0).tolist(),
        "max": values.max(0).tolist(),
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "count": [len(values)],
        **{name: row.tolist() for name, row in zip(QUANTILES, quantiles, strict=True)},
    }


def pixel_statistics(counts: np.ndarray, num_frames: int) -> dict[str, list]:
    """lerobot's statistics of pictures, from histograms (3, 256): shape (3, 1, 1), levels scaled to [0, 1]."""
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    reached = share.cumsum(1)
    values = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts > 0)[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
        **{name: levels[(reached >= q).argmax(1)] for name, q in QUANTILES.items()},
    }
    return {name: v.reshape(3, 1, 1).tolist() for name, v in values.items()} | {"count": [num_frames]}
