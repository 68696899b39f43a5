"""Pictures -> MP4. T frames."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.files import replacing

GOP = 2
"""Every second frame is a key frame, as in lerobot: a frame picked at random costs at most two decodings."""
CODEC, PIXELS = "libx264", "yuv420p"
OPTIONS = {"preset": "veryfast", "crf": "18", "bf": "0"}
"""H.264 decodes faster than lerobot's AV1. crf 18 is said to be visually lossless; no B-frames: none is waited for."""
LAST_S = 1.0
"""Seconds for which the last picture of a film to look at stays."""


class Film:
    """Writes one MP4; a context manager."""

    def __init__(
        self, path: Path, fps: float, size: tuple[int, int], options: Mapping[str, str] | None = None, gop: int = GOP
    ):
        """
        Args:
            size: height and width, both even (H.264 stores colours for blocks of 2 x 2).
            options: of the encoder, where they are others than ``OPTIONS``.
            gop: frames from one key frame to the next.
        """
        height, width = size
        if height % 2 or width % 2:
            raise UserError(f"pictures of {height} x {width}", "even sides for video", "crop or resize them first")
        import av

        self.path, self.fps, self.size, self.num_frames = path, fps, size, 0
        self._rate = Fraction(fps).limit_denominator(10_000)
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: Any = self._container.add_stream(CODEC, rate=self._rate, options={**OPTIONS, **(options or {})})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, PIXELS
        self._stream.codec_context.gop_size = gop
        self._stream.codec_context.thread_count = 1  # the processes are the parallelism

    def add(self, frames: np.ndarray) -> float:
        """Append uint8 (T, height, width, 3); returns the first one's time in seconds."""
        import av

        start = self.num_frames / self.fps
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = self.num_frames, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1
        return start

    def __enter__(self) -> "Film":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()


def write_film(path: Path, frames: list[np.ndarray], hz: float) -> None:
    """A film to look at of uint8 (height, width, 3) frames with even sides, ``hz`` a second."""
    last = [frames[-1]] * max(1, round(LAST_S * hz))
    with replacing(path) as partial, Film(partial, hz, frames[0].shape[:2]) as film:
        film.add(np.stack([*frames, *last]))
