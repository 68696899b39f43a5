"""The paper's ten backbones at full size without a weight: their public configurations, on the meta device."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "spatial_merge_size": 2,
}
QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "deepstack_visual_indexes": [5, 11, 17],
    "num_position_embeddings": 2304,
}
QWEN3_VISION_LARGE = QWEN3_VISION | {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "vision_use_head": False,
}
INTERN_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
}


def decoder(width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, tied: bool) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def qwen(kind: str, vision: dict, text: dict, **more: object) -> dict:
    vision = vision | {"out_hidden_size": text["hidden_size"]}
    tied = text["tie_word_embeddings"]
    return {"kind": kind, "text_config": text | more, "vision_config": vision, "tie_word_embeddings": tied}


SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
CONFIGS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen(
        "qwen2_5_vl", QWEN25_VISION, decoder(2048, 36, 16, 2, 11008, 151936, True), **SECTIONS
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen(
        "qwen2_5_vl", QWEN25_VISION, decoder(3584, 28, 28, 4, 18944, 152064, False), **SECTIONS
    ),
    "Qwen/Qwen3-VL-2B-Instruct": qwen(
        "qwen3_vl", QWEN3_VISION, decoder(2048, 28, 16, 8, 6144, 151936, True), head_dim=128
    ),
    "Qwen/Qwen3-VL-4B-Instruct": qwen(
        "qwen3_vl", QWEN3_VISION, decoder(2560, 36, 32, 8, 9728, 151936, True), head_dim=128
    ),
    "Qwen/Qwen3-VL-8B-Instruct": qwen(
        "qwen3_vl", QWEN3_VISION_LARGE, decoder(4096, 36, 32, 8, 12288, 151936, False), head_dim=128
    ),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": qwen(
        "qwen3_vl_moe", QWEN3_VISION_LARGE, decoder(2048, 48, 32, 4, 6144, 151936, False), head_dim=128, **EXPERTS
    ),
    "google/paligemma-3b-pt-224": {
        "kind": "paligemma",
        "text_config": {**decoder(2048, 18, 8, 1, 16384, 257216, True), "model_type": "gemma", "head_dim": 256},
        "vision_config": SIGLIP,
    },
    "google/paligemma2-3b-pt-224": {
        "kind": "paligemma",
        "text_config": {**decoder(2304, 26, 8, 4, 9216, 257216, True), "model_type": "gemma2", "head_dim": 256},
        "vision_config": SIGLIP,
        "projection_dim": 2304,
        "hidden_size": 2304,
    },
    "microsoft/kosmos-2-patch14-224": {"kind": "kosmos-2"},
    "OpenGVLab/InternVL3_5-4B-HF": {
        "kind": "internvl",
        "text_config": {**decoder(2560, 36, 32, 8, 9728, 151936, False), "model_type": "qwen3", "head_dim": 128},
        "vision_config": INTERN_VISION,
        "tie_word_embeddings": False,
    },
}
"""Hub id -> the values of its ``config.json`` that decide the shapes."""


def config(name: str) -> PretrainedConfig:
    values = dict(CONFIGS[name])
    return AutoConfig.for_model(values.pop("kind"), **values)


def on_meta(name: str) -> PreTrainedModel:
    """A model of this size whose parameters hold no numbers."""
    values = config(name)
    # Kosmos-2's class with a head has no model below it that could be run without the head.
    auto = AutoModel if values.model_type == "kosmos-2" else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(values)


built = cache(on_meta)
"""For tests that only count."""
