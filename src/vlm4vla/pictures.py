"""Pictures brought to a policy's size, the same way wherever that is done: data, simulators, served policies."""

import numpy as np


def resized(picture: np.ndarray, size: int, method: str = "bicubic") -> np.ndarray:
    """uint8 (height, width, 3) -> (size, size, 3), the aspect ratio not kept (as VLM4VLA does).

    ``method``: a filter of Pillow. A picture that has the size is given back as it is.
    """
    if picture.shape[:2] == (size, size):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling[method.upper()]))
