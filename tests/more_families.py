"""More tiny families (see ``tiny_families``): those that came after the adapter, which needs a row for most."""

import transformers

from tiny_models import (
    CHATML,
    GEMMA,
    LINEAR,
    LLAMA,
    PATCHED,
    SIDE,
    SIGLIP,
    SQUARE,
    Family,
    chatml,
    config,
    family,
    gemma_template,
    rope,
    template,
    tokenizer,
)


@family
def lfm2_vl() -> Family:
    form = "{{ bos_token }}" + chatml("<image>")
    named = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    named |= {"image_thumbnail_token": "<|img_thumbnail|>"}
    tiles = (f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    words = tokenizer(form, "<|im_start|>", *tiles, named=named, add_bos=True, **special)
    images = transformers.Lfm2VlImageProcessor(
        tile_size=32,
        max_num_patches=64,
        encoder_patch_size=16,
        min_tiles=2,
        max_tiles=4,
        min_image_tokens=1,
        max_image_tokens=4,
        max_pixels_tolerance=1.0,
    )
    text = {
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    }
    eyes = {**PATCHED, "patch_size": 16, "num_patches": 16, "vision_use_head": False}
    return transformers.Lfm2VlProcessor(images, words, chat_template=form), config(
        "lfm2_vl", words, text, eyes, image_token_id=words.image_token_id, projector_hidden_size=48
    )


@family
def gemma3n() -> Family:
    form = gemma_template("<start_of_turn>", "<end_of_turn>", "<image_soft_token>")
    # The vision and the audio tower embed the last tokens of the vocabulary: those from `vocab_offset` on.
    named = {"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>", "sot_token": "<start_of_turn>"}
    named |= {"eot_token": "<end_of_turn>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named |= {"eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    words = tokenizer(form, named=named, add_bos=True, **GEMMA)
    images = transformers.SiglipImageProcessor(size=SQUARE, do_normalize=False)
    hearing = transformers.Gemma3nAudioFeatureExtractor()
    processor = transformers.Gemma3nProcessor(hearing, images, words, chat_template=form, image_seq_length=16)
    audio = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2}
    return processor, config(
        "gemma3n",
        words,
        {
            "num_hidden_layers": 4,
            "vocab_size": len(words),
            "vocab_size_per_layer_input": words.eoi_token_id,
            "pad_token_id": words.pad_token_id,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
        {
            "hidden_size": 2048,  # of this tower's last layer, whatever its other sizes
            "vocab_offset": words.eoi_token_id,
            "vocab_size": 2,
            "model_args": {"channel_multiplier": 0.02, "msfa_output_resolution": 4},
        },
        vision_soft_tokens_per_image=16,
        audio_config=audio | {"vocab_offset": words.eoa_token_id, "vocab_size": 2},
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
        audio_token_id=words.audio_token_id,
        boa_token_id=words.boa_token_id,
        eoa_token_id=words.eoa_token_id,
    )


@family
def llava_next() -> Family:
    form = template("'[INST] ' if message.role == 'user' else ' '", "<image>\\n", "", " [/INST]")
    words = tokenizer(form, named={"image_token": "<image>"}, add_bos=True, **LLAMA)
    tiles = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=tiles
        ),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=form,
    )
    return processor, config(
        "llava_next",
        words,
        {"model_type": "mistral"},
        {"model_type": "clip_vision_model", **PATCHED},
        image_token_index=words.image_token_id,
        image_grid_pinpoints=tiles,
    )


@family
def perception_lm() -> Family:
    turn = "'<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'"
    opened = "<|start_header_id|>assistant<|end_header_id|>\\n\\n"
    form = template(turn, "<|image|>", "<|eot_id|>", opened, start="{{ bos_token }}")
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    words = tokenizer(form, "<|start_header_id|>", "<|end_header_id|>", named=named, add_bos=True, **special)
    processor = transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(),
        transformers.PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=4),
        words,
        patch_size=14,
        pooling_ratio=2,
        chat_template=form,
    )
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [SIDE, SIDE], "patch_size": 14}
    tower |= {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}
    eyes = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": False}
    return processor, config(
        "perception_lm",
        words,
        {"model_type": "llama"},
        {**eyes, "num_classes": 0, "model_args": tower},
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        projector_pooling_ratio=2,
    )


@family
def idefics2() -> Family:
    form = template("message.role|capitalize + ':'", "<image>", "<end_of_utterance>\\n", "Assistant:")
    named = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    words = tokenizer(form, "<end_of_utterance>", named=named, add_bos=True, **LLAMA)
    images = transformers.Idefics2ImageProcessor(
        size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_image_splitting=True
    )
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    return transformers.Idefics2Processor(images, words, image_seq_len=4, chat_template=form), config(
        "idefics2",
        words,
        {"model_type": "mistral", "sliding_window": None, "pad_token_id": words.pad_token_id},
        PATCHED,
        perceiver_config=perceiver | {"hidden_size": 64, "num_key_value_heads": 1},
        image_token_id=words.image_token_id,
    )


COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
COHERE_TEXT = {
    "model_type": "cohere2",
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def cohere_template(image: str) -> str:
    turn = "'<|START_OF_TURN_TOKEN|><|' + ('USER' if message.role == 'user' else 'CHATBOT') + '_TOKEN|>'"
    return template(
        turn,
        image,
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        start="{{ bos_token }}",
    )


COHERE_TURNS = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")


@family
def cohere2_vision() -> Family:
    form = cohere_template("<|IMG_PATCH|>")
    named = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    named |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
    words = tokenizer(form, *COHERE_TURNS, named=named, add_bos=True, **COHERE)
    # Its patch size is that of the picture's tokens: the side of a tile's grid of them.
    images = transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, crop_to_patches=True, max_patches=4)
    return transformers.Cohere2VisionProcessor(images, words, chat_template=form), config(
        "cohere2_vision",
        words,
        COHERE_TEXT,
        SIGLIP,
        image_token_id=words.image_token_id,
        alignment_intermediate_size=96,
    )


@family
def aya_vision() -> Family:
    form = cohere_template("<image>")
    marks = (f"<|{name}|>" for name in ("START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"))
    words = tokenizer(form, *COHERE_TURNS, *marks, "<image>", "TILE", "TILE_GLOBAL", named={}, add_bos=True, **COHERE)
    images = transformers.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4)
    return transformers.AyaVisionProcessor(
        images, words, patch_size=14, img_size=SIDE, downsample_factor=2, chat_template=form
    ), config(
        "aya_vision",
        words,
        COHERE_TEXT,
        SIGLIP,
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        adapter_layer_norm_eps=1e-6,
    )


@family
def ovis2() -> Family:
    form = chatml("<image>\\n")
    parts = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    words = tokenizer(form, "<|im_start|>", *parts, named={"image_token": "<image>"}, **CHATML)
    images = transformers.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    atom, *marks = words.convert_tokens_to_ids(list(parts))
    return transformers.Ovis2Processor(images, words, chat_template=form, image_seq_length=4), config(
        "ovis2",
        words,
        {"model_type": "qwen2"},
        {**PATCHED, "vocab_size": 64, "hidden_stride": 2},
        image_token_id=atom,
        visual_indicator_token_ids=marks,
        vocab_size=len(words) + 16,
        hidden_size=64,
    )


@family
def minicpmv4_6() -> Family:
    form = chatml("<|image_pad|>", "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    named |= {"image_start_token": "<image>", "image_end_token": "</image>"}
    named |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
    named |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    words = tokenizer(form, "<|im_start|>", "<think>", "</think>", named=named, **CHATML)
    size = {"scale_resolution": SIDE, "patch_size": 14}
    processor = transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(**size),
        transformers.MiniCPMV4_6VideoProcessor(**size),
        words,
        chat_template=form,
    )
    return processor, config(
        "minicpmv4_6",
        words,
        {"model_type": "qwen3_5_text", **LINEAR, **rope(1, 1, 0, partial_rotary_factor=0.25)},
        PATCHED,
        insert_layer_id=0,
        image_size=SIDE,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
