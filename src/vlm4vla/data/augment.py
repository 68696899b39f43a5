"""Image augmentation. All numbers are drawn from the step's own numpy generator: the same on every device."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB -> luma and two colour axes (NTSC): a change of hue is a rotation of the last two."""


def jitter_and_shift(
    images: np.ndarray, rng: np.random.Generator, jitter: float, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, colour cast and a small shift, drawn per picture.

    Args:
        images: uint8 (B, S, S, 3).
        jitter: brightness factor within 1 +- jitter, channel offset within +- jitter of the range. 0, with a shift of
            10, is VLM4VLA's recipe for CALVIN.
        shift: at most so many pixels each way; edges repeat (random shift as DrQ does).

    Returns:
        uint8 (B, S, S, 3), and the shift in fractions of the picture, float (B, 2) as (du, dv).
    """
    count, size = images.shape[0], images.shape[1]
    factor = rng.uniform(1 - jitter, 1 + jitter, (count, 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-jitter, jitter, (count, 1, 1, 3)).astype(np.float32) * 255
    changed = np.clip(images * factor + offset, 0, 255).astype(np.uint8)
    moved = rng.integers(-shift, shift + 1, (count, 2))
    around = np.arange(size)
    columns = np.clip(around[None] - moved[:, :1], 0, size - 1)
    rows = np.clip(around[None] - moved[:, 1:], 0, size - 1)
    result = changed[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return result, moved / size


def crop_and_colour(
    images: Tensor,
    rng: np.random.Generator,
    area: float = 0.9,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.05,
) -> Tensor:
    """Random resized crop and colours, drawn per picture: VLM4VLA's recipe for Bridge and LIBERO (Octo's, OpenVLA's).

    The four colour changes are one linear map of RGB a picture. So hue turns about the grey axis and saturation pulls
    to the luma, where TensorFlow's go through HSV: the same for grey and luma, a few levels apart for strong colours.

    Args:
        images: uint8 (B, H, W, 3), on any device.
        area: of the crop, as a share of the picture; its place is uniform, its aspect the picture's.
        brightness: added, within +- this share of the range.
        contrast, saturation: factors within 1 +- this.
        hue: turned within +- this share of a full circle.

    Returns:
        uint8 (B, H, W, 3), on the same device.
    """
    count, side = len(images), area**0.5
    draws = {
        "place": rng.uniform(-1, 1, (count, 2)) * (1 - side),
        "brightness": rng.uniform(-brightness, brightness, count),
        "contrast": rng.uniform(1 - contrast, 1 + contrast, count),
        "saturation": rng.uniform(1 - saturation, 1 + saturation, count),
        "turn": rng.uniform(-hue, hue, count) * 2 * np.pi,
    }
    draw = {name: torch.from_numpy(values).float().to(images.device) for name, values in draws.items()}
    window = torch.zeros(count, 2, 3, device=images.device)
    window[:, 0, 0] = window[:, 1, 1] = side
    window[:, :, 2] = draw["place"]
    pictures = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    grid = functional.affine_grid(window, list(pictures.shape), align_corners=False)
    pictures = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)

    matrix = draw["contrast"][:, None, None] * _colours(draw["saturation"], draw["turn"])  # (B, 3, 3)
    # Contrast turns about the picture's mean luma, which saturation and hue do not change.
    luma = torch.einsum("c,bchw->b", YIQ[0].to(images.device), pictures) / pictures[0, 0].numel()
    offset = draw["brightness"] + (1 - draw["contrast"]) * luma
    pictures = torch.einsum("bdc,bchw->bdhw", matrix, pictures) + offset[:, None, None, None]
    return (pictures * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _colours(saturation: Tensor, turn: Tensor) -> Tensor:
    """(B,) factors and angles -> (B, 3, 3) maps of RGB that keep the luma."""
    to_yiq = YIQ.to(turn.device)
    rotation = torch.zeros(len(turn), 3, 3, device=turn.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = saturation * turn.cos()
    rotation[:, 1, 2] = -saturation * turn.sin()
    rotation[:, 2, 1] = saturation * turn.sin()
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
