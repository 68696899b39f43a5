"""The files of LeRobotDataset folders, v3.0 as well as v2.0 and v2.1. N frames, E episodes.

v3.0, many episodes in a file:

    meta/info.json                            version, fps, features; our convention and provenance under ``vlm4vla``
    meta/stats.json                           statistics per feature
    meta/tasks.parquet                        task_index by task (the instruction)
    meta/episodes/chunk-000/file-000.parquet  per episode: tasks, length, where its rows and films are, statistics
    data/chunk-000/file-000.parquet           per frame: pictures (dtype ``image``), state, action, counters
    videos/<feature>/chunk-000/file-000.mp4   pictures (dtype ``video``)

v2.0 and v2.1, one file an episode: ``meta/tasks.jsonl``, ``meta/episodes.jsonl``,
``data/chunk-000/episode_000000.parquet`` and ``videos/chunk-000/<feature>/episode_000000.mp4``.

Layout and types are those of huggingface/lerobot.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm4vla.errors import UserError
from vlm4vla.files import stays_inside

VERSION = "v3.0"
OLD_VERSIONS = ("v2.0", "v2.1")
OWN_KEY = "vlm4vla"
"""Our entry in ``meta/info.json`` (lerobot passes over keys that it does not know); what ``data describe`` says of a
foreign folder is in ``meta/vlm4vla.json`` and overrules it."""
IMAGE = "observation.images."
STATE = "observation.state"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"


@dataclass(frozen=True)
class Clips:
    """Where the episodes of one camera lie in MP4 files."""

    files: tuple[Path, ...]
    number: np.ndarray
    """int64 (E,): which of the files."""
    start: np.ndarray
    """float64 (E,): seconds of the episode's first frame within the file."""


@dataclass(frozen=True)
class Episodes:
    """What the metadata says of all episodes; they lie back to back."""

    start: np.ndarray
    """int64 (E,): first frame of each."""
    stop: np.ndarray
    """int64 (E,): one past the last frame of each."""
    clips: dict[str, Clips]
    """By feature, for those of dtype ``video``."""


def damaged(path: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"{path}: {found}", expected, "delete the data set's folder, then record, convert or copy it again"
    )


def require(path: Path, true: bool, found: str, expected: str) -> None:
    if not true:
        raise damaged(path, found, expected)


def parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise damaged(path, "no such file", "a Parquet file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, f"damaged ({error})", "a whole Parquet file") from error


def read(path: Path, columns: list[str], group: int | None = None) -> pa.Table:
    """Columns of one row group, or of the whole file."""
    file = parquet(path)
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, f"damaged ({error})", "a whole Parquet file") from error


def vectors(table: pa.Table, name: str) -> np.ndarray:
    """A column of vectors, or of plain numbers, as float32 (N, D). Raises ``ValueError`` where lengths differ."""
    column = table[name].combine_chunks()
    flat = column.flatten() if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)


def read_info(folder: Path) -> dict[str, Any]:
    """``meta/info.json``, checked."""
    path = folder / "meta" / "info.json"
    partial = folder.with_name(folder.name + ".partial")
    if not folder.exists() and partial.exists():
        raise UserError(f"{partial}, unfinished", f"the data set {folder}", "run the command that makes it again")
    if not path.is_file():
        raise UserError(
            f"no {path}",
            "a LeRobotDataset folder",
            "check the path, or make one: vlm4vla data record --help; vlm4vla data convert --help",
        )
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, f"no JSON ({error})", "lerobot's info.json") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version not in (VERSION, *OLD_VERSIONS):
        raise UserError(
            f"{path} with codebase_version {version!r}",
            f"one of {', '.join((VERSION, *OLD_VERSIONS))}",
            "a newer version of vlm4vla, or one of lerobot that converts the data set",
        )
    features = info.get("features", {})
    missing = [key for key in ("fps", "total_frames", "total_episodes") if key not in info]
    missing += ["features.action"] * ("action" not in features)
    require(path, not missing, f"no {', '.join(missing)}", "all of lerobot's keys")
    fps, chunks = info["fps"], info.get("chunks_size", 1000)
    require(path, isinstance(fps, int | float) and 0 < fps < math.inf, f"fps {fps!r}", "a number above 0")
    require(path, isinstance(chunks, int) and chunks > 0, f"chunks_size {chunks!r}", "a number above 0")
    _check_features(path, features)
    own = info.get(OWN_KEY, {})
    require(path, _is_own(own), f"{OWN_KEY}: {own!r}", "what vlm4vla writes")
    if own := own | description(folder):
        info[OWN_KEY] = own
    unknown = set(own.get("cameras", {}).values()) - set(features)
    require(folder / "meta", not unknown, f"cameras of the features {sorted(unknown)}", f"some of {list(features)}")
    return info


def _check_features(path: Path, features: Any) -> None:
    """Those that are read have a shape: pictures three numbers, action and state one."""
    require(path, isinstance(features, dict), f"features: {features!r}", "descriptions by name")
    for name, each in features.items():
        require(path, isinstance(each, dict), f"features.{name}: {each!r}", "a description")
        picture = each.get("dtype") in ("image", "video")
        if picture or name in ("action", STATE):
            shape, dims = each.get("shape"), 3 if picture else 1
            whole = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
            require(path, whole and len(shape) == dims, f"features.{name} of shape {shape!r}", f"{dims} numbers")


def _is_own(values: Any) -> bool:
    """Whether it has the form of our entry."""
    if not isinstance(values, dict):
        return False
    parts = [values.get(key, {}) for key in ("convention", "cameras", "provenance")]
    return all(isinstance(part, dict) for part in parts) and all(isinstance(name, str) for name in parts[1].values())


def description(folder: Path) -> dict[str, Any]:
    """What ``data describe`` has said of the folder."""
    path = folder / "meta" / f"{OWN_KEY}.json"
    if not path.is_file():
        return {}
    mend = f"rm {path}; describe it again"
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error})", "what data describe wrote", mend) from error
    if not _is_own(values):
        raise UserError(f"{path}: {str(values)[:80]}", "what data describe wrote", mend)
    return values


def read_tasks(folder: Path, info: dict) -> tuple[str, ...]:
    """Instructions by task index."""
    if info["codebase_version"] != VERSION:
        path = folder / "meta" / "tasks.jsonl"
        rows = _json_lines(path, {"task_index", "task"})
        number, tasks = [row["task_index"] for row in rows], [row["task"] for row in rows]
    else:
        path = folder / "meta" / "tasks.parquet"
        table = read(path, parquet(path).schema_arrow.names)
        names = [name for name in table.column_names if name != "task_index"]
        # The task is pandas' index: ``task`` in newer folders, without a name in older ones.
        require(path, "task_index" in table.column_names and len(names) == 1, f"{names}", "task_index by task")
        number, tasks = table["task_index"].to_pylist(), table[names[0]].to_pylist()
    plain = all(isinstance(n, int) for n in number) and all(isinstance(task, str) for task in tasks)
    require(path, plain, "other tasks than texts by number", "texts by number")
    require(path, sorted(number) == list(range(len(number))), f"the task indices {sorted(number)[:9]}", "0, 1, 2, ...")
    return tuple(task for _, task in sorted(zip(number, tasks, strict=True)))


def read_episodes(folder: Path, info: dict) -> Episodes:
    """Boundaries of all episodes, and where their films are."""
    videos = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    if info["codebase_version"] != VERSION:
        return _read_old_episodes(folder, info, videos)
    where = folder / "meta" / "episodes"
    places = {
        name: [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")] for name in videos
    }
    columns = [
        "episode_index",
        "dataset_from_index",
        "dataset_to_index",
        *(key for each in places.values() for key in each),
    ]
    files = sorted(where.glob("*/*.parquet"))
    require(where, bool(files), "no Parquet file", f"{FILE.format(chunk_index=0, file_index=0)}.parquet")
    for path in files:
        names = parquet(path).schema_arrow.names
        require(path, set(columns) <= set(names), f"columns {names}", f"{columns} among them")
    table = pa.concat_tables([read(path, columns) for path in files])
    index, start, stop = (table[name].to_numpy() for name in columns[:3])
    _check_back_to_back(where, index, start, stop)
    clips = {}
    for name in videos:
        chunk, file, seconds = (table[column].to_numpy() for column in places[name])
        both, number = np.unique(np.stack([chunk, file], 1).astype(int), axis=0, return_inverse=True)
        paths = (_film(folder, info, video_key=name, chunk_index=c, file_index=f) for c, f in both.tolist())
        clips[name] = Clips(tuple(paths), number.ravel(), seconds.astype(np.float64))
    return Episodes(start, stop, clips)


def _film(folder: Path, info: dict, **place: Any) -> Path:
    """Where a film is, by ``video_path``; it must be below ``folder``."""
    template, where = info.get("video_path") or VIDEO_PATH, folder / "meta" / "info.json"
    try:
        name = template.format(**place)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged(where, f"video_path {template!r}", f"a path of {', '.join(place)}") from error
    require(where, stays_inside(name), f"the film {name}", "a path below the data set's folder")
    return folder / name


def _read_old_episodes(folder: Path, info: dict, videos: list[str]) -> Episodes:
    path = folder / "meta" / "episodes.jsonl"
    rows = _json_lines(path, {"episode_index", "length"})
    require(path, all(isinstance(row["length"], int) for row in rows), "a length that is no number", "numbers")
    stop = np.cumsum([row["length"] for row in rows], dtype=np.int64)
    start = np.r_[0, stop[:-1]]
    _check_back_to_back(path, np.array([row["episode_index"] for row in rows]), start, stop)
    clips = {}
    for name in videos:
        chunk = info.get("chunks_size", 1000)
        paths = (
            _film(folder, info, video_key=name, episode_chunk=i // chunk, episode_index=i) for i in range(len(rows))
        )
        clips[name] = Clips(tuple(paths), np.arange(len(rows)), np.zeros(len(rows)))
    return Episodes(start, stop, clips)


def _check_back_to_back(where: Path, index: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
    require(where, len(index) > 0, "no episode", "at least one")
    whole = np.array_equal(index, np.arange(len(index))) and np.array_equal(start, np.r_[0, stop[:-1]])
    require(where, whole, "gaps or overlaps between episodes", "episodes back to back")
    empty = np.flatnonzero(stop <= start)
    require(where, not len(empty), f"the empty episode {empty[:1]}", "at least one frame an episode")


def _json_lines(path: Path, keys: set[str]) -> list[dict]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise damaged(path, "no such file", "a line of JSON each") from error
    except ValueError as error:
        raise damaged(path, f"no JSON ({error})", "a line of JSON each") from error
    require(path, all(isinstance(r, dict) and keys <= r.keys() for r in rows), "other keys", f"{sorted(keys)} each")
    return rows
