"""What autocast copies of the weights in a bf16 run, against the copies that are there when a forward pass ends."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_families
from vlm4vla.policy import untrained
from vlm4vla.spec import HeadSpec, RunSpec, Runtime, TrainSpec
from vlm4vla.training.examine import copies_bytes
from vlm4vla.training.loop import _accelerator


class Copies(TorchDispatchMode):
    """Which bf16 copies of parameters are made, and still there."""

    def __init__(self, model):
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (name := self._names.get(id(args[0]))):
            self._made[name] = (StorageWeakRef(out.untyped_storage()), out.nbytes)
        return out

    def there(self):
        """Their bytes by the parameter's name."""
        return {name: size for name, (storage, size) in self._made.items() if not storage.expired()}


def forward(name, treatment, checkpointing):
    """Copies at the end of a training's forward pass, and what is counted for them."""
    spec = RunSpec(treatment=treatment, head=HeadSpec(hidden=16), training=TrainSpec(precision="bf16"))
    vla = untrained(*tiny_families.draw(name), spec).train()
    if checkpointing:
        vla.backbone.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = vla.backbone.encode(np.zeros((2, 64, 64, 3), np.uint8), ["push", "pull it"])
    runtime = Runtime(device="cpu", gradient_checkpointing=checkpointing)
    accelerator = _accelerator(torch.device("cpu"), spec.training, runtime, Path())
    with Copies(vla) as copies, accelerator.autocast():
        actions = vla.head(vla.backbone(inputs))
        there = copies.there()
    assert actions is not None  # and with them what autograd keeps
    return there, copies_bytes(vla, spec)


@pytest.mark.parametrize("treatment", ["full", "freeze_vision", "freeze_llm"])
@pytest.mark.parametrize("name", ["qwen3_vl", "paligemma2", "qwen3_vl_moe"])
def test_copies_of_weights_are_counted(name, treatment):
    there, counted = forward(name, treatment, checkpointing=False)
    # A mixture's router is a parameter of no linear layer.
    assert counted == pytest.approx(sum(there.values()), rel=0.02 if "moe" in name else 0)


def test_with_checkpointing_copies_go_with_their_layer():
    there, _ = forward("qwen3_vl", "full", checkpointing=True)
    assert "head.trunk.0.weight" in there
    assert not [name for name in there if ".layers." in name or ".blocks." in name]


def test_nothing_is_copied_in_fp32():
    spec = RunSpec()
    assert copies_bytes(untrained(*tiny_families.draw("qwen3_vl"), spec), spec) == 0
