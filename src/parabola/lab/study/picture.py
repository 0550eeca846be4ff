# SPDX-License-Identifier: Apache-2.0
"""The charts of one experiment as a picture for the documentation."""

import tempfile
from pathlib import Path

from parabola.lab.report.picture import screenshot
from parabola.lab.study.page import write_page
from parabola.lab.study.record import Finished, Settings


def write_picture(
    item: Finished, settings: Settings, path: Path, *, width: int = 1200, height: int = 720
) -> None:
    """Writes an experiment's charts and their key as a PNG, by a Chromium on this machine.

    Args:
        item: The experiment that ran.
        settings: How it was run.
        path: The PNG file; replaced where it exists.
        width: Width of the picture in CSS pixels.
        height: Height of the picture in CSS pixels.

    Raises:
        RuntimeError: There is no Chromium on this machine, or it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "study.html"
        write_page([item], settings, page)
        screenshot(page, path, width=width, height=height, scale=2.0)
