"""How another project's policy sees and acts: all that would have to be guessed about its server, in a YAML file.

Shipped ones lie in ``baselines/``; each has a page in ``docs/baselines/``. H x W pictures are uint8 RGB.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vlm4vla.errors import UserError
from vlm4vla.serving.wire import form
from vlm4vla.spec import Strict, load_yaml, parse, yaml_file
from vlm4vla.types import Observation

SHIPPED = Path(__file__).parent / "baselines"


class Picture(Strict):
    """From what the simulator renders to what the policy is sent, in this order."""

    render: int = Field(ge=1)
    """Pixels (square) that the simulator is asked for."""
    jpeg: int | None = Field(default=None, ge=1, le=100)
    """Compress and decompress at this quality, with halved chroma: OpenVLA's training data were JPEG files."""
    size: int = Field(ge=1)
    """Pixels (square) that the policy is sent."""
    resize: Literal["none", "bilinear", "bicubic", "lanczos"] = "none"
    crop: float = Field(default=1.0, gt=0, le=1)
    """Share of the area that is cut out of the middle and enlarged to ``size`` again (bilinear, corners aligned, as
    TensorFlow's ``crop_and_resize``): policies trained with random crops of that size."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 (render, render, 3) -> uint8 (size, size, 3)."""
        if image.shape != (self.render, self.render, 3):
            raise UserError(f"a picture of {image.shape}", f"{self.render} x {self.render}", "render at that size")
        picture = Image.fromarray(image)
        if self.jpeg is not None:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=self.jpeg, subsampling="4:2:0")
            picture = Image.open(file)
        if self.resize != "none":
            picture = picture.resize((self.size, self.size), Image.Resampling[self.resize.upper()])
        values = np.asarray(picture)
        return values if self.crop == 1 else crop(values, self.crop)


def crop(image: np.ndarray, area: float) -> np.ndarray:
    """The middle ``area`` (share) of a picture (S, S, 3), enlarged to (S, S, 3)."""
    size = len(image)
    margin = (1 - area**0.5) / 2 * (size - 1)
    place = np.linspace(margin, size - 1 - margin, size)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, size - 1), place - low
    rows = image[low] * (1 - part)[:, None, None] + image[high] * part[:, None, None]
    both = rows[:, low] * (1 - part)[:, None] + rows[:, high] * part[:, None]
    # TensorFlow's float -> uint8: 0 .. 1 is spread over 255.5 and cut off.
    return np.floor(both / 255 * 255.5).astype(np.uint8)


class Baseline(Strict):
    """Another project's policy as its server speaks of it."""

    dialect: Literal["openpi", "starvla", "openvla"]
    form: str
    """How it writes actions (``wire.FORMS``)."""
    chunk: int = Field(ge=1)
    """H, actions in one answer; an answer of fewer is an error."""
    picture: Picture
    cameras: dict[str, str]
    """The simulator's camera -> the message's key (openpi), in the order of the message's list (StarVLA); OpenVLA takes
    one, its key is ``image``."""
    state: str | None = None
    """The key under which the simulator's state is sent (openpi, StarVLA); None: it is not."""
    lower: bool = False
    """Whether the instruction is sent in lower case."""
    unnorm_key: str | None = None
    """Which of its data sets' statistics the policy shall undo its normalisation with (OpenVLA, StarVLA)."""

    def pictures(self, observation: Observation) -> list[np.ndarray]:
        """One prepared picture for each of ``cameras``. Raises ``UserError`` where the simulator has no such camera."""
        missing = self.cameras.keys() - observation.images.keys()
        if missing:
            raise UserError(
                f"a simulator with the cameras {list(observation.images)}",
                f"also {sorted(missing)}, which this policy was trained with",
                "evaluate it where these cameras are, or serve a policy that needs fewer",
            )
        return [self.picture.prepare(observation.images[camera]) for camera in self.cameras]

    def instruction(self, observation: Observation) -> str:
        return observation.instruction.lower() if self.lower else observation.instruction

    def proprioception(self, observation: Observation) -> np.ndarray:
        if observation.state is None:
            found = "an observation without the robot's state"
            raise UserError(found, f"one to be sent as {self.state!r}", "evaluate where the simulator gives a state")
        return observation.state


def baseline(name: str) -> Baseline:
    """A shipped baseline by name, or a YAML file of one. Raises ``UserError`` where there is none, or a wrong key."""
    path = yaml_file(name, "baseline", SHIPPED)
    found = parse(Baseline, load_yaml(path), str(path))
    if form(found.form) is None:
        raise UserError(f"{path}: form: native", "how the policy writes actions, by name", "see docs/serving.md")
    if found.picture.resize == "none" and found.picture.size != found.picture.render:
        raise UserError(f"{path}: rendered and sent at different sizes", "picture.resize", "name the method")
    if found.dialect == "openvla" and (len(found.cameras) != 1 or found.state is not None):
        raise UserError(f"{path}: more than a camera for openvla", "one camera and no state", f"mend {path}")
    return found
