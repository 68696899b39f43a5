"""Looking at data: what is told, what is suspicious, and the page of an episode."""

import base64
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from fake_sim import CONVENTION
from test_films import VIDEO, film, raw
from vlm4vla.cli import cli
from vlm4vla.data.inspect import inspect
from vlm4vla.data.video import decode
from vlm4vla.data.view import PAD, PLOT, WIDTH, curve, view
from vlm4vla.data.write import Episode, write
from vlm4vla.errors import UserError


def episodes(lengths=(4, 6), seed=0):
    """Moving pictures, actions without anything strange, states."""
    rng = np.random.default_rng(seed)
    result = []
    for i, t in enumerate(lengths):
        actions = rng.normal(size=(t, 7)).astype(np.float32)
        actions[:, 6] = np.arange(t) % 2
        images = rng.integers(0, 256, (t, 6, 8, 3), np.uint8)
        result.append([images, actions, rng.normal(size=(t, 2)).astype(np.float32), f"put it {i}"])
    return result


def written(folder, parts):
    encoded = [Episode.encode({"main": images}, actions, states, task) for images, actions, states, task in parts]
    write(folder, encoded, CONVENTION, {"source": "a test"})
    return folder


def test_what_is_there_is_told(tmp_path):
    report = inspect(written(tmp_path / "demos", episodes()))
    text = str(report)
    for expected in (
        "episodes    2",
        "frames      10 (4 to 6 an episode, mean 5.0)",
        "fps         5",
        "main 6x8",
        "tasks       2, e.g. 'put it 0'",
        "convention  control: delta_ee",
        'provenance  source: "a test"',
    ):
        assert expected in text
    gripper = next(line for line in text.splitlines() if line.startswith("gripper"))
    assert gripper.split()[1:7] == ["0.5000", "0.5000", "0.0000", "0.0000", "1.0000", "1.0000"]
    assert report.findings == ()
    assert report.next_step is None


def nan(parts):
    parts[1][1][2, 0] = np.nan


def nan_state(parts):
    parts[0][2][1, 1] = np.nan


def half_open(parts):
    parts[1][1][:, 6] = 0.5


def constant(parts):
    for part in parts:
        part[1][:, 3] = 0.25


def frozen(parts):
    parts[0][0][:] = parts[0][0][:1]


def black(parts):
    parts[1][0][:] = 0


def twice(parts):
    parts[1][1:3] = parts[0][1:3]
    parts[1][0] = parts[0][0]


def clipped(parts):
    for part in parts:
        part[1][:, 0] = part[1][:, 0].clip(-0.5, 0.5)


def nameless(parts):
    parts[0][3] = " "


SUSPICIOUS = {
    nan: ("problem: 1 frames have NaN or infinite numbers in the action, in the episodes [1]", "--episode 1"),
    nan_state: ("problem: 1 frames have NaN or infinite numbers in the state, in the episodes [0]", "--episode 0"),
    half_open: ("problem: 6 frames have other gripper actions than 0 and 1, such as 0.5", "convert"),
    constant: ("note: roll is constant (0.25); policies will predict that", None),
    frozen: ("note: the camera main shows the same picture all along in 1 of 2 episodes looked at: [0]", None),
    black: ("note: the camera main is black in 1 of 2", None),
    twice: ("note: 1 episodes repeat another one to the last bit, e.g. [0, 1]", None),
    clipped: ("note: x is at -0.5 or 0.5 in up to", None),
    nameless: ("note: 4 frames have an empty instruction", None),
}


@pytest.mark.parametrize("change", SUSPICIOUS, ids=lambda change: change.__name__)
def test_suspicious_things_are_told(tmp_path, change):
    parts = episodes((4, 4) if change is twice else (4, 6))
    change(parts)
    folder = written(tmp_path / "demos", parts)
    message, mend = SUSPICIOUS[change]
    report = inspect(folder)
    assert message in str(report)
    assert (report.next_step is None) == (mend is None)
    assert mend is None or mend in str(report.next_step)
    told = CliRunner().invoke(cli, ["data", "inspect", str(folder)])
    assert ("vlm4vla train" in told.output) == (mend is None)


def test_wrong_statistics_and_broken_films_are_told(tmp_path):
    parts = raw((5, 5))
    for _, actions, *_ in parts:
        actions[:, 6] = actions[:, 6] > 0
    folder = film(tmp_path / "demos", parts)
    path = folder / "meta/stats.json"
    values = json.loads(path.read_text())
    values["action"]["mean"][2] += 1
    path.write_text(json.dumps(values))
    (folder / VIDEO.format(0)).write_bytes(b"no film")
    report = inspect(folder)
    assert "other means than the actions" in str(report)
    assert "problem: episode 0, camera main:" in str(report)
    assert "convert or copy it again" in str(report.next_step)


def test_an_episode_becomes_one_page(tmp_path):
    parts = episodes((4, 12))
    parts[1][1][5, 2] = np.nan
    parts[1][0][:] = 20 * np.arange(12)[:, None, None, None]
    parts[1][3] = "put it <b>there</b> & back"
    folder = written(tmp_path / "demos", parts)
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["data", "view", str(folder), "--episode", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    page = out.read_text()
    assert "put it &lt;b&gt;there&lt;/b&gt; &amp; back" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is fetched"
    (encoded,) = re.findall(r'<video src="data:video/mp4;base64,([^"]*)"', page)
    (tmp_path / "film.mp4").write_bytes(base64.b64decode(encoded))
    shown = decode(tmp_path / "film.mp4", np.arange(12) / CONVENTION.control_hz, CONVENTION.control_hz, (6, 8))
    assert shown.mean((1, 2, 3)) == pytest.approx(20 * np.arange(12), abs=5)
    assert page.count('<path d="M') == 7
    assert "1 not finite" in page
    with pytest.raises(UserError, match="0 to 1"):
        view(folder, 2, out)


def test_curves_are_held_steps_with_gaps():
    path, low, high, gaps = curve(np.array([0.0, np.nan, 2.0, 1.0]))
    assert (low, high, gaps) == (0, 2, 1)
    step = WIDTH / 4
    middle = PLOT / 2
    assert path == (
        f"M0.0,{PLOT - PAD:.1f}h{step:.1f}M{2 * step:.1f},{PAD:.1f}h{step:.1f}L{3 * step:.1f},{middle:.1f}h{step:.1f}"
    )
    assert curve(np.full(3, np.nan))[0] == ""
