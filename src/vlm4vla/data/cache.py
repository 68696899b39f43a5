"""All pictures of a data set, decoded once into a memory-mapped array that training indexes. N frames."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.files import replacing
from vlm4vla.pictures import resized


def frames(dataset: Dataset, camera: str = "main", size: int | None = None) -> np.memmap:
    """uint8 (N, height, width, 3), read-only. The first call decodes into ``<folder>/.cache``; later ones only open it.

    The file's name holds the content hash, so pictures of changed data are never served; files of earlier contents are
    deleted.

    Args:
        size: resize to (size, size) once and for all, as ``pictures.resized`` does; None: as they are stored.

    Raises:
        UserError: no such camera, a damaged data set, or no place for the file.
    """
    stored = dataset.camera_size(camera)
    size = None if stored == (size, size) else size
    shape = (dataset.num_frames, *(stored if size is None else (size, size)), 3)
    name = camera if size is None else f"{camera}-{size}"
    path = dataset.folder / ".cache" / f"{name}-{dataset.content_hash[:16]}.npy"
    if not _holds(path, shape):
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                # Ordinary writes: on a full disk they fail, where pages of a sparse memory map kill the process.
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for pictures in _pictures(dataset, camera, size):
                    file.write(pictures.data)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}",
                f"{np.prod(shape) / 2**20:,.0f} MB for the decoded pictures beside the data set",
                "free them, or copy the data set to another disk",
            ) from error
        for old in path.parent.glob(f"{name}-" + "[0-9a-f]" * 16 + ".npy"):
            if old != path:
                old.unlink()
    return np.lib.format.open_memmap(path, "r")


def pictures(
    dataset: Dataset, size: int | None, cached: bool, camera: str = "main"
) -> Callable[[np.ndarray], np.ndarray]:
    """Frame indices (B,) -> uint8 (B, size, size, 3): from the cache, or decoded each time."""
    if cached:
        return frames(dataset, camera, size).__getitem__
    if size is None or dataset.camera_size(camera) == (size, size):
        return lambda indices: dataset.images(indices, camera)
    return lambda indices: np.stack([resized(picture, size) for picture in dataset.images(indices, camera)])


def _pictures(dataset: Dataset, camera: str, size: int | None) -> Iterator[np.ndarray]:
    for pictures in dataset.batches(camera):
        yield pictures if size is None else np.stack([resized(picture, size) for picture in pictures])


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether ``path`` is a whole cache of this shape."""
    try:
        array = np.lib.format.open_memmap(path, "r")
    except (FileNotFoundError, ValueError):  # ValueError: truncated, or no .npy file
        return False
    return array.shape == shape and array.dtype == np.uint8
