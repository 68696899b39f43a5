"""Image augmentation: its numbers are drawn on the CPU, from the step's own numpy generator, so that they are the same
whatever device trains; pictures are changed in batches on that device. B pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlm4vla.spec import TrainSpec

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB -> luma and two colour axes (NTSC): a change of hue is a rotation of the last two."""


Draws = dict[str, Tensor]
"""Of one batch: (B, ...) each, a row a picture."""


@dataclass(frozen=True)
class JitterAndShift:
    """Brightness, colour cast and a small shift, drawn per picture."""

    jitter: float
    """Brightness factor within 1 +- jitter, channel offset within +- jitter of the range. 0, with a shift of 10, is
    VLM4VLA's recipe for CALVIN."""
    shift: int
    """At most so many pixels each way; edges repeat (random shift as DrQ does)."""

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        """``shift`` is (B, 2), int64 pixels to the right and down."""
        drawn = {
            "factor": rng.uniform(1 - self.jitter, 1 + self.jitter, (count, 1, 1, 1)).astype(np.float32),
            "offset": rng.uniform(-self.jitter, self.jitter, (count, 1, 1, 3)).astype(np.float32) * 255,
            "shift": rng.integers(-self.shift, self.shift + 1, (count, 2)),
        }
        return {name: torch.from_numpy(values) for name, values in drawn.items()}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 (B, S, S, 3) -> the same, on the same device; the same to the bit on every device."""
        count, size = images.shape[:2]
        changed = (images * draws["factor"] + draws["offset"]).clamp_(0, 255).to(torch.uint8)
        around = torch.arange(size, device=images.device)
        columns, rows = ((around - draws["shift"][:, i : i + 1]).clamp_(0, size - 1) for i in (0, 1))
        picture = torch.arange(count, device=images.device)
        return changed[picture[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass(frozen=True)
class CropAndColour:
    """Random resized crop and colours, drawn per picture: VLM4VLA's recipe for Bridge and LIBERO (Octo's, OpenVLA's).

    The four colour changes are one linear map of RGB a picture. So hue turns about the grey axis and saturation pulls
    to the luma, where TensorFlow's go through HSV: the same for grey and luma, a few levels apart for strong colours.
    """

    area: float = 0.9
    """Of the crop, as a share of the picture; its place is uniform, its aspect the picture's."""
    brightness: float = 0.2
    """Added, within +- this share of the range."""
    contrast: float = 0.2
    """A factor within 1 +- this; so is ``saturation``."""
    saturation: float = 0.2
    hue: float = 0.05
    """Turned within +- this share of a full circle."""

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        drawn = {
            "place": rng.uniform(-1, 1, (count, 2)) * (1 - self.area**0.5),
            "brightness": rng.uniform(-self.brightness, self.brightness, count),
            "contrast": rng.uniform(1 - self.contrast, 1 + self.contrast, count),
            "saturation": rng.uniform(1 - self.saturation, 1 + self.saturation, count),
            "turn": rng.uniform(-self.hue, self.hue, count) * 2 * np.pi,
        }
        return {name: torch.from_numpy(values).float() for name, values in drawn.items()}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 (B, H, W, 3) -> the same, on the same device; devices differ by a level at most, by rounding."""
        window = torch.zeros(len(images), 2, 3, device=images.device)
        window[:, 0, 0] = window[:, 1, 1] = self.area**0.5
        window[:, :, 2] = draws["place"]
        # Under autocast half precision would merge neighbouring levels.
        with torch.autocast(images.device.type, enabled=False):
            pictures = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
            grid = functional.affine_grid(window, list(pictures.shape), align_corners=False)
            pictures = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
            matrix = draws["contrast"][:, None, None] * _colours(draws["saturation"], draws["turn"])  # (B, 3, 3)
            # Contrast turns about the picture's mean luma, which saturation and hue do not change.
            luma = torch.einsum("c,bchw->b", YIQ[0].to(images.device), pictures) / pictures[0, 0].numel()
            offset = draws["brightness"] + (1 - draws["contrast"]) * luma
            pictures = torch.einsum("bdc,bchw->bdhw", matrix, pictures) + offset[:, None, None, None]
        return (pictures * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augmentation(training: TrainSpec) -> JitterAndShift | CropAndColour:
    if training.augment == "crop_and_colour":
        return CropAndColour()
    return JitterAndShift(training.image_jitter, training.image_shift)


def _colours(saturation: Tensor, turn: Tensor) -> Tensor:
    """(B,) factors and angles -> (B, 3, 3) maps of RGB that keep the luma."""
    to_yiq = YIQ.to(turn.device)
    rotation = torch.zeros(len(turn), 3, 3, device=turn.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = saturation * turn.cos()
    rotation[:, 1, 2] = -saturation * turn.sin()
    rotation[:, 2, 1] = saturation * turn.sin()
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
