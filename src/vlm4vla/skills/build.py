"""The embedded VLM from nothing: scenes -> alignment -> questions -> scores -> a folder with its model card."""

import json
import shutil
from pathlib import Path

import torch

from vlm4vla import __version__
from vlm4vla.backbones import tiny
from vlm4vla.backbones.load import load_vlm
from vlm4vla.files import write_text
from vlm4vla.sims.grinningface import emoji
from vlm4vla.skills.conversations import make_folder, write_conversations
from vlm4vla.skills.questions import CUES, FILLER, PLACE_PHRASES, TEMPLATES, Scenes, words
from vlm4vla.skills.scenes import make_scenes, names, version
from vlm4vla.skills.score import score
from vlm4vla.skills.stage import ALIGN_WEIGHT, BACKGROUND_WEIGHT, MAX_SHIFT, QUESTIONS, Stage
from vlm4vla.spec import Runtime, TrainSpec, content_hash
from vlm4vla.training.loop import fit

SEED = 0
TRAIN_SCENES, TRAIN_SCENE_SEED = 24_000, 0
TEST_SCENES, TEST_SCENE_SEED = 1_000, 1
"""Scores are on scenes of another seed than any that was trained on."""
ALIGN = TrainSpec(steps=900, batch_size=64, learning_rate=2e-3, warmup_steps=40)
INSTRUCT = TrainSpec(steps=3000, batch_size=32, learning_rate=2e-3, warmup_steps=40, schedule="cosine", checkpoints=6)
SENTENCES = TrainSpec(steps=1500, batch_size=32, learning_rate=1.5e-3, warmup_steps=40, schedule="cosine")
FREE_SHARE = 0.5

CARD = """# The embedded VLM

A LLaVA of {parameters} parameters (SegFormer encoder at {size} px, two-layer projector, 3-layer Llama) that knows
{emojis} emojis by name and where things are on a table. It stands in for a web-scale VLM where only two CPU cores are
at hand: its knowledge covers *all* emojis, robot demonstrations cover some. Opens with plain transformers:
`AutoModelForImageTextToText.from_pretrained(folder)`.

- **Made by** `vlm4vla vlm train`, from random weights and pictures that the project renders; no outside data.
- **Training**: {scenes} scenes; {align} steps x {align_batch} of region-text alignment, then {instruct} steps x
  {instruct_batch} scenes x {questions} short questions, then {sentences} steps with free sentences.
- **Not for** anything else: it has never seen a photograph, and its vocabulary is a few hundred words.

## Scores

Exact answers (greedy, whole vocabulary) on {test} rendered scenes of a seed never trained on, with Wilson's 95 %
intervals. `where` and `what` also by emoji split: `val` and `hard` occur in no robot demonstration.

{table}

`where`: on which side is X (or none). `what`: which card is on the left, in the middle, on the right. `point`: cell of
a 12 x 12 grid, where a neighbouring cell counts as wrong. Free sentence: the name stands
among up to twelve random words, as in a robot's instruction.
"""


def build_vlm(work: Path, folder: Path, runtime: Runtime) -> dict:
    """Make the embedded VLM in ``folder``, with intermediate results in ``work``; resumes after a kill.

    Returns:
        The model card's values, also in ``folder/scores.json``.
    """
    torch.set_num_threads(runtime.threads)
    size = tiny.IMAGE_SIZE
    train = make_scenes(TRAIN_SCENES, TRAIN_SCENE_SEED, size, work / "scenes", runtime.workers, runtime.progress)
    test = test_scenes(work, runtime)
    align, instruct, sentences = identities()
    vlm, processor = tiny.build(names(), words(), SEED)
    fit(Stage(vlm, processor, train, instruct=False), ALIGN, SEED, work / "align", runtime, align)
    vlm, processor = load_vlm(str(work / "align" / "policy"))
    # A Stage draws parameters of its own: the same ones where the steps before it were made by an earlier start.
    torch.manual_seed(SEED + 1)
    fit(Stage(vlm, processor, train, instruct=True), INSTRUCT, SEED, work / "instruct", runtime, instruct)
    vlm, processor = load_vlm(str(work / "instruct" / "policy"))
    torch.manual_seed(SEED + 2)
    last = Stage(vlm, processor, train, instruct=True, free_share=FREE_SHARE)
    fit(last, SENTENCES, SEED, work / "sentences", runtime, sentences)
    scores = score_folder(work / "sentences" / "policy", test)
    shutil.copytree(work / "sentences" / "policy", folder, dirs_exist_ok=True)
    write_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    write_text(folder / "README.md", model_card(scores, sum(p.numel() for p in vlm.parameters())))
    return scores


def identities() -> tuple[str, str, str]:
    """What the three steps are of: each step's constants and those of the steps before it."""
    scenes = [version(), TRAIN_SCENES, TRAIN_SCENE_SEED, tiny.IMAGE_SIZE]
    align = content_hash([names(), words(), scenes, SEED, BACKGROUND_WEIGHT, MAX_SHIFT, ALIGN.model_dump()])
    instruct = content_hash([align, TEMPLATES, QUESTIONS, ALIGN_WEIGHT, INSTRUCT.model_dump()])
    return align, instruct, content_hash([instruct, CUES, FILLER, FREE_SHARE, SENTENCES.model_dump()])


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown table of ``score``'s result."""
    lines = ["| task | right | interval | questions |", "|---|---|---|---|"]
    for task, row in scores.items():
        lines.append(f"| {task} | {row['estimate']:.1%} | [{row['low']:.1%}, {row['high']:.1%}] | {row['n']} |")
    return "\n".join(lines)


def model_card(scores: dict[str, dict[str, float]], parameters: int) -> str:
    """Markdown; every figure in it comes from the arguments and this module's constants."""
    return CARD.format(
        parameters=f"{parameters / 1e6:.2f} million",
        size=tiny.IMAGE_SIZE,
        emojis=len(names()),
        scenes=f"{TRAIN_SCENES:,}",
        align=ALIGN.steps,
        align_batch=ALIGN.batch_size,
        instruct=INSTRUCT.steps,
        instruct_batch=INSTRUCT.batch_size,
        questions=QUESTIONS,
        sentences=SENTENCES.steps,
        test=f"{TEST_SCENES:,}",
        table=score_table(scores),
    )


def test_scenes(work: Path, runtime: Runtime) -> Scenes:
    """The scenes that scores are on, rendered into ``work/scenes`` where they are missing."""
    folder = work / "scenes"
    return make_scenes(TEST_SCENES, TEST_SCENE_SEED, tiny.IMAGE_SIZE, folder, runtime.workers, runtime.progress)


def questions(
    num_scenes: int, each: int, seed: int, all_emojis: bool, work: Path, folder: Path, runtime: Runtime
) -> Path:
    """``each`` questions about every one of ``num_scenes`` scenes, as a file of conversations in ``folder``; as many of
    them are free sentences as in the VLM's last step. Does nothing where they are there.

    Only emojis of ``train`` are named, as by robot demonstrations, unless ``all_emojis``; a scene without one is left
    out.

    Raises:
        UserError: ``folder`` is something else, or another process makes it.
    """
    named = None if all_emojis else {e.name for e in emoji.split("train")}
    recipe = {
        "scenes": [version(), num_scenes, seed, tiny.IMAGE_SIZE],
        "questions": [content_hash([TEMPLATES, PLACE_PHRASES, CUES, FILLER]), each, FREE_SHARE],
        "emojis": "all" if all_emojis else "train",
        "version": __version__,
    }

    def write(partial: Path) -> None:
        scenes = make_scenes(num_scenes, seed, tiny.IMAGE_SIZE, work / "scenes", runtime.workers, runtime.progress)
        write_conversations(scenes, partial, each, seed, FREE_SHARE, named)

    return make_folder(folder, recipe, write)


def score_folder(folder: Path, scenes: Scenes) -> dict:
    """Scores by task over all emojis, and of ``where`` and ``what`` by emoji split."""
    vlm, processor = load_vlm(str(folder))
    split_of = {e.name: e.split for e in emoji.catalogue()}
    plain = score(vlm, processor, scenes, TEST_SCENE_SEED, split_of)
    free = score(vlm, processor, scenes, TEST_SCENE_SEED, split_of, free_share=1.0)
    return plain | {f"{task}, free sentence": free[task] for task in CUES}
