"""Low-rank adapters (LoRA) beside a VLM's linear layers, made by peft and kept in peft's own files.

A folder of adapters opens in plain peft: ``PeftModel.from_pretrained(vlm, folder)``. Experts of a mixture, which are
three-dimensional parameters and no linear layers, get none, and an audit says so. peft's way with them
(``target_parameters``, 0.21) puts the sum of all experts and their adapters in memory in every forward pass, 2.4 GB a
layer of Qwen3-VL-30B-A3B in fp32, and exchanges parameters meanwhile, which FSDP2 does not bear.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm4vla.errors import UserError
from vlm4vla.spec import GroupSpec, TreatmentSpec

NAME = "default"
"""peft's name for the only adapter; in a model's parameter names, not in the file."""
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's files count from its own wrapper."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def present(vlm: PreTrainedModel) -> bool:
    return any(is_adapter(name) for name, _ in vlm.named_parameters())


def without(group: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Of a group with adapters, the matrices that have none: the end of their name -> how many numbers they hold."""
    bases = {name.partition(".lora_")[0] + ".base_layer.weight" for name in group if is_adapter(name)}
    counts: dict[str, int] = {}
    for name, parameter in group.items():
        if parameter.ndim > 1 and name not in bases and not is_adapter(name):
            end = ".".join(name.replace(".base_layer.", ".").split(".")[-2:])
            counts[end] = counts.get(end, 0) + parameter.numel()
    return counts


def add(vlm: PreTrainedModel, groups: Mapping[str, Mapping[str, nn.Parameter]], treatment: TreatmentSpec) -> None:
    """Put adapters beside the linear layers of every group whose mode is ``lora``; they change nothing at first.

    Raises:
        UserError: a group has no linear layer of the names that are asked for.
    """
    linear = {name: module for name, module in vlm.named_modules() if isinstance(module, nn.Linear)}
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for group, mode in treatment.groups().items():
        if mode.mode != "lora":
            continue
        assert mode.rank is not None
        assert mode.alpha is not None
        own = {id(parameter) for parameter in groups[group].values()}
        names = [name for name, module in linear.items() if id(module.weight) in own]
        found = [name for name in names if mode.targets is None or name.rpartition(".")[2] in mode.targets]
        if not names:  # Gemma 3's projector is a matrix, Ovis2's a table
            raise UserError(
                f"adapters for the {group} of {type(vlm).__name__}, which has no linear layer",
                f"a treatment that freezes it, or trains all of it, and says so: {group}: frozen, or {group}: trained",
                f"--set {shlex.quote(f'treatment={_without(treatment, group)}')}",
            )
        if not found:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"no linear layer {list(mode.targets or ())} in {group} of {type(vlm).__name__}",
                f"names among its linear layers: {', '.join(known)}",
                f"--set treatment.{group}.targets=[{known[0]}], or several of them",
            )
        ranks |= dict.fromkeys(found, mode.rank)
        alphas |= dict.fromkeys(found, mode.alpha)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={_exactly(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={_exactly(name): value for name, value in alphas.items() if value != alpha},
    )
    inject_adapter_in_model(config, vlm, NAME)


def _without(treatment: TreatmentSpec, group: str) -> str:
    """The treatment with this group frozen, as YAML in one line."""
    groups: dict[str, Any] = {}
    for name, mode in treatment.model_dump(exclude={"name"}, exclude_none=True).items():
        plain = GroupSpec.model_validate(mode["mode"]).model_dump(exclude_none=True)
        groups[name] = "frozen" if name == group else mode["mode"] if mode == plain else mode
    values = {"name": f"{treatment.name}_without_{group}", **groups}
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=sys.maxsize).strip()


def _exactly(name: str) -> str:
    """peft takes the keys of its patterns as regular expressions for the end of a name."""
    return "^" + name.replace(".", r"\.")


def save(vlm: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write peft's two files into ``folder``; ``state`` holds the VLM's whole tensors by name."""
    folder.mkdir(parents=True)
    config: Any = vlm.peft_config[NAME]
    name = str(vlm.name_or_path)
    # Of a hub's model only: a folder of this machine says nothing elsewhere, and a push would publish it.
    config.base_model_name_or_path = name if name.count("/") == 1 and not Path(name).exists() else None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    tensors = {_in_file(name): value.cpu().contiguous() for name, value in state.items() if is_adapter(name)}
    save_file(tensors, folder / FILE, {"format": "pt"})


def load(vlm: PreTrainedModel, folder: Path) -> None:
    """Add the adapters of ``folder`` to the VLM that they were trained on.

    Raises:
        OSError, SafetensorError, ValueError: ``folder`` is damaged or of another VLM.
    """
    tensors = load_file(folder / FILE)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    inject_adapter_in_model(config, vlm, NAME)
    own = {name: parameter for name, parameter in vlm.named_parameters() if is_adapter(name)}
    if tensors.keys() != {_in_file(name) for name in own}:
        raise ValueError(f"the adapters in {folder} are of another VLM")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[_in_file(name)])


def _in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


@torch.no_grad()
def merge(vlm: PreTrainedModel) -> None:
    """Add what adapters add to the weights below them, and take them out (equal up to rounding)."""
    for name, module in list(vlm.named_modules()):
        if isinstance(module, Linear):
            base: Any = module.get_base_layer()
            base.weight += module.get_delta_weight(NAME)
            vlm.set_submodule(name, base)
