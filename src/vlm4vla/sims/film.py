"""Pictures -> MP4."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from vlm4vla.files import replacing

LAST_S = 1.0
"""Seconds for which the last picture stays."""


def write_film(path: Path, frames: list[np.ndarray], hz: float) -> None:
    """H.264 of uint8 (height, width, 3) frames with even sides, ``hz`` a second."""
    import av

    height, width = frames[0].shape[:2]
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(hz).limit_denominator(1000), options={"crf": "18"})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for frame in [*frames, *[frames[-1]] * max(1, round(LAST_S * hz))]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
