# SPDX-License-Identifier: Apache-2.0
"""Rows, checks, quadrants and charts: the plain data of an experiment."""

import math
import pickle

import pytest

from parabola.lab.study import figures, tables
from parabola.lab.study.experiment import Context, quadrants
from parabola.lab.study.rows import Row, best_row, find, method_name, powers_of_two


def row(source="gradient", power=0.5, values=((3.0,), (1.0,), (2.0,)), **given) -> Row:
    traits = {"basis": "identity", "batch": "full", "schedule": "constant", **given}
    return best_row(source, power, rates=[1, 2, 4][: len(values)], values=values, **traits)


def test_the_best_rate_has_the_lowest_median_and_says_whether_it_is_interior():
    found = row(values=((5.0, 1.0, 9.0), (3.0, 4.0, 2.0), (math.nan, 0.0, math.inf)))
    assert (found.best_lr, found.metric, found.low, found.high) == (2.0, 3.0, 2.0, 4.0)
    assert found.interior
    assert found.medians == (5.0, 3.0, math.inf)
    assert not row(values=((1.0,), (2.0,), (3.0,))).interior
    assert not row(values=((3.0,), (2.0,), (1.0,))).interior


def test_a_table_says_that_the_best_rate_is_at_the_edge():
    assert tables.row_cells(row())[5] == "2"
    assert tables.row_cells(row(values=((1.0,), (2.0,), (3.0,))))[5] == "1 (edge)"


def test_of_equal_values_the_middle_is_the_best():
    assert row(values=((1.0,), (1.0,), (1.0,))).best_lr == 2.0


def test_the_curve_is_that_of_the_best_rate():
    found = row(curves=((1, 3), (1, 1), (1, 2)), every=10)
    assert (found.curve.steps, found.curve.values) == ((0, 10), (1.0, 1.0))


@pytest.mark.parametrize(
    ("source", "power", "name"),
    [
        ("gradient", 0.5, "Adam"),
        ("gauss_newton", 0.5, "GN^-1/2"),
        ("gauss_newton", 1.0, "GN^-1"),
        ("none", 0.5, "GD"),
        ("empirical", 1.0, "EF^-1"),
    ],
)
def test_methods_have_their_common_names(source, power, name):
    assert method_name(source, power) == name
    assert row(source, power).method == name
    assert row(source, power, label="SOAP").method == "SOAP"


@pytest.mark.parametrize(
    ("value", "relation", "threshold", "passed"),
    [
        (1.0, "<", 1.0, False),
        (1.0, "<=", 1.0, True),
        (1.0, ">", 1.0, False),
        (1.0, ">=", 1.0, True),
        (1.0, "in", (0.5, 1.0), True),
        (1.1, "in", (0.5, 1.0), False),
        (math.nan, "<", 1.0, False),
        (math.nan, "in", (0.0, 1.0), False),
    ],
)
def test_checks(value, relation, threshold, passed):
    assert Context().check("", value, relation, threshold).passed is passed


@pytest.mark.parametrize(
    ("relation", "threshold", "loosened"),
    [
        ("<", 2.0, 20.0),
        ("<", 1e-8, 1e-4),
        (">=", 2.0, 0.2),
        ("in", (-1.5, -0.5), (-15.0, -0.05)),
        ("in", (-1.0, 3.0), (-10.0, 30.0)),
    ],
)
def test_a_quick_run_has_looser_checks_half_the_steps_and_half_the_grid(
    relation, threshold, loosened
):
    quick = Context(quick=True)
    assert quick.check("", 1.0, relation, threshold).threshold == pytest.approx(loosened)
    assert quick.check("", 1.0, relation, threshold, exact=True).threshold == threshold
    assert quick.steps(101) == 50
    assert quick.grid((1, 2, 3)) == (1, 3)


def test_a_context_travels_to_a_process():
    context = Context(seeds=(4,), map=lambda function, items: [])
    there = pickle.loads(pickle.dumps(context))
    assert there.seeds == (4,)
    assert there.map(abs, [-1, 2]) == [1, 2]


def test_find_wants_exactly_one():
    rows = [row(noise=0), row(noise=1), row("gauss_newton", noise=1)]
    assert find(rows, method="Adam", noise=1) is rows[1]
    with pytest.raises(LookupError, match="2 rows"):
        find(rows, method="Adam")
    with pytest.raises(LookupError, match="0 rows"):
        find(rows, noise=2)


def test_quadrants_sort_rows_by_batch_and_basis():
    rows = [
        row(batch=batch, basis=basis, values=((9.0,), (value,), (9.0,)))
        for value, (batch, basis) in enumerate(
            [("full", "identity"), ("8", "identity"), ("full", "kronecker"), ("64", "identity")]
        )
    ]
    picture = quadrants("here", rows, small="8", basis="kronecker")
    assert picture.cells == {
        ("full", "identity"): {"Adam": 0.0},
        ("small", "identity"): {"Adam": 1.0},
        ("full", "gauss_newton"): {"Adam": 2.0},
    }
    with pytest.raises(ValueError, match="two rows for Adam"):
        quadrants("here", [*rows, rows[0]], small="8")


def test_powers_of_two():
    assert powers_of_two(-1, 1, 2) == pytest.approx((0.5, 2**-0.5, 1, 2**0.5, 2))


def test_lines_leave_out_what_diverged_and_keep_to_what_an_axis_shows():
    line = figures.Line("Adam", (1, 2, 3, 4), (1e-90, math.inf, 1e90, math.nan), "Adam")
    figure = figures.lines([line], x_title="step")
    trace = figure["data"][0]
    assert (trace["x"], trace["y"]) == ([1, 3], [figures.FLOOR, figures.CEILING])
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < math.log10(figures.FLOOR) < math.log10(figures.CEILING) < high


def test_bands_span_the_seeds():
    found = row(values=((5.0, 1.0), (3.0, 4.0), (2.0, 6.0)))
    band, line = figures.rate_curves([found])["data"]
    assert band["meta"]["role"] == "band"
    assert band["y"] == [5.0, 4.0, 6.0, 2.0, 3.0, 1.0]
    assert line["y"] == [3.0, 3.5, 4.0]
    assert len(figures.rate_curves([row()])["data"]) == 1


def test_a_clipped_method_is_the_same_color_dashed():
    plain, clipped = figures.rate_curves(
        [row("gauss_newton", 1.0), row("gauss_newton", 1.0, label="GN^-1 clipped")]
    )["data"]
    assert clipped["meta"]["slot"] == plain["meta"]["slot"] + 8


def test_rows_are_split_with_words_for_each_part():
    rows = [row(noise=0.5), row(batch="8", noise=1.0), row(source="none", noise=0.5)]
    parts = figures.split(rows, "batch", "basis", "noise")
    assert [(name, len(part)) for name, part in parts] == [
        ("full batch, identity basis, noise 0.5", 2),
        ("batch 8, identity basis, noise 1", 1),
    ]


def test_the_quadrants_are_drawn_on_one_axis():
    picture = quadrants(
        "here",
        [row(), row("none"), row(batch="8", values=((1.0,), (math.inf,), (1e-30,)))],
        small="8",
    )
    first, second = figures.quadrant_plots(picture)
    assert first.figure["layout"]["xaxis"]["range"] == second.figure["layout"]["xaxis"]["range"]
    assert first.figure["data"][0]["y"] == ["Adam", "GD"]
    assert second.figure["data"][0]["x"] == [figures.FLOOR]
    assert second.figure["data"][0]["text"] == ["1e-30"]
