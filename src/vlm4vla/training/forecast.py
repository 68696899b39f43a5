"""What a training would take, before it is started: ``vlm4vla train --dry-run``."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vlm4vla.data.sources import Sources
from vlm4vla.policy import VLA, torch_device
from vlm4vla.spec import RunSpec, Runtime
from vlm4vla.training import check
from vlm4vla.training.check import Material
from vlm4vla.training.examine import GIB, answers_bytes, audit, copies_bytes, on_meta
from vlm4vla.training.processes import units

LOOKED_AT = 8
"""Steps whose conversations are looked at: what they take differs, and the most of it must fit."""
MEASURE_S = 0.5
SIDE = {"cuda": 8192, "mps": 2048, "cpu": 1024}
"""Of the square matrices: large enough that reading them takes no part of the time."""


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of this device's matrix products in this precision, measured for half a second."""
    side = SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    torch.matmul(a, a)
    synchronize()
    number, started = 0, time.perf_counter()
    while time.perf_counter() - started < MEASURE_S:
        torch.matmul(a, a)
        synchronize()
        number += 1
    return number * 2 * side**3 / (time.perf_counter() - started)


def forecast(spec: RunSpec, runtime: Runtime, image_size: int, processes: int, sources: Sources | None) -> list[str]:
    """Lines that say what would be frozen, what memory and what time it takes; nothing is trained or read.

    Args:
        sources: what is trained on, where it is there.

    Raises:
        UserError: ``spec`` cannot be trained so, or on ``sources``: see ``training.check``.
    """
    check.execution(spec.training, runtime, processes)
    vla, processor = on_meta(spec, sources.states.shape[1] if sources and spec.proprioception else 0)
    material = check.material(spec, sources, vla.backbone, runtime.compile) if sources else None
    sizes, training = audit(vla, processor, spec, image_size).sizes, spec.training
    device = torch_device(runtime.device)
    rate = matrix_rate(device, training.precision)
    samples = training.batch_size // (processes * runtime.accumulate)
    states, each = gib_needed(vla, sizes, spec, runtime, processes, sources, material)
    activations = each * samples
    flops = sizes["training_gflop"] * 1e9 * (4 / 3 if runtime.gradient_checkpointing else 1)
    floor_s = flops * training.batch_size * training.steps / rate / processes
    lines = [
        *(f"{name:<16} {_parameters(name, sizes)}" for name in sizes["trained"]),
        *(f"{'without adapter':<16} {name} {number:,}" for name, number in sizes["without_adapter"].items()),
        f"{'steps':<16} {training.steps:,} of {training.batch_size} samples",
        *(f"{'data':<16} {line}" for line in _passes(sources, training.steps * training.batch_size)),
        f"{'processes':<16} {processes}, each {samples} samples at a time, {runtime.accumulate} time(s) a step",
        f"{'memory':<16} {states:.2f} GiB weights, gradients and moments + {activations:.2f} GiB activations "
        f"(estimate) in each process{_there(device)}",
        f"{'work':<16} {flops / 1e9:.1f} GFLOP a sample",
        f"{'time':<16} {_duration(floor_s)} at this device's measured matrix rate ({rate / 1e12:.2f} TFLOP/s), "
        f"{_duration(2 * floor_s)} at half of it",
    ]
    if states + activations > gib_there(device):
        lines.append(
            f"{'too much':<16} try --accumulate {2 * runtime.accumulate}, --gradient-checkpointing, or --shard"
        )
    return lines


def _passes(sources: Sources | None, samples: int) -> list[str]:
    """How often each source is seen."""
    if sources is None:
        return ["not here: nothing of it was looked at"]
    lines = [
        f"{name}: {share:.1%} of the samples, {samples * share / size:.1f} times its {size:,}"
        for name, share, size in zip(sources.names, sources.shares, sources.sizes, strict=True)
    ]
    note = ["conversations: work is counted as a frame's; answers and the LM head come on top"]
    return lines + note * bool(sources.conversations)


def gib_needed(
    vla: VLA,
    sizes: Mapping[str, Any],
    spec: RunSpec,
    runtime: Runtime,
    processes: int,
    sources: Sources | None = None,
    material: Material | None = None,
) -> tuple[float, float]:
    """Memory that each process needs, in GiB, estimated.

    Args:
        sizes: of the run's ``audit``.
        sources, material: where they are here. Without them, all samples are taken for frames; with conversations among
            them, what those take beyond frames is read off the first ``LOOKED_AT`` batches, and the largest counts.

    Returns:
        What does not grow with the batch (weights and their copies in bf16, gradients, Adam's moments), and the
        activations of one sample. Samples differ, so that is the mean over the samples of one forward pass: times
        their number it gives the whole.
    """
    states = sizes["states_gib"] / (processes if runtime.shard else 1)
    if not (runtime.shard or runtime.gradient_checkpointing):  # where it is a layer's at a time
        states += copies_bytes(vla, spec) / GIB
    # With checkpointing a layer's activations are there at a time, and each layer's input: about twice a layer's share.
    share = 2 / max(2, len(units(vla))) if runtime.gradient_checkpointing else 1
    each = sizes["activations_gib"] * share
    if sources and sources.conversations and material and material.mixture:
        samples = spec.training.batch_size // (processes * runtime.accumulate)
        starts = spec.training.batch_size * np.arange(LOOKED_AT)
        found = []
        for start in starts:
            source, within = material.mixture.draw(np.arange(start, start + samples), spec.seed)
            talks = sources.talks((sources.first[source] + within)[source >= len(sources.sets)])
            if talks:
                more, logits = answers_bytes(vla, spec, material.image_size, talks)
                found.append(more * share + logits)
        each += max(found, default=0) / samples / GIB
    return states, each


def _parameters(name: str, sizes: dict) -> str:
    trained, frozen = sizes["trained"][name], sizes["frozen"].get(name, 0)
    if not trained:
        return f"{frozen:,} frozen"
    return f"{trained:,} trained" + (f", {frozen:,} frozen" if frozen else "")


def gib_there(device: torch.device) -> float:
    """All memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return float("inf")


def _there(device: torch.device) -> str:
    return f" of {gib_there(device):.0f} GiB" if device.type == "cuda" else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
