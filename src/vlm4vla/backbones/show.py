"""What a VLM is made of, read from its configuration and processor: nothing of its weights is needed."""

import torch
from transformers import PretrainedConfig

from vlm4vla.backbones.families import Family, family
from vlm4vla.backbones.inputs import Inputs
from vlm4vla.backbones.load import load_blank, load_config, load_processor
from vlm4vla.backbones.treatments import groups

EXAMPLE = "put the spoon on the towel"


def describe(name: str, image_size: int) -> str:
    """Groups of parameters, prompt, tokens and the place of the query for square pictures of ``image_size`` pixels.

    Raises:
        UserError: see ``load.load_blank`` and ``load.load_processor``.
    """
    config, processor = load_config(name), load_processor(name)
    row = family(config)
    inputs = Inputs(processor, row)
    tokens = inputs.rows(EXAMPLE, image_size, image_size)
    vlm = load_blank(name)
    counts = {group: sum(p.numel() for p in part.values()) for group, part in groups(vlm).items()}
    text = config.get_text_config()
    length = len(tokens["input_ids"])
    facts = {
        "family": f"{row.title} ({config.model_type})",
        "class": type(vlm).__name__,
        "parameters": f"{sum(counts.values()):,}: " + ", ".join(f"{group} {n:,}" for group, n in counts.items() if n),
        "hidden size": f"{text.hidden_size}, {text.num_hidden_layers} layers",
        "row": ", ".join(departures(row)) or "none: the common way",
        "prompt": repr(inputs.prompt(EXAMPLE)),
        "tokens": f"{length} with the query at {length - 1}; {num_visual_tokens(tokens, config)} of them the picture's "
        f"({image_size} px)",
    }
    return "\n".join(f"{key:<12} {value}" for key, value in facts.items())


def departures(row: Family) -> list[str]:
    """What the row of a family says, in words."""
    said = {
        f"system message {row.system!r}": row.system is not None,
        f"prompt {row.plain!r} without a chat template": row.plain is not None,
        "one tile a picture": bool(row.images),
        f"token type {row.query_type} at the query": row.query_type is not None,
        "padding mask kept": row.keeps_mask,
        "opened with AutoModel": row.base_only,
        "own arithmetic for pictures of its size": row.embedded,
    }
    return [words for words, holds in said.items() if holds]


def num_visual_tokens(tokens: dict[str, torch.Tensor], config: PretrainedConfig) -> int:
    """Places of the prompts in ``tokens``, (L,) or (B, L), that projected pictures fill."""
    if (places := tokens.get("image_embeds_position_mask")) is not None:  # Kosmos-2 has no token of its own for them
        return int(places.sum())
    names = ("image_token_id", "image_token_index", "image_patch_id")
    ids = [value for name in names if (value := getattr(config, name, None)) is not None]
    return int(torch.isin(tokens["input_ids"], torch.tensor(ids)).sum())
