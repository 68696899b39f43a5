"""What a GPU would refuse or wait for, seen without one (``pretend_device``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")

import tiny_families
from pretend_device import DEVICE, Pretend
from test_families import SIZE, TWINS, drawn, each
from test_imitation import QUIET, demonstrations, spec  # noqa: F401 (a fixture)
from vlm4vla.backbones.vlm import Backbone
from vlm4vla.convention import LIBERO
from vlm4vla.data.normalize import Normalizer
from vlm4vla.policy import Policy, untrained
from vlm4vla.spec import RunSpec, TrainSpec
from vlm4vla.training import imitation, loop
from vlm4vla.types import Observation

LEVEL = 1 / 255 / 0.2
"""One of the 255 levels of a picture, divided by the smallest deviation that a processor normalises by."""


def pictures(number: int) -> np.ndarray:
    """Grey noise. Next to black and white the CPU's bicubic filter, which clips each direction by itself, differs from
    a GPU's by up to 20 levels for noise."""
    return np.random.default_rng(0).integers(64, 192, (number, SIZE, SIZE, 3), np.uint8)


def test_the_device_refuses_what_a_gpu_refuses_and_notes_what_is_waited_for():
    with Pretend() as device:
        there, here = torch.arange(3.0, device=DEVICE), torch.arange(3.0)
        with pytest.raises(RuntimeError, match="of tensors on pretend:0 and of others on cpu"):
            _ = there + here
        with pytest.raises(RuntimeError, match="of tensors on pretend:0 and of others on cpu"):
            _ = here[there.long()]
        assert (there + here[1]).device == DEVICE  # a number
        assert there[here.long()].device == DEVICE
        assert not device.waits
        assert there.sum().item() == 3
        assert (there + here.to(DEVICE)).tolist() == [0, 2, 4]
        assert len(there[there > 0]) == 2
    assert sum(device.waits.values()) == 3


@contextmanager
def moved(backbone: Backbone, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """``backbone`` on the device, and ``inputs``. It prepares pictures there, within a level of the CPU's, and computes
    with the CPU's."""
    seen = backbone._seen(inputs["images"])
    with Pretend():
        backbone.to(DEVICE)
        there = {name: value.to(DEVICE) for name, value in inputs.items()}
        ours = backbone._seen(there["images"])
        for name, value in seen.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                assert (ours[name].cpu() - value).abs().max() <= LEVEL
                ours[name] = value.to(DEVICE)
        with patch.object(backbone, "_seen", lambda _: ours):
            yield there


@pytest.mark.parametrize("name", each(fast=tiny_families.FAMILIES.keys() - TWINS - {"qwen3_5"}))
def test_a_family_computes_on_a_device_what_it_does_on_the_cpu(name):
    backbone = drawn(name)
    torch.nn.init.normal_(backbone.query)
    inputs = backbone.encode(pictures(4), ["push", "pull it", "lift", "turn it round"])
    wanted = backbone(inputs)
    wanted.sum().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    with moved(backbone, inputs) as there:
        backbone.zero_grad()
        found = backbone(there)
        found.sum().backward()
        assert torch.allclose(found.cpu(), wanted, atol=1e-5)
        for name, p in backbone.named_parameters():
            if p.grad is not None:
                assert torch.allclose(p.grad.cpu(), gradients.pop(name), rtol=1e-3, atol=1e-4), name
    assert not gradients


@pytest.mark.parametrize(
    "name", [case for case in each(fast={"qwen2_5_vl", "paligemma1"}) if "kosmos2" not in case.values]
)
def test_a_family_is_taught_answers_on_a_device_as_on_the_cpu(name):
    backbone = drawn(name)
    talks = [(("user", "what?"), ("assistant", "a cat")), (("user", "and where?"), ("assistant", "on the left"))]
    inputs = backbone.encode_answers(pictures(2), talks)
    with torch.no_grad():
        wanted = backbone.answer_losses(inputs)
        with moved(backbone, inputs) as there:
            assert torch.allclose(backbone.answer_losses(there).cpu(), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", each())
def test_a_family_waits_for_the_device_no_oftener_for_more_pictures(name):
    backbone, waits = drawn(name), []
    with Pretend() as device, torch.no_grad():
        backbone.to(DEVICE)
        for number in (2, 4):
            made = backbone.encode(pictures(number), ["push"] * number)
            inputs = {key: value.to(DEVICE) for key, value in made.items()}
            backbone(inputs)  # sizes that are met for the first time
            device.waits.clear()
            backbone(inputs)
            waits.append(device.waits.copy())
    if name != "lfm2_vl":  # transformers cuts its pictures out one by one, at lengths that the device knows
        assert waits[0] == waits[1]
    ours = [line for package, line in waits[0] if package == "vlm4vla"]
    assert len(ours) == (name in ("smolvlm", "idefics3")), "a Lanczos filter is for the CPU, nothing else"


def test_a_training_on_a_device_ends_with_the_cpus_weights_and_waits_only_where_it_logs(
    spec,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    demos, saved, waits = demonstrations(tmp_path / "demos"), Policy.save, []

    def save(policy, folder, state):  # files are written from storage, which such a tensor has none of
        saved(policy, folder, {name: value.cpu() for name, value in state.items()})

    def trained(name, steps):
        training = spec.training.model_copy(update={"steps": steps, "augment": "crop_and_colour", "ema": 0.9})
        imitation.train(spec.model_copy(update={"training": training}), demos, tmp_path / name, QUIET)
        return Policy.load(tmp_path / name / "policy").vla.parameters()

    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    cpus = trained("cpu", 3)
    monkeypatch.setattr(loop, "torch_device", lambda _: DEVICE)
    monkeypatch.setattr(Policy, "save", save)
    for steps in (3, 4):  # two rows of metrics each
        with Pretend() as device:
            ours = trained(f"{steps}", steps)
        if steps == 3:
            assert all(torch.allclose(*pair, atol=1e-3) for pair in zip(ours, cpus, strict=True))
        waits.append({line: times for (package, line), times in device.waits.items() if package == "vlm4vla"})
    assert waits[0] == waits[1]


@pytest.mark.parametrize("treatment", ["full", "lora"])
def test_a_policy_that_acts_in_bf16_is_moved_to_a_device_in_bf16(treatment):
    run = RunSpec(treatment=treatment, training=TrainSpec(precision="bf16"))
    vla = untrained(*tiny_families.draw("qwen3_vl"), run)
    policy = Policy(vla, run, LIBERO, Normalizer.fit(np.eye(7, dtype=np.float32)), None, SIZE, {})
    with Pretend() as device:
        policy.for_acting(DEVICE)
    kept = {id(value): value for value in (*vla.parameters(), *vla.buffers())}.values()
    assert {value.device for value in kept} == {DEVICE}
    assert device.moved == sum(value.nbytes for value in kept)
    assert torch.bfloat16 in {value.dtype for value in kept}


def test_a_policy_answers_on_a_device_as_on_the_cpu_and_waits_once(policy_folder):
    policy = Policy.load(policy_folder)
    image = np.random.default_rng(0).integers(0, 256, (policy.image_size, policy.image_size, 3), np.uint8)
    look = [Observation({"main": image}, "place it on the cat", np.zeros(policy.vla.state_size, np.float32))] * 2
    wanted = policy.predict(look)
    with Pretend() as device:
        policy.vla.to(DEVICE)
        device.waits.clear()
        found = policy.predict(look)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
    assert [times for (package, _), times in device.waits.items() if package == "vlm4vla"] == [1]
