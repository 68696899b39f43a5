"""Videos of episodes: what the policy saw, with the instruction, the step and the outcome written below.

There is one frame for each look of the policy, shown for as long as the robot moved on it: nothing is rendered for a
video but the end of its episode.
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm4vla.evaluation.filmstrip import strip_path
from vlm4vla.sims.film import write_film
from vlm4vla.types import EpisodeResult

WIDTH = 384
"""Pixels at least; smaller pictures are enlarged by a whole factor."""
FONT_SIZE, LINE, MARGIN, INSTRUCTION_LINES = 14, 20, 6, 3
LETTER = 0.6 * FONT_SIZE
"""Width of a letter, amply."""
INK, PAPER, GREEN, RED = (32, 36, 42), (255, 255, 255), (22, 128, 60), (190, 40, 40)


def video_path(folder: Path, protocol: str, episode: int) -> Path:
    """Named as its film strip (``filmstrip.py``) is."""
    return strip_path(folder, protocol, episode).with_suffix(".mp4")


def write_video(folder: Path, frames: list[np.ndarray], steps: list[int], result: EpisodeResult, hz: float) -> Path:
    """Write the MP4 of ``frames``, uint8 (height, width, 3), each seen after so many ``steps`` of ``hz`` a second."""
    folder.mkdir(parents=True, exist_ok=True)
    path = video_path(folder, result.protocol, result.episode)
    outcomes = [""] * (len(frames) - 1) + ["success" if result.success else "failure"]
    sheets = [
        _captioned(frame, result.instruction, f"step {step}", outcome)
        for frame, step, outcome in zip(frames, steps, outcomes, strict=True)
    ]
    write_film(path, sheets, hz * (len(frames) - 1) / (steps[-1] - steps[0]))
    return path


def _captioned(frame: np.ndarray, instruction: str, step: str, outcome: str) -> np.ndarray:
    factor = -(-WIDTH // frame.shape[1])
    image = Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1))
    height = image.height + (INSTRUCTION_LINES + 1) * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (image.width + image.width % 2, height + height % 2), PAPER)  # H.264 wants even sides
    sheet.paste(image)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    top = image.height + MARGIN
    draw.text((MARGIN, top), step, fill=INK, font=font)
    draw.text((image.width // 2, top), outcome, fill=GREEN if outcome == "success" else RED, font=font)
    for text in textwrap.wrap(instruction, int((image.width - 2 * MARGIN) / LETTER))[:INSTRUCTION_LINES]:
        top += LINE
        draw.text((MARGIN, top), text, fill=INK, font=font)
    return np.asarray(sheet)
