"""The VLM stage's scenes on disk, and what a build of the embedded VLM is of."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fake_sim
from test_worker import gone
from vlm4vla.errors import UserError
from vlm4vla.sims.grinningface import emoji
from vlm4vla.skills import scenes

HANG = """if True:
    import sys
    from pathlib import Path
    import fake_sim
    from vlm4vla.skills import scenes
    scenes._render_shard = fake_sim.hang
    if __name__ == "__main__":
        scenes.make_scenes(1, 0, 32, Path(sys.argv[1]), workers=1, progress=False)
"""


def test_a_rendering_process_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "_render_shard", fake_sim.die)
    with pytest.raises(UserError, match="0 of 1 shards are there"):
        scenes.make_scenes(1, 0, 32, tmp_path, workers=1, progress=False)


def test_rendering_processes_end_with_their_parent(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", HANG, str(tmp_path)], env=environment)
    end = time.monotonic() + 30
    while not (written := [path.read_text() for path in tmp_path.glob("*.npz")]) or not written[0]:
        assert parent.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(int(written[0]))


@pytest.mark.parametrize("owner", ["font", "constant", "catalogue"])
def test_shards_of_other_fonts_emojis_and_constants_are_other_files(monkeypatch, owner):
    before = scenes.version()
    assert before == scenes.version()
    if owner == "font":
        monkeypatch.setattr(emoji, "font_version", lambda: "Other.ttf 0123456789")
    elif owner == "constant":
        monkeypatch.setattr(scenes, "ROW_SHARE", 0.5)
    else:
        fewer = emoji.catalogue()[1:]
        monkeypatch.setattr(emoji, "catalogue", lambda: fewer)
    assert scenes.version() != before


def test_each_step_of_the_build_is_of_its_constants_and_of_the_steps_before(monkeypatch):
    from vlm4vla.skills import build

    before = build.identities()
    assert len(set(before)) == 3

    def changed(name, value):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            return [a != b for a, b in zip(before, build.identities(), strict=True)]

    for name, expected in {
        "SEED": [True, True, True],
        "TRAIN_SCENES": [True, True, True],
        "ALIGN": [True, True, True],
        "INSTRUCT": [False, True, True],
        "SENTENCES": [False, False, True],
        "FREE_SHARE": [False, False, True],
    }.items():
        value = getattr(build, name)
        other = value.model_copy(update={"steps": 1}) if hasattr(value, "steps") else value + 1
        assert changed(name, other) == expected, name
