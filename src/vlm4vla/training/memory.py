"""Out of memory: what it was for, which knob to turn, and by how much."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vlm4vla.errors import UserError
from vlm4vla.policy import torch_device
from vlm4vla.spec import Runtime
from vlm4vla.training.forecast import gib_there

USABLE = 0.9
"""Share of a device's memory that tensors can fill; the rest goes to the driver, to workspaces and to fragments."""


@contextmanager
def told(sizes: Callable[[], tuple[float, float]], samples: int, runtime: Runtime) -> Iterator[None]:
    """Turn an allocation that fails into the error that says what helps.

    Args:
        sizes: estimates of this process in GiB: weights, gradients and moments; activations of one sample. Only asked
            for when memory has run out.
        samples: of a batch, in this process.

    Raises:
        UserError: memory ran out within the block.
    """
    try:
        yield
    except RuntimeError as error:
        # On the CPU allocations fail with a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise advice(*sizes(), samples, runtime, gib_there(torch_device(runtime.device))) from error


def advice(states: float, each: float, samples: int, runtime: Runtime, available: float) -> UserError:
    """What to change so that ``states`` + activations of ``each`` GiB a sample fit into ``available`` GiB."""
    at_once = math.ceil(samples / runtime.accumulate)
    found = (
        f"out of memory ({available:.1f} GiB): about {states:.1f} GiB of weights, gradients and moments and "
        f"{at_once * each:.1f} GiB of activations, {each:.2f} GiB for each of {at_once} samples at a time"
    )
    room = USABLE * available - states
    if room <= 0:
        devices = math.ceil(states / (USABLE * available)) + 1
        expected = f"less than {USABLE * available:.1f} GiB of weights, gradients and moments"
        return UserError(found, expected, f"spread them over {devices} devices (--shard), or freeze parts (treatment)")
    # The estimate may have said that it fits; it did not, so at most half as many.
    fits = min(int(room / max(each, 1e-4)), at_once // 2)
    if fits >= 1:
        parts = next(parts for parts in range(math.ceil(samples / fits), samples + 1) if samples % parts == 0)
        return UserError(
            found,
            f"about {samples // parts} samples at a time",
            f"the same command with --accumulate {parts} (now {runtime.accumulate}); the batch stays the same",
        )
    expected = f"room for one sample: {each:.2f} GiB, and there are {room:.2f}"
    if not runtime.gradient_checkpointing:
        return UserError(found, expected, "the same command with --gradient-checkpointing")
    return UserError(found, expected, "freeze parts (treatment), or smaller pictures (data.image_size)")
