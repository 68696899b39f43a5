"""Treatments: which parts of a VLM are trained, kept, adapted or drawn anew, with one meaning for every family.

Six groups partition a VLM's parameters: ``vision`` (encoder), ``projector``, ``llm`` (decoder layers and norm),
``word_embedding`` (input table) and ``lm_head`` (output table where it is not the input's; a policy acts without it, so
it is never trained, with conversations neither, and drawn anew only where all is), and ``audio`` (what Gemma 3n and 4
hear with, treated as the LM head is). The released VLM4VLA code freezes Qwen's merger with its vision encoder and
leaves PaliGemma's projector trained under the same name; here the projector is a group of its own for all.
"""

from torch import nn
from transformers import PreTrainedModel

from vlm4vla.backbones import adapters
from vlm4vla.backbones.vlm import auto_class
from vlm4vla.spec import VLM_GROUPS, TrainSpec, TreatmentSpec


def groups(vlm: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """Group -> name -> parameter; a partition of ``vlm.named_parameters()``, adapters with what they sit on."""

    def ids(module: nn.Module | None) -> set[int]:
        return set() if module is None else {id(parameter) for parameter in module.parameters()}

    word, head = ids(vlm.get_input_embeddings()), ids(vlm.get_output_embeddings())
    llm, vision = ids(vlm.get_decoder()), ids(vlm.get_encoder(modality="image"))
    result: dict[str, dict[str, nn.Parameter]] = {name: {} for name in (*VLM_GROUPS, "lm_head", "audio")}
    for name, parameter in vlm.named_parameters():
        key = id(parameter)
        if key in word:
            group = "word_embedding"
        elif key in head:
            group = "lm_head"
        elif key in llm:
            group = "llm"
        elif "audio" in name:
            group = "audio"
        elif key in vision and "merger" not in name:
            group = "vision"
        else:
            group = "projector"
        result[group][name] = parameter
    return result


def treat(vlm: PreTrainedModel, treatment: TreatmentSpec) -> PreTrainedModel:
    """The VLM under a treatment: what is not trained has ``requires_grad`` False. ``vlm`` itself may be changed.

    New draws and adapters use torch's global generator: seed it before. A group drawn alone gets the weights that it
    gets when all are drawn.

    Raises:
        UserError: adapters for a group without linear layers or experts of the names asked for.
    """
    modes = treatment.groups()
    drawn = [name for name, group in modes.items() if group.mode == "scratch"]
    if drawn:
        vlm = _draw(vlm, drawn)
    if any(group.mode == "lora" for group in modes.values()):
        adapters.add(vlm, groups(vlm), treatment)
    for name, parameters in groups(vlm).items():
        for path, parameter in parameters.items():
            mode = modes[name].mode if name in modes else "frozen"
            parameter.requires_grad_(adapters.is_adapter(path) if mode == "lora" else mode != "frozen")
    return vlm


def _draw(vlm: PreTrainedModel, names: list[str]) -> PreTrainedModel:
    # A whole new model, because apply(_init_weights) after from_pretrained silently does nothing in transformers 5.
    fresh = auto_class(vlm.config).from_config(vlm.config, dtype=vlm.dtype)
    if set(names) == set(VLM_GROUPS):
        return fresh  # the LM head and what is no parameter as well
    new = groups(fresh)
    for name in names:
        for path, parameter in groups(vlm)[name].items():
            parameter.data.copy_(new[name][path].data)
    return vlm


def overwritten(vlm: PreTrainedModel, treatment: TreatmentSpec) -> list[str]:
    """Names of the parameters that training changes in place, adapters not counted."""
    whole = [name for name, group in treatment.groups().items() if group.mode in ("trained", "scratch")]
    return [path for name in whole for path in groups(vlm)[name]]


def lr_scales(vlm: PreTrainedModel, treatment: TreatmentSpec, training: TrainSpec) -> dict[str, float]:
    """Peak learning rate as a factor on ``training.learning_rate``, of each group that is trained and of ``head``."""
    scales = {}
    for name, group in treatment.groups().items():
        if group.mode != "frozen" and any(p.requires_grad for p in groups(vlm)[name].values()):
            given = 1.0 if group.mode in ("lora", "scratch") else training.vlm_lr_scale
            scales[name] = group.learning_rate / training.learning_rate if group.learning_rate else given
    if treatment.head.mode == "trained":
        rate = treatment.head.learning_rate
        scales["head"] = rate / training.learning_rate if rate else 1.0
    return scales


def count(vlm: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Group -> ``{"trained": n, "frozen": n}`` parameters."""
    return {
        group: {
            "trained": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters.values() if not p.requires_grad),
        }
        for group, parameters in groups(vlm).items()
    }
