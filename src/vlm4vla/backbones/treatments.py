"""Treatments: which parts of a VLM are trained, kept or drawn anew, with one meaning for every family.

Five groups partition a VLM's parameters: ``vision`` (encoder), ``projector``, ``llm`` (decoder layers and norm),
``word_embedding`` (input table) and ``lm_head`` (output table where it is not the input's; a policy never runs it).
The released VLM4VLA code freezes Qwen's merger with its vision encoder and leaves PaliGemma's projector trained under
the same name; here the projector is a group of its own for all.
"""

from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlm4vla.spec import Treatment

FROZEN: dict[Treatment, tuple[str, ...]] = {
    "full": (),
    "freeze_vision": ("vision",),
    "freeze_word_embedding": ("word_embedding",),
    "freeze_llm": ("llm",),
    "freeze_vlm": ("vision", "projector", "llm", "word_embedding"),  # only query and head are trained
    "scratch": (),
}


def groups(vlm: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """Group -> name -> parameter; a partition of ``vlm.named_parameters()``."""

    def ids(module: nn.Module | None) -> set[int]:
        return set() if module is None else {id(parameter) for parameter in module.parameters()}

    word, head = ids(vlm.get_input_embeddings()), ids(vlm.get_output_embeddings())
    llm, vision = ids(vlm.get_decoder()), ids(vlm.get_encoder(modality="image"))
    result: dict[str, dict[str, nn.Parameter]] = {
        name: {} for name in ("vision", "projector", "llm", "word_embedding", "lm_head")
    }
    for name, parameter in vlm.named_parameters():
        key = id(parameter)
        if key in word:
            group = "word_embedding"
        elif key in head:
            group = "lm_head"
        elif key in llm:
            group = "llm"
        elif key in vision and "merger" not in name:
            group = "vision"
        else:
            group = "projector"
        result[group][name] = parameter
    return result


def treat(vlm: PreTrainedModel, treatment: Treatment) -> PreTrainedModel:
    """The VLM under a treatment: frozen groups have ``requires_grad`` False; ``scratch`` is a new draw of its config.

    The draw uses torch's global generator: seed it before.
    """
    if treatment == "scratch":
        # from_config, because apply(_init_weights) after from_pretrained silently does nothing in transformers 5.
        vlm = AutoModelForImageTextToText.from_config(vlm.config, dtype=vlm.dtype)
    for group, parameters in groups(vlm).items():
        for parameter in parameters.values():
            parameter.requires_grad_(group != "lm_head" and group not in FROZEN[treatment])
    return vlm


def count(vlm: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Group -> ``{"trained": n, "frozen": n}`` parameters."""
    return {
        group: {
            "trained": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters.values() if not p.requires_grad),
        }
        for group, parameters in groups(vlm).items()
    }
