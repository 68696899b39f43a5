"""Raw data -> LeRobotDataset v3.0: streaming, parallel, resumable, atomic. T frames, A action, S state.

A source is cut into shards. Each is converted by one process into a folder of its own under ``<out>.partial/shards``,
which appears when it is whole; the shards in their order then become the data set, whose films are links to theirs. So
neither the number of processes nor interruptions change a byte of it, and memory holds one demonstration a process.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlm4vla import __version__
from vlm4vla.convention import Convention
from vlm4vla.data.layout import STATE, vectors
from vlm4vla.data.resumable import begin, finished, once, processes
from vlm4vla.data.write import Clip, Episode, write
from vlm4vla.errors import UserError
from vlm4vla.sims.film import Film


@dataclass(frozen=True)
class Demonstration:
    """One episode of T frames as a source reads it."""

    name: str
    """Where it came from, for messages."""
    images: dict[str, np.ndarray]
    """uint8 (T, height, width, 3) by camera."""
    actions: np.ndarray
    """(T, A) in the source's convention."""
    states: np.ndarray | None
    """(T, S)"""
    task: str


@dataclass(frozen=True)
class Left:
    """Something that a source leaves out on purpose; the summary counts it."""

    what: str
    count: int


class Source(Protocol):
    """Raw data of one kind; picklable."""

    convention: Convention

    def identity(self) -> dict[str, Any]:
        """JSON values that say what is converted and how: an interrupted conversion goes on only with the same."""
        ...

    def shards(self) -> Sequence[Any]:
        """Pieces of similar size, in order; each picklable and with a ``str`` that names it."""
        ...

    def demonstrations(self, shard: Any) -> Iterator[Demonstration | Left | UserError]:
        """What the shard holds, in order; a ``UserError`` stands for a demonstration that cannot be read."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a conversion came to."""

    folder: Path
    episodes: int
    frames: int
    left_out: dict[str, int] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    """Demonstrations that could not be read and were dropped, as was asked for."""

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.episodes} episodes, {self.frames} frames"]
        lines += [f"left out: {count} {what}" for what, count in self.left_out.items()]
        lines += [f"damaged and dropped: {message}" for message in self.damaged]
        return "\n".join(lines)


def convert(source: Source, out: Path, workers: int, progress: bool, drop_damaged: bool = False) -> Summary:
    """Convert ``source`` into the data set ``out``; finishes what an interrupted conversion began, and does nothing
    where the same one is complete.

    Args:
        drop_damaged: leave demonstrations out that cannot be read, and say which; else the first one stops. A shard
            without damage is the same either way, so an interrupted conversion may go on with it.

    Raises:
        UserError: ``out`` holds something else, raw data are damaged, or a process died.
    """
    identity = json.loads(json.dumps({**source.identity(), "version": __version__}))
    partial = out.with_name(out.name + ".partial")

    def make() -> None:
        begin(partial, "conversion", identity)
        shards = partial / "shards"
        shards.mkdir(exist_ok=True)
        number = _make_shards(source, shards, workers, progress, drop_damaged)
        made = [_Shard.read(shards / _name(i)) for i in range(number)]
        left: Counter[str] = sum((Counter(shard.left_out) for shard in made), Counter())
        damaged = [message for shard in made for message in shard.damaged]
        _check_damaged(shards, damaged, drop_damaged)
        provenance = {"conversion": identity, "left_out": dict(left), "damaged": damaged}
        episodes = (episode for shard in made for episode in shard.episodes())
        write(out, episodes, source.convention, provenance, staging=partial / "dataset")

    return once(out, partial, "conversion", make, lambda: _summary(out, identity, drop_damaged))


def _make_shards(source: Source, folder: Path, workers: int, progress: bool, drop_damaged: bool) -> int:
    """Make the shards that are missing; returns how many there are."""
    shards = source.shards()
    for old in folder.glob(".*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(old)
    missing = [i for i in range(len(shards)) if not (folder / _name(i)).is_dir()]
    done = len(shards) - len(missing)
    bar = tqdm(total=len(shards), initial=done, unit="shard", desc="converting", disable=not progress)
    with bar, processes(workers, "conversion") as pool:
        futures = [pool.submit(_make_shard, source, shards[i], folder / _name(i), drop_damaged) for i in missing]
        frames = 0
        for future in as_completed(futures):
            frames += future.result()
            bar.set_postfix(frames=frames, refresh=False)
            bar.update()
    return len(shards)


def _make_shard(source: Source, shard: Any, folder: Path, drop_damaged: bool) -> int:
    """Convert one shard (in a process of its own); returns its frames."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir()
    episodes: list[Episode] = []
    left: Counter[str] = Counter()
    damaged: list[str] = []
    with ExitStack() as stack:
        films: dict[str, Film] = {}
        first: dict[str, Any] = {}
        for item in source.demonstrations(shard):
            if isinstance(item, Left):
                left[item.what] += item.count
                continue
            error = item if isinstance(item, UserError) else _wrong(item, source.convention)
            if error is None and isinstance(item, Demonstration):
                sizes = {camera: frames.shape[1:3] for camera, frames in item.images.items()}
                found = {**sizes, "state": () if item.states is None else item.states.shape[1:]}
                first = first or found
                films = films or {
                    camera: stack.enter_context(Film(partial / f"{camera}.mp4", source.convention.control_hz, size))
                    for camera, size in sizes.items()
                }
                if found != first:
                    error = _error(item, f"sizes of {found}", f"{first}, as in those before")
                else:
                    states = None if item.states is None else item.states.astype(np.float32)
                    actions = item.actions.astype(np.float32)
                    episodes.append(Episode.encode(item.images, actions, states, item.task, films))
            if error is not None and not drop_damaged:
                raise UserError(error.found, error.expected, f"{error.next_step}; or leave it out: --drop-damaged")
            if error is not None:
                damaged.append(error.found)
    _Shard(partial, dict(left), tuple(damaged)).write(episodes)
    partial.rename(folder)
    return sum(len(episode.actions) for episode in episodes)


@dataclass(frozen=True)
class _Shard:
    """A converted shard: ``shard.json``, ``numbers.parquet``, ``pixels.npy``, and an MP4 for each camera."""

    folder: Path
    left_out: dict[str, int]
    damaged: tuple[str, ...]

    def write(self, episodes: list[Episode]) -> None:
        rows = [
            {
                "length": len(e.actions),
                "task": e.task,
                "starts": {c: clip.start for c, clip in e.clips.items()},
                "sizes": e.sizes,
            }
            for e in episodes
        ]
        if episodes:
            pq.write_table(pa.concat_tables([episode.table() for episode in episodes]), self.folder / "numbers.parquet")
            np.save(self.folder / "pixels.npy", np.stack([np.stack([*e.pixels.values()]) for e in episodes]))
        values = {"episodes": rows, "left_out": self.left_out, "damaged": self.damaged}
        (self.folder / "shard.json").write_text(json.dumps(values))
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "_Shard":
        values = json.loads((folder / "shard.json").read_text())
        return cls(folder, values["left_out"], tuple(values["damaged"]))

    def episodes(self) -> Iterator[Episode]:
        rows = json.loads((self.folder / "shard.json").read_text())["episodes"]
        if not rows:
            return
        table, pixels = pq.read_table(self.folder / "numbers.parquet"), np.load(self.folder / "pixels.npy")
        actions, states = vectors(table, "action"), vectors(table, STATE) if STATE in table.column_names else None
        start = 0
        for row, counts in zip(rows, pixels, strict=True):
            stop = start + row["length"]
            clips = {camera: Clip(self.folder / f"{camera}.mp4", at) for camera, at in row["starts"].items()}
            sizes = {camera: (height, width) for camera, (height, width) in row["sizes"].items()}
            state = None if states is None else states[start:stop]
            yield Episode(
                {}, clips, dict(zip(clips, counts, strict=True)), sizes, actions[start:stop], state, row["task"]
            )
            start = stop


def _wrong(item: Demonstration, convention: Convention) -> UserError | None:
    """What is wrong with a demonstration."""
    for camera, frames in item.images.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"pictures of {camera} as {frames.dtype} {frames.shape}"
            return _error(item, found, "uint8 (frames, height, width, 3)")
    for what, values in (("actions", item.actions), ("states", item.states)):
        if values is not None and (values.dtype.kind not in "biuf" or values.ndim != 2):
            return _error(item, f"{what} as {values.dtype} {values.shape}", "a row of numbers for each frame")
    lengths = {len(item.actions), *map(len, item.images.values())} | (
        {len(item.states)} if item.states is not None else set()
    )
    if len(lengths) != 1 or not len(item.actions):
        return _error(item, f"{sorted(lengths)} frames, by feature", "the same number, at least one")
    if item.actions.shape[1:] != (len(convention.names),):
        return _error(
            item, f"actions of {item.actions.shape[1:]}", f"{len(convention.names)} numbers: {convention.names}"
        )
    for frames in item.images.values():
        if frames.shape[1] % 2 or frames.shape[2] % 2 or not frames.size:
            return _error(item, f"pictures of {frames.shape[1]} x {frames.shape[2]}", "even sides, as films have them")
    for what, values in (("actions", item.actions), ("states", item.states)):
        if values is not None and not (finite := np.isfinite(values)).all():
            return _error(item, f"{what} with {(~finite).sum()} NaN or infinite numbers", "finite numbers")
    if not np.isin(item.actions[:, -1], (0, 1)).all():
        return _error(item, f"the gripper values {np.unique(item.actions[:, -1])[:9]}", "0 and 1 after conversion")
    if not item.task.strip():
        return _error(item, "no instruction", "one")
    return None


def _error(item: Demonstration, found: str, expected: str) -> UserError:
    return UserError(f"{item.name}: {found}", expected, "mend or remove it in the raw data")


def _name(number: int) -> str:
    return f"{number:06d}"


def _check_damaged(folder: Path, damaged: Sequence[str], drop_damaged: bool) -> None:
    if damaged and not drop_damaged:
        raise UserError(
            f"{folder}, which {len(damaged)} damaged demonstrations were left out of, such as {damaged[0]}",
            "all demonstrations",
            f"add --drop-damaged; or mend the raw data and: rm -r {folder}",
        )


def _summary(folder: Path, identity: dict, drop_damaged: bool) -> Summary:
    dataset, provenance = finished(folder, "conversion", identity)
    left, damaged = provenance["left_out"], tuple(provenance["damaged"])
    _check_damaged(folder, damaged, drop_damaged)
    return Summary(folder, dataset.num_episodes, dataset.num_frames, left, damaged)
