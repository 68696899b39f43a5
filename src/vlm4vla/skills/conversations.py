"""Questions about rendered scenes as a file of conversations, to be trained on beside demonstrations."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm4vla.data.resumable import once
from vlm4vla.errors import UserError
from vlm4vla.files import new_folder
from vlm4vla.skills.questions import Scenes, ask

NAME = "conversations.jsonl"
RECIPE = "recipe.json"


def make_folder(folder: Path, recipe: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """``folder`` as ``write`` fills it and with its recipe beside; nothing is done where the same one is there.

    Returns the conversations' path.

    Raises:
        UserError: ``folder`` is something else, or another process makes it.
    """
    said = json.dumps(recipe, indent=4)

    work = folder.with_name(f".{folder.name}.questions")

    def make() -> None:
        with new_folder(work / folder.name) as partial:
            write(partial)
            (partial / RECIPE).write_text(said)
        (work / folder.name).rename(folder)

    def look() -> Path:
        if not (folder / RECIPE).is_file() or (folder / RECIPE).read_bytes() != said.encode():
            raise UserError(f"{folder}, which is something else", "a new folder, or the same questions", "name another")
        return folder / NAME

    return once(folder, work, "folder of questions", make, look)


def write_conversations(
    scenes: Scenes, folder: Path, questions: int, seed: int, free_share: float, named: Collection[str] | None = None
) -> None:
    """``questions`` records about each scene, in LLaVA's form, and the pictures (PNG) beside them, all from a seed.

    ``folder`` is there and empty. ``free_share``, ``named``: as in ``questions.ask``; a scene without questions is left
    out.
    """
    (folder / "images").mkdir()
    with (folder / NAME).open("w") as file:
        for i, picture in enumerate(scenes.images):
            asked = ask(scenes, i, questions, np.random.default_rng((seed, i)), free_share, named)
            if not asked:
                continue
            name = f"images/{i:06d}.png"
            Image.fromarray(picture).save(folder / name)
            for number, each in enumerate(asked):
                said = [("human", f"<image>\n{each.question}"), ("gpt", each.answer)]
                turns = [{"from": who, "value": text} for who, text in said]
                file.write(json.dumps({"id": f"{i}-{number}", "image": name, "conversations": turns}) + "\n")
