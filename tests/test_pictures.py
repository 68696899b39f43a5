"""One way of resizing."""

import numpy as np
import pytest
from PIL import Image

from vlm4vla.pictures import resized


@pytest.mark.parametrize(("method", "filter_"), [("bicubic", 3), ("bilinear", 2), ("lanczos", 1)])
def test_pictures_become_square_with_the_filter_that_was_named(method, filter_):
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(picture).resize((5, 5), filter_))
    np.testing.assert_array_equal(resized(picture, 5, method), wanted)
    np.testing.assert_array_equal(
        resized(picture[::-1, ::-1], 5, method), resized(picture[::-1, ::-1].copy(), 5, method)
    )
    assert resized(picture[:, :6], 6, method).tobytes() == picture[:, :6].tobytes(), "nothing to do"
    assert (resized(picture, 5) == resized(picture, 5, "bicubic")).all()
