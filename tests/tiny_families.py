"""Families of VLMs with random weights and real processors, made of plain transformers classes, offline.

``FAMILIES[name]()`` gives a processor and a configuration whose sizes are small and whose structure is the family's
own. The tokenizer is 256 bytes and the family's special tokens; it adds a bos token where the real one does, and pads
on the left. The chat template writes the family's wire format.
"""

from typing import Any

import torch
import transformers
from transformers import AutoConfig

import more_families  # noqa: F401 (its families are in FAMILIES as well)
from tiny_models import (
    CHATML,
    FAMILIES,
    GEMMA,
    LINEAR,
    LLAMA,
    PATCHED,
    PATCHES,
    SIDE,
    SIGLIP,
    SQUARE,
    VISION,
    Family,
    chatml,
    config,
    family,
    gemma_template,
    rope,
    template,
    tokenizer,
)
from vlm4vla.backbones.vlm import auto_class


def draw(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A family's model with random weights, and its processor."""
    processor, config = FAMILIES[name]()
    torch.manual_seed(seed)
    vlm = auto_class(config).from_config(config)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim > 1:  # Gemma's projector is zero at first, and others hardly let a signal through
                parameter.normal_(0, 0.1) if not parameter.any() else parameter.mul_(3)
    return vlm.eval(), processor


# ----------------------------------------------------------------------------------------------------------------- Qwen


def qwen_tokenizer(answer: str = "<|im_start|>assistant\\n") -> Any:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    form = chatml("<|vision_start|><|image_pad|><|vision_end|>", answer)
    return tokenizer(form, "<|im_start|>", "<think>", "</think>", named=named, **CHATML)


def qwen(model_type: str, words: Any, patch: int, text: dict, vision: dict, tie: bool = True) -> Family:
    pixels = (4 * patch) ** 2
    images = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": pixels, "longest_edge": pixels}, patch_size=patch, merge_size=2
    )
    if patch == 14:
        kind, videos = transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor()
    else:
        kind, videos = transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor()
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": patch, "out_hidden_size": 64}
    made = config(
        model_type,
        words,
        {"tie_word_embeddings": tie, **text},
        eyes | vision,
        tie_word_embeddings=tie,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_bos_token_id,
        vision_end_token_id=words.vision_eos_token_id,
    )
    return kind(images, words, videos, chat_template=words.chat_template), made


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION_3 = {"depth": 3, "num_position_embeddings": 64}
DEEPSTACK = {**VISION_3, "deepstack_visual_indexes": [0, 1]}


@family
def qwen2_vl() -> Family:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return qwen("qwen2_vl", qwen_tokenizer(), 14, rope(2, 3, 3, interleaved=False), vision)


@family
def qwen2_5_vl() -> Family:
    # Windows of 2 x 2 patches in the first layer, all patches in the second.
    vision = {"depth": 2, "window_size": 28, "fullatt_block_indexes": [1]}
    return qwen("qwen2_5_vl", qwen_tokenizer(), 14, rope(2, 3, 3, interleaved=False), vision)


@family
def qwen3_vl() -> Family:
    return qwen("qwen3_vl", qwen_tokenizer(), 16, rope(4, 2, 2), DEEPSTACK)


@family
def qwen3_vl_untied() -> Family:
    """The 8B's LM head is not the word embedding."""
    return qwen("qwen3_vl", qwen_tokenizer(), 16, rope(4, 2, 2), DEEPSTACK, tie=False)


@family
def qwen3_vl_moe() -> Family:
    return qwen("qwen3_vl_moe", qwen_tokenizer(), 16, EXPERTS | rope(4, 2, 2), DEEPSTACK, tie=False)


@family
def qwen3_5() -> Family:
    words = qwen_tokenizer("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
    return qwen("qwen3_5", words, 16, LINEAR | rope(1, 1, 0, partial_rotary_factor=0.25), VISION_3)


@family
def qwen3_5_moe() -> Family:
    """One more expert, for every token, is a module of linear layers."""
    words = qwen_tokenizer("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
    text = LINEAR | rope(1, 1, 0, partial_rotary_factor=0.25) | EXPERTS | {"shared_expert_intermediate_size": 24}
    return qwen("qwen3_5_moe", words, 16, text, VISION_3)


# ------------------------------------------------------------------------------------------------- PaliGemma and Gemma


def paligemma(**text: Any) -> Family:
    words = tokenizer(None, named={"image_token": "<image>"}, add_bos=True, **GEMMA)
    images = transformers.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = PATCHES
    processor = transformers.PaliGemmaProcessor(images, words)  # adds its location and segment tokens
    return processor, config(
        "paligemma",
        processor.tokenizer,
        text,
        {**SIGLIP, "projection_dim": 64},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
        vocab_size=len(processor.tokenizer) + 16,
    )


@family
def paligemma1() -> Family:
    return paligemma(model_type="gemma")


@family
def paligemma2() -> Family:
    softcap = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return paligemma(model_type="gemma2", query_pre_attn_scalar=16, sliding_window=4096, **softcap)


@family
def gemma3() -> Family:
    form = gemma_template("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(form, "<start_of_turn>", "<end_of_turn>", named=named, add_bos=True, **GEMMA)
    images = transformers.Gemma3ImageProcessor(size=SQUARE)
    return transformers.Gemma3Processor(images, words, chat_template=form, image_seq_length=4), config(
        "gemma3",
        words,
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )


@family
def gemma4(**text: Any) -> Family:
    form = gemma_template("<|turn>", "<turn|>", "<|image|>")
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    words = tokenizer(form, "<|turn>", "<turn|>", named=named, add_bos=True, **GEMMA)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(patch_size=16, pooling_kernel_size=2, max_soft_tokens=70),
        words,
        transformers.Gemma4VideoProcessor(),
        chat_template=form,
        image_seq_length=70,
    )
    return processor, config(
        "gemma4",
        words,
        {
            "num_hidden_layers": 4,
            "vocab_size_per_layer_input": len(words) + 16,
            "pad_token_id": words.pad_token_id,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 64,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            **text,
        },
        {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config=None,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
        audio_token_id=words.audio_token_id,
        video_token_id=processor.video_token_id,
    )


@family
def gemma4_moe() -> Family:
    """The 26B-A4B: in each layer experts beside the usual feed-forward part, and no embeddings of its own."""
    experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24}
    return gemma4(hidden_size_per_layer_input=0, **experts)


# ------------------------------------------------------------------------------------------------------------- Kosmos-2


@family
def kosmos2() -> Family:
    words = tokenizer(None, named={}, add_bos=True, **LLAMA, unk_token="<unk>")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = transformers.Kosmos2Processor(images, words, num_patch_index_tokens=4)
    # The picture's places take the 64 ids after <unk>, whatever they are; 64 is the processor's constant.
    return processor, AutoConfig.for_model(
        "kosmos-2",
        text_config={
            "vocab_size": len(processor.tokenizer) + 80,
            "embed_dim": 64,
            "layers": 3,
            "ffn_dim": 96,
            "attention_heads": 4,
            "pad_token_id": words.pad_token_id,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config=PATCHED,
        latent_query_num=64,
    )


# ----------------------------------------------------------------------------------------- InternVL, SmolVLM, Idefics3


@family
def internvl() -> Family:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    form = chatml("<IMG_CONTEXT>\n")
    words = tokenizer(form, "<|im_start|>", named=named, **CHATML)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=12),
        words,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=form,
    )
    return processor, config(
        "internvl",
        words,
        {"model_type": "qwen3", "tie_word_embeddings": False},
        {**VISION, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def idefics(model_type: str, processor: Any, images: Any, **parts: Any) -> Family:
    form = template(
        "message.role|capitalize + ':'", "<image>", "<end_of_utterance>\\n", "Assistant:", start="<|im_start|>"
    )
    words = tokenizer(
        form,
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
    )
    side = {"longest_edge": SIDE}
    pictures = images(size=side, max_image_size=side, do_image_splitting=True)
    return processor(pictures, words, image_seq_len=4, chat_template=form, **parts), config(
        model_type,
        words,
        {"model_type": "llama", "pad_token_id": words.pad_token_id},
        PATCHED,
        image_token_id=words.image_token_id,
        scale_factor=2,
        pad_token_id=words.pad_token_id,
    )


@family
def smolvlm() -> Family:
    side = {"longest_edge": SIDE}
    videos = transformers.SmolVLMVideoProcessor(size=side, max_image_size=side)
    return idefics("smolvlm", transformers.SmolVLMProcessor, transformers.SmolVLMImageProcessor, video_processor=videos)


@family
def idefics3() -> Family:
    return idefics("idefics3", transformers.Idefics3Processor, transformers.Idefics3ImageProcessor)


# ------------------------------------------------------------------------------------------ LLaVA, GLM, Mistral, Molmo2


@family
def llava() -> Family:
    form = template("'USER: '", "<image>\\n", " ", "ASSISTANT:")
    words = tokenizer(form, named={"image_token": "<image>"}, add_bos=True, **LLAMA)
    processor = transformers.LlavaProcessor(
        transformers.LlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=form,
    )
    vision = {"model_type": "clip_vision_model", **PATCHED}
    return processor, config("llava", words, {"model_type": "llama"}, vision, image_token_index=words.image_token_id)


@family
def llava_onevision() -> Family:
    form = chatml("<image>\\n")
    named = {"image_token": "<image>", "video_token": "<video>"}
    words = tokenizer(form, "<|im_start|>", named=named, **CHATML)
    tiles = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]]
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=tiles),
        words,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=form,
    )
    return processor, config(
        "llava_onevision",
        words,
        {"model_type": "qwen2"},
        SIGLIP,
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=tiles,
    )


@family
def glm4v() -> Family:
    return glm("glm4v", transformers.Glm4vProcessor, transformers.Glm4vImageProcessor, transformers.Glm4vVideoProcessor)


@family
def glm46v() -> Family:
    return glm(
        "glm46v", transformers.Glm46VProcessor, transformers.Glm46VImageProcessor, transformers.Glm46VVideoProcessor
    )


def glm(model_type: str, processor: Any, images: Any, videos: Any) -> Family:
    form = template(
        "'<|' + message.role + '|>\\n'",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "",
        "<|assistant|>\\n",
        start="[gMASK]<sop>",
    )
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    named |= {"boi_token": "<|begin_of_image|>", "eoi_token": "<|end_of_image|>"}
    named |= {"bov_token": "<|begin_of_video|>", "eov_token": "<|end_of_video|>"}
    more = ("[gMASK]", "<sop>", "<|assistant|>")
    words = tokenizer(form, *more, named=named, eos_token="<|user|>", pad_token="<|endoftext|>")
    pixels = 2 * SIDE**2  # counted over the two frames that a picture is doubled to
    pictures = images(size={"shortest_edge": pixels, "longest_edge": pixels}, patch_size=14, merge_size=2)
    turns = rope(2, 1, 1, interleaved=False, partial_rotary_factor=0.5)
    return processor(pictures, words, videos(), chat_template=form), config(
        model_type,
        words,
        {"model_type": "glm4v_text", **turns},
        {
            "model_type": "glm4v_vision",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "image_size": SIDE,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
        },
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_start_token_id=words.boi_token_id,
        image_end_token_id=words.eoi_token_id,
        video_start_token_id=words.bov_token_id,
        video_end_token_id=words.eov_token_id,
    )


@family
def mistral3() -> Family:
    end = "' + ('[/INST]' if message.role == 'user' else eos_token) + '"
    form = template("'[INST]' if message.role == 'user' else ''", "[IMG]", end, "", start="{{ bos_token }}")
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    words = tokenizer(form, "[INST]", "[/INST]", named=named, add_bos=True, **LLAMA, unk_token="<unk>")
    images = transformers.PixtralImageProcessor(size={"longest_edge": SIDE}, patch_size={"height": 28, "width": 28})
    return transformers.PixtralProcessor(
        images, words, patch_size=14, spatial_merge_size=2, chat_template=form
    ), config(
        "mistral3",
        words,
        {"model_type": "ministral3", "sliding_window": None},
        {"model_type": "pixtral", **PATCHED, "head_dim": 16},
        image_token_index=words.image_token_id,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


@family
def molmo2() -> Family:
    form = chatml("<|image|>")
    parts = ("im_start", "im_end", "im_patch", "im_col", "low_res_im_start", "frame_start", "frame_end", "im_low")
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    more = ("<|im_start|>", *(f"<{part}>" for part in parts))
    words = tokenizer(form, *more, named=named, bos_token="<|im_end|>", **CHATML)
    processor = transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(size=SQUARE, patch_size=14, pooling_size=[2, 2], overlap_margins=[0, 0]),
        transformers.Molmo2VideoProcessor(),
        words,
        chat_template=form,
    )
    number = words.convert_tokens_to_ids
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return processor, config(
        "molmo2",
        words,
        {"vocab_size": len(words) + 8, "additional_vocab_size": 8},
        {**PATCHED, **heads, "num_hidden_layers": 3, "image_size": [SIDE, SIDE], "num_position_embeddings": PATCHES},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "intermediate_size": 48,
            "text_hidden_size": 64,
            "vision_feature_layer": [-1, -2],
        },
        image_start_token_id=number("<im_start>"),
        low_res_image_start_token_id=number("<low_res_im_start>"),
        image_end_token_id=number("<im_end>"),
        image_patch_id=number("<im_patch>"),
        image_col_id=number("<im_col>"),
        frame_start_token_id=number("<frame_start>"),
        frame_end_token_id=number("<frame_end>"),
    )
