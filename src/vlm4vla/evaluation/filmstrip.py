"""Film strips: what the policy saw in an episode, side by side in one lossless PNG, and the outcome beside it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlm4vla.files import replacing, write_text
from vlm4vla.types import EpisodeResult


def strip_path(folder: Path, protocol: str, episode: int) -> Path:
    """``<folder>/<protocol with dashes for slashes>-<episode>.png``."""
    return folder / f"{protocol.replace('/', '-')}-{episode:04d}.png"


def write_strip(folder: Path, frames: list[np.ndarray], result: EpisodeResult) -> None:
    """Write the strip of ``frames``, uint8 (height, width, 3) each, then its JSON: where that is, the strip is whole.

    The JSON holds protocol, episode, seed, success, credits, instruction, steps and the number of frames.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = strip_path(folder, result.protocol, result.episode)
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(frames, axis=1)).save(partial, format="PNG")
    names = ("protocol", "episode", "seed", "success", "credits", "instruction", "steps")
    about = {name: getattr(result, name) for name in names} | {"frames": len(frames)}
    write_text(path.with_suffix(".json"), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
