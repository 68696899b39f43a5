"""A look at the simulator: the expert's episode as a film strip and as an MP4."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm4vla.files import replacing
from vlm4vla.sims.film import write_film
from vlm4vla.sims.grinningface.env import CONTROL_HZ, GrinningFace

IMAGE_SIZE = 224
STRIP_FRAMES, BAR, GAP = 6, 26, 6
"""Frames in the strip; height of its caption bars and space between frames, pixels."""
INK, PAPER = (32, 36, 42), (255, 255, 255)


def demo(out_dir: Path | str, level: str = "place", seed: int = 0) -> tuple[Path, Path]:
    """Write ``grinningface_<level>_<seed>.png`` and ``.mp4`` into ``out_dir`` -> their paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    env = GrinningFace(level, "train", image_size=IMAGE_SIZE)
    try:
        env.reset(seed)
        observation = env.observe()
        frames, done = [observation.images["main"]], False
        while not done:
            done = env.execute(env.expert()[None]).done
            frames.append(env.observe().images["main"])
    finally:
        env.close()
    stem = out_dir / f"grinningface_{level}_{seed}"
    strip, film = stem.with_suffix(".png"), stem.with_suffix(".mp4")
    write_strip(strip, frames, observation.instruction)
    write_film(film, frames, CONTROL_HZ)
    return strip, film


def write_strip(path: Path, frames: list[np.ndarray], title: str) -> None:
    """``STRIP_FRAMES`` frames (uint8 (S, S, 3)), the first and the last among them, each with its step."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int))
    size = frames[0].shape[0]
    sheet = Image.new("RGB", (len(chosen) * (size + GAP) - GAP, size + 2 * BAR), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((2, 4), f"“{title}”", fill=INK, font=font)
    for column, step in enumerate(chosen):
        x = column * (size + GAP)
        sheet.paste(Image.fromarray(frames[step]), (x, BAR))
        draw.text((x + 2, size + BAR + 4), f"step {step}", fill=INK, font=font)
    with replacing(path) as partial:
        sheet.save(partial, "PNG", optimize=True)
