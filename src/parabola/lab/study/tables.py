# SPDX-License-Identifier: Apache-2.0
"""What the study prints: rows, the two-by-two picture, checks with their thresholds, and notes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parabola.lab.study.experiment import Check, Experiment, Note, Quadrants, Sheet
from parabola.lab.study.record import Finished
from parabola.lab.study.rows import Row

BASES = ("identity", "gauss_newton")
BATCHES = ("full", "small")
MARKS = {True: "PASS", False: "FAIL"}


def print_finished(console: Console, item: Finished) -> None:
    """Everything about one experiment."""
    console.print()
    if item.outcome is None:
        console.print(Text(f"{item.experiment.id}: {item.error}", style="bold red"))
        return
    outcome = item.outcome
    if outcome.rows:
        console.print(row_table(item.experiment, outcome.rows))
    for sheet in outcome.sheets:
        console.print(sheet_table(sheet))
    for picture in outcome.quadrants:
        console.print(f"{picture.title}: {' | '.join(methods_of(picture))}", highlight=False)
        console.print(quadrant_table(picture))
    for note in outcome.notes:
        console.print(note_text(note), soft_wrap=True)
    for check in outcome.checks:
        console.print(check_text(check), soft_wrap=True)
    console.print(f"{item.experiment.id}: {item.seconds:.1f} s", highlight=False)


def catalog_table(known: Mapping[str, Experiment]) -> Table:
    """All experiments with their question."""
    table = Table(title="Experiments", title_justify="left")
    table.add_column("id", no_wrap=True)
    table.add_column("question")
    for experiment in known.values():
        table.add_row(
            " ".join(filter(None, (experiment.id, experiment.argument))), experiment.question
        )
    return table


def row_table(experiment: Experiment, rows: Sequence[Row]) -> Table:
    """One line a row, each at its best learning rate; what all rows share is in the caption."""
    titles = ("method", "basis", "batch", "schedule", "settings")
    cells = [row_cells(row) for row in rows]
    shared = [i for i in (1, 2, 3) if len(rows) > 1 and len({line[i] for line in cells}) == 1]
    common = ", ".join(f"{titles[i]} {cells[0][i]}" for i in shared)
    table = Table(
        title=f"{experiment.id}: {experiment.metric}",
        title_justify="left",
        caption=f"All rows: {common}" if common else None,
        caption_justify="left",
    )
    kept = [i for i in range(5) if i not in shared]
    for i in kept:
        table.add_column(titles[i])
    for column in ("best lr", "median", "over seeds", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in cells:
        table.add_row(*(line[i] for i in kept), *line[5:])
    return table


def row_cells(row: Row) -> tuple[str, ...]:
    """Method, basis, batch, schedule, settings, best rate, median, spread and seconds as text."""
    settings = (f"{name.replace('_', ' ')} {_word(v)}" for name, v in row.settings.items())
    return (
        row.method,
        "GN" if row.basis == "gauss_newton" else row.basis,
        row.batch,
        row.schedule,
        ", ".join(settings),
        f"{row.best_lr:.3g}" + ("" if row.interior else " (edge)"),
        number(row.metric),
        "" if row.low == row.high else f"{number(row.low)} - {number(row.high)}",
        f"{row.seconds:.1f}",
    )


def sheet_table(sheet: Sheet) -> Table:
    """A table of measurements."""
    table = Table(title=sheet.title, title_justify="left")
    for column in sheet.columns:
        table.add_column(column, justify="right")
    for line in sheet.lines:
        table.add_row(*map(word, line))
    return table


def quadrant_table(picture: Quadrants) -> Table:
    """Basis against batch; a cell lists the values of the methods in the order of `methods_of`."""
    methods = methods_of(picture)
    table = Table()
    table.add_column("")
    for basis in ("identity basis", "GN basis"):
        table.add_column(basis, justify="right")
    for batch in BATCHES:
        table.add_row(f"{batch} batch", *(cell(picture, batch, basis, methods) for basis in BASES))
    return table


def methods_of(picture: Quadrants) -> list[str]:
    """The methods of a picture: Adam, GN^-1/2 and GN^-1 first, then others as they come."""
    seen = dict.fromkeys(name for cell in picture.cells.values() for name in cell)
    usual = [name for name in ("Adam", "GN^-1/2", "GN^-1") if name in seen]
    return usual + [name for name in seen if name not in usual]


def check_text(check: Check) -> Text:
    """PASS or FAIL, what, and the measured value beside its threshold."""
    style = "bold green" if check.passed else "bold red"
    words = f"{check.text}: {number(check.value)} {bound(check)}"
    return Text.assemble((MARKS[check.passed], style), " ", words)


def note_text(note: Note) -> Text:
    """A claim, and on the next line where it does not hold."""
    return Text.assemble(("claim   ", "bold"), note.claim, "\n", ("counter ", "bold"), note.counter)


def bound(check: Check) -> str:
    """The relation and the threshold of a check."""
    if isinstance(check.threshold, tuple):
        return f"(within {number(check.threshold[0])} and {number(check.threshold[1])})"
    return f"({check.relation} {number(check.threshold)})"


def verdict(done: Iterable[Finished]) -> str:
    """One sentence over all experiments."""
    items = list(done)
    checks = [check for item in items if item.outcome for check in item.outcome.checks]
    failed = sum(not check.passed for check in checks)
    broken = [item.experiment.id for item in items if item.outcome is None]
    text = (
        ("The check passes." if len(checks) == 1 else f"All {len(checks)} checks pass.")
        if not failed
        else f"{failed} of {len(checks)} checks fail."
    )
    return text + (f" Did not finish: {', '.join(broken)}." if broken else "")


def number(value: float) -> str:
    """Three digits, as short as it goes."""
    if math.isinf(value):
        return "never" if value > 0 else "-inf"  # diverged, or missed the target
    return f"{value:.3g}"


def word(value: float | str) -> str:
    """A number in three digits; text and whole numbers as they are."""
    return number(value) if isinstance(value, float) else str(value)


def cell(picture: Quadrants, batch: str, basis: str, methods: Sequence[str]) -> str:
    """The values of one quadrant in the order of `methods`."""
    values = picture.cells.get((batch, basis))
    if values is None:
        return "-"
    return " | ".join(number(values[name]) if name in values else "-" for name in methods)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
