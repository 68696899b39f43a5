"""The report: what it says is decided by the intervals, what is missing is listed, and the page stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import TRAIN, VAL, write_study
from vlm4vla.errors import UserError
from vlm4vla.reporting import conclusions, html, plots, published, tables
from vlm4vla.reporting.published import judge
from vlm4vla.studies.matrix import RESULTS, Study, plan
from vlm4vla.studies.stats import MIN_SEEDS, Difference, Mean, Rate
from vlm4vla.studies.store import Store
from vlm4vla.types import EpisodeResult

CALVIN = "calvin_abc_d/v1"
APART = {"full": {TRAIN: (0.95, 0.95), VAL: (0.9, 0.85)}, "scratch": {TRAIN: (0.9, 0.5), VAL: (0.9, 0.33)}}
OVERLAPPING = {"full": {VAL: (0.9, 0.6)}, "freeze_vision": {VAL: (0.9, 0.6)}}


def text_of(results: tables.Results) -> str:
    return " ".join(" ".join(pair) for pair in conclusions.paragraphs(results))


# ---------------------------------------------------------------------------------------------------------- conclusions


def test_treatments_clearly_apart_are_said_to_be_so_with_their_numbers(study_folder):
    results = tables.load(study_folder(APART))
    first, second = (results.rate(t, VAL, "recognition") for t in ("full", "scratch"))
    assert first is not None
    assert second is not None
    said = conclusions.headline(results)
    assert said.startswith("Recognition on unseen emojis (val): full lies above scratch")
    assert f"{first.estimate:.0%} against {second.estimate:.0%}" in said
    text = text_of(results)
    assert "Apart: full above scratch" in text
    assert f"(n = {first.n}) from {MIN_SEEDS} training seeds" in text
    assert "full is above chance; scratch is not told from chance" in text


def test_overlapping_treatments_are_not_ranked(study_folder):
    results = tables.load(study_folder(OVERLAPPING, episodes=60))
    assert "No two treatments can be told apart" in conclusions.headline(results)
    text = text_of(results)
    assert "Apart" not in text
    assert "are not told apart" in text
    pairs = tables.comparisons(results, VAL, "recognition")
    missed = max(abs(pairs[0].difference.low), abs(pairs[0].difference.high))
    assert f"a difference of up to {100 * missed:.0f} points cannot be excluded" in text


def test_never_apart_where_the_interval_contains_zero(study_folder):
    """Whatever the data: 'above' is said of exactly the pairs whose interval excludes 0."""
    for gap in (0.0, 0.05, 0.1, 0.2, 0.4):
        behaviour = {"full": {VAL: (0.9, 0.5 + gap)}, "scratch": {VAL: (0.9, 0.5)}, "freeze_llm": {VAL: (0.9, 0.5)}}
        folder = study_folder(behaviour, episodes=30)
        results = tables.load(folder)
        text = text_of(results)
        for metric in ("recognition", "success"):
            for pair in tables.comparisons(results, VAL, metric):
                apart = pair.difference.low > 0 or pair.difference.high < 0
                said = f"{pair.first} above {pair.second} by {conclusions._points(pair)}"
                assert (said in text) is apart
        folder.rename(folder.with_name(f"gap{gap}"))


def test_one_seed_says_nothing_about_training_again(study_folder):
    results = tables.load(study_folder(APART, seeds=(0,)))
    text = text_of(results)
    assert "Apart, as trained here: full above scratch" in text
    assert "nothing can be concluded about training again" in text
    assert "as trained here" in conclusions.headline(results)


def test_three_seeds_widen_the_interval_beyond_the_episodes(study_folder):
    folder = study_folder({"full": {VAL: (0.9, 0.5)}, "scratch": {VAL: (0.9, 0.5)}})
    rate = tables.load(folder).rate("full", VAL, "success")
    assert rate is not None
    assert "bootstrap over 3 training seeds" in rate.method


def test_missing_cells_are_listed_and_make_the_headline_preliminary(study_folder):
    folder = study_folder(APART, skip=lambda treatment, seed, name: (treatment, seed, name) == ("scratch", 2, VAL))
    results = tables.load(folder)
    assert [(cell.treatment, cell.seed, cell.protocol) for cell in results.missing] == [("scratch", 2, VAL)]
    assert "(preliminary)" in conclusions.headline(results)
    assert "1 missing of 12 cells" in text_of(results)
    page = html.report(folder, folder / "report.html").read_text()
    assert "Not all is there" in page
    assert "2 of 3 training seeds" in page
    assert f"<td>{results.missing[0].run_id}</td><td>{VAL}</td><td>0 of 100</td>" in page


def test_a_treatment_without_any_episode_is_not_measured(study_folder):
    folder = study_folder(APART, skip=lambda treatment, seed, name: treatment == "scratch")
    results = tables.load(folder)
    assert results.rate("scratch", VAL, "success") is None
    assert "scratch" not in conclusions.headline(results)
    assert "Not measured: scratch." in text_of(results)
    page = html.report(folder, folder / "report.html").read_text()
    assert "not measured" in page


def test_a_study_without_any_episode_still_reports(study_folder):
    folder = study_folder(APART, skip=lambda *_: True)
    assert "measured yet (preliminary)" in conclusions.headline(tables.load(folder))
    assert html.report(folder, folder / "report.html").is_file()


def test_faults_are_counted_and_neither_success_nor_failure(study_folder):
    folder = study_folder(APART, episodes=20, faults=2)
    results = tables.load(folder)
    assert results.faults == 2 * 12
    rate = results.rate("full", VAL, "success")
    assert rate is not None
    assert (rate.n, rate.faults) == (3 * 18, 3 * 2)
    assert "24 episodes ended in an infrastructure fault" in text_of(results)
    assert "24 × the worker died three times" in html.report(folder, folder / "report.html").read_text()


def test_recognition_says_how_many_episodes_it_rests_on(study_folder):
    results = tables.load(study_folder({"full": {VAL: (0.3, 0.9)}, "scratch": {VAL: (0.9, 0.9)}}))
    rate = results.rate("full", VAL, "recognition")
    assert rate is not None
    assert rate.n < 0.5 * 300
    assert f"{rate.n} of 300 (full)" in text_of(results)


def test_recognition_leads_only_where_every_treatment_has_it(study_folder):
    folder = study_folder({"full": {VAL: (0.0, 0.5)}, "scratch": {VAL: (0.9, 0.9)}}, episodes=20)
    results = tables.load(folder)
    assert results.rate("full", VAL, "recognition") is None
    assert conclusions.lead(results, "grinningface/place") == (VAL, "success")
    assert "scratch lies above full" in conclusions.headline(results)


@pytest.mark.parametrize(
    ("low", "estimate", "high", "said"),
    [
        (0.30, 0.40, 0.50, "full is not told from chance"),
        (0.35, 0.40, 0.50, "full is above chance"),
        (0.10, 0.20, 0.30, "full is below chance"),
        (0.10, 0.20, 0.40, "full is not told from chance"),
    ],
)
def test_chance_is_excluded_by_the_interval_alone(low: float, estimate: float, high: float, said: str):
    rate = Rate(40, 100, estimate, low, high, "Wilson")
    assert conclusions._against_chance({"full": rate}, 1 / 3) == [f"Chance is 33%: {said}."]


def test_chance_depends_on_the_number_of_cards():
    assert tables.chance(VAL) == pytest.approx(1 / 3)
    assert tables.chance("grinningface/place-cards5/val/v1") == pytest.approx(1 / 5)


# ------------------------------------------------------------------------------------------------ published directions


@pytest.mark.parametrize(
    ("direction", "low", "high", "verdict"),
    [
        ("lower", -0.3, -0.1, "agree"),
        ("lower", -0.3, 0.01, "undecided"),
        ("lower", 0.01, 0.3, "disagree"),
        ("higher", 0.01, 0.3, "agree"),
        ("higher", -0.01, 0.3, "undecided"),
        ("higher", -0.3, -0.01, "disagree"),
        ("similar", -0.05, 0.05, "agree"),
        ("similar", -0.02, 0.15, "undecided"),
        ("similar", -0.3, 0.3, "undecided"),
        ("similar", 0.12, 0.3, "disagree"),
    ],
)
def test_a_verdict_needs_the_whole_interval(direction, low: float, high: float, verdict: str):
    assert judge(direction, Difference((low + high) / 2, low, high, "")) == verdict


def test_claims_say_what_the_table_shows():
    texts = {claim.first[0]: claim.published for claim in published.claims() if claim.second == ("full", None)}
    assert texts["freeze_vision"] == "lower in 7 of 7 pairs of model and benchmark"
    assert texts["scratch"] == "lower in 5 of 5 pairs of model and benchmark"
    values = {(r["model"], r["benchmark"], r["treatment"]): r["value"] for r in published.published()}
    assert values["Qwen2.5VL-7B", "simpler_bridge", "scratch"] == "18.2"


def test_published_directions_are_compared_where_ours_was_run(study_folder):
    lines = published.compare(tables.load(study_folder(APART)))
    ours = {(line.claim.first[0], line.where): line.verdict for line in lines}
    assert ours["scratch", "grinningface/place, val"] == "agree"
    assert ours["freeze_vision", ""] == "not run"
    assert len({(line.claim, line.where) for line in lines}) == len(lines)


# ------------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.links += [value for name, value in values.items() if name in ("src", "href", "xlink:href")]
        self.pictures += [values["src"]] if tag == "img" else []
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[tables.Results, str]:
    folder = write_study(
        tmp_path_factory.mktemp("page") / "study", APART, seeds=(0,), episodes=12, curve=True, strips=6
    )
    return tables.load(folder), html.report(folder, folder / "report.html").read_text()


def test_the_page_stands_alone(page: tuple[tables.Results, str]):
    parsed = Page(page[1])
    assert not parsed.open
    assert parsed.scripts == 0
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert "@import" not in page[1]
    assert not re.search(r"url\((?!#)", page[1])


def test_the_page_shows_every_rate_run_and_protocol(page: tuple[tables.Results, str]):
    results, text = page
    for row in results.rows:
        for rate in row.rates.values():
            assert f'<span class="count">{rate.k}/{rate.n}</span>' in text
    for run in results.runs.values():
        assert run.run_id in text
        assert run.data_hash in text
    assert all(f"<h3>{name}</h3>" in text for name in results.protocol_names)
    assert "2.13.0" in text


def test_chains_are_shown_task_by_task_and_by_their_average_length(study_folder):
    """CALVIN beside a benchmark of single tasks, each with its own columns; the length leads."""
    behaviour = {"full": {CALVIN: (0.9, 1.0), VAL: (0.9, 0.9)}, "scratch": {CALVIN: (0.5, 1.0), VAL: (0.9, 0.3)}}
    folder = study_folder(behaviour, episodes=60, curve=True, faults=1)
    results = tables.load(folder)
    for treatment in behaviour:
        chains = [r for cell in results.select(CALVIN, treatment) for r in cell.results if r.success is not None]
        length = results.rate(treatment, CALVIN, "length")
        assert isinstance(length, Mean)
        assert (length.n, length.top) == (3 * 59, 5)
        assert length.estimate == pytest.approx(sum(r.credits["length"] for r in chains) / len(chains))
        assert 0 < length.low < length.estimate < length.high < 5
        rates = [results.rate(treatment, CALVIN, f"success_{i}") for i in range(1, 6)]
        assert [rate.k for rate in rates] == [sum(r.credits["length"] >= i for r in chains) for i in range(1, 6)]
        assert length.estimate == pytest.approx(sum(rate.estimate for rate in rates))
        assert rates[4] == results.rate(treatment, CALVIN, "success")

    assert conclusions.lead(results, CALVIN) == (CALVIN, "length")
    first, second = (results.rate(t, CALVIN, "length") for t in ("full", "scratch"))
    (pair,) = tables.comparisons(results, CALVIN, "length")
    text = text_of(results)
    assert f"full {first.estimate:.2f} [{first.low:.2f}, {first.high:.2f}] (n = 177)" in text
    assert pair.apart
    gap = pair.difference
    assert f"Apart: full above scratch by {gap.estimate:.2f} tasks [{gap.low:.2f}, {gap.high:.2f}]" in text
    assert gap.estimate == pytest.approx(first.estimate - second.estimate)

    page = html.report(folder, folder / "report.html").read_text()
    heads = [re.findall("<th>(.*?)</th>", part) for part in page.split('<table class="results">')[1:]]
    rows = [f"{i} in a row" for i in range(1, 6)]
    assert heads[0][:7] == ["treatment", *rows, "average length"]
    assert heads[1][:4] == ["treatment", "success", "execution", "recognition"]
    assert f"<b>{first.estimate:.2f}</b>" in page
    assert '<span class="count">177 chains</span>' in page
    assert f"{CALVIN}: tasks in a row</figcaption>" in page
    assert f"{CALVIN}: average length, {CALVIN}</figcaption>" in page


def test_a_calvin_study_leads_with_the_length(study_folder):
    folder = study_folder({"full": {CALVIN: (0.9, 1.0)}, "scratch": {CALVIN: (0.5, 1.0)}}, episodes=60, seeds=(0,))
    results = tables.load(folder)
    first, second = (results.rate(t, CALVIN, "length") for t in ("full", "scratch"))
    said = f"full lies above scratch as trained here, {first.estimate:.2f} against {second.estimate:.2f}"
    assert conclusions.headline(results) == f"Average length on {CALVIN}: {said}"


def test_a_run_card_names_the_weights_it_started_from(study_folder):
    folder = study_folder({"full": {VAL: (0.9, 0.9)}}, seeds=(0,), episodes=3)
    (card,) = folder.glob("runs/*/policy/policy.json")
    card.write_text(json.dumps({"card": {**json.loads(card.read_text())["card"], "backbone_hash": "fedcba9876"}}))
    assert "fedcba9876" in html.report(folder, folder / "report.html").read_text()


def test_versions_are_of_all_episodes_and_several_are_said(study_folder):
    folder = study_folder({"full": {VAL: (0.9, 0.9)}}, seeds=(0,), episodes=3)
    with Store(folder / RESULTS) as store:
        (run_id,) = store.runs()
        store.add(run_id, EpisodeResult(VAL, 3, 7, True, 5, versions={"mujoco": "4.1.0", "gl": "egl"}))
    study = folder / "study.yaml"
    study.write_text(study.read_text().replace("episodes: 3", "episodes: 4"))
    versions = html.context(tables.load(folder))["versions"]
    assert versions["mujoco"] == "4.0.0, 4.1.0 (2 in one study)"
    assert versions["torch"] == "2.13.0"


def test_the_seed_of_the_data_is_not_taken_for_the_training_seed():
    study = Study.model_validate({"name": "s", "matrix": {"treatment": ["full"], "data.seed": [0, 1], "seed": [0]}})
    assert [cell.title for cell in study.cells()] == ["full, data.seed=0", "full, data.seed=1"]
    assert "data.seed=1" in str(plan(study))


def test_film_strips_and_every_plot_are_there(page: tuple[tables.Results, str]):
    results, text = page
    parsed = Page(text)
    assert len(parsed.pictures) >= len(results.treatments) * len(results.protocol_names)
    assert all(picture.startswith("data:image/png;base64,") for picture in parsed.pictures)
    dots, over_steps, curves = 3, 3 * 2, 3
    assert text.count("<svg") == dots + over_steps + curves


def test_only_what_is_shown_is_explained(page: tuple[tables.Results, str], study_folder):
    folder = study_folder({"full": {CALVIN: (0.5, 0.5)}}, seeds=(0,), episodes=3)
    chains = html.report(folder, folder / "report.html").read_text()
    assert ("Recognition: the card" in page[1], "In a row: tasks" in page[1]) == (True, False)
    assert ("Recognition: the card" in chains, "In a row: tasks" in chains) == (False, True)


def test_names_cannot_inject_markup(study_folder):
    folder = study_folder({"full": {VAL: (0.9, 0.9)}}, seeds=(0,), episodes=3)
    study = folder / "study.yaml"
    study.write_text(study.read_text().replace("synthetic", "'<script>alert(1)</script>'"))
    assert Page(html.report(folder, folder / "report.html").read_text()).scripts == 0


def test_a_folder_without_a_study_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=re.escape("study.yaml")):
        html.report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_strip_keeps_first_and_last_frame(tmp_path: Path):
    import base64
    import io

    import numpy as np
    from PIL import Image

    frames = [np.full((4, 4, 3), 10 * i, np.uint8) for i in range(html.FRAMES + 3)]
    Image.fromarray(np.concatenate(frames, axis=1)).save(tmp_path / "strip.png")
    uri = html._picture(tmp_path / "strip.png", len(frames))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert shown.shape[1] == html.FRAMES * (4 + html.GAP) - html.GAP
    assert (shown[0, 0, 0], shown[0, -1, 0]) == (0, 10 * (html.FRAMES + 2))


def test_plots_take_the_colour_of_the_page():
    svg = plots.dots("recognition & more", ["val"], {"full": [plots.Point(0.8, 0.7, 0.9)]}, chance=1 / 3)
    assert plots.INK not in svg
    assert "currentColor" in svg
    assert "<title>recognition &amp; more</title>" in svg
    assert not re.search(r"<svg[^>]* width=", svg)


def test_a_plot_leaves_out_what_was_not_measured():
    empty = plots.dots(
        "t", ["a"], {"full": [html.point(None)], "scratch": [html.point(Rate(0, 0, float("nan"), 0, 1, ""))]}
    )
    assert "nan" not in empty.lower()
