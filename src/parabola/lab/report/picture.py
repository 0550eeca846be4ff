# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report, made by a Chromium that is already on the machine.

The report is a web page, so a browser draws its picture: the README shows what a reader of the
report sees, and no second plotting library is needed.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from parabola.lab.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Milliseconds on the page's own clock, which jumps ahead whenever the page has nothing to do.
VIRTUAL_TIME = 10_000


def find_browser() -> str | None:
    """The path of Chromium or Chrome: `$CHROMIUM` where it is set, else the first one on PATH."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)


def run_browser(*arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs headless Chromium with a fresh profile.

    Args:
        arguments: further flags, then the address.
        timeout: seconds after which it is stopped.

    Raises:
        RuntimeError: there is no Chromium on this machine, it failed, or it took too long.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError(
            f"no Chromium found (looked for $CHROMIUM and {', '.join(BROWSERS)} on PATH); "
            "on Debian and Ubuntu: apt-get install chromium"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = [f"--user-data-dir={profile}", f"--virtual-time-budget={VIRTUAL_TIME}"]
        try:
            done = subprocess.run(
                [browser, *FLAGS, *own, *arguments],
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{browser} did not finish within {timeout:g} seconds") from error
    if done.returncode:
        raise RuntimeError(f"{browser} exited with {done.returncode}: {done.stderr[-2000:]}")
    return done


def write_picture(
    results: dict[str, Any], path: Path, *, width: int = 1200, height: int = 900, scale: float = 2.0
) -> None:
    """Writes the verdict and the curves of a comparison as a PNG.

    Args:
        results: the object that `parabola compare` writes (`parabola.compare/1`).
        path: the PNG file to write, its folder included; replaced where it exists.
        width: width of the picture in CSS pixels.
        height: height of the picture in CSS pixels.
        scale: image pixels per CSS pixel.

    Raises:
        RuntimeError: there is no Chromium on this machine, or it failed.
        ValueError: where `results` has another schema.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(results, page)
        screenshot(page, path, width=width, height=height, scale=scale)


def screenshot(page: Path, path: Path, *, width: int, height: int, scale: float) -> None:
    """Writes the part of a page that is meant for pictures as a PNG.

    Args:
        page: the html file, which lays itself out for `#picture=HEIGHT`.
        path: the PNG file to write, its folder included; replaced where it exists.
        width: width of the picture in CSS pixels.
        height: height of the picture in CSS pixels.
        scale: image pixels per CSS pixel.

    Raises:
        RuntimeError: there is no Chromium on this machine, or it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        done = run_browser(
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={scale}",
            f"--screenshot={picture}",
            f"{page.resolve().as_uri()}#picture={height}",
        )
        if not picture.exists():
            raise RuntimeError(f"Chromium wrote no picture: {done.stderr[-2000:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(picture, path)
