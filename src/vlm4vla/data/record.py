"""Records a simulator's scripted expert into a LeRobotDataset v3.0 folder: parallel, resumable, the same to the bit.

Attempt ``i`` of a recording has seed ``DEMO_SEED + data.seed * 1_000_000 + i`` and depends on nothing else. The data
set is the shortest run of attempts 0, 1, 2, ... with ``data.episodes`` successes, failures left out; so neither the
number of processes nor interruptions change a byte. Each finished attempt is a file of ``<folder>.partial/episodes``.
"""

import json
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vlm4vla import __version__, sims
from vlm4vla.convention import Convention
from vlm4vla.data.layout import IMAGE, OWN_KEY, STATE, vectors
from vlm4vla.data.resumable import begin, finished, once, processes
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError
from vlm4vla.files import replacing
from vlm4vla.sims import protocols
from vlm4vla.sims.base import Sim
from vlm4vla.sims.protocols import DEMO_SEED, Protocol
from vlm4vla.spec import DataSpec

SEEDS_PER_RECORDING = 1_000_000
DISTURBED = 0.4
"""Share of steps whose executed action is disturbed, so that demonstrations show how to come back (a form of DART,
arXiv 1703.09327). The recorded label stays the expert's."""
DISTURBANCE = np.array([1.0, 1.0, 0.6])
"""Standard deviation of the disturbance in x, y, z, in units of ``data.noise``: less in height, above a table."""
NOISE_STREAM = 1
"""Separates the disturbance's random numbers from those with which the simulator lays out the episode."""
MIN_FAILURES = 20
"""A recording stops when more attempts than this, and than ``data.episodes``, have failed."""


@dataclass(frozen=True)
class Summary:
    """What a recording came to."""

    folder: Path
    episodes: int
    frames: int
    failed_seeds: tuple[int, ...]
    """Attempts in which the expert did not succeed; they are not in the data set."""

    def __str__(self) -> str:
        failed = len(self.failed_seeds)
        attempts = f"the expert failed {failed} of {self.episodes + failed} attempts"
        return f"{self.folder}: {self.episodes} episodes, {self.frames} frames; {attempts}"


def record(data: DataSpec, folder: Path, workers: int, progress: bool) -> Summary:
    """Record ``data`` into ``folder`` with ``workers`` processes, one simulator each; finishes what an interrupted
    recording began, and does nothing where the same recording is complete.

    Raises:
        UserError: ``folder`` holds something else or is being recorded by another process, the simulator has no
            expert, the expert fails more often than it succeeds, or a recording process died.
    """
    identity = recording(data)
    proto = protocols.protocol(str(data.protocol))
    partial = folder.with_name(folder.name + ".partial")

    def make() -> None:
        begin(partial, "recording", identity)
        shards = partial / "episodes"
        shards.mkdir(exist_ok=True)
        done = _attempt(proto, data, shards, workers, progress)
        succeeded = [attempt for attempt in sorted(done) if done[attempt]]
        failed = [_seed(data, attempt) for attempt in sorted(done) if not done[attempt]]
        convention = _load(_shard(shards, succeeded[0], True))[1]
        episodes = (_load(_shard(shards, attempt, True))[0] for attempt in succeeded)
        versions = _versions([_shard(shards, attempt, True) for attempt in succeeded])
        provenance = {"recording": identity, "failed_seeds": failed, "versions": versions}
        write(folder, episodes, convention, provenance, staging=partial / "dataset")

    return once(folder, partial, "recording", make, lambda: _summary(folder, identity))


def recording(data: DataSpec) -> dict:
    """What identifies the recording of ``data``, as its folder's ``meta/info.json`` has it (``vlm4vla.provenance``)."""
    if data.protocol is None:
        raise UserError("data without a protocol", "the protocol whose expert to record", "set data.protocol")
    values = data.model_dump(include={"episodes", "seed", "image_size", "noise"})
    proto = protocols.protocol(data.protocol)
    return json.loads(json.dumps({"protocol": proto.to_dict(), "data": values, "version": __version__}))


def record_episode(sim: Sim, seed: int, noise: float, max_steps: int) -> Episode | None:
    """One demonstration, or None where the expert did not succeed within ``max_steps``.

    Each frame is what the policy would see, with the expert's action from that very state; what is executed is
    sometimes disturbed.
    """
    rng = np.random.default_rng([seed, NOISE_STREAM])
    sim.reset(seed)
    observations, actions = [], []
    for _ in range(max_steps):
        observations.append(sim.observe())
        action = sim.expert()
        actions.append(action)
        executed = action.copy()
        if rng.random() < DISTURBED:
            executed[:3] += rng.normal(size=3) * noise * DISTURBANCE
        outcome = sim.execute(executed[None])
        if outcome.done:
            break
    else:
        return None
    if not outcome.success:
        return None
    first = observations[0]
    images = {camera: np.stack([o.images[camera] for o in observations]) for camera in first.images}
    states = None if first.state is None else np.stack([o.state for o in observations])
    return Episode.encode(images, np.stack(actions), states, first.instruction)


def _attempt(proto: Protocol, data: DataSpec, shards: Path, workers: int, progress: bool) -> dict[int, bool]:
    """Run the missing attempts; returns the success of attempts 0, 1, 2, ... until ``data.episodes`` have succeeded.

    An attempt is started only while those before it cannot suffice, even if all running ones succeed. So none is
    wasted, and which ones are made does not depend on which finish first.
    """
    done = {int(path.stem): path.suffix == ".parquet" for path in shards.glob("[0-9]*.*")}
    attempt, pending = 0, set[Future]()
    bar = tqdm(total=data.episodes, initial=sum(done.values()), unit="episode", disable=not progress, desc="recording")
    with bar, processes(workers, "recording") as pool:
        while sum(done.values()) < data.episodes:
            while len(pending) < 2 * workers and sum(done.values()) + len(pending) < data.episodes:
                if attempt not in done:
                    pending.add(pool.submit(_run, proto, data, attempt, shards))
                attempt += 1
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                number, success = future.result()
                done[number] = success
                bar.set_postfix(failed=len(done) - sum(done.values()), refresh=False)
                bar.update(success)
            failures = len(done) - sum(done.values())
            if failures > max(MIN_FAILURES, data.episodes):
                raise UserError(
                    f"the expert failed {failures} of {len(done)} attempts at {proto.name}",
                    "an expert that succeeds more often than not",
                    "lower data.noise",
                )
    assert sorted(done) == list(range(len(done)))
    return done


_sim: Sim | None = None
"""This recording process's simulator."""


def _run(proto: Protocol, data: DataSpec, attempt: int, shards: Path) -> tuple[int, bool]:
    """Make one attempt and store it (in a recording process)."""
    global _sim
    if _sim is None:
        _sim = sims.make(proto.sim, image_size=data.image_size, **proto.sim_args)
    try:
        episode = record_episode(_sim, _seed(data, attempt), data.noise, proto.max_steps)
    except NotImplementedError as error:
        raise UserError(f"{proto.sim} without a scripted expert", "one", "choose another protocol") from error
    with replacing(_shard(shards, attempt, episode is not None)) as path:
        if episode is None:
            path.touch()
        else:
            _save(path, episode, _sim.convention, sims.versions(_sim))
    return attempt, episode is not None


def _seed(data: DataSpec, attempt: int) -> int:
    if attempt >= SEEDS_PER_RECORDING:
        raise UserError(f"attempt {attempt}", f"at most {SEEDS_PER_RECORDING} a recording", "lower data.episodes")
    return DEMO_SEED + data.seed * SEEDS_PER_RECORDING + attempt


def _shard(shards: Path, attempt: int, success: bool) -> Path:
    return shards / f"{attempt:06d}.{'parquet' if success else 'failed'}"


def _save(path: Path, episode: Episode, convention: Convention, versions: dict[str, str]) -> None:
    rest = {
        "pixels": {camera: counts.tolist() for camera, counts in episode.pixels.items()},
        "sizes": episode.sizes,
        "task": episode.task,
        "convention": convention.to_dict(),
        "versions": versions,
    }
    table = episode.table().replace_schema_metadata({OWN_KEY: json.dumps(rest)})
    pq.write_table(table, path, use_dictionary=False)


def _load(path: Path) -> tuple[Episode, Convention]:
    with _told(path):
        table = pq.read_table(path)
    rest = json.loads(table.schema.metadata[OWN_KEY.encode()])
    images = {camera: table[IMAGE + camera].combine_chunks().field("bytes").to_pylist() for camera in rest["pixels"]}
    pixels = {camera: np.array(counts) for camera, counts in rest["pixels"].items()}
    states = vectors(table, STATE) if STATE in table.column_names else None
    # Attempts of an earlier version name one size for all cameras.
    sizes = {camera: tuple(rest["sizes"][camera] if "sizes" in rest else rest["size"]) for camera in images}
    episode = Episode(images, {}, pixels, sizes, vectors(table, "action"), states, rest["task"])
    return episode, Convention.from_dict(rest["convention"])


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A damaged file is an error that says how to mend it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged ({error})", "a recorded episode", f"rm {path}; run the command again"
        ) from error


def _versions(shards: list[Path]) -> dict[str, list[str]]:
    """What the attempts were made with; an interrupted recording may have gone on with other versions."""
    found: dict[str, set[str]] = {}
    for path in shards:
        with _told(path):
            metadata = pq.read_schema(path).metadata or {}
        # An attempt made before versions were stored names none.
        for name, value in json.loads(metadata[OWN_KEY.encode()]).get("versions", {}).items():
            found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in sorted(found.items())}


def _summary(folder: Path, identity: dict) -> Summary:
    dataset, provenance = finished(folder, "recording", identity)
    return Summary(folder, dataset.num_episodes, dataset.num_frames, tuple(provenance["failed_seeds"]))
