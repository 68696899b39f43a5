"""What is executed of predicted chunks where a protocol asks for more than their first actions.

H horizon, A action dimensions, n steps. The last dimension is the gripper: 1 = open, 0 = closed.
"""

import numpy as np


def blend(chunks: list[tuple[int, np.ndarray]], start: int, num_steps: int, decay: float) -> np.ndarray:
    """Temporal ensembling (ACT, arXiv 2304.13705): the actions (n, A) of steps ``start`` .. ``start + num_steps - 1``,
    each the mean of all predictions for it.

    Args:
        chunks: ``(step at which it was predicted, (H, A) actions)``, oldest first; the last reaches to the end.
        decay: of the weight exp(-decay x rank), the oldest prediction of a step having rank 0.

    The gripper is open where the weighted vote says so, by half or more.
    """
    blended = []
    for step in range(start, start + num_steps):
        votes = np.stack([actions[step - begun] for begun, actions in chunks if step - begun < len(actions)])
        weights = np.exp(-decay * np.arange(len(votes)))
        mean = weights @ votes / weights.sum()
        mean[-1] = mean[-1] >= 0.5
        blended.append(mean)
    return np.array(blended, np.float32)


def delay_opening(actions: np.ndarray, asked: int, after: int) -> tuple[np.ndarray, int]:
    """Open the gripper from the ``after``-th action in a row that asks for it; it is closed until then, closes at once.

    Args:
        actions: (n, A).
        asked: how many in a row asked for it before, since the episode's start.

    Returns:
        The actions (n, A), and how many in a row have asked for it now.
    """
    delayed = actions.copy()
    for action in delayed:
        asked = asked + 1 if action[-1] > 0.5 else 0
        action[-1] = asked >= after
    return delayed, asked
