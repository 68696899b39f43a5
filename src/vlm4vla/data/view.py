"""One episode as one self-contained HTML page: its films with a slider, action and gripper curves, the instruction."""

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from vlm4vla.data.inspect import names
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.files import write_text
from vlm4vla.sims.film import Film

MAX_FRAMES, HEIGHT, JPEG_QUALITY = 1000, 224, 80
"""More frames are thinned out evenly, larger pictures are scaled down: a page stays below a few MB."""
FILM = {"crf": "26"}
"""A film to look at, with a key frame every ``GOP`` frames, so that the slider jumps without a delay."""
GOP = 12
WIDTH, PLOT, PAD = 1000, 90, 8
"""Of a curve, in SVG units: width, height, and the room above and below."""
STRIP = 10
"""Pictures in the strip."""


def view(source: Path | str, episode: int, out: Path) -> Path:
    """Write the page of ``episode`` to ``out``.

    Raises:
        UserError: as ``Dataset.open``, or there is no such episode.
    """
    dataset = Dataset.open(source)
    if not 0 <= episode < dataset.num_episodes:
        raise UserError(
            f"episode {episode} of {dataset.folder}", f"0 to {dataset.num_episodes - 1}", "name one of these"
        )
    start, stop = int(dataset.episode_from[episode]), int(dataset.episode_to[episode])
    shown = np.unique(np.linspace(start, stop - 1, min(stop - start, MAX_FRAMES)).round().astype(int))
    strip = np.unique(np.linspace(0, len(shown) - 1, min(STRIP, len(shown))).round().astype(int))
    seconds = (stop - start) / dataset.fps
    cameras = {}
    for camera in dataset.cameras:
        frames = _small(dataset.images(shown, camera))
        cameras[camera] = {"film": _film(frames, len(shown) / seconds), "strip": [_jpeg(frames[i]) for i in strip]}
    labels = names(dataset)
    curves = [
        {"name": name, "path": path, "low": low, "high": high, "gripper": d == len(labels) - 1, "gaps": gaps}
        for d, name in enumerate(labels)
        for path, low, high, gaps in [curve(dataset.actions[start:stop, d])]
    ]
    environment = Environment(loader=PackageLoader("vlm4vla.data"), autoescape=True)
    page = environment.get_template("view.html.j2").render(
        dataset=dataset,
        episode=episode,
        task=dataset.tasks[dataset.task_index[start]],
        num_frames=stop - start,
        seconds=seconds,
        shown=(shown - start).tolist(),
        cameras=cameras,
        strip=strip.tolist(),
        curves=curves,
        width=WIDTH,
        height=PLOT,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def curve(values: np.ndarray) -> tuple[str, float, float, int]:
    """(T,) -> an SVG path as steps, each as long as its action is held; smallest and largest value; numbers that are
    not finite, where the path has gaps."""
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    across = WIDTH / len(values)
    level = PLOT - PAD - (PLOT - 2 * PAD) * (values - low) / (high - low or 1.0)
    path = "".join(
        f"{'M' if step == 0 or not finite[step - 1] else 'L'}{step * across:.1f},{level[step]:.1f}h{across:.1f}"
        for step in range(len(values))
        if finite[step]
    )
    return path, low, high, int((~finite).sum())


def _small(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, height, width, 3) at most ``HEIGHT`` pixels high and with even sides, as H.264 wants them."""
    height, width = frames.shape[1:3]
    scale = min(1.0, HEIGHT / height)
    size = [2 * max(1, round(side * scale / 2)) for side in (width, height)]
    if size == [width, height]:
        return frames
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in frames])


def _film(frames: np.ndarray, hz: float) -> str:
    """A data URL of an MP4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        with Film(path, hz, frames.shape[1:3], FILM, GOP) as film:
            film.add(frames)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _jpeg(frame: np.ndarray) -> str:
    """A data URL."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
