"""All pictures of a data set, decoded once into a memory-mapped array that training indexes. N frames."""

from pathlib import Path

import numpy as np

from vlm4vla.data.lerobot import Dataset
from vlm4vla.data.write import replacing


def frames(dataset: Dataset, camera: str = "main") -> np.memmap:
    """uint8 (N, height, width, 3), read-only. The first call decodes into ``<folder>/.cache``; later ones only open it.

    The file's name holds the content hash, so pictures of changed data are never served; files of earlier contents are
    deleted.

    Raises:
        UserError: no such camera, or a damaged data set.
    """
    shape = (dataset.num_frames, *dataset.camera_size(camera), 3)
    path = dataset.folder / ".cache" / f"{camera}-{dataset.content_hash[:16]}.npy"
    if not _holds(path, shape):
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            start = 0
            for pictures in dataset.batches(camera):
                array[start : start + len(pictures)] = pictures
                start += len(pictures)
            array.flush()
        for old in path.parent.glob(f"{camera}-*.npy"):
            if old != path:
                old.unlink()
    return np.lib.format.open_memmap(path, "r")


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether ``path`` is a whole cache of this shape."""
    try:
        array = np.lib.format.open_memmap(path, "r")
    except (FileNotFoundError, ValueError):  # ValueError: truncated, or no .npy file
        return False
    return array.shape == shape and array.dtype == np.uint8
