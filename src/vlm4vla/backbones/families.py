"""Families of VLMs: one row each for what cannot be read off the model or its processor. No torch here.

The common way needs no row: the model's own chat template with one picture and ``QUESTION``, its own processor, its own
forward. ``docs/backbones.md`` tells how to find out whether a new family needs one (``vlm4vla backbones check ID``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUESTION = "What action should the robotic arm take to {instruction}"
"""VLM4VLA's question for instruction-tuned VLMs (its Qwen and InternVL templates)."""
SYSTEM = "You are a helpful assistant."
"""VLM4VLA's system message for them. Said explicitly: not every version of these templates adds it by itself."""


@dataclass(frozen=True)
class Family:
    """How a family departs from the common way."""

    title: str
    hub_ids: tuple[str, ...] = ()
    """Known models, for ``backbones list`` and for the nearest name of a misspelt one."""
    system: str | None = None
    """System message before the question."""
    plain: str | None = None
    """The whole prompt of a family without a chat template; its processor adds the rest (bos, newline, picture)."""
    images: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the image processor: one tile a picture, where the family would cut it into several."""
    query_type: int | None = None
    """``token_type_ids`` of the query and of answers, where it is not that of the prompt's last token."""
    keeps_mask: bool = False
    """Needs the padding mask. In a causal family nothing looks at the padding on the right of it: without a mask the
    numbers are the same to the last bit, and attention takes its faster kernel."""
    base_only: bool = False
    """Opened with ``AutoModel``: the class with the LM head is not built around a model without it."""
    embedded: bool = False
    """The VLM that ships with this package (``backbones.tiny``)."""


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2-VL", ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"), SYSTEM),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"), SYSTEM),
    "qwen3_vl": Family("Qwen3-VL", tuple(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B")), SYSTEM),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", ("Qwen/Qwen3-VL-30B-A3B-Instruct",), SYSTEM),
    "qwen3_5": Family("Qwen3.5", ("Qwen/Qwen3.5-27B",)),
    "qwen3_5_moe": Family("Qwen3.5-MoE", ("Qwen/Qwen3.5-35B-A3B",)),
    # Picture and prompt attend to each other in both directions (type 0), the query to both (type 1): a prefix LM.
    # Of type 0, the query would be seen by the prompt, and padding with it.
    "paligemma": Family(
        "PaliGemma 1 and 2",
        ("google/paligemma-3b-pt-224", "google/paligemma2-3b-pt-224"),
        plain="<image>{instruction}",
        query_type=1,
        keeps_mask=True,
    ),
    "kosmos-2": Family("Kosmos-2", ("microsoft/kosmos-2-patch14-224",), plain="<p>{instruction}\n</p>", base_only=True),
    "internvl": Family("InternVL3.5", ("OpenGVLab/InternVL3_5-4B-HF",), SYSTEM, images={"crop_to_patches": False}),
    "gemma3": Family("Gemma 3", ("google/gemma-3-4b-it",)),
    "gemma4": Family("Gemma 4", ("google/gemma-4-E2B-it",)),
    "smolvlm": Family("SmolVLM2", ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",), images={"do_image_splitting": False}),
    "idefics3": Family("Idefics3", ("HuggingFaceM4/Idefics3-8B-Llama3",), images={"do_image_splitting": False}),
    "llava": Family("LLaVA", ("llava-hf/llava-1.5-7b-hf",)),
    "llava_onevision": Family("LLaVA-OneVision", ("llava-hf/llava-onevision-qwen2-7b-ov-hf",)),
    "glm4v": Family("GLM-4.1V", ("zai-org/GLM-4.1V-9B-Thinking",)),
    "glm46v": Family("GLM-4.6V", ("zai-org/GLM-4.6V-Flash",)),
    "mistral3": Family("Mistral 3", ("mistralai/Mistral-Small-3.1-24B-Instruct-2503",)),
    "molmo2": Family("Molmo2", ("allenai/Molmo2-8B",), images={"max_crops": 1}),
    "lfm2_vl": Family("LFM2-VL", ("LiquidAI/LFM2-VL-1.6B",), images={"do_image_splitting": False}),
    "gemma3n": Family("Gemma 3n", ("google/gemma-3n-E2B-it", "google/gemma-3n-E4B-it")),
    "llava_next": Family("LLaVA-NeXT", ("llava-hf/llava-v1.6-mistral-7b-hf",)),
    "perception_lm": Family("Perception LM", ("facebook/Perception-LM-1B",), images={"vision_input_type": "vanilla"}),
    "idefics2": Family("Idefics2", ("HuggingFaceM4/idefics2-8b",), images={"do_image_splitting": False}),
    "cohere2_vision": Family(
        "Command A Vision", ("CohereLabs/command-a-vision-07-2025",), images={"crop_to_patches": False}
    ),
    "aya_vision": Family("Aya Vision", ("CohereLabs/aya-vision-8b",), images={"crop_to_patches": False}),
    "ovis2": Family("Ovis2", ("thisisiron/Ovis2-1B-hf",), images={"crop_to_patches": False}),
    "minicpmv4_6": Family("MiniCPM-V 4.6", ("openbmb/MiniCPM-V-4.6",), images={"slice_mode": False}),
}
"""``model_type`` of the configuration -> row."""
EMBEDDED = Family("the embedded VLM", ("tiny",), embedded=True)


def family(config: Any) -> Family:
    """The row of a transformers configuration; the common way for a family that has none."""
    # The embedded VLM is a LLaVA too, and the only one with this encoder.
    if getattr(getattr(config, "vision_config", None), "model_type", None) == "segformer":
        return EMBEDDED
    return FAMILIES.get(config.model_type, Family(config.model_type, keeps_mask=True))


def hub_ids() -> list[str]:
    """All known models, the embedded one first."""
    return [name for row in (EMBEDDED, *FAMILIES.values()) for name in row.hub_ids]


def known() -> str:
    """A line for each known model: id, family, ``model_type``."""
    rows = {"(shipped)": EMBEDDED, **FAMILIES}
    lines = [(name, row.title, model_type) for model_type, row in rows.items() for name in row.hub_ids]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {title:<{widths[1]}}  {kind}" for name, title, kind in lines)
