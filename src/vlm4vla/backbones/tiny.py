"""The embedded VLM: a LLaVA of 1.4 M parameters made of plain transformers classes, for two CPU cores.

    SegFormer encoder (96 px -> 6 x 6 features) -> two-layer projector -> 3-layer Llama

SegFormer, because a vision encoder that must learn names *and* places from a few ten thousand pictures needs
convolutions (a patchify ViT of this size learned the names but not the places), and it is the one encoder in
transformers that has strided convolutions, needs no position table and gives the (B, N, D) features LLaVA expects.
Every emoji name is one token, so that a name is one word to the model as "banana" is to a large one.

``build`` draws new weights; the shipped ones (``FOLDER``) are made by ``vlm4vla vlm train``.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SegformerConfig,
)

FOLDER = Path(__file__).parent / "tiny_vlm"
IMAGE_SIZE = 96
STRIDE = 16
GRID = IMAGE_SIZE // STRIDE
POINT_BINS = 12
"""Coordinates in answers ("x3 y7") are cells of a 12 x 12 grid over the picture."""

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<answer>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} <answer>{% endif %}"
)


def build_processor(names: Sequence[str], words: Sequence[str]) -> LlavaProcessor:
    """Processor whose vocabulary is ``words`` plus each emoji name as one token; anything else becomes ``<unk>``."""
    words = [*words, *(f"x{i}" for i in range(POINT_BINS)), *(f"y{i}" for i in range(POINT_BINS))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # single_word keeps "ant" out of "elephant"; the longest match wins, so "cat face" is not "cat" + "face".
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in names])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="right",
        chat_template=TEMPLATE,
    )
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        do_convert_rgb=False,
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )


def build_config(processor: LlavaProcessor) -> LlavaConfig:
    width = 128
    # 1 / sqrt(width): transformers' default of 0.02 suits layers ten times as wide; at that scale this model stayed
    # at chance for as long as it was watched.
    spread = width**-0.5
    vision = SegformerConfig(
        num_encoder_blocks=3,
        depths=[1, 1, 2],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[32, 64, width],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        num_attention_heads=[1, 2, 4],
        mlp_ratios=[4, 4, 4],
        drop_path_rate=0.0,
        initializer_range=spread,
        reshape_last_stage=False,
    )
    vision.hidden_size = width  # LlavaConfig asks every vision config for it
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=spread,
        tie_word_embeddings=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def build(
    names: Sequence[str], words: Sequence[str], seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A freshly drawn embedded VLM and its processor."""
    processor = build_processor(names, words)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(build_config(processor)), processor


def pixels(images: Tensor) -> Tensor:
    """uint8 (B, 96, 96, 3) -> float32 (B, 3, 96, 96), to the last bit what the PIL image processor makes of them."""
    return images.permute(0, 3, 1, 2).float().contiguous().div_(127.5).sub_(1)
