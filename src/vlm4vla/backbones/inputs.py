"""Pictures and instructions -> a VLM's inputs. B batch, L sequence.

The two halves of a transformers processor, apart: the text of an instruction is prepared once (a data set has few),
pictures are resized and normalised in batches by the model's own image processor, on the device that holds them.
Together they are what the whole processor would have made (``backbones.check`` compares them).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_backends import TorchvisionBackend

from vlm4vla.backbones import tiny
from vlm4vla.backbones.families import QUESTION, Family
from vlm4vla.errors import UserError
from vlm4vla.spec import Compat
from vlm4vla.types import Turns

Processor = Any
"""A transformers processor; their call signatures are only known at run time."""
Positions = Callable[..., tuple[Tensor, Tensor]]
"""``get_rope_index`` of a model with several position axes: ids, types and picture sizes -> (axes, B, L)."""
SIZES = ("_grid_thw", "image_sizes", "batch_num_images", "spatial_shapes", "target_sizes")
"""Endings of the names of what a processor says of pictures' sizes and number: models read that one by one, and would
wait for a device each time."""
TEXTS_KEPT = 1 << 14
"""Instructions, and as many conversations, whose tokens are kept: 10 kB each at 300 tokens."""
SIZES_KEPT = 8
"""Picture sizes whose texts are made without looking at a picture each time."""
ANSWER = "\ue000"
"""Of Unicode's private use: stands for an answer where a template is asked what it writes around one."""


def prompt(processor: Processor, text: str, system: str | None = None, image: bool = True) -> str:
    """One user turn with an image and ``text`` in the model's own chat template, the assistant's turn opened."""
    return written(processor, [("user", text)], system, image)


def written(
    processor: Processor, turns: Sequence[tuple[str, str]], system: str | None = None, image: bool = True
) -> str:
    """Turns (role, text) in the model's own chat template, the picture before the first one's text. After a user's turn
    the assistant's is opened."""
    messages: list[dict] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"] = [{"type": "image"}] * image + messages[0]["content"]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    # A policy acts in one forward pass: templates that know of thinking leave it out.
    thinking = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    opened = turns[-1][0] == "user"
    return processor.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False, **thinking)


class Inputs:
    """Makes a VLM's inputs, with one more position for the action query right after each prompt."""

    def __init__(
        self, processor: Processor, family: Family, compat: Sequence[Compat] = (), positions: Positions | None = None
    ):
        """Raises: UserError: there is no way to put a picture into the prompt."""
        self.processor, self.family, self.positions = _pinned(processor, family.images), family, positions
        # VLM4VLA's release enlarges what Qwen and InternVL see, so that its 224 px become 256 visual tokens.
        self.side = 448 if "upsample_448" in compat else None
        self.rows = lru_cache(TEXTS_KEPT)(self._row)
        self.talks = lru_cache(TEXTS_KEPT)(self._talk)
        self.blind = lru_cache(SIZES_KEPT)(self._blind)
        self.length = 0
        """Positions that batches have at least: a compiled model wants one shape."""
        self.image_names: frozenset[str] = frozenset()
        self.image_options: dict[str, Any] = {}
        if family.plain is None:
            _require_image(processor)

    def prompt(self, instruction: str) -> str:
        """The text that the processor is given.

        Raises:
            UserError: the instruction holds a special token, which would be taken for the template's.
        """
        self._require_words(instruction)
        if self.family.plain is not None:
            return self.family.plain.format(instruction=instruction)
        return prompt(self.processor, QUESTION.format(instruction=instruction), self.family.system)

    def script(self, turns: Turns) -> list[tuple[str, bool]]:
        """A conversation about a picture as the model's template writes it, in pieces: text, and whether the model is
        to say it. An answer ends as the template ends it, where it says nothing with the end-of-sequence token.

        ``turns`` is one that ``require_talk`` lets pass: a training asks it of all records before its first step.
        """
        end = self.processor.tokenizer.eos_token
        system, turns = (turns[0][1], turns[1:]) if turns[0][0] == "system" else (self.family.system, turns)
        questions, answers = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
        if self.family.plain is not None:
            return [(self.family.plain.format(instruction=questions[0]), False), (answers[0] + end, True)]

        def around(*texts: str) -> list[str]:
            roles = ("user", "assistant", "user")
            return written(self.processor, list(zip(roles, texts, strict=False)), system).split(ANSWER)

        first = written(self.processor, [("user", questions[0])], system)
        before, after = around(questions[0], ANSWER)
        lead = before.removeprefix(first) if before.startswith(first) else ""  # a blank after "Assistant:"
        end = after.strip() or end
        pieces = [(first, False), (lead + answers[0] + end, True)]
        for question, answer in zip(questions[1:], answers[1:], strict=True):
            between = around(questions[0], ANSWER, question)[1]
            pieces += [(between.removeprefix(end), False), (lead + answer + end, True)]
        return pieces

    def require_talk(self, turns: Turns) -> None:
        """Raises: UserError: a text with a special token, an answer with words that the tokenizer has no tokens for, or
        several questions for a model that knows no turns."""
        for _, text in turns:
            self._require_words(text)
        if self.family.plain is not None and len(turns) != 2:
            raise UserError(
                f"a conversation of {len(turns)} turns, the first one {turns[0]}",
                f"a question and its answer: {self.family.title} has no chat template",
                "make a record of each question",
            )
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return
        for role, text in turns:
            if role == "assistant" and tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise UserError(
                    f"the answer {text!r} with words that the tokenizer does not know",
                    f"words of its own: {tokenizer.unk_token!r} would be learned instead of them",
                    "leave the record out of the file, or choose another backbone",
                )

    def _require_words(self, text: str) -> None:
        for token in self.processor.tokenizer.all_special_tokens:
            if token in text:
                raise UserError(
                    f"the text {text!r} with the special token {token!r}",
                    "words alone, for it would be taken for the template's",
                    "take the token out of the text",
                )

    def native(
        self, images: Sequence[np.ndarray], text: Sequence[str], processor: Processor | None = None
    ) -> dict[str, Tensor]:
        """What the model's own processor (or a ``blind`` one) makes of pictures and prompts, padded on the side it
        likes."""
        bos = self.processor.tokenizer.bos_token
        # Several templates write the bos token that their tokenizer adds once more.
        written = {"add_special_tokens": False} if bos and self.family.plain is None and text[0].startswith(bos) else {}
        made = (processor or self.processor)(
            text=list(text),
            images=[[Image.fromarray(image)] for image in images],  # Idefics2's takes no arrays
            return_tensors="pt",
            text_kwargs={"padding": True, **written},
            images_kwargs=dict(self.family.images),
        )
        return {name: value for name, value in made.items() if name != "labels"}

    def tokens(self, instructions: Sequence[str], height: int, width: int) -> dict[str, Tensor]:
        """Token ids, mask and types (B, L) for pictures of this size, right-padded, and ``query_position`` (B,)."""
        height, width = (self.side or height, self.side or width)
        rows = [self.rows(instruction, height, width) for instruction in instructions]
        batch = self._padded(rows, self.length)
        return {**batch, "query_position": torch.tensor([len(row["input_ids"]) - 1 for row in rows])}

    def answers(self, talks: Sequence[Turns], height: int, width: int) -> dict[str, Tensor]:
        """Token ids, mask and types (B, L) of conversations about a picture of this size, right-padded, with
        ``labels`` (B, L), -100 except on what the model is to say, and the positions ``kept`` (P,), before a label of
        any row."""
        height, width = (self.side or height, self.side or width)
        batch = self._padded([self.talks(turns, height, width) for turns in talks])
        return {**batch, "kept": (batch["labels"][:, 1:] >= 0).any(0).nonzero()[:, 0]}

    def _padded(self, rows: Sequence[dict[str, Tensor]], length: int = 0) -> dict[str, Tensor]:
        """Tensors of the rows' longest length, or of ``length`` if that is more."""
        pad = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        batch = {}
        for name, first in rows[0].items():
            longest = first.new_empty((length, *first.shape[1:]))  # pads the others, and goes
            padded = pad_sequence([row[name] for row in rows] + [longest], True, pad.get(name, 0))
            batch[name] = padded[:-1]
        if "position_ids" in batch:
            batch["position_ids"] = batch["position_ids"].permute(2, 0, 1)
        if not self.family.keeps_mask:
            del batch["attention_mask"]
        return batch

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, H, W, 3) on any device -> the model's picture inputs on that device."""
        if self.side:
            pictures = images.permute(0, 3, 1, 2).float()
            enlarged = F.interpolate(pictures, (self.side, self.side), mode="bicubic", antialias=True)
            images = enlarged.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        if self.family.embedded and images.shape[1:3] == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE):
            return {"pixel_values": tiny.pixels(images)}
        if not self.image_names:
            self.rows("", *images.shape[1:3])  # finds out how the processor prepares pictures
        options: dict[str, Any] = dict(self.image_options)
        if isinstance(self.processor.image_processor, TorchvisionBackend):
            options["device"] = self.picture_device(images.device)
            pictures = images.to(options["device"]).permute(0, 3, 1, 2)
        else:
            pictures = images.cpu().numpy()
        images_only: Any = self.processor.image_processor
        made = images_only([[picture] for picture in pictures], **options)
        made = {
            name: value.float() if value.is_floating_point() else value  # Llama 4's are bfloat16
            for name, value in made.items()
            if name in self.image_names
        }
        return {name: value.cpu() if name.endswith(SIZES) else value.to(images.device) for name, value in made.items()}

    def picture_device(self, device: torch.device) -> torch.device:
        """Where pictures are prepared for a model on ``device``: there, except with a Lanczos filter.

        A GPU has none (SmolVLM, Idefics3 ask for it), and transformers would take another one.
        """
        lanczos = getattr(self.processor.image_processor, "resample", None) == Image.Resampling.LANCZOS
        return torch.device("cpu") if lanczos else device

    def _row(self, instruction: str, height: int, width: int) -> dict[str, Tensor]:
        """The unpadded prompt's (L,) tensors, the last token once more for the query.

        A copy of the last token, so that every family sees an ordinary text token there.
        """
        row, sizes = self._prompted(self.prompt(instruction), height, width)
        return self._placed(self._longer(row, row["input_ids"][-1:]), sizes)

    def _talk(self, turns: Turns, height: int, width: int) -> dict[str, Tensor]:
        """The unpadded conversation's (L,) tensors, with ``labels``."""
        (text, _), *others = self.script(turns)
        row, sizes = self._prompted(text, height, width)
        labels = [torch.full_like(row["input_ids"], -100)]
        for text, said in others:
            ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            row = self._longer(row, ids)
            labels.append(ids if said else torch.full_like(ids, -100))
        return {**self._placed(row, sizes), "labels": torch.cat(labels)}

    def _placed(self, row: dict[str, Tensor], sizes: dict[str, Tensor]) -> dict[str, Tensor]:
        """With ``position_ids`` (L, axes) where the model has several axes: it would find them anew in every step, a
        sample at a time, and read the device for it."""
        if self.positions is None:
            return row
        known = {name: value[None] for name, value in row.items()}
        return {**row, "position_ids": self.positions(**known, **sizes)[0][:, 0].T}

    def _blind(self, height: int, width: int) -> Processor:
        """The processor for texts about a picture of one size: to look at one again for each text would take half of
        the time. A copy: others may prepare pictures with the processor itself meanwhile."""
        processor = copy(self.processor)
        processor.image_processor = Remembering(processor.image_processor)
        return processor

    def _prompted(self, text: str, height: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The (L,) tensors of a prompt about a picture of this size, and what the processor says of its size."""
        processor = self.blind(height, width)
        made = self.native([np.zeros((height, width, 3), np.uint8)], [text], processor)
        if not self.image_names:
            shape = made["input_ids"].shape
            self.image_options = processor.image_processor.options
            self.image_names = frozenset(name for name, value in made.items() if value.shape != shape)
        row = {name: value[0] for name, value in made.items() if name not in self.image_names}
        return row, {name: made[name] for name in self.image_names if name.endswith("_grid_thw")}

    def _longer(self, row: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """A prompt's tensors with ``ids`` after it: of the type of its last token, or of the family's own."""
        more = {name: value[-1:].expand(len(ids)) for name, value in row.items()} | {"input_ids": ids}
        if self.family.query_type is not None:
            more["token_type_ids"] = torch.full_like(ids, self.family.query_type)
        return {name: torch.cat([value, more[name]]) for name, value in row.items()}


class Remembering:
    """An image processor that looks once: what it made of the first pictures is its answer ever after.

    Attributes:
        options: the arguments that the whole processor gave it: some add their own, each in its own way.
    """

    def __init__(self, inner: Any):
        self.inner, self.options, self.made = inner, {}, None

    def __call__(self, images: Any, **options: Any) -> Any:
        if self.made is None:
            self.options, self.made = options, self.inner(images, **options)
        return copy(self.made)  # some processors take entries out of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _pinned(processor: Processor, options: Mapping[str, Any]) -> Processor:
    """A copy of the processor, whose image processor has these settings for its own: Idefics2 reads there
    how many tiles the text is about, whatever it is called with. The model's own processor stays as it is."""
    if options:
        processor = copy(processor)
        processor.image_processor = copy(processor.image_processor)
        for name, value in options.items():
            setattr(processor.image_processor, name, value)
    return processor


def _require_image(processor: Processor) -> None:
    name = type(processor).__name__
    if getattr(processor, "chat_template", None) is None:
        raise UserError(
            f"{name} without a chat template",
            "a chat template that takes a picture, or a row that says how the prompt is written",
            "choose the instruction-tuned model, or add a row to backbones/families.py (docs/backbones.md)",
        )
    if prompt(processor, "") == prompt(processor, "", image=False):
        raise UserError(
            f"{name}, whose chat template has no place for a picture",
            "a template that writes the image token",
            "choose a vision-language model: vlm4vla backbones list",
        )
