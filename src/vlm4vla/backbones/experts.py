"""Experts of a mixture, which transformers keeps as three-dimensional parameters, in the precision of the rest.

Transformers' own way with them knows no autocast: with fp32 weights they compute in fp32 whatever the rest does. T
tokens, K experts of each, P = T x K pairs, E experts, I and O a matrix's in and out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Not public, but what transformers' own experts run on: it finds the kernel that torch and the device have.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

NAME = "vlm4vla"
"""Of ``compute`` among transformers' implementations of experts."""


def find(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of all experts that transformers can be told how to compute."""
    return [(name, part) for name, part in module.named_modules() if hasattr(part, "is_concatenated")]


def matrices(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Their weights by name, each (E, O, I), or (E, I, O) where they ``is_transposed``."""
    return {name: value for name, value in experts.named_parameters(recurse=False) if value.ndim == 3}


def compute(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Tokens (T, D), their experts' numbers (T, K) and weights (T, K) -> (T, D), in autocast's precision."""
    device, number = hidden.device.type, chosen.shape[1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else experts.down_proj.dtype
    expert, pair = chosen.flatten().sort()
    numbers = torch.arange(experts.num_experts, device=expert.device)
    ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)  # of each expert's pairs

    def product(x: Tensor, name: str) -> Tensor:
        y = _grouped_linear(x, getattr(experts, name).to(dtype), ends, is_transposed=experts.is_transposed)
        return y + getattr(experts, f"{name}_bias")[expert].to(dtype) if experts.has_bias else y

    x = hidden[pair // number].to(dtype)  # (P, D)
    x = experts._apply_gate(product(x, "gate_up_proj")) if experts.has_gate else experts.act_fn(product(x, "up_proj"))
    x = product(x, "down_proj")
    if experts.has_post_expert_norm:
        x = experts.post_expert_norm(x)
    x = x * weights.flatten()[pair, None]
    return x[pair.argsort()].unflatten(0, (-1, number)).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, compute)


def use(vlm: PreTrainedModel) -> None:
    """Let all experts of ``vlm`` run through ``compute``."""
    for _, experts in find(vlm):
        experts.config._experts_implementation = NAME
