"""Action chunks out of recorded episodes. N frames, B batch, H horizon, A action."""

from typing import Protocol

import numpy as np


class Episodes(Protocol):
    """What windows are cut from; ``lerobot.Dataset`` is one."""

    @property
    def actions(self) -> np.ndarray:
        """(N, A)"""
        ...

    @property
    def episode_to(self) -> np.ndarray:
        """int64 (num_episodes,), increasing: one past the last frame of each episode; episodes lie back to back."""
        ...


def windows(episodes: Episodes, indices: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of ``horizon`` actions that start at the frames ``indices`` (B,).

    Returns:
        actions (B, H, A) and validity (B, H), bool. Past the end of its episode a chunk is invalid and repeats the
        episode's last action, so that no number of another episode can leak into a loss whose mask is forgotten.

    Raises:
        IndexError: an index outside [0, N).
    """
    num_frames = len(episodes.actions)
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_frames:
        raise IndexError(f"frame indices in [{indices.min()}, {indices.max()}] of {num_frames} frames")
    end = episodes.episode_to[np.searchsorted(episodes.episode_to, indices, side="right")]  # (B,)
    steps = np.asarray(indices)[:, None] + np.arange(horizon)  # (B, H)
    valid = steps < end[:, None]
    return episodes.actions[np.minimum(steps, end[:, None] - 1)], valid
