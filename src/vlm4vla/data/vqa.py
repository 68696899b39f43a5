"""Vision-language data in the common conversation form (LLaVA, ShareGPT): JSON, or a JSON object a line.

    {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                              {"from": "gpt", "value": "A cat."}]}

Also ``"images": [...]`` and ``"messages": [{"role": "user", "content": ...}, ...]``. A file is indexed once by where
each record lies; records and pictures are read when they are asked for, so that millions fit in little memory.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vlm4vla.errors import UserError
from vlm4vla.files import stays_inside
from vlm4vla.types import Turns

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE = "<image>"
"""Where the picture stands in LLaVA's text; the model's own template puts it there."""
PLACEHOLDER = re.compile(rf"\s*{IMAGE}\s*")
FORM = '{"image": "a.png", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'


@dataclass(frozen=True)
class Conversation:
    """One record."""

    images: tuple[np.ndarray, ...]
    """uint8 (height, width, 3) each; none for text alone."""
    turns: Turns
    """Ending with the assistant."""


@dataclass(frozen=True)
class Conversations:
    """An opened file of N records."""

    path: Path
    images: Path
    """Folder that the records' picture paths start from."""
    bounds: np.ndarray
    """int64 (N, 2): where each record begins and ends in the file, in bytes."""

    @classmethod
    def open(cls, path: Path | str, images: Path | str | None = None) -> "Conversations":
        """Index a ``.json`` or ``.jsonl`` file; ``images`` defaults to the file's own folder.

        Raises:
            UserError: no such file, no JSON, or no record.
        """
        path = Path(path)
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"no conversations in {path}", "a .json or .jsonl file", "check the path")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            is_list = bytes(content[:64]).lstrip()[:1] == b"["
            bounds = _list_bounds(path, content) if is_list else _line_bounds(content)
        if not len(bounds):
            raise UserError(f"{path} without a record", "conversations", "check the file")
        return cls(path, Path(images) if images else path.parent, bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the file, and of name and size in bytes of every picture in it: to read millions would take
        longer than many a training. Raises ``UserError`` as ``check`` does."""
        return self._scan(lambda turns: None)

    def check(self, talk: Callable[[Turns], None]) -> None:
        """Read all records and look up their pictures, so that what cannot be trained on is told before a training.

        Raises:
            UserError: a record that is not a conversation or is about another number of pictures than one, a picture
                that is not there, or what ``talk`` raises about a record's turns; file and record are told.
        """
        self.__dict__["content_hash"] = self._scan(talk)  # where the property keeps it: records are read once

    def _scan(self, talk: Callable[[Turns], None]) -> str:
        counts, names = np.empty(len(self), np.int64), set()
        for index in range(len(self)):
            found, turns = self._record(index)
            counts[index] = len(found)
            names.update(found)
            try:
                talk(turns)
            except UserError as error:
                raise UserError(f"{self._where(index)}: {error.found}", error.expected, error.next_step) from error
        if (strange := np.flatnonzero(counts != 1)).size:
            raise UserError(
                f"{self._where(strange[0])} with {counts[strange[0]]} pictures ({len(strange)} records have another "
                "number than one)",
                "conversations about one picture each",
                "leave those records out of the file",
            )
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        for name in sorted(names):
            try:
                size = (self.images / name).stat().st_size
            except OSError as error:
                raise self._no_picture(str(self.path), name, error) from error
            digest.update(f"{name}\0{size}\0".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Conversation:
        """Read a record and its pictures.

        Raises:
            UserError: the record is not a conversation, or a picture is missing or damaged.
        """
        names, turns = self._record(index)
        return Conversation(tuple(self._picture(index, name) for name in names), turns)

    def turns(self, index: int) -> Turns:
        """A record without its pictures. Raises ``UserError`` where it is not a conversation."""
        return self._record(index)[1]

    def _where(self, index: int) -> str:
        return f"{self.path}, record {index}"

    def _record(self, index: int) -> tuple[list[str], Turns]:
        """The pictures' names and what is said."""
        start, stop = self.bounds[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        where = self._where(index)
        try:
            record = json.loads(text)
            said = record["conversations"] if "conversations" in record else record["messages"]
            turns = tuple(_turn(turn) for turn in said)
            named = record.get("images", record.get("image")) or []
            names = [named] if isinstance(named, str) else list(named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: no conversation ({error!r})", f"such as {FORM}", "mend the file") from error
        spoken = [role for role, _ in turns if role != "system"]
        if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
            raise UserError(f"{where}: the turns {spoken}", "user and assistant in turn", "mend the file")
        for name in names:
            if not isinstance(name, str) or not stays_inside(name):
                raise UserError(f"{where}: the picture {name!r}", f"a path below {self.images}", "mend the file")
        return names, turns

    def _picture(self, index: int, name: str) -> np.ndarray:
        try:
            return np.asarray(Image.open(self.images / name).convert("RGB"))
        except Exception as error:  # pillow raises whatever its decoders do (SyntaxError, DecompressionBombError, ...)
            raise self._no_picture(self._where(index), name, error) from error

    def _no_picture(self, where: str, name: str, error: Exception) -> UserError:
        return UserError(
            f"{where}: {self.images / name} ({error})", "a picture", "name the pictures' folder, or fetch the picture"
        )


def _turn(turn: dict) -> tuple[str, str]:
    role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
    if isinstance(text, list):  # parts by type
        text = "".join(part.get("text", IMAGE) for part in text)
    return ROLES[role], PLACEHOLDER.sub(" ", text).strip() if IMAGE in text else text


def _line_bounds(content: mmap.mmap) -> np.ndarray:
    """Where each line that is not empty begins and ends."""
    text = np.frombuffer(content, np.uint8)
    breaks = np.flatnonzero(text == ord("\n"))
    del text  # an array on it would keep the map open
    start, stop = np.r_[0, breaks + 1], np.r_[breaks, len(content)]
    bounds = np.stack([start, stop], 1)
    return bounds[[bool(content[a:b].strip()) for a, b in bounds.tolist()]].astype(np.int64)


def _list_bounds(path: Path, content: mmap.mmap) -> np.ndarray:
    """Where each object of a JSON list begins and ends, in one pass of the decoder."""
    try:
        text = content[:].decode()
        decoder, at, bounds = json.JSONDecoder(), text.index("[") + 1, []
        space = re.compile(r"[\s,]*")
        while (at := space.match(text, at).end()) < len(text) and text[at] != "]":  # pyright: ignore[reportOptionalMemberAccess]
            _, stop = decoder.raw_decode(text, at)
            bounds.append((at, stop))
            at = stop
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error})", "a list of conversations", "mend the file") from error
    if at >= len(text):
        raise UserError(f"{path}: the list does not end", "a whole file", "copy it again")
    characters = np.array(bounds, np.int64).reshape(-1, 2)
    if text.isascii():
        return characters
    # From characters to bytes: bytes before each character.
    flat, order = characters.ravel(), []
    last, byte = 0, 0
    for place in flat.tolist():
        byte += len(text[last:place].encode())
        last = place
        order.append(byte)
    return np.array(order, np.int64).reshape(-1, 2)
