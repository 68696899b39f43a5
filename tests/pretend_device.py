"""A device that is the CPU, and as strict as a GPU about what lies where.

Its tensors hold one of the CPU and say that they lie on ``DEVICE``. An operation that mixes them with the CPU's own
fails as on a GPU, and where the CPU would have to wait for the device is noted: where it reads a value, or makes a
tensor whose size depends on one. What it cannot show is anything about kernels: precision, memory, time.
"""

import traceback
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import vlm4vla


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


_setup_privateuseone_for_python_backend("pretend", Backend())
DEVICE = torch.device("pretend", 0)
COPIES = ("_to_copy", "copy_")
READS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero")
INDEXED = ("_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_")
"""They take indices of the CPU as well."""


class OnDevice(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        sizes = (held.shape, held.stride(), held.storage_offset())
        made = Tensor._make_wrapper_subclass(cls, *sizes, dtype=held.dtype, device=DEVICE)  # pyright: ignore
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            return func(args[0].cpu())
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, _args: tuple = (), _kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} on {DEVICE} outside of Pretend")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"


class Pretend(TorchDispatchMode):
    """While it is on, this thread can make tensors on ``DEVICE`` and compute with them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        """How often the CPU waited, by package (this one, transformers, none of both) and line."""
        self.moved = 0
        """Bytes that came from the CPU."""

    def __enter__(self) -> "Pretend":
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device=...): made on the CPU and moved
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = any(isinstance(tensor, OnDevice) for tensor in tensors)
        to = kwargs.get("device")
        there = isinstance(args[0], OnDevice) if name == "copy_" else ours if to is None else to.type == DEVICE.type
        indices = args[1] if name in INDEXED else ()
        if ours and name not in COPIES:
            free = {id(index) for index in indices}
            mixed = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim and id(t) not in free]
            if mixed:
                raise RuntimeError(f"{func} of tensors on {DEVICE} and of others on {mixed[0].device}")
        masked = any(isinstance(index, OnDevice) and index.dtype == torch.bool for index in indices)
        if ours and (masked or name in READS or (name in COPIES and not there)):
            self.waits[_place()] += 1
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = pytree.tree_map_only(OnDevice, lambda t: t.held, (args, kwargs))
        if name == "histc":  # the CPU's takes no whole numbers, a GPU's does
            held_args = (held_args[0].float(), *held_args[1:])
        made = func(*held_args, **held_kwargs)
        if not there:
            return made
        if name in COPIES and not ours:
            self.moved += made.nbytes
        made = pytree.tree_map_only(Tensor, OnDevice, made)
        return return_and_correct_aliasing(func, args, kwargs, made) if ours else made


def _place() -> tuple[str, str]:
    for frame in reversed(traceback.extract_stack()):
        for package in (transformers, vlm4vla):
            if frame.filename.startswith(f"{package.__path__[0]}/"):
                return package.__name__, f"{frame.filename.rsplit('/', 1)[1]}: {frame.line}"
    return "", ""
