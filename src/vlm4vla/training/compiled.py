"""Layers through ``torch.compile``: each class of layers once, for one shape; the rest of the model stays as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch._dynamo.exc import TorchDynamoException

from vlm4vla.errors import UserError
from vlm4vla.spec import Runtime
from vlm4vla.training.processes import units


@contextmanager
def compiled(module: nn.Module, runtime: Runtime) -> Iterator[None]:
    """For a while, layers of ``module`` run compiled, where ``runtime`` asks for it; each when it first runs.

    Raises:
        UserError: the compiler fails on these layers.
    """
    if not runtime.compile:
        yield
        return
    layers = units(module)
    for layer in layers:
        layer.compile(dynamic=False)  # with changing shapes the compiler fails on some families' vision towers
    try:
        yield
    except TorchDynamoException as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"layers that do not compile ({why})", "a family whose layers do", "leave out --compile"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
