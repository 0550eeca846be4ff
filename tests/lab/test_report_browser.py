# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: every plot is drawn, carries the data, and nothing complains.

Headless Chromium loads the page from the file system and prints the document afterwards; a script
added to a copy of the page reports what plotly holds.  This needs no driver and no package.
"""

import json
import re
import runpy
import statistics
import struct
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fake_results import diverged, empty, fake_results, fake_run

from parabola.lab.report import write_picture, write_report
from parabola.lab.report.picture import find_browser, run_browser

needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

PROBE = """
<script>
addEventListener("load", () => {
  const trace = ({ meta, name, visible, x, y }) => ({ ...meta, name, visible, x, y });
  const plot = (p) => ({
    traces: p.data.map(trace),
    lines: p.querySelectorAll(".scatterlayer .js-line").length,
    bars: p.querySelectorAll(".barlayer .point path").length,
    height: p.getBoundingClientRect().height,
    colors: p.data.map((t) => t.line?.color ?? null),
  });
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  const read = () => Object.fromEntries(plots.map((p) => [p.id, plot(p)]));
  const seen = { plots: read(), overflow: document.documentElement.scrollWidth - innerWidth };
  const button = document.querySelector(".legend button");
  if (button) {
    button.click();
    seen.slot = Number(button.dataset.slot);
    seen.pressed = button.getAttribute("aria-pressed");
    seen.toggled = read();
  }
  parent.postMessage([document.title, seen], "*");
});
</script>
"""

# One window with every page in a frame: starting the browser costs more than drawing a page.
FRAMES = """
<!doctype html>
<title>frames</title>
<script>
const seen = {};
addEventListener("message", ({ data: [name, found] }) => {
  seen[name] = found;
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
<pre id="seen"></pre>
"""


def load(pages: dict[str, tuple[int, dict[str, Any]]], folder: Path, *flags: str) -> dict[str, Any]:
    """Opens reports in Chromium, each in a frame of its own.

    Args:
        pages: name -> (width of the frame, results).
        folder: where to write the pages.
        flags: further flags of the browser.

    Returns:
        What the probe saw by name, and under "console" the messages of the console.
    """
    frames = FRAMES
    for name, (width, results) in pages.items():
        path = folder / f"{name}.html"
        write_report(results, path)
        text = path.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
        text = re.sub("<title>.*?</title>", f"<title>{name}</title>", text)
        path.write_text(text, encoding="utf-8")
        frames += f'<iframe src="{name}.html" width="{width}" height="1000"></iframe>\n'
    window = folder / "frames.html"
    window.write_text(frames, encoding="utf-8")
    done = run_browser("--enable-logging=stderr", *flags, "--dump-dom", window.as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(unescape(found[1]) or "{}")
    console = [entry for entry in done.stderr.splitlines() if "CONSOLE" in entry]
    assert set(seen) == set(pages), f"scripts did not run to the end: {console}"
    return {**seen, "console": console}


DEGENERATE: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "failed": [empty("adamw", "failed", "no such file")],
    "one": [fake_run("adamw")],
    "diverged": [diverged("sgd", s) for s in range(3)],
    "one-step": [fake_run("adamw", steps=1)],
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return fake_results()


@pytest.fixture(scope="module")
def pages(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    wanted = {"wide": (1400, results), "narrow": (420, results)}
    wanted |= {name: (1000, fake_results(runs)) for name, runs in DEGENERATE.items()}
    return load(wanted, tmp_path_factory.mktemp("pages"))


@pytest.fixture
def seen(pages: dict[str, Any]) -> dict[str, Any]:
    wide: dict[str, Any] = pages["wide"]
    return wide


def of(results: dict[str, Any], optimizer: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["optimizer"] == optimizer]


@needs_browser
def test_console_stays_empty(pages: dict[str, Any]) -> None:
    assert pages["console"] == []


@needs_browser
def test_every_plot_is_drawn(seen: dict[str, Any]) -> None:
    assert list(seen["plots"]) == [
        *("loss-steps", "loss-seconds", "metric-steps", "metric-seconds"),
        *("step-cost", "memory"),
    ]
    for name, plot in seen["plots"].items():
        assert plot["height"] > 100, name
        # Four lines and four bands; metric charts have the target line too.
        expected = {"loss": 8, "metric": 9}.get(name.split("-")[0], 0)
        assert plot["lines"] == expected, name
    assert seen["plots"]["step-cost"]["bars"] == 4 * 3
    assert seen["plots"]["memory"]["bars"] == 4 + 1


@needs_browser
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Muon", "Shampoo"])
def test_plots_carry_the_first_and_last_values(
    seen: dict[str, Any], results: dict[str, Any], optimizer: str
) -> None:
    runs = of(results, optimizer.lower())
    median = statistics.median
    window = len(runs[0]["train"]["loss"]) // 100
    ends = {
        "loss": (
            median(run["train"]["loss"][0] for run in runs),
            median(statistics.fmean(run["train"]["loss"][-window:]) for run in runs),
        ),
        "metric": (
            median(run["eval"]["metric"][0] for run in runs),
            median(run["eval"]["metric"][-1] for run in runs),
        ),
    }
    last = {
        "steps": runs[0]["train"]["step"][-1],
        "seconds": median(run["train"]["seconds"][-1] for run in runs),
    }
    for value, (first_y, last_y) in ends.items():
        for against, last_x in last.items():
            traces = seen["plots"][f"{value}-{against}"]["traces"]
            (line,) = (t for t in traces if t["role"] == "line" and t["name"] == optimizer)
            assert line["y"][0] == pytest.approx(first_y, rel=1e-9)
            assert line["y"][-1] == pytest.approx(last_y, rel=1e-9)
            assert line["x"][-1] == pytest.approx(last_x, rel=1e-9)


@needs_browser
def test_bars_carry_the_costs(seen: dict[str, Any], results: dict[str, Any]) -> None:
    (memory,) = seen["plots"]["memory"]["traces"]
    bars = dict(zip(memory["y"], memory["x"], strict=True))
    run = of(results, "shampoo")[0]
    parameters = results["workload"]["parameters"]
    assert bars["Shampoo"] == pytest.approx(run["state_bytes"] / parameters)
    assert bars["parameters"] == pytest.approx(run["parameter_bytes"] / parameters)
    costs = {
        t["role"]: dict(zip(t["y"], t["x"], strict=True))
        for t in seen["plots"]["step-cost"]["traces"]
    }
    for part in ("model", "optimizer"):
        seconds = statistics.median(r["seconds_per_step"][part] for r in of(results, "shampoo"))
        assert costs[part]["Shampoo"] == pytest.approx(1e3 * seconds)


@needs_browser
def test_legend_hides_one_optimizer_in_all_curves(seen: dict[str, Any]) -> None:
    assert seen["pressed"] == "false"
    for name in ("loss-steps", "loss-seconds", "metric-steps", "metric-seconds"):
        traces = seen["toggled"][name]["traces"]
        hidden = [t for t in traces if t["visible"] is False]
        assert hidden == [t for t in traces if t.get("slot") == seen["slot"]], name
        assert {"line", "band"} <= {t["role"] for t in hidden}


@needs_browser
def test_dark_page_has_its_own_colors(
    seen: dict[str, Any], results: dict[str, Any], tmp_path: Path
) -> None:
    dark = load({"dark": (1400, results)}, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert dark["console"] == []
    light_colors, dark_colors = (
        [
            color
            for trace, color in zip(plot["traces"], plot["colors"], strict=True)
            if trace["role"] == "line"
        ]
        for plot in (seen["plots"]["loss-steps"], dark["dark"]["plots"]["loss-steps"])
    )
    assert len(set(light_colors) | set(dark_colors)) == 8


@needs_browser
@pytest.mark.parametrize(
    ("name", "plots"), [("none", 0), ("failed", 0), ("one", 6), ("diverged", 6), ("one-step", 6)]
)
def test_degenerate_pages_draw_what_there_is(name: str, plots: int, pages: dict[str, Any]) -> None:
    assert len(pages[name]["plots"]) == plots
    assert all(plot["height"] > 80 for plot in pages[name]["plots"].values())


@needs_browser
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_page_does_not_scroll_sideways(name: str, pages: dict[str, Any]) -> None:
    assert pages[name]["overflow"] <= 0


@needs_browser
def test_picture_has_the_asked_size(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "images" / "picture.png"
    write_picture(results, path, width=1000, height=700, scale=1.5)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1500, 1050)


def test_picture_script_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "docs" / "make_picture.py"
    source = tmp_path / "results.json"
    picture = tmp_path / "picture.png"
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    monkeypatch.setattr(sys, "argv", [str(script), str(source), str(picture)])
    for message in ("No such file", "no Chromium found"):
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
        source.write_text(json.dumps(fake_results()), encoding="utf-8")
    assert not picture.exists()
