"""Image augmentation on the CPU scale; the paper's full set comes with the data issue."""

import numpy as np


def jitter_and_shift(
    images: np.ndarray, rng: np.random.Generator, jitter: float, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, colour cast and a small shift, drawn per picture.

    Args:
        images: uint8 (B, S, S, 3).
        jitter: brightness factor within 1 +- jitter, channel offset within +- jitter of the range.
        shift: at most so many pixels each way; edges repeat (random shift as DrQ and VLM4VLA's CALVIN recipe do).

    Returns:
        uint8 (B, S, S, 3), and the shift in fractions of the picture, float (B, 2) as (du, dv).
    """
    count, size = images.shape[0], images.shape[1]
    factor = rng.uniform(1 - jitter, 1 + jitter, (count, 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-jitter, jitter, (count, 1, 1, 3)).astype(np.float32) * 255
    changed = np.clip(images * factor + offset, 0, 255).astype(np.uint8)
    moved = rng.integers(-shift, shift + 1, (count, 2))
    around = np.arange(size)
    columns = np.clip(around[None] - moved[:, :1], 0, size - 1)
    rows = np.clip(around[None] - moved[:, 1:], 0, size - 1)
    result = changed[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return result, moved / size
