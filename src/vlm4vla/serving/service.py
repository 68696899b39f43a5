"""What all dialects share: the policy, how a client's picture becomes the policy's, and what is said about both."""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.pictures import resized
from vlm4vla.serving.sources import Source
from vlm4vla.serving.wire import NATIVE, check_form, form, forms_of
from vlm4vla.types import ActionChunk, Observation

RESIZE = ("refuse", "nearest", "bilinear", "bicubic", "lanczos")
"""What is done with a picture of another size than the policy's. The aspect ratio is not kept (VLM4VLA does not)."""
MAX_INSTRUCTION = 1000
"""Characters. A batch is as long as its longest prompt, so one client could make all others wait."""
FORMAT = 1
OWN_KEY = "vlm4vla"
"""Our entry in the dialects' metadata, and in our clients' messages the form that they read. Other projects' clients
pass over the first and lack the second."""


@dataclass(frozen=True)
class Service:
    """A policy as it is served.

    Raises ``UserError`` from ``observation`` where a client's message is not what the policy was trained on.
    """

    source: Source
    resize: str = "refuse"
    form: str | None = None
    """How clients that do not say what they take get actions (``wire.FORMS``, or ``native``); None: they get none."""
    execute: int = 0
    """Actions of each chunk that are handed out one by one (vla-eval); 0: all."""

    async def observation(self, image: Any, instruction: Any, state: Any) -> Observation:
        """A client's picture of the third-person camera, instruction and state -> what the policy sees."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(f"a picture that is {found}", "uint8 (height, width, 3), RGB", "send it like that")
        if 0 in image.shape:
            raise UserError(f"a picture of {image.shape}", "one with pixels", "look at the camera")
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"the instruction {instruction!r:.80}", "a sentence", "send the task in words")
        if len(instruction) > MAX_INSTRUCTION:
            found = f"an instruction of {len(instruction)} characters"
            raise UserError(found, f"{MAX_INSTRUCTION} at most", "send the task in a few sentences")
        numbers = self._state(state)
        if image.shape[:2] != (self.source.image_size, self.source.image_size):
            image = await asyncio.to_thread(self._resized, image)
        return Observation({"main": image}, instruction, numbers)

    def form_of(self, said: Any) -> str:
        """The form for a client: the one that it said, else the one that was chosen for all.

        Raises ``UserError`` where neither is known (a wrong form still moves the robot), or where the policy's actions
        cannot be written so.
        """
        name, convention = self.form if said is None else said, self.source.policy.convention
        if not isinstance(name, str):
            raise UserError(
                "a client that does not say how it takes actions",
                f"one of the forms of this policy, chosen for such clients: {', '.join(forms_of(convention))}",
                "vlm4vla serve POLICY --form FORM   (docs/serving.md says who writes how)",
            )
        check_form(name, convention)
        return name

    def actions(self, chunk: ActionChunk, form_name: str) -> np.ndarray:
        """What is sent for a chunk: (H, A) float32 in the named form."""
        known = form(form_name)
        return chunk.actions if known is None else known.written(chunk.actions)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        size = self.source.image_size
        if self.resize == "refuse":
            raise UserError(
                f"a picture of {image.shape[0]} x {image.shape[1]} pixels",
                f"{size} x {size}, as in training",
                "send that size, or serve with --resize bicubic (what was used in training is best)",
            )
        return resized(image, size, self.resize)

    def _state(self, state: Any) -> np.ndarray | None:
        if self.source.state_size == 0:
            return None
        parts = state if isinstance(state, list) else [] if state is None else [state]
        try:
            numbers = np.concatenate([np.zeros(0), *(np.ravel(part) for part in parts)]).astype(np.float32)
        except (ValueError, TypeError):
            numbers = np.zeros(0, np.float32)
        if numbers.shape != (self.source.state_size,) or not np.isfinite(numbers).all():
            raise UserError(
                f"a state of {numbers.size} numbers" + ("" if np.isfinite(numbers).all() else ", not all finite"),
                f"{self.source.state_size} finite ones, for this policy was trained with proprioception",
                "let the client send its state",
            )
        return numbers

    @property
    def about(self) -> dict:
        """What our own client must know to act without guessing."""
        return {
            "format": FORMAT,
            "policy": self.source.name,
            "convention": self.source.policy.convention.to_dict(),
            "chunk": self.source.chunk,
            "image_size": self.source.image_size,
            "resize": self.resize,
            "form": self.form or NATIVE,
            "state_size": self.source.state_size,
        }

    def begin(self) -> None:
        """Check the settings; one inference, so that the first client does not wait for lazily made buffers.

        Raises:
            UserError: no such ``resize`` or ``form``, the policy's actions cannot be written so, or ``execute`` is more
                than a chunk holds.
        """
        if self.resize not in RESIZE:
            raise UserError(f"--resize {self.resize}", f"one of {', '.join(RESIZE)}", "name one of them")
        if self.form is not None:
            check_form(self.form, self.source.policy.convention)
        if self.execute > self.source.chunk:
            found, chunk = f"--execute {self.execute}", self.source.chunk
            raise UserError(found, f"at most the {chunk} actions of a chunk", f"use --execute {chunk}")
        blank = np.zeros((self.source.image_size, self.source.image_size, 3), np.uint8)
        state = np.zeros(self.source.state_size, np.float32) if self.source.state_size else None
        self.source.policy.predict([Observation({"main": blank}, "warm up", state)])
