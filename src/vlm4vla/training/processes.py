"""Several processes train one policy: which part of a batch each one takes, and what they hold together.

Accelerate starts the processes' group and wraps the model for DDP. FSDP2 is torch's own ``fully_shard``, applied in
place before the optimiser is made (docs/adr/0005-fsdp2-by-torch.md). A batch is the same whatever the number of
processes: each takes a contiguous part of it, and every random number is drawn for the whole.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

AHEAD = 2
"""Batches that are made while the device works on the present one."""
TEXT_BYTES = 64


def number() -> int:
    """How many processes train together, as ``torchrun`` or ``accelerate launch`` say in ``WORLD_SIZE``; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def reduce(accelerator: Accelerator, value: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """A tensor that every process has, over all of them."""
    return cast(Tensor, accelerator.reduce(value, how))


class PartOf:
    """Draws like numpy's generator for all ``total`` samples of a batch and gives the rows of one part of them."""

    def __init__(self, rng: np.random.Generator, total: int, part: slice):
        self.rng, self.total, self.part = rng, total, part
        self.count = len(range(total)[part])

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> np.ndarray:
        return self.rng.uniform(low, high, self._whole(size))[self.part]

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: int | tuple[int, ...] = 1) -> np.ndarray:
        return self.rng.normal(loc, scale, self._whole(size))[self.part]

    def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
        return self.rng.integers(low, high, self._whole(size))[self.part]

    def _whole(self, size: int | tuple[int, ...]) -> tuple[int, ...]:
        count, *others = (size,) if isinstance(size, int) else size
        assert count == self.count, "one draw a sample, or parts of a batch would not be those of the whole"
        return (self.total, *others)


@contextmanager
def ahead(make: Callable[[int], Any], steps: range) -> Iterator[Iterator[Any]]:
    """``make(step)`` for every step in order, made in a thread of its own while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = [pool.submit(make, step) for step in steps[:AHEAD]]

            def results() -> Iterator[Any]:
                for step in steps:
                    if step + AHEAD in steps:
                        waiting.append(pool.submit(make, step + AHEAD))
                    yield waiting.pop(0).result()

            yield results()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def first_says(accelerator: Accelerator, text: str) -> str:
    """The first process's ``text`` (ASCII, ``TEXT_BYTES`` at most); every process must ask."""
    if accelerator.num_processes == 1:
        return text
    data = np.frombuffer(text.encode("ascii").ljust(TEXT_BYTES), np.uint8).copy()
    said = cast(Tensor, broadcast(torch.from_numpy(data).to(accelerator.device)))
    return said.cpu().numpy().tobytes().decode("ascii").rstrip()


def place(module: nn.Module, accelerator: Accelerator, sharded: bool, half: bool) -> None:
    """Give every process on its device what the first process holds; in the others ``module`` may be on ``meta``.

    Args:
        sharded: every parameter is spread over the processes (FSDP2); a layer is whole only while it runs, and here
            while it is handed round.
        half: with ``sharded``, layers run in bf16, from fp32 shards, with gradients summed in fp32.
    """
    device, number = accelerator.device, accelerator.num_processes
    if sharded and number > 1:
        mesh = init_device_mesh(device.type, (number,))
        dtypes: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if half else {}
        for part in (*units(module), module):
            receive(part, device, number)
            # What goes into the whole is a batch, whose targets stay as they are.
            policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=part is not module)
            fully_shard(part, mesh=mesh, mp_policy=policy)
    else:
        receive(module, device, number)


def receive(module: nn.Module, device: torch.device, number: int) -> None:
    """Put parameters and buffers on ``device``; with a ``number`` of processes they are the first one's."""
    if number == 1:
        module.to(device)
        return
    held: dict[int, Tensor] = {}  # a tied one stays one
    for part in module.modules():
        for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if isinstance(value, DTensor):
                continue
            if id(value) not in held:
                data = value.detach()
                data = torch.empty_like(data, device=device) if data.is_meta else data.to(device).contiguous()
                torch.distributed.broadcast(data, 0)
                kept = isinstance(value, nn.Parameter)
                held[id(value)] = nn.Parameter(data, value.requires_grad) if kept else data
            setattr(part, name, held[id(value)])


def units(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: each layer; and an LM head of its own, which runs for conversations alone."""
    layers: list[nn.Module] = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    for vlm in module.modules():
        if isinstance(vlm, PreTrainedModel) and (head := vlm.get_output_embeddings()) is not None:
            table = {id(parameter) for parameter in vlm.get_input_embeddings().parameters()}
            if head not in layers and not any(id(parameter) in table for parameter in head.parameters()):
                layers.append(head)
    return layers


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A tensor's all rows; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(module: nn.Module, average: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The module's state by name, whole, the averaged weights in place of the last ones; every process must ask.

    Args:
        keep: False in processes that only help: their result is empty.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}  # a tied one by its first name
    seen: dict[str, Tensor] = {}
    state = {}
    for key, value in module.state_dict(keep_vars=True).items():
        name = names.get(id(value), key)
        if name not in seen:
            held: Any = average.get(name, value)
            source = held.detach()
            gathered = whole(source)
            # Sharded ones are moved away at once: a device that needs shards cannot hold all of them.
            seen[name] = gathered.cpu() if keep and gathered is not source else gathered if keep else torch.empty(0)
        if keep:
            state[key] = seen[name]
    return state
