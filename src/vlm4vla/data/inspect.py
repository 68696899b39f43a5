"""What ``vlm4vla data inspect`` tells: contents, statistics, and what looks suspicious. T frames, D numbers."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm4vla.data.layout import OWN_KEY
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError

EPISODES_LOOKED_AT = 20
"""Their first, middle and last pictures are decoded; numbers are checked in all frames of all episodes."""
FROZEN = 0.5
"""Mean absolute difference, in levels of 255, below which pictures of one episode are the same."""
DARK = 8
"""A picture without any level above this is black."""
SATURATED, AT_LEAST = 0.05, 3
"""Share and number of frames at exactly the smallest or largest value from which an action looks clipped."""
STATISTICS_OFF = 0.05
"""Standard deviations that ``meta/stats.json`` may be beside the data's mean."""


@dataclass(frozen=True)
class Finding:
    """Something suspicious."""

    text: str
    blocks: bool = False
    """Training on it cannot go well, or will be refused."""
    mend: str = ""
    """The next command, or what to do."""


@dataclass(frozen=True)
class Report:
    lines: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def next_step(self) -> str | None:
        """What mends the first blocking finding; None where training can begin."""
        return next((finding.mend for finding in self.findings if finding.blocks), None)

    def __str__(self) -> str:
        marks = {True: "problem", False: "note"}
        return "\n".join([*self.lines, *(f"{marks[finding.blocks]}: {finding.text}" for finding in self.findings)])


def inspect(source: Path | str) -> Report:
    """Look at all numbers and some pictures of a data set.

    Raises:
        UserError: as ``Dataset.open``.
    """
    dataset = Dataset.open(source)
    findings = [
        *_meaning(dataset, source),
        *_numbers(dataset, "action", dataset.actions, names(dataset), source),
        *_gripper(dataset),
        *_pictures(dataset),
        *_duplicates(dataset),
        *_statistics(dataset),
    ]
    if dataset.recorded_states is not None:
        labels = [f"state {d}" for d in range(dataset.states.shape[1])]
        findings += _numbers(dataset, "state", dataset.states, labels, source)
    return Report((*_contents(dataset), "", *_table(dataset.actions, names(dataset))), tuple(findings))


def names(dataset: Dataset) -> list[str]:
    """The names of the action's dimensions."""
    given = dataset.info["features"]["action"].get("names")
    if isinstance(given, list) and len(given) == dataset.actions.shape[1]:
        return given
    return [f"action_{d}" for d in range(dataset.actions.shape[1])]


def _contents(dataset: Dataset) -> list[str]:
    lengths, own = dataset.episode_to - dataset.episode_from, dataset.info.get(OWN_KEY, {})
    films = {path for clips in dataset.clips.values() for path in clips.files if path.exists()}
    size = sum(path.stat().st_size for path in (*dataset.files, *films)) / 1e6
    convention = own.get("convention", {"none": "training will refuse this folder"})
    state = "none" if dataset.recorded_states is None else f"{dataset.states.shape[1]} numbers"
    return [
        f"{dataset.folder}: LeRobotDataset {dataset.info['codebase_version']}, {size:.1f} MB",
        f"episodes    {dataset.num_episodes}",
        f"frames      {dataset.num_frames} ({lengths.min()} to {lengths.max()} an episode, mean {lengths.mean():.1f})",
        f"fps         {dataset.fps:g}",
        "cameras     " + (", ".join(f"{name} {h}x{w}" for name, (h, w) in dataset.cameras.items()) or "none"),
        f"action      {dataset.actions.shape[1]} numbers; state: {state}",
        f"tasks       {len(dataset.tasks)}, e.g. {dataset.tasks[0]!r}",
        *(f"convention  {key}: {value}" for key, value in convention.items()),
        *(f"provenance  {key}: {json.dumps(value)}" for key, value in own.get("provenance", {}).items()),
    ]


def _table(actions: np.ndarray, labels: list[str]) -> list[str]:
    """Statistics of the finite actions."""
    lines = [f"{'dimension':12}{'mean':>10}{'std':>10}{'min':>10}{'q01':>10}{'q99':>10}{'max':>10}  at min / max"]
    actions = actions[np.isfinite(actions).all(1)]
    for name, column in zip(labels, actions.T, strict=True):
        if not len(column):
            break
        low, high = column.min(), column.max()
        q01, q99 = np.quantile(column.astype(np.float64), [0.01, 0.99])
        numbers = (column.mean(dtype=np.float64), column.std(dtype=np.float64), low, q01, q99, high)
        at = f"{(column == low).mean():6.1%} /{(column == high).mean():6.1%}"
        lines.append(f"{name:12}" + "".join(f"{number:10.4f}" for number in numbers) + "  " + at)
    return lines


def _meaning(dataset: Dataset, source: Path | str) -> Iterator[Finding]:
    if "convention" not in dataset.info.get(OWN_KEY, {}):
        yield Finding(
            "the folder does not say what its actions mean",
            True,
            f"vlm4vla data describe {source} --convention NAME",
        )
    if "main" not in dataset.cameras:
        camera = next(iter(dataset.features.values()), "FEATURE")
        mend = f"vlm4vla data describe {source} --camera main={camera}"
        yield Finding("no camera is named main, which policies see", True, mend)
    if blank := [i for i, task in enumerate(dataset.tasks) if not task.strip()]:
        count = int(np.isin(dataset.task_index, blank).sum())
        yield Finding(f"{count} frames have an empty instruction")


def _numbers(
    dataset: Dataset, what: str, values: np.ndarray, labels: list[str], source: Path | str
) -> Iterator[Finding]:
    finite = np.isfinite(values).all(1)
    if not finite.all():
        episodes = np.unique(np.searchsorted(dataset.episode_to, np.flatnonzero(~finite), side="right"))
        yield Finding(
            f"{int((~finite).sum())} frames have NaN or infinite numbers in the {what}, in the episodes "
            f"{episodes[:5].tolist()}{' ...' if len(episodes) > 5 else ''} (left out above)",
            True,
            f"vlm4vla data view {source} --episode {episodes[0]}; then convert or record it again without that episode",
        )
    known = values[finite]
    for d, (name, column) in enumerate(zip(labels, known.T, strict=True)):
        if not len(column):
            return
        low, high = column.min(), column.max()
        if low == high:
            yield Finding(f"{name} is constant ({low:g})" + ("; policies will predict that" * (what == "action")))
        elif what == "action" and d < len(labels) - 1:
            count = max((column == low).sum(), (column == high).sum())
            share = count / len(column)
            # A number that is both an end of the range and the resting value, 0 for most, is no limit.
            if count >= AT_LEAST and share > SATURATED and 0 not in (low, high):
                yield Finding(f"{name} is at {low:g} or {high:g} in up to {share:.0%} of all frames: was it clipped?")


def _gripper(dataset: Dataset) -> Iterator[Finding]:
    gripper = dataset.actions[:, -1]
    strange = gripper[~np.isin(gripper, (0, 1)) & np.isfinite(gripper)]
    if len(strange):
        found = f"{len(strange)} frames have other gripper actions than 0 and 1, such as {strange[0]:g}"
        yield Finding(found, True, "convert the data set again with its gripper as 0 (closed) and 1 (open)")


def _pictures(dataset: Dataset) -> Iterator[Finding]:
    count = min(EPISODES_LOOKED_AT, dataset.num_episodes)
    looked_at = np.unique(np.linspace(0, dataset.num_episodes - 1, count).astype(int))
    for camera in dataset.cameras:
        frozen, dark = [], []
        for episode in looked_at.tolist():
            first, last = int(dataset.episode_from[episode]), int(dataset.episode_to[episode]) - 1
            try:
                three = dataset.images(np.array([first, (first + last) // 2, last]), camera).astype(int)
            except UserError as error:
                yield Finding(f"episode {episode}, camera {camera}: {error.found}", True, error.next_step)
                continue
            if last - first >= 2 and np.abs(three - three[:1]).mean((1, 2, 3)).max() < FROZEN:
                frozen.append(episode)
            if three.max() <= DARK:
                dark.append(episode)
        of = f"of {len(looked_at)} episodes looked at"
        if frozen:
            yield Finding(f"the camera {camera} shows the same picture all along in {len(frozen)} {of}: {frozen[:5]}")
        if dark:
            yield Finding(f"the camera {camera} is black in {len(dark)} {of}: {dark[:5]}")


def _duplicates(dataset: Dataset) -> Iterator[Finding]:
    """Episodes with the same numbers: recorded actions never repeat to the last bit."""
    seen: dict[bytes, list[int]] = defaultdict(list)
    for episode, (start, stop) in enumerate(zip(dataset.episode_from, dataset.episode_to, strict=True)):
        digest = hashlib.sha256(dataset.actions[start:stop].tobytes())
        if dataset.recorded_states is not None:
            digest.update(dataset.recorded_states[start:stop].tobytes())
        seen[digest.digest()].append(episode)
    if again := [episodes for episodes in seen.values() if len(episodes) > 1]:
        count = sum(len(episodes) - 1 for episodes in again)
        yield Finding(f"{count} episodes repeat another one to the last bit, e.g. {again[0][:4]}")


def _statistics(dataset: Dataset) -> Iterator[Finding]:
    """``meta/stats.json`` is for lerobot; training computes its own."""
    path = dataset.folder / "meta" / "stats.json"
    try:
        told = np.array(json.loads(path.read_text())["action"]["mean"], float)
        true, std = dataset.actions.mean(0, dtype=np.float64), dataset.actions.std(0, dtype=np.float64)
        off = np.abs(told - true) > STATISTICS_OFF * std + 1e-6
    except (OSError, ValueError, KeyError, TypeError):
        return
    if off.any():
        yield Finding(f"{path} has other means than the actions (not used here; lerobot would)")
