"""Low-rank adapters (LoRA) beside a VLM's linear layers and experts, made by peft and kept in peft's own files.

A folder of adapters opens in plain peft: ``PeftModel.from_pretrained(vlm, folder)``. Those of experts are peft's as
well; how they are computed is ours (``experts.LowRank``).
"""

import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm4vla.backbones import experts
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


def without(vlm: PreTrainedModel, group: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Of a group with adapters, the matrices that have none: the end of their name -> how many numbers they hold."""
    below = {id(_below(module)) for module in vlm.modules() if isinstance(module, LoraLayer)}
    counts: dict[str, int] = {}
    for name, parameter in group.items():
        if parameter.ndim > 1 and id(parameter) not in below and not is_adapter(name):
            end = ".".join([part for part in name.split(".") if part != "base_layer"][-2:])
            counts[end] = counts.get(end, 0) + parameter.numel()
    return counts


def _below(module: Any) -> nn.Parameter:
    """What the adapter in a ``LoraLayer`` adds to."""
    return module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight


def add(vlm: PreTrainedModel, groups: Mapping[str, Mapping[str, nn.Parameter]], treatment: TreatmentSpec) -> None:
    """Put adapters beside the linear layers and the experts of every group whose mode is ``lora``; they change nothing
    at first.

    Raises:
        UserError: a group has neither of the names that are asked for.
    """
    linear = {name: module.weight for name, module in vlm.named_modules() if isinstance(module, nn.Linear)}
    mixed = {f"{at}.{end}": value for at, part in experts.find(vlm) for end, value in experts.matrices(part).items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for group, mode in treatment.groups().items():
        if mode.mode != "lora":
            continue
        assert mode.rank is not None
        assert mode.alpha is not None
        own = {id(parameter) for parameter in groups[group].values()}
        names = [name for name, weight in (linear | mixed).items() if id(weight) in own]
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
                f"names among its linear layers and experts: {', '.join(known)}",
                f"--set treatment.{group}.targets=[{known[0]}], or several of them",
            )
        ranks |= dict.fromkeys(found, mode.rank)
        alphas |= dict.fromkeys(found, mode.alpha)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[name for name in ranks if name in linear],
        target_parameters=[name for name in ranks if name in mixed],
        rank_pattern={_exactly(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={_exactly(name): value for name, value in alphas.items() if value != alpha},
    )
    _inject(config, vlm)


def _inject(config: LoraConfig, vlm: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        # peft looks for these names among modules alone, and experts' matrices are parameters; their ranks are taken.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        inject_adapter_in_model(config, vlm, NAME)
    for module in vlm.modules():
        if isinstance(module, ParamWrapper):
            # Not before: while peft puts one wrapper around another, it knows them by the name of their class.
            module.__class__ = experts.LowRank


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
    config: Any = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    _inject(config, vlm)
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
        if isinstance(module, (Linear, ParamWrapper)):
            below = _below(module)
            below += module.get_delta_weight(NAME)
            if not name.endswith(".base_layer"):  # of two around the same experts, the inner one
                vlm.set_submodule(name, module.get_base_layer())
