"""Temporal ensembling (ACT, arXiv 2304.13705). H horizon, A action dimensions, n steps."""

import numpy as np


def blend(chunks: list[tuple[int, np.ndarray]], start: int, num_steps: int, decay: float) -> np.ndarray:
    """The actions (n, A) of steps ``start`` .. ``start + num_steps - 1`` as the mean of all predictions for each.

    Args:
        chunks: ``(step at which it was predicted, (H, A) actions)``, oldest first; the last reaches to the end.
        decay: of the weight exp(-decay x rank), the oldest prediction of a step having rank 0.

    The gripper (last dimension, 1 = open, 0 = closed) is open where the weighted vote says so, by half or more.
    """
    blended = []
    for step in range(start, start + num_steps):
        votes = np.stack([actions[step - begun] for begun, actions in chunks if step - begun < len(actions)])
        weights = np.exp(-decay * np.arange(len(votes)))
        mean = weights @ votes / weights.sum()
        mean[-1] = mean[-1] >= 0.5
        blended.append(mean)
    return np.array(blended, np.float32)
