"""Experts of a mixture: transformers' numbers, in the precision that is asked for."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AriaTextModel, AutoConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

import tiny_families
from vlm4vla.backbones import experts
from vlm4vla.backbones.vlm import Backbone
from vlm4vla.convention import LIBERO
from vlm4vla.data.normalize import Normalizer
from vlm4vla.errors import UserError
from vlm4vla.policy import Policy, untrained
from vlm4vla.spec import RunSpec, TrainSpec

T, E, K, D = 20, 6, 2, 24
SIZES = {"hidden_size": D, "intermediate_size": 40, "moe_intermediate_size": 40}
KINDS = {  # transposed, with a bias, a gate of its own; without a gate
    "gpt_oss": (GptOssExperts, {"num_local_experts": E}),
    "nemotron_h": (NemotronHExperts, {"n_routed_experts": E, "moe_latent_size": None}),
    "qwen3_vl_moe": (Qwen3VLMoeTextExperts, {"num_experts": E}),
    "gemma4": (Gemma4TextExperts, {"num_experts": E}),
}


def made(kind):
    """Experts of one kind and what goes into them; one of them is chosen by no token."""
    build, counts = KINDS[kind]
    mixture = build(AutoConfig.for_model(kind).get_text_config().__class__(**SIZES, **counts))
    mixture.config._experts_implementation = "eager"
    torch.manual_seed(0)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    chosen = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    return mixture, (torch.randn(T, D), chosen, torch.rand(T, K).softmax(1))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_their_gradients_are_transformers_own(kind):
    mixture, inputs = made(kind)
    found = {}
    for name in ("eager", experts.NAME):
        mixture.config._experts_implementation = name
        mixture.zero_grad()
        out = mixture(*inputs)
        out.square().sum().backward()
        found[name] = [out.detach(), *(parameter.grad for parameter in mixture.parameters())]
    assert found["eager"][0].std() > 0.1
    for ours, theirs in zip(found[experts.NAME], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_they_compute_in_bf16(kind, monkeypatch):
    mixture, inputs = made(kind)
    plain = mixture(*inputs)
    mixture.config._experts_implementation = experts.NAME
    product, seen = experts._grouped_linear, set()

    def spied(x, weight, *args, **options):
        seen.update({x.dtype, weight.dtype})
        return product(x, weight, *args, **options)

    monkeypatch.setattr(experts, "_grouped_linear", spied)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixture(*inputs)
    assert seen == {torch.bfloat16}
    assert out.dtype == torch.float32
    torch.testing.assert_close(out / plain.abs().max(), plain / plain.abs().max(), atol=0.01, rtol=0)
    assert not torch.equal(out, plain)


def adapted(mixture, rank):
    """The experts alone in a model, with adapters of all their matrices that are not zero."""
    model = torch.nn.ModuleDict({"experts": mixture}).requires_grad_(False)
    names = [f"experts.{name}" for name in experts.matrices(mixture)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=5, target_modules=[], target_parameters=names), model)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 0, 0.3) if "lora_" in name else None
    return model, names


def as_ours(model):
    for part in model.modules():
        if isinstance(part, ParamWrapper):
            part.__class__ = experts.LowRank


class Large(TorchDispatchMode):
    """Counts the tensors as large as a matrix of all experts that are made beside those there are."""

    def __init__(self, mixture):
        super().__init__()
        self.numbers = min(value.numel() for value in experts.matrices(mixture).values())
        self.known = {value.data_ptr(): value for value in mixture.parameters()}
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numbers and out.data_ptr() not in self.known:
            self.made += 1
            self.known[out.data_ptr()] = out  # kept, or the next one may lie in its place
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_their_adapters_and_gradients_are_pefts_own_without_the_sum_of_all_experts(kind, half):
    mixture, inputs = made(kind)
    model, names = adapted(mixture, 3)

    def out_and_gradients():
        model.zero_grad()
        with Large(mixture) as large, torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model["experts"](*inputs)
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], large.made

    theirs, sums = out_and_gradients()
    as_ours(model)
    ours, copies = out_and_gradients()
    assert len(ours) == len(theirs) == 1 + 2 * len(names)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), atol=0.03 if half else 1e-5, rtol=0)
    assert sums >= len(names)
    assert copies == half * len(names), "in bf16 each is cast"


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_memory_held_before_does_not_enter_a_product_of_any_rank(rank):
    mixture, (hidden, chosen, weights) = made("qwen3_vl_moe")
    model, _ = adapted(mixture, rank)
    as_ours(model)
    many = hidden.repeat(50, 1), chosen.repeat(50, 1), weights.repeat(50, 1)
    freed = [torch.full((50 * T * K, number), torch.nan, dtype=torch.bfloat16) for number in range(1, 33)]
    del freed
    with torch.autocast("cpu", torch.bfloat16):
        out = model["experts"](*many)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_backbones_experts_are_computed_here_and_cast_once_to_act():
    spec = RunSpec(training=TrainSpec(precision="bf16"))
    vla = untrained(*tiny_families.draw("qwen3_vl_moe"), spec).eval()
    mixtures = [part for _, part in experts.find(vla)]
    assert len(mixtures) == 3
    assert {part.config._experts_implementation for part in mixtures} == {experts.NAME}
    Policy(vla, spec, LIBERO, Normalizer.fit(np.eye(7, dtype=np.float32)), None, 64, {}).for_acting(torch.device("cpu"))
    assert {p.dtype for part in mixtures for p in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "number"), [("qwen3_vl_moe", 2), ("gemma4_moe", 2), ("qwen3_vl", 1)])
def test_how_many_experts_a_token_has(name, number):
    assert experts.per_token(Backbone(*tiny_families.draw(name)).vlm) == number


def test_a_number_of_experts_under_another_key_is_found_or_asked_for(monkeypatch):
    sizes = {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
    config: Any = AutoConfig.for_model("aria_text", **sizes, moe_num_experts=E, moe_topk=K)
    aria = AriaTextModel(config)
    assert experts.per_token(aria) == K
    assert experts.share(aria) == K / E
    monkeypatch.setattr(experts, "PER_TOKEN", ("num_experts_per_tok",))
    with pytest.raises(UserError, match="in AriaTextConfig nothing known"):
        experts.per_token(aria)
