# SPDX-License-Identifier: Apache-2.0
"""`parabola study` end to end: what it lists, prints and writes, and its exit code."""

import io
import json
import os
import re
from html import unescape

import pytest
import torch
from rich.console import Console

from parabola.lab.commands import app
from parabola.lab.errors import UsageError
from parabola.lab.report.picture import find_browser, run_browser
from parabola.lab.study import catalog, figures
from parabola.lab.study.experiment import (
    Check,
    Context,
    Experiment,
    Note,
    Outcome,
    Plot,
    Sheet,
    quadrants,
)
from parabola.lab.study.picture import write_picture
from parabola.lab.study.record import Finished, Settings
from parabola.lab.study.rows import best_row
from parabola.lab.study.runner import Request, run_study

ROWS = [
    best_row(
        source,
        power,
        basis=basis,
        batch=batch,
        schedule="cosine",
        rates=[0.1, 0.2, 0.4],
        values=[[9.0, 8.0], [level, 2 * level], [float("inf"), float("nan")]],
        curves=[[1, 9], [1, level], [1, float("nan")]],
        every=5,
        noise=0.5,
    )
    for level, (source, power) in enumerate(
        [("gradient", 0.5), ("gauss_newton", 0.5), ("gauss_newton", 1.0)], start=1
    )
    for basis in ("identity", "gauss_newton")
    for batch in ("full", "8")
]


def squared(x):
    return x * x


def outcome(context, value=0.25):
    squares = context.map(squared, range(3))
    checks = [
        context.check("a <b>sum</b> of squares", sum(squares), "in", (5, 5)),
        Check("always", value, "<", 0.5, value < 0.5),
    ]
    plots = [
        Plot("Rates", figures.rate_curves(ROWS[:1]), "log scale"),
        Plot("Losses", figures.loss_curves(ROWS[:1]), "log scale"),
    ]
    sheet = Sheet("A sheet", ("batch", "error"), [(1, 0.12345), (2, "none")])
    notes = [Note("it falls", f"not from {context.argument}")]
    return Outcome(ROWS, checks, notes, plots, [quadrants("here", ROWS, "8")], [sheet])


def broken(context):
    raise RuntimeError("no such luck")


def misused(context):
    raise UsageError("that is no task")


@pytest.fixture
def study(monkeypatch):
    """Small experiments instead of the real ones."""
    found = [
        Experiment("good", "Good", "Does it pass?", outcome, claim="It should."),
        Experiment("bad", "Bad", "Does it fail?", lambda context: outcome(context, 0.75)),
        Experiment("broken", "Broken", "Does it raise?", broken),
        Experiment("mine", "Mine", "On your task?", outcome, argument="TASK"),
        Experiment("misused", "Misused", "On your task?", misused, argument="TASK"),
    ]
    monkeypatch.setattr(catalog, "known", lambda: {item.id: item for item in found})


@pytest.fixture
def run(cli, tmp_path, study):
    def invoke(*words):
        result = cli.invoke(app, ["study", *words, "--out", str(tmp_path / "out"), "--jobs", "1"])
        path = tmp_path / "out" / "study.json"
        return result, json.loads(path.read_text()) if path.exists() else None

    return invoke


def test_without_arguments_it_lists_experiments_with_their_questions(cli):
    result = cli.invoke(app, ["study"])
    assert result.exit_code == 0
    for name, experiment in catalog.known().items():
        assert name in result.output
        assert experiment.question.split()[0] in result.output


def test_a_run_prints_rows_quadrants_notes_and_checks(run):
    result, _ = run("good")
    assert result.exit_code == 0, result.output
    for text in (
        "good: final / initial loss",
        "here: Adam | GN^-1/2 | GN^-1",
        "1.5 | 3 | 4.5",
        "claim   it falls\ncounter not from None",
        "PASS a <b>sum</b> of squares: 5 (within 5 and 5)",
        "PASS always: 0.25 (< 0.5)",
        "A sheet",
        "0.123",
        "All 2 checks pass.",
    ):
        assert text in result.output, text


def test_a_failing_check_is_an_exit_code_and_the_value_stands_beside_its_threshold(run):
    result, found = run("good", "bad")
    assert result.exit_code == 1
    assert "FAIL always: 0.75 (< 0.5)" in result.output
    assert "1 of 4 checks fail." in result.output
    assert [item["passed"] for item in found["experiments"]] == [True, False]
    assert found["passed"] is False


def test_an_experiment_that_raises_does_not_stop_the_others(run):
    result, found = run("broken", "good")
    assert result.exit_code == 1
    assert "RuntimeError: no such luck" in result.output
    assert "All 2 checks pass. Did not finish: broken." in result.output
    assert [item["error"] for item in found["experiments"]] == ["RuntimeError: no such luck", None]


def test_the_json_has_settings_and_full_curves(run):
    _, found = run("good", "--seeds", "2", "--quick", "--fresh")
    assert found["schema"] == "parabola.study/1"
    assert found["settings"] == {"seeds": 2, "quick": True, "fresh": True}
    assert found["command"] == "parabola study good --seeds 2 --quick --fresh"
    assert {"torch", "parabola", "python", "platform"} <= set(found["environment"])
    (item,) = found["experiments"]
    assert (item["id"], item["question"], item["error"]) == ("good", "Does it pass?", None)
    row = item["rows"][0]
    assert (row["method"], row["basis"], row["batch"]) == ("Adam", "identity", "full")
    assert row["rates"] == [0.1, 0.2, 0.4]
    assert row["values"] == [[9.0, 8.0], [1.0, 2.0], [None, None]]
    assert row["curve"] == {"steps": [0, 5], "values": [1.0, 1.0]}
    assert row["settings"] == {"noise": 0.5}
    assert row["interior"] is True
    assert item["checks"][1] == {
        **{"text": "always", "value": 0.25, "relation": "<", "threshold": 0.5, "passed": True}
    }
    assert item["notes"] == [{"claim": "it falls", "counter": "not from None"}]
    assert item["sheets"][0]["lines"] == [[1, 0.12345], [2, "none"]]
    assert len(item["quadrants"][0]["cells"]) == 4


def test_an_argument_follows_its_experiment(run):
    result, found = run("mine", "a/task.py:Task", "good")
    assert result.exit_code == 0
    assert "counter not from a/task.py:Task" in result.output
    assert found["command"].startswith("parabola study mine a/task.py:Task good ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["goood"], "no experiment named 'goood': did you mean 'good'?"),
        (["mine"], "mine needs a word after it: parabola study mine TASK"),
        (["--all", "good"], "leave out the ids"),
        (["misused", "x"], "that is no task"),
    ],
)
def test_wrong_words_are_explained(run, words, message):
    result, found = run(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert found is None


def test_all_leaves_out_what_needs_an_argument(run):
    result, found = run("--all")
    assert result.exit_code == 1
    assert [item["id"] for item in found["experiments"]] == ["good", "bad", "broken"]


def elsewhere(parent):
    return os.getpid() != parent and torch.get_num_threads() == 1


def spread(context):
    counts = context.map(elsewhere, [os.getpid()] * 4)
    return Outcome((), [context.check("four in other processes", sum(counts), "in", (4, 4))])


def test_a_terminal_shows_a_bar_that_ends_full(tmp_path):
    console = Console(force_terminal=True, file=io.StringIO(), width=100)
    experiment = Experiment("good", "Good", "Does it pass?", outcome)
    request = Request([(experiment, None)], Settings(seeds=1), 1, tmp_path)
    (found,) = run_study(request, console)
    assert found.passed
    text = console.file.getvalue()
    assert "3/3" in text
    assert "running" not in text


@pytest.mark.slow  # every process imports torch
def test_work_is_spread_over_processes(cli, tmp_path, monkeypatch):
    found = {"spread": Experiment("spread", "Spread", "Elsewhere?", spread)}
    monkeypatch.setattr(catalog, "known", lambda: found)
    result = cli.invoke(app, ["study", "spread", "--jobs", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output


def finished(id="good"):
    experiment = Experiment(id, "Good", "Does it pass?", outcome)
    return Finished(experiment, None, outcome(Context()), None, 1.0)


def test_the_page_shows_everything_and_loads_nothing(run, tmp_path):
    run("good", "bad", "broken")
    page = (tmp_path / "out" / "study.html").read_text()
    assert "1 of 4 checks fail. Did not finish: broken." in page
    for text in (
        "Does it pass?",
        "It should.",
        "it falls",
        "PASS",
        "FAIL",
        "A sheet",
        "no such luck",
    ):
        assert text in page
    assert "a &lt;b&gt;sum&lt;/b&gt; of squares" in page
    figures_ = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    drawn = json.loads(figures_.group(1))
    assert set(drawn) == set(re.findall(r'<div class="chart" id="([^"]+)"', page))
    assert len(drawn) == 2 * (4 + 2)  # two experiments, four quadrants and two plots each
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?https?:', page)


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

PROBE = """<script>addEventListener("load", () => {
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  document.title = JSON.stringify({
    drawn: plots.filter((p) => p.querySelector(".js-line, .barlayer .point path")).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
});</script>"""


@needs_browser
def test_a_browser_draws_every_chart(run, tmp_path):
    run("good")
    page = tmp_path / "out" / "study.html"
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    document = run_browser("--dump-dom", page.as_uri()).stdout
    title = unescape(re.search(r"<title>(.*?)</title>", document).group(1))
    assert json.loads(title) == {"drawn": 6, "overflow": 0}


@needs_browser
def test_a_picture_of_one_experiment(tmp_path):
    path = tmp_path / "images" / "good.png"
    write_picture(finished(), Settings(), path, ["Rates", "Losses"], width=600, height=400)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no chart 'Ratse'"):
        write_picture(finished(), Settings(), path, ["Ratse"])
