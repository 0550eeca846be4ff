# SPDX-License-Identifier: Apache-2.0
"""The charts of one experiment as a picture for the documentation."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parabola.lab.report.picture import screenshot
from parabola.lab.study.page import write_page
from parabola.lab.study.record import Finished, Settings


def write_picture(
    item: Finished,
    settings: Settings,
    path: Path,
    titles: Sequence[str],
    *,
    width: int = 1200,
    height: int = 420,
) -> None:
    """Writes some of an experiment's charts and their key as a PNG, by a Chromium on this machine.

    Args:
        item: The experiment that ran.
        settings: How it was run.
        path: The PNG file; replaced where it exists.
        titles: The charts to show.
        width: Width of the picture in CSS pixels.
        height: Height of the picture in CSS pixels.

    Raises:
        RuntimeError: There is no Chromium on this machine, or it failed.
        ValueError: The experiment did not finish, or has no chart of such a title.
    """
    if item.outcome is None:
        raise ValueError(f"{item.experiment.id} did not finish: {item.error}")
    drawn = {plot.title: plot for plot in item.outcome.plots}
    missing = [title for title in titles if title not in drawn]
    if missing:
        raise ValueError(f"no chart {missing[0]!r} (there are: {', '.join(drawn)})")
    shown = replace(item.outcome, plots=[drawn[title] for title in titles], quadrants=())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "study.html"
        write_page([replace(item, outcome=shown)], settings, page)
        screenshot(page, path, width=width, height=height, scale=2.0)
