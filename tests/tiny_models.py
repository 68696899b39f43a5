"""What tiny families are made of: sizes, tokenizers, chat templates, configurations."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

SIDE = 56
"""Pixels of a picture's side: 4 x 4 patches of 14."""
PATCHES = 16
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHED = {**VISION, "patch_size": 14, "image_size": SIDE}
SIGLIP = {"model_type": "siglip_vision_model", **PATCHED, "vision_use_head": False}
SQUARE = {"height": SIDE, "width": SIDE}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Of Qwen3.5's LLM."""
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
Family = tuple[Any, Any]
FAMILIES: dict[str, Callable[[], Family]] = {}


def family(build: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[build.__name__] = build
    return build


# ------------------------------------------------------------------------------------------------------------ tokenizer


def tokenizer(template: str | None, *more: str, add_bos: bool = False, named: dict[str, str], **special: str) -> Any:
    """256 bytes and special tokens; ``named`` become attributes (``image_token``)."""
    tokens = list(dict.fromkeys([*special.values(), *named.values(), *more]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if add_bos:
        bos = special["bos_token"]
        bytes_only.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bytes_only.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, extra_special_tokens=named, padding_side="left", **special
    )
    made.chat_template = template
    return made


def template(turn: str, image: str, end: str, answer: str, start: str = "") -> str:
    """A chat template: ``start``, then turns of ``turn`` (which may name ``message.role``), their parts, ``end``."""
    return (
        start
        + "{%- for message in messages %}{{ "
        + turn
        + " }}{%- for part in message.content %}{%- if part.type == 'image' %}"
        + image
        + "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{{ '"
        + end
        + "' }}{%- endfor %}{%- if add_generation_prompt %}{{ '"
        + answer
        + "' }}{%- endif %}"
    )


def chatml(image: str, answer: str = "<|im_start|>assistant\\n") -> str:
    return template("'<|im_start|>' + message.role + '\\n'", image, "<|im_end|>\\n", answer)


def gemma_template(opens: str, closes: str, image: str) -> str:
    turn = f"'{opens}' + message.role + '\\n'"
    return template(turn, image, f"{closes}\\n", f"{opens}model\\n", start="{{ bos_token }}")


def config(model_type: str, words: Any, text: dict, vision: dict, **more: Any) -> Any:
    """A configuration whose LLM is of the common size, with a few words more than its tokenizer."""
    text = {**TEXT, "vocab_size": len(words) + 16, **text}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **more)


def rope(*sections: int, interleaved: bool = True, **more: float) -> dict:
    values = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": values | ({"mrope_interleaved": True} if interleaved else {})}
