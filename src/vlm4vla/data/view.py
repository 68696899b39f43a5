"""One episode as one self-contained HTML page: pictures with a slider, action and gripper curves, the instruction."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from vlm4vla.data.inspect import names
from vlm4vla.data.lerobot import Dataset
from vlm4vla.errors import UserError
from vlm4vla.files import write_text

MAX_FRAMES, HEIGHT, JPEG_QUALITY = 300, 224, 80
"""More frames are thinned out evenly, larger pictures are scaled down: a page stays below a few MB."""
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
    cameras = {camera: [_jpeg(frame) for frame in dataset.images(shown, camera)] for camera in dataset.cameras}
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
        seconds=(stop - start) / dataset.fps,
        shown=(shown - start).tolist(),
        cameras=cameras,
        strip=np.unique(np.linspace(0, len(shown) - 1, min(STRIP, len(shown))).round().astype(int)).tolist(),
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


def _jpeg(frame: np.ndarray) -> str:
    """A data URL."""
    image = Image.fromarray(frame)
    if image.height > HEIGHT:
        image = image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
