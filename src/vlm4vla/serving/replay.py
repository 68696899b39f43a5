"""Policies made of a data set: its recorded actions again, and actions drawn from its range.

A recording replayed in the episodes that it was made in succeeds where actions, conventions and simulator are right:
the cheapest proof of all three (record it with ``data.noise=0``: noise is executed, not recorded). Drawn actions are
the floor that a success rate is to be compared with.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.data.lerobot import OWN_KEY, Dataset
from vlm4vla.data.record import SEEDS_PER_RECORDING
from vlm4vla.errors import UserError
from vlm4vla.serving.sources import Source
from vlm4vla.types import ActionChunk, Observation

CHUNK = 16
"""H of both: as many as any protocol executes of one chunk."""


class Replay:
    """Recorded actions by episode and step; after a recording's end the arm stays where it is.

    Attempt ``i`` of a recording of ours with ``data.seed=0`` is episode ``i`` of its ``.../id/v1`` protocol. Another
    data set's episode ``i`` is taken for the protocol's; the instruction must be the same.
    """

    def __init__(self, dataset: Dataset):
        self._dataset, self.convention = dataset, dataset.convention
        failed = dataset.info.get(OWN_KEY, {}).get("provenance", {}).get("failed_seeds", [])
        failed = {seed % SEEDS_PER_RECORDING for seed in failed}
        attempts = (i for i in range(dataset.num_episodes + len(failed)) if i not in failed)
        self._episode = dict(zip(attempts, range(dataset.num_episodes), strict=True))

    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Raises ``UserError`` where nothing was recorded of an episode, or under another instruction."""
        return [ActionChunk(self._actions(observation), self.convention) for observation in observations]

    def _actions(self, observation: Observation) -> np.ndarray:
        data, episode = self._dataset, self._episode.get(observation.episode)
        if episode is None:
            raise UserError(
                f"episode {observation.episode}, of which {data.folder} holds no recording",
                f"one of the {len(self._episode)} recorded ones",
                f"evaluate fewer: --episodes {len(self._episode)}",
            )
        start, end = int(data.episode_from[episode]), int(data.episode_to[episode])
        (recorded,) = data.instructions(np.array([start]))
        if recorded != observation.instruction:
            raise UserError(
                f"the instruction {observation.instruction!r} in episode {observation.episode}",
                f"{recorded!r}, as recorded",
                "evaluate under the protocol that was recorded (grinningface/.../id/v1 has a recording's episodes)",
            )
        still = np.zeros((CHUNK, data.actions.shape[1]), np.float32)
        still[:, -1] = data.actions[end - 1, -1]
        return np.concatenate([data.actions[start + observation.step : end], still])[:CHUNK]


class Random:
    """Evenly drawn between the recorded extremes of each dimension; the gripper opens or closes at each step. What is
    drawn depends on the episode's number and the step alone."""

    def __init__(self, actions: np.ndarray, convention: Convention):
        self._low, self._high, self.convention = actions.min(0), actions.max(0), convention

    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [ActionChunk(self._draw(each), self.convention) for each in observations]

    def _draw(self, observation: Observation) -> np.ndarray:
        rng = np.random.default_rng([observation.episode, observation.step])
        actions = rng.uniform(self._low, self._high, (CHUNK, len(self._low))).astype(np.float32)
        actions[:, -1] = rng.integers(0, 2, CHUNK)
        return actions


def replay(folder: Path) -> Source:
    """``replay:FOLDER``. Raises ``UserError`` as ``Dataset.open``."""
    dataset = Dataset.open(folder)
    return Source(Replay(dataset), f"replay-{dataset.content_hash[:10]}", CHUNK, dataset.image_size)


def random(folder: Path) -> Source:
    """``random:FOLDER``. Raises ``UserError`` as ``Dataset.open``."""
    dataset = Dataset.open(folder)
    policy = Random(dataset.actions[np.isfinite(dataset.actions).all(1)], dataset.convention)
    return Source(policy, f"random-{dataset.content_hash[:10]}", CHUNK, dataset.image_size)
