"""Qwen2.5-VL through the adapter against the same computation put together by hand.

By hand: the prompt's ids, the merge of word embeddings, picture features and query, the three-axis rotary positions
and the causal mask. Of transformers only the vision tower and the decoder layers are used.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")

import tiny_families
from vlm4vla.backbones.vlm import Backbone

TEXTS = ["push", "put the spoon on the towel"]
GRID = 4
"""The picture is GRID x GRID patches; 2 x 2 of them make one token."""


@pytest.fixture(scope="module")
def backbone():
    backbone = Backbone(*tiny_families.draw("qwen2_5_vl")).eval()
    torch.nn.init.normal_(backbone.query, generator=torch.Generator().manual_seed(1))
    return backbone


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 14 * GRID, 14 * GRID, 3), np.uint8)


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The wire format, written out: system turn, user turn with the picture, assistant's turn opened."""

    def plain(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False)

    special = tokenizer.convert_tokens_to_ids
    start, end, newline = special("<|im_start|>"), special("<|im_end|>"), plain("\n")
    picture = [special("<|image_pad|>")] * (GRID // 2) ** 2
    question = plain(f"What action should the robotic arm take to {text}")
    return [
        *[start, *plain("system\nYou are a helpful assistant."), end, *newline],
        *[start, *plain("user\n"), special("<|vision_start|>"), *picture, special("<|vision_end|>"), *question, end],
        *[*newline, start, *plain("assistant\n")],
    ]


def positions(is_picture: list[bool]) -> Tensor:
    """(3, L) time, row, column: words count on all three axes; a picture's tokens lie on a grid at one time, and the
    next word follows the largest position of the picture."""
    side, places, following, seen = GRID // 2, [], 0, 0
    for picture in is_picture:
        if picture:
            places.append((following, following + seen // side, following + seen % side))
            seen += 1
            if seen == side * side:
                following += side
        else:
            places.append((following,) * 3)
            following += 1
    return torch.tensor(places).T


def reference(backbone: Backbone, images: np.ndarray, i: int, multi_axis: bool = True) -> Tensor:
    """(D,) hidden state of sample ``i``, alone and unpadded."""
    vlm, processor = backbone.vlm, backbone.processor
    picture = processor.image_processor([images[i]], return_tensors="pt")
    ids = torch.tensor(prompt_ids(processor.tokenizer, TEXTS[i]))
    is_picture = ids == vlm.config.image_token_id
    words = vlm.get_input_embeddings().weight[ids]
    words[is_picture] = vlm.model.visual(picture["pixel_values"], picture["image_grid_thw"]).pooler_output
    embeddings = torch.cat([words, backbone.query[None]])[None]
    length = embeddings.shape[1]
    places = positions([*is_picture.tolist(), False]) if multi_axis else torch.arange(length).expand(3, -1)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    decoder = vlm.model.language_model
    return decoder(inputs_embeds=embeddings, position_ids=places[:, None], attention_mask=mask).last_hidden_state[0, -1]


@torch.no_grad()
def test_the_adapter_equals_the_computation_by_hand(backbone, images):
    found = backbone(backbone.encode(images, TEXTS))
    expected = torch.stack([reference(backbone, images, i) for i in range(2)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_on_one_axis_as_in_the_release_give_another_result(backbone, images):
    """So the test above would notice if the model's own positions were lost."""
    found = backbone(backbone.encode(images, TEXTS))
    flat = torch.stack([reference(backbone, images, i, multi_axis=False) for i in range(2)])
    assert (found - flat).abs().max() > 1e-3
