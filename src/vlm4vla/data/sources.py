"""All that a policy is trained on, as one: its demonstrations, and what ``DataSpec.mixture`` puts beside them.

K sources, robot sets before conversations; N frames of all robot sets, back to back. Samples are numbered through: one
below N is a frame, one from N on is a record of a conversation file.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np

from vlm4vla import spec
from vlm4vla.convention import check_same
from vlm4vla.data.cache import pictures
from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.vqa import Conversations
from vlm4vla.errors import UserError
from vlm4vla.pictures import resized
from vlm4vla.types import Turns

DECODERS = 4
"""Threads that read the pictures of a batch's conversations."""

NOT_IN_NAMES = r"[^A-Za-z0-9_.-]+"
"""Metrics are named by sources (``loss/NAME``), and MLflow refuses other characters. A name is no part of a run's
identity."""


@dataclass(frozen=True)
class Sources:
    """Opened sources. Of a robot set alone, everything is as the set itself has it."""

    sets: tuple[Dataset, ...]
    """The demonstrations first."""
    conversations: tuple[Conversations, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    """(K,) in any unit: how often each is drawn."""
    names: tuple[str, ...] = ("demonstrations",)
    """(K,), no two alike."""

    @classmethod
    def open(cls, data: spec.DataSpec, folder: Path | str) -> "Sources":
        """The demonstrations in ``folder``, and ``data.mixture`` beside them; no record of a conversation is read yet.

        Raises:
            UserError: a source that cannot be opened, or robot sets whose actions mean different things, or whose
                pictures differ in size without ``data.image_size``.
        """
        robots = [source for source in data.mixture if source.folder]
        talks = [source for source in data.mixture if source.conversations]
        sets = (Dataset.open(folder), *(Dataset.open(str(source.folder)) for source in robots))
        for other in sets[1:]:
            _check_alike(sets[0], other, data.image_size)
        names = ["demonstrations"]
        for source in (*robots, *talks):
            name = Path(os.path.abspath(source.folder)).name if source.folder else Path(str(source.conversations)).stem
            name = re.sub(NOT_IN_NAMES, "-", name)
            free = (f"{name}-{number}" for number in count(2))
            names.append(name if name not in names else next(other for other in free if other not in names))
        return cls(
            sets,
            tuple(Conversations.open(str(source.conversations), source.images) for source in talks),
            (1.0, *(source.weight for source in (*robots, *talks))),
            tuple(names),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source, (K,)."""
        return (*(each.num_frames for each in self.sets), *(len(each) for each in self.conversations))

    @cached_property
    def first(self) -> np.ndarray:
        """int64 (K + 1,): the first sample of each source, and the number of all."""
        return np.cumsum([0, *self.sizes])

    @property
    def num_frames(self) -> int:
        """N"""
        return len(self.actions)

    @property
    def num_episodes(self) -> int:
        return sum(each.num_episodes for each in self.sets)

    @property
    def actions(self) -> np.ndarray:
        """float32 (N, A), native units."""
        return self._windows[0]

    @cached_property
    def states(self) -> np.ndarray:
        """float32 (N, S); ``UserError`` where a set has none, or one of another size."""
        states = [each.states for each in self.sets]
        widths = [each.shape[1] for each in states]
        if len(set(widths)) > 1:
            found = ", ".join(f"{each.folder} with {width}" for each, width in zip(self.sets, widths, strict=True))
            raise UserError(f"states of different sizes: {found} numbers", "one size", "train without proprioception")
        return _joined(states)

    @property
    def episode_to(self) -> np.ndarray:
        """int64 (E,): one past the last frame of each episode."""
        return self._windows[1]

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """What windows are cut from."""
        ends = [each.episode_to + start for each, start in zip(self.sets, self.first, strict=False)]
        return _joined([each.actions for each in self.sets]), _joined(ends)

    def source(self, samples: np.ndarray) -> np.ndarray:
        """The number of each sample's source, int64 (B,)."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def instructions(self, frames: np.ndarray) -> list[str]:
        """Of each frame (B,)."""
        said = np.empty(len(frames), object)
        for k, here, within in self._by_source(frames):
            said[here] = self.sets[k].instructions(within)
        return said.tolist()

    def pictures(self, size: int, cached: bool) -> Callable[[np.ndarray], np.ndarray]:
        """Frames (B,) -> uint8 (B, size, size, 3) of the main camera; ``cached``: see ``cache.pictures``."""
        readers = [pictures(each, size, cached) for each in self.sets]
        if len(readers) == 1:
            return readers[0]

        def read(frames: np.ndarray) -> np.ndarray:
            found = np.empty((len(frames), size, size, 3), np.uint8)
            for k, here, within in self._by_source(frames):
                found[here] = readers[k](within)
            return found

        return read

    def records(self, samples: np.ndarray, size: int) -> tuple[np.ndarray, list[Turns]]:
        """Of samples (B,) from N on: their pictures, uint8 (B, size, size, 3), and what is said about them."""

        def read(place: tuple[int, int]) -> tuple[np.ndarray, Turns]:
            record = self.conversations[place[0] - len(self.sets)][place[1]]
            return resized(record.images[0], size), record.turns

        with ThreadPoolExecutor(DECODERS) as pool:  # pillow decodes and resizes without holding Python's lock
            pictures, turns = zip(*pool.map(read, self._places(samples)), strict=True)
        return np.stack(pictures), list(turns)

    def talks(self, samples: np.ndarray) -> list[Turns]:
        """What is said in samples (B,) from N on, without their pictures."""
        return [self.conversations[k - len(self.sets)].turns(i) for k, i in self._places(samples)]

    @property
    def shares(self) -> list[float]:
        """What each source has of the samples that are drawn, (K,)."""
        return [weight / sum(self.weights) for weight in self.weights]

    @cached_property
    def frame_weights(self) -> np.ndarray | None:
        """float64 (N,): how often each frame is drawn, relative to the others; None where all are drawn alike."""
        if len(self.sets) == 1:
            return None
        counts = [each.num_frames for each in self.sets]
        return np.concatenate([np.full(n, weight / n) for weight, n in zip(self.weights, counts, strict=False)])

    @property
    def hashes(self) -> list[str]:
        """Content hash of each source, (K,)."""
        return [each.content_hash for each in (*self.sets, *self.conversations)]

    @property
    def content_hash(self) -> str:
        """Of what all sources hold and how often each is drawn; of a robot set alone, the set's."""
        if len(self.hashes) == 1:
            return self.hashes[0]
        return spec.content_hash(list(zip(self.hashes, self.shares, strict=True)))

    def described(self) -> list[dict]:
        """What a policy's card says of each source."""
        rows = zip(self.names, self.sizes, self.shares, self.hashes, strict=True)
        return [{"name": name, "samples": size, "share": share, "hash": h} for name, size, share, h in rows]

    def _places(self, samples: np.ndarray) -> zip:
        """Source of each sample, and its number there."""
        source = self.source(samples)
        return zip(source.tolist(), (samples - self.first[source]).tolist(), strict=True)

    def _by_source(self, frames: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each robot set among them: its number, where in ``frames`` its own are, and their numbers there."""
        source = self.source(frames)
        return [(int(k), source == k, frames[source == k] - self.first[k]) for k in np.unique(source)]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_alike(first: Dataset, other: Dataset, size: int | None) -> None:
    mend = "convert one of them to the other's convention, or leave it out of data.mixture"
    check_same(first.convention, str(first.folder), other.convention, str(other.folder), mend)
    sizes = [each.camera_size("main") for each in (first, other)]
    if size is None and sizes[0] != sizes[1]:
        raise UserError(
            f"{first.folder} with pictures of {sizes[0]}, {other.folder} of {sizes[1]}",
            "one size, or a size to bring them to",
            "add --set data.image_size=224",
        )
