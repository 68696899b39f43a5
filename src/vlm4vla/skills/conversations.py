"""Questions about rendered scenes as a file of conversations, to be trained on beside demonstrations."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlm4vla.files import new_folder
from vlm4vla.skills.questions import Scenes, ask

NAME = "conversations.jsonl"


def write_conversations(scenes: Scenes, folder: Path, questions: int, seed: int, free_share: float) -> Path:
    """``questions`` records about each scene, in LLaVA's form, and the pictures (PNG) beside them, all from a seed.

    ``folder`` appears when it is whole. ``free_share``: as in ``questions.ask``. Returns the file's path.
    """
    with new_folder(folder) as partial:
        (partial / "images").mkdir()
        with (partial / NAME).open("w") as file:
            for i, picture in enumerate(scenes.images):
                name = f"images/{i:06d}.png"
                Image.fromarray(picture).save(partial / name)
                for number, each in enumerate(ask(scenes, i, questions, np.random.default_rng((seed, i)), free_share)):
                    said = [("human", f"<image>\n{each.question}"), ("gpt", each.answer)]
                    turns = [{"from": who, "value": text} for who, text in said]
                    file.write(json.dumps({"id": f"{i}-{number}", "image": name, "conversations": turns}) + "\n")
    return folder / NAME
