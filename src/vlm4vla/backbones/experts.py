"""Experts of a mixture, which transformers keeps as three-dimensional parameters, in the precision of the rest.

Transformers' own way with them knows no autocast: with fp32 weights they compute in fp32 whatever the rest does. peft's
own way with their adapters (``target_parameters``) makes the sum of all experts and what adapters add in every forward
pass. Here each token meets its experts' matrices and, beside them, their low-rank ones
(docs/adr/0007-adapters-of-experts.md). T tokens, K experts of each, P = T x K pairs, E experts, R rank, I and O a
matrix's in and out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

# Not public, but what transformers' own experts run on: it finds the kernel that torch and the device have.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from vlm4vla.errors import UserError

NAME = "vlm4vla"
"""Of ``compute`` among transformers' implementations of experts."""
PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""What configurations call K: most of transformers'; Gemma 4's; Aria's."""
Factors = tuple[Tensor, Tensor, float]
"""A (E, R, I) and B (E, R, O) of one parameter's adapters, and what their product is scaled by."""


def find(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of all experts that transformers can be told how to compute."""
    return [(name, part) for name, part in module.named_modules() if hasattr(part, "is_concatenated")]


def matrices(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Their weights by name, each (E, O, I), or (E, I, O) where they ``is_transposed``."""
    return {name: value for name, value in experts.named_parameters(recurse=False) if value.ndim == 3}


def per_token(vlm: PreTrainedModel) -> int:
    """K, by the VLM's configuration; 1 where it has no experts.

    Raises:
        UserError: there are experts, and the configuration has no key that is known.
    """
    if not find(vlm):
        return 1
    config = vlm.config.get_text_config()
    for name in PER_TOKEN:
        if number := getattr(config, name, None):
            return number
    raise UserError(
        f"experts of a mixture, and in {type(config).__name__} nothing known that says how many of them a token meets",
        f"one of {', '.join(PER_TOKEN)}",
        "add the key's name to PER_TOKEN in src/vlm4vla/backbones/experts.py",
    )


def share(vlm: PreTrainedModel) -> float:
    """K / E: the part of experts' weights that a token meets; 1 where there are none."""
    return next((per_token(vlm) / mixture.num_experts for _, mixture in find(vlm)), 1.0)


def width(vlm: PreTrainedModel) -> int:
    """Numbers that go in and out of experts' matrices, and between their adapters, for one token in all layers."""
    beside = [value for _, mixture in find(vlm) for value in matrices(mixture).values()]
    ranks = [rank for part in vlm.modules() if isinstance(part, LowRank) for rank in part.r.values()]
    return per_token(vlm) * (sum(sum(value.shape[1:]) for value in beside) + 2 * sum(ranks))


def compute(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, adapters: Mapping[str, Factors] | None = None
) -> Tensor:
    """Tokens (T, D), their experts' numbers (T, K) and weights (T, K) -> (T, D), in autocast's precision."""
    device, number = hidden.device.type, chosen.shape[1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else experts.down_proj.dtype
    expert, pair = chosen.flatten().sort()
    numbers = torch.arange(experts.num_experts, device=expert.device)
    ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)  # of each expert's pairs

    def product(x: Tensor, name: str) -> Tensor:
        y = _grouped_linear(x, getattr(experts, name).to(dtype), ends, is_transposed=experts.is_transposed)
        if adapters and name in adapters:
            a, b, scale = adapters[name]
            # torch starts each row of what it makes at a multiple of 16 bytes, and its product in bf16 on a CPU reads
            # what lies between two rows: of an odd rank memory as it is found, which may be no number.
            if lacking := -a.shape[1] % 8:
                a, b = (nn.functional.pad(value, (0, 0, 0, lacking)) for value in (a, b))
            low = _grouped_linear(x, a.to(dtype), ends)
            y = y + scale * _grouped_linear(low, b.to(dtype), ends, is_transposed=True)
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


class LowRank(ParamWrapper):
    """peft's adapters of one parameter of experts; the outermost of several computes with all of them."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        adapters: dict[str, Factors] = {}
        wrapper: Any = self
        while isinstance(wrapper, LowRank):
            adapters[wrapper.parameter_name] = factors(wrapper)
            wrapper = wrapper.base_layer
        return compute(wrapper, hidden, chosen, weights, adapters)


def factors(wrapper: Any) -> Factors:
    """peft has the experts' A (R, I) below each other, and in a row of B the experts side by side for each rank."""
    (name,) = wrapper.active_adapters
    a, b, count = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    return a.unflatten(0, (count, -1)), by_expert(b, count), wrapper.scaling[name]


@torch.library.custom_op("vlm4vla::by_expert", mutates_args=())
def by_expert(b: Tensor, count: int) -> Tensor:
    """peft's B (O, R x E) -> (E, R, O), laid out so.

    An operator, for torch's compiler would leave B as it lies, which its product in bf16 does not take.
    """
    return b.unflatten(1, (-1, count)).permute(2, 1, 0).clone(memory_format=torch.contiguous_format)


@by_expert.register_fake
def _(b: Tensor, count: int) -> Tensor:
    return b.new_empty(count, b.shape[1] // count, b.shape[0])


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad.permute(2, 1, 0).flatten(1), None


by_expert.register_autograd(_back)
