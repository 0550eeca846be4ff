# SPDX-License-Identifier: Apache-2.0
"""The report's sentences, tables and charts, and a page that is whole, safe and self-contained."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_results import PARAMETERS, at_target, diverged, empty, fake_results, fake_run

from parabola.lab.report import write_report
from parabola.lab.report.charts import line_chart, memory_chart, step_cost_chart
from parabola.lab.report.curves import MAX_POINTS, curves
from parabola.lab.report.page import color_slots, command, embed, page_content
from parabola.lab.report.summary import (
    NONE,
    TIMES,
    Spread,
    count,
    duration,
    number,
    ratio,
    summarize,
)
from parabola.lab.report.verdict import verdict
from parabola.lab.results import (
    EvalCurve,
    Results,
    Run,
    Settings,
    StepSeconds,
    TrainCurve,
    WorkloadFacts,
)


def seeds(optimizer: str, *ways: tuple[int | None, float | None]) -> list[dict[str, Any]]:
    return [at_target(optimizer, *way, seed=seed) for seed, way in enumerate(ways)]


SHAMPOO = seeds("shampoo", (110, 1.3), (120, 1.4), (130, 1.5))
ADAMW = seeds("adamw", (200, 0.9), (205, 1.0), (230, 1.1))
NEVER = (None, None)

HEADLINES = {
    "the leader, the baseline and what it cost": (
        [*ADAMW, *SHAMPOO],
        "Shampoo reached train loss 0.05 in 120 steps (median of 3 seeds), AdamW in 205; "
        "Shampoo took 1.4x the seconds of AdamW.",
    ),
    "cost is told against the baseline, not the runner-up": (
        [*ADAMW, *SHAMPOO, *seeds("muon", (150, 2.0), (150, 2.0), (150, 2.0))],
        "Shampoo reached train loss 0.05 in 120 steps (median of 3 seeds), Muon in 150, "
        "AdamW in 205; Shampoo took 1.4x the seconds of AdamW.",
    ),
    "the baseline leads": (
        [*seeds("adamw", (90, 0.5), (90, 0.5), (90, 0.5)), *SHAMPOO],
        "AdamW reached train loss 0.05 in 90 steps (median of 3 seeds), Shampoo in 120; "
        "AdamW took 0.36x the seconds of Shampoo.",
    ),
    "the same seconds": (
        [*seeds("adamw", (205, 1.38)), *seeds("shampoo", (120, 1.4))],
        "Shampoo reached train loss 0.05 in 120 steps (one seed), AdamW in 205; "
        "Shampoo took about the same time as AdamW.",
    ),
    "a tie": (
        [*seeds("adamw", (120, 1.0)), *seeds("shampoo", (120, 2.0)), *seeds("sgd", NEVER)],
        "AdamW and Shampoo both reached train loss 0.05 in 120 steps (one seed), "
        "SGD not within 300; AdamW took 0.50x the seconds of Shampoo.",
    ),
    "only one got there": (
        [*seeds("adamw", NEVER, NEVER, NEVER), *SHAMPOO],
        "Only Shampoo reached train loss 0.05 in 120 steps and 1.40 s (median of 3 seeds), "
        "AdamW not within 300.",
    ),
    "the others diverged or failed": (
        [*seeds("shampoo", (120, 1.4)), diverged("sgd"), empty("muon", "failed", "out of memory")],
        "Only Shampoo reached train loss 0.05 in 120 steps and 1.40 s (one seed), "
        "SGD diverged, Muon failed.",
    ),
    "nothing to compare with": (
        seeds("adamw", (205, 1.0)),
        "AdamW reached train loss 0.05 in 205 steps and 1 s (one seed); "
        "there is nothing to compare it with.",
    ),
    "one seed of three is not a result": (
        [*seeds("adamw", (205, 1.0), NEVER, NEVER), *SHAMPOO],
        "Only Shampoo reached train loss 0.05 in 120 steps and 1.40 s (median of 3 seeds), "
        "AdamW not within 300.",
    ),
    "nobody got there in most seeds": (
        seeds("sgd", (205, 1.0), NEVER, NEVER),
        "No optimizer reached train loss 0.05 within 300 steps in most of its seeds; "
        "best train loss: SGD 0.0319 (median of 3 seeds).",
    ),
    "interrupted runs say nothing": (
        [{**run, "status": "interrupted"} for run in seeds("adamw", NEVER, NEVER)],
        "No run is complete enough to compare: every one was interrupted.",
    ),
    "no evaluation": (
        [empty("adamw", "failed", "no such file")],
        "No run has measured the train loss yet.",
    ),
    "no run": ([], "No run has been recorded yet."),
}


@pytest.mark.parametrize("case", HEADLINES)
def test_headline(case: str) -> None:
    runs, expected = HEADLINES[case]
    assert verdict(fake_results(runs)).headline.replace(TIMES, "x") == expected


def test_headline_when_none_reached_the_target_or_there_is_none() -> None:
    runs = [fake_run(name, best_metric=best) for name, best in (("sgd", 0.8), ("adamw", 0.9))]
    for run in runs:
        run.update(steps_to_target=None, seconds_to_target=None)
    results = fake_results(runs, metric="test_accuracy", goal="max", target=0.99)
    best = "best test accuracy: AdamW 0.900 and SGD 0.800 (one seed)."
    assert verdict(results).headline == (
        f"No optimizer reached test accuracy 0.99 within 300 steps; {best}"
    )
    results["workload"]["target"] = None
    assert verdict(results).headline == f"No target is set; {best}"


def test_headline_is_short_with_many_optimizers() -> None:
    runs = [at_target(f"method{i}", 100 + i, 1.0) for i in range(9)]
    headline = verdict(fake_results(runs)).headline
    assert "method4 in 104, 4 more in the table;" in headline
    assert "method5" not in headline


NOTES = {
    "One seed only: how much the result varies from seed to seed is not measured.": [
        *seeds("adamw", (205, 1.0)),
        *seeds("shampoo", (120, 1.4)),
    ],
    "The number of seeds differs: Shampoo 3 and AdamW 1.": [*ADAMW[:1], *SHAMPOO],
    "The seeds of Shampoo and AdamW overlap in steps: "
    "with this many seeds their order is not settled.": [
        *seeds("adamw", (125, 1.0), (205, 1.0), (230, 1.0)),
        *SHAMPOO,
    ],
    "By the clock AdamW was first: 1 s against 1.40 s for Shampoo.": [*ADAMW, *SHAMPOO],
    "Shampoo was also first by the clock: 1.40 s.": [
        *seeds("adamw", (205, 2.0), (205, 2.0), (205, 2.0)),
        *SHAMPOO,
    ],
    "AdamW reached the target in 2 of 3 seeds.": seeds("adamw", (205, 1.0), (210, 1.0), NEVER),
    "SGD diverged in 2 of 3 runs.": [diverged("sgd"), diverged("sgd", 1), fake_run("sgd", 2)],
    "Muon failed in its only run.": [*SHAMPOO, empty("muon", "failed")],
    "AdamW was interrupted in 1 of 2 runs.": [
        fake_run("adamw"),
        empty("adamw", "interrupted", seed=1),
    ],
    "The time of a step differs by up to 3.0x between the seeds of AdamW: "
    "the machine was not quiet, so the seconds say little.": [
        fake_run("adamw", s, seconds_per_step={"total": t, "model": t / 2, "optimizer": t / 2})
        for s, t in enumerate((0.001, 0.003))
    ],
}


@pytest.mark.parametrize("note", NOTES)
def test_note(note: str) -> None:
    notes = verdict(fake_results(NOTES[note])).notes
    assert note in [text.replace(TIMES, "x") for text in notes]


def test_a_clear_result_needs_no_note_but_the_clock() -> None:
    runs = [*seeds("adamw", (205, 1.6), (210, 1.7)), *seeds("shampoo", (120, 1.4), (121, 1.5))]
    assert verdict(fake_results(runs)).notes == ("Shampoo was also first by the clock: 1.45 s.",)


def test_unreached_seeds_count_as_infinitely_many_steps() -> None:
    (summary,) = summarize(fake_results(seeds("sgd", (100, 1.0), (300, 3.0), NEVER)))
    assert (summary.steps.median, summary.steps.low, summary.steps.high) == (300, 100, math.inf)
    (summary,) = summarize(fake_results(seeds("sgd", (100, 1.0), NEVER)))
    assert math.isinf(summary.steps.median)
    assert (summary.reached, summary.known) == (1, 2)


def test_interrupted_run_counts_only_if_it_reached_the_target() -> None:
    runs = [{**run, "status": "interrupted"} for run in seeds("sgd", (100, 1.0), NEVER)]
    (summary,) = summarize(fake_results(runs))
    assert (summary.known, summary.reached, summary.steps.median) == (1, 1, 100)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.05, "0.0500"), (8.66e-6, "8.66e-6"), (26122, "26,122"), (3.0, "3"), (0, "0")),
        *((2.5e7, "2.50e7"), (None, NONE), (math.nan, NONE), (math.inf, NONE)),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2_837_314, "2,837,314"), (112.5, "112.5"), (300.0, "300"), (math.inf, NONE), (None, NONE)],
)
def test_count(value: float | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((3e-5, "30 µs"), (0.2194, "219 ms"), (1.4, "1.40 s"), (119, "119 s")),
        *((204, "3 min 24 s"), (7500, "2 h 5 min"), (None, NONE)),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0972, "0.097x"), (1, "1.0x"), (0.996, "1.0x"), (1.44, "1.4x"), (12.6, "13x")],
)
def test_ratio(value: float, text: str) -> None:
    assert ratio(value) == text.replace("x", TIMES)


def line(figure: dict[str, Any], optimizer: str) -> dict[str, Any]:
    traces = [t for t in figure["data"] if t["meta"]["role"] == "line"]
    return next(t for t in traces if t["name"] == optimizer)


def roles(figure: dict[str, Any]) -> list[str]:
    return [t["meta"]["role"] for t in figure["data"]]


def test_metric_chart_draws_medians_bands_target_and_hits() -> None:
    results = fake_results()
    summaries = summarize(results)
    slots = color_slots([s.name for s in summaries])
    drawn = curves(summaries, "eval", "metric", smooth=False)
    figure = line_chart(drawn, summaries, slots, seconds=False, target=0.05)
    values = sorted(r["eval"]["metric"][20] for r in results["runs"] if r["optimizer"] == "muon")
    muon = line(figure, "Muon")
    assert muon["x"][20] == 120
    assert muon["y"][20] == values[1]
    band = next(t for t in figure["data"] if t["meta"] == {"slot": slots["muon"], "role": "band"})
    assert (band["y"][20], band["y"][-21]) == (values[2], values[0])
    assert roles(figure).count("hit") == 4
    hits = {t["name"]: t["x"][0] for t in figure["data"] if t["meta"]["role"] == "hit"}
    assert hits["Muon"] == next(s.steps.median for s in summaries if s.name == "muon")
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert figure["layout"]["annotations"][0]["y"] == math.log10(0.05)


def test_seconds_are_the_median_over_seeds_at_the_same_step() -> None:
    results = fake_results()
    summaries = summarize(results)
    drawn = curves(summaries, "train", "loss", smooth=True)
    last = sorted(r["train"]["seconds"][-1] for r in results["runs"] if r["optimizer"] == "sgd")
    assert drawn["sgd"].seconds[-1] == last[1]


def test_batch_loss_is_a_trailing_mean_and_long_runs_are_thinned() -> None:
    run = fake_run("sgd", steps=1000)
    loss = run["train"]["loss"]
    curve = curves(summarize(fake_results([run])), "train", "loss", smooth=True)["sgd"]
    assert curve.window == 10
    assert len(curve.steps) == MAX_POINTS
    assert (curve.steps[0], curve.steps[-1]) == (1, 1000)
    assert curve.median[0] == loss[0]
    assert curve.median[-1] == pytest.approx(sum(loss[-10:]) / 10, rel=1e-12)


def test_diverged_seeds_pull_the_median_up_and_end_it() -> None:
    runs = [diverged("sgd", 0, at=40), diverged("sgd", 1, at=90), fake_run("sgd", 2)]
    curve = curves(summarize(fake_results(runs)), "train", "loss", smooth=False)["sgd"]
    assert curve.steps[-1] == 90
    assert [end[0] for end in curve.ends] == [40, 90]
    at_60 = curve.steps.index(60)
    assert curve.median[at_60] == max(run["train"]["loss"][59] for run in runs[1:])


def test_values_that_are_not_finite_end_a_run() -> None:
    run = fake_run("sgd", status="diverged")
    run["train"]["loss"][50] = math.nan
    curve = curves(summarize(fake_results([run])), "train", "loss", smooth=False)["sgd"]
    assert curve.steps[-1] == 50


def test_a_maximized_metric_is_drawn_linearly_and_without_its_first_steps() -> None:
    run = fake_run("sgd")
    run["eval"]["metric"] = [1 - 0.9 * m / 2.3 for m in run["eval"]["metric"]]
    summaries = summarize(fake_results([run], goal="max", target=0.97))
    drawn = curves(summaries, "eval", "metric", smooth=False)
    layout = line_chart(drawn, summaries, {"sgd": 3}, seconds=False, target=0.97, goal="max")[
        "layout"
    ]
    low, high = layout["yaxis"]["range"]
    assert layout["yaxis"]["type"] == "linear"
    assert low > run["eval"]["metric"][0]
    assert high > 0.97


def test_step_cost_splits_a_step_and_adds_up() -> None:
    summaries = summarize(fake_results())
    figure = step_cost_chart(summaries, color_slots([s.name for s in summaries]))
    assert figure is not None
    assert [t["meta"]["role"] for t in figure["data"]] == ["model", "optimizer", "rest"]
    totals = [sum(parts) for parts in zip(*(t["x"] for t in figure["data"]), strict=True)]
    for s, milliseconds in zip(summaries, totals, strict=True):
        expected = s.median_of(lambda run: run["seconds_per_step"]["total"])
        assert expected is not None
        assert milliseconds == pytest.approx(1e3 * expected)


def test_memory_is_bytes_per_parameter_and_ignores_runs_without_a_step() -> None:
    sgd = [fake_run("sgd", state_bytes=0)]
    summaries = summarize(fake_results([*sgd, fake_run("adamw"), empty("adamw", "failed", seed=1)]))
    slots = color_slots([s.name for s in summaries])
    figure = memory_chart(summaries, slots, PARAMETERS)
    assert figure is not None
    bars = dict(zip(figure["data"][0]["y"], figure["data"][0]["x"], strict=True))
    assert bars == pytest.approx({"parameters": 4.0, "SGD": 0.0, "AdamW": 8.0}, abs=1e-4)
    assert memory_chart(summaries, slots, None) is None


def test_table_shows_median_range_and_ratio_to_the_baseline() -> None:
    content = page_content(
        fake_results([*ADAMW, *SHAMPOO, *seeds("sgd", (280, 3.0), NEVER, NEVER)])
    )
    shampoo, adamw, sgd = content["table"]
    assert shampoo["reached"] == "3 of 3"
    assert shampoo["steps"] == ("120", f"110 {NONE} 130")
    assert (shampoo["steps_ratio"], shampoo["seconds_ratio"]) == (f"0.59{TIMES}", f"1.4{TIMES}")
    assert (adamw["label"], adamw["steps_ratio"]) == ("AdamW", "")
    assert sgd["steps"] == ("not reached", f"280 {NONE} never")
    assert (sgd["reached"], sgd["steps_ratio"]) == ("1 of 3", "")
    assert content["others"] == ["test accuracy"]
    assert len(shampoo["others"]) == 1
    assert content["interval"] == "evaluated every 6 steps"


def test_settings_list_every_variant_and_how_they_were_tuned() -> None:
    runs = [fake_run("sgd", 0), fake_run("sgd", 1), fake_run("sgd", 2, hyperparameters={"lr": 0.1})]
    (card,) = page_content(fake_results(runs))["settings"]
    assert card["variants"] == [
        {"pairs": (("lr", "0.01"), ("betas", "(0.9, 0.99)")), "seeds": "seeds 0 and 1"},
        {"pairs": (("lr", "0.1"),), "seeds": "seeds 2"},
    ]
    assert card["tuning"] == "sweep of lr on seed 1000, 300 steps"


def test_versions_that_differ_between_runs_are_marked() -> None:
    runs = [fake_run("sgd"), fake_run("sgd", 1, versions={"torch": "2.14.0"})]
    environment = dict(page_content(fake_results(runs))["environment"])
    assert environment["torch"] == "2.13.0 and 2.14.0 (differs between runs)"
    assert environment["python"] == "3.11.4"


def test_runs_that_did_not_finish_are_listed_with_their_message() -> None:
    content = page_content(
        fake_results([fake_run("adamw"), diverged("sgd", 2), empty("muon", "failed", "no memory")])
    )
    told = {
        (r["label"], r["seed"], r["status"], r["error"], r["last_step"])
        for r in content["troubled"]
    }
    assert told == {
        ("SGD", "2", "diverged", "loss is nan at step 41", "40"),
        ("Muon", "0", "failed", "no memory", NONE),
    }
    assert len(content["runs"]) == 3


def test_command_reproduces_the_comparison() -> None:
    results = fake_results()
    assert command(results) == (
        "parabola compare digits --optimizers adamw,sgd,muon,shampoo "
        "--seeds 3 --steps 300 --device cpu"
    )
    results["settings"].update(workload="my tasks/task.py:MyTask", steps=None, seconds=30.0)
    assert command(results).startswith("parabola compare 'my tasks/task.py:MyTask' --optimizers")
    assert command(results).endswith("--seeds 3 --seconds 30.0 --device cpu")


def test_colors_are_fixed_for_known_names_and_never_shared() -> None:
    names = ["lion", "adamw", "shampoo", *(f"method{i}" for i in range(8))]
    slots = color_slots(names)
    assert (slots["shampoo"], slots["adamw"]) == (0, 1)
    assert len(set(slots.values())) == len(names)


def test_embedded_json_has_no_nan_and_cannot_end_its_script() -> None:
    text = embed({"a": [math.nan, math.inf, 1.5], "b": "</script><!--&"})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": "</script><!--&"}
    assert not re.search(r"NaN|Infinity|[<>&]", text)


class Page(HTMLParser):
    """The parts of a page that could load something, its visible text and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.data = ""
        self.policy = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self._inside = f"{tag}#{named.get('id')}" if tag in ("script", "style") else ""
        self.loads += [(tag, k) for k in named if k in ("src", "href", "srcset", "data", "action")]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(named["content"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script#figures":
            self.data += data
        elif not self._inside:
            self.text += data


def written(results: dict[str, Any], tmp_path: Path) -> Page:
    path = tmp_path / "report.html"
    write_report(results, path)
    return Page(path.read_text(encoding="utf-8"))


def test_page_loads_nothing_and_forbids_loading(tmp_path: Path) -> None:
    page = written(fake_results(), tmp_path)
    assert page.loads == []
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy
    style = Path(tmp_path / "report.html").read_text(encoding="utf-8").split("<style>")[1]
    assert not re.search(r"url\(|@import", style.split("</style>")[0])


def test_page_carries_verdict_tables_and_figures(tmp_path: Path) -> None:
    results = fake_results()
    page = written(results, tmp_path)
    assert verdict(results).headline in page.text
    for text in ("Time to target", "3 of 3", "train loss ≤ 0.05", "sweep of lr", "5 January 2026"):
        assert text in page.text
    assert command(results) in page.text
    figures = json.loads(page.data)
    assert list(figures) == [
        *("loss-steps", "loss-seconds", "metric-steps", "metric-seconds"),
        *("step-cost", "memory"),
    ]
    assert all(figures.values())


def test_strings_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    results = fake_results([fake_run(evil, hyperparameters={evil: evil}, tuned=evil, error=evil)])
    results["runs"] += [empty(evil, "failed", evil, seed=1)]
    results["runs"][0]["eval"]["others"] = {evil: [1.0]}
    results["workload"].update(name=evil, description=evil, metric=evil)
    results["environment"] = {evil: evil}
    results["created"] = evil
    page = written(results, tmp_path)
    assert "img" not in page.tags
    assert page.tags.count("script") == 3
    # Shown as text: title, heading, verdict, tables.
    assert page.text.count(evil) > 10


DEGENERATE: dict[str, list[dict[str, Any]]] = {
    "no runs": [],
    "one run": [fake_run("adamw")],
    "failed before the first step": [empty("adamw", "failed", "no such file")],
    "interrupted before the first step": [empty("adamw", "interrupted")],
    "one step": [fake_run("adamw", steps=1)],
    "all diverged at once": [diverged("sgd", s, at=1) for s in range(3)],
    "no evaluation": [
        fake_run("adamw", eval={"step": [], "metric": [], "seconds": []}, final_metric=None)
    ],
    "nothing but names": [{"optimizer": "adamw"}],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_results_give_a_page(case: str, tmp_path: Path) -> None:
    results = fake_results(copy.deepcopy(DEGENERATE[case]))
    page = written(results, tmp_path)
    assert verdict(results).headline in page.text
    figures = json.loads(page.data)
    for figure in figures.values():
        assert figure is None or figure["data"]
    # What cannot be drawn says so.
    missing = sum(figure is None for figure in figures.values())
    assert (
        len(re.findall(r"(?:Nothing|No step times|No state sizes) recorded yet\.", page.text))
        == missing
    )


def test_not_finite_numbers_from_elsewhere_do_not_break_the_page(tmp_path: Path) -> None:
    run = fake_run("adamw", final_metric=math.nan, best_metric=math.inf, steps_to_target=None)
    run["seconds_per_step"] = {"total": math.nan, "model": None, "optimizer": 1.0}
    run["train"]["loss"] = [math.nan] * 300
    page = written(fake_results([run], parameters=None, target=math.nan), tmp_path)
    assert "NaN" not in page.data
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_only_names_in_the_workload(tmp_path: Path) -> None:
    results = {"schema": "parabola.compare/1", "workload": {"name": "mine"}, "runs": []}
    assert "No run has been recorded yet." in written(results, tmp_path).text


def test_another_schema_is_refused(tmp_path: Path) -> None:
    results = fake_results() | {"schema": "parabola.compare/9"}
    with pytest.raises(ValueError, match=r"parabola.compare/9.*allowed: 'parabola.compare/1'"):
        write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_made_up_results_have_the_shape_of_real_ones() -> None:
    made_up = fake_results()
    assert set(made_up) == set(Results.__annotations__)
    assert set(made_up["workload"]) == set(WorkloadFacts.__annotations__)
    assert set(made_up["settings"]) == Settings.__required_keys__
    run = made_up["runs"][0]
    assert set(run) == Run.__required_keys__
    assert set(run["train"]) == set(TrainCurve.__annotations__)
    assert set(run["eval"]) == set(EvalCurve.__annotations__)
    assert set(run["seconds_per_step"]) == set(StepSeconds.__annotations__)


def test_spread_of_nothing_is_never_finite() -> None:
    assert math.isinf(Spread(()).median)
