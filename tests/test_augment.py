"""Image augmentation: what it may do to a picture, and that its numbers come from one generator."""

import colorsys

import numpy as np
import pytest
import torch

from vlm4vla.data.augment import YIQ, CropAndColour, JitterAndShift, augmentation
from vlm4vla.spec import TrainSpec

NOTHING = {"area": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def crop_and_colour(images, rng, **options):
    augment = CropAndColour(**options)
    return augment.apply(images, augment.draw(len(images), rng))


def pictures(count=4, height=24, width=32):
    """Smooth and of middling colours, so that nothing is clipped."""
    rows, columns, n = np.mgrid[0:height, 0:width, 0:count].transpose(0, 3, 1, 2)
    grey = 90 + 40 * np.sin(rows / 7 + n) + 30 * np.cos(columns / 9)
    return torch.from_numpy(np.stack([grey, grey + 20, grey - 10], -1).round().astype(np.uint8))


def test_the_same_generator_draws_the_same():
    images = pictures()
    first, again, other = (crop_and_colour(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert (first == again).all()
    assert (first != other).any()
    assert all((first[i] != images[i]).any() for i in range(4))


def test_without_a_range_nothing_changes():
    images = pictures()
    changed = crop_and_colour(images, np.random.default_rng(0), **NOTHING)
    assert (changed.int() - images.int()).abs().max() <= 1


def test_pictures_are_changed_one_by_one():
    alone = crop_and_colour(pictures(1), np.random.default_rng(3))
    assert (alone[0] != crop_and_colour(pictures(1), np.random.default_rng(4))[0]).any()
    same = torch.cat([pictures(1)] * 3)
    assert len({tuple(each.ravel().tolist()) for each in crop_and_colour(same, np.random.default_rng(5))}) == 3


def test_the_crop_shows_its_share_of_the_picture():
    ramp = torch.arange(200).repeat(200, 1)[None, :, :, None].repeat(64, 1, 1, 3).to(torch.uint8)
    shown = crop_and_colour(ramp, np.random.default_rng(0), **{**NOTHING, "area": 0.81}).float()[:, 100, :, 0]
    assert (shown[:, 190] - shown[:, 10]).numpy() == pytest.approx(180 * 0.9, abs=1.1)
    left = shown[:, 10] - 10 * 0.9  # the level at the window's left edge: 0 to 20
    assert left.min() == pytest.approx(0, abs=2)
    assert left.max() == pytest.approx(20, abs=2)


def test_brightness_is_added_and_contrast_turns_about_the_mean():
    images = pictures(64)
    grey = images.float() @ YIQ[0]
    brighter = crop_and_colour(images, np.random.default_rng(0), **{**NOTHING, "brightness": 0.2})
    by = (brighter.float() - images.float()).mean((1, 2, 3))
    assert by.abs().max() <= 0.2 * 255 + 1
    assert by.std() > 0.05 * 255
    steeper = crop_and_colour(images, np.random.default_rng(0), **{**NOTHING, "contrast": 0.2}).float() @ YIQ[0]
    factor = steeper.std((1, 2)) / grey.std((1, 2))
    assert 0.79 < factor.min() < 0.9
    assert 1.1 < factor.max() < 1.21
    assert (steeper.mean((1, 2)) - grey.mean((1, 2))).abs().max() < 1


def test_hue_and_saturation_leave_grey_and_luma_alone():
    rng = np.random.default_rng(0)
    grey = torch.from_numpy(rng.integers(0, 256, (8, 4, 4, 1), np.uint8)).repeat(1, 1, 1, 3)
    strong = {**NOTHING, "saturation": 0.2, "hue": 0.05}
    assert (crop_and_colour(grey, rng, **strong).int() - grey.int()).abs().max() <= 1
    colours = pictures(8)
    luma = crop_and_colour(colours, rng, **strong).float() @ YIQ[0] - colours.float() @ YIQ[0]
    assert luma.abs().max() < 1.5


def test_hue_turns_by_at_most_its_share_of_the_circle():
    colour = torch.tensor([150, 110, 90], dtype=torch.uint8).expand(200, 2, 2, 3)
    turned = crop_and_colour(colour, np.random.default_rng(0), **{**NOTHING, "hue": 0.05})[:, 0, 0].numpy() / 255
    before = colorsys.rgb_to_hsv(150 / 255, 110 / 255, 90 / 255)[0]
    by = np.array([(colorsys.rgb_to_hsv(*each)[0] - before + 0.5) % 1 - 0.5 for each in turned])
    # YIQ's circle is not HSV's: 0.05 of one is 0.04 to 0.07 of the other.
    assert 0.03 < by.max() < 0.08
    assert -0.08 < by.min() < -0.03


def test_calvins_recipe_is_a_shift_alone():
    images, augment = pictures(50, 24, 24), JitterAndShift(jitter=0, shift=10)
    draws = augment.draw(50, np.random.default_rng(0))
    shifted, offsets = augment.apply(images, draws).numpy(), draws["shift"].numpy()
    assert offsets.min() == -10
    assert offsets.max() == 10
    for image, result, (right, down) in zip(images.numpy(), shifted, offsets, strict=True):
        padded = np.pad(image, [(10, 10), (10, 10), (0, 0)], mode="edge")
        assert (result == padded[10 - down : 34 - down, 10 - right : 34 - right]).all()


def test_jitter_and_shift_is_what_it_was_on_arrays():
    """Policies trained by earlier versions were trained on these pictures, to the bit."""
    images, rng = np.random.default_rng(1).integers(0, 256, (20, 24, 24, 3), np.uint8), np.random.default_rng(2)
    factor = rng.uniform(0.9, 1.1, (20, 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-0.1, 0.1, (20, 1, 1, 3)).astype(np.float32) * 255
    changed = np.clip(images * factor + offset, 0, 255).astype(np.uint8)
    moved = rng.integers(-3, 4, (20, 2))
    columns, rows = (np.clip(np.arange(24) - moved[:, i : i + 1], 0, 23) for i in (0, 1))
    expected = changed[np.arange(20)[:, None, None], rows[:, :, None], columns[:, None, :]]
    augment = augmentation(TrainSpec(image_jitter=0.1, image_shift=3))
    made = augment.apply(torch.from_numpy(images), augment.draw(20, np.random.default_rng(2)))
    assert np.array_equal(made.numpy(), expected)


def test_half_precision_of_the_training_does_not_reach_the_pictures():
    plain = crop_and_colour(pictures(), np.random.default_rng(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_and_colour(pictures(), np.random.default_rng(0)), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_makes_the_same_pictures():
    for augment, levels in ((JitterAndShift(0.06, 2), 0), (CropAndColour(), 1)):
        draws = augment.draw(4, np.random.default_rng(0))
        images = pictures(4, 24, 24)
        there = augment.apply(images.cuda(), {name: value.cuda() for name, value in draws.items()}).cpu()
        assert (there.int() - augment.apply(images, draws).int()).abs().max() <= levels
