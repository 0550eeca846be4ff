# SPDX-License-Identifier: Apache-2.0
"""Comparisons by several processes, each with its share of every batch."""

import json

import pytest
import torch
from fake_results import fake_results, fake_run

from parabola.lab import commands
from parabola.lab.commands import app
from parabola.lab.errors import UsageError
from parabola.lab.report.page import command, page_content, write_report
from parabola.lab.results import by_rank
from parabola.lab.team import share


def ranks(*rows):
    keys = ("optimizer_seconds", "bytes_sent", "state_bytes")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def test_shares_make_up_the_batch():
    x, y = torch.arange(12).view(6, 2), torch.arange(6)
    batch = {"inputs": (x, [y]), "scale": torch.tensor(2.0), "name": "digits"}
    parts = [share(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part["inputs"][0] for part in parts]), x)
    assert torch.equal(torch.cat([part["inputs"][1][0] for part in parts]), y)
    assert all(len(part["inputs"][0]) == 2 for part in parts)
    assert all(part["scale"] == 2 and part["name"] == "digits" for part in parts)


def test_an_uneven_batch_is_refused(cli, tmp_path):
    with pytest.raises(UsageError, match=r"--nproc 4 cannot share a batch of 6 samples evenly"):
        share(torch.zeros(6), 0, 4)
    result = cli.invoke(app, ["compare", "digits", "--nproc", "3", "--out", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "--nproc 3 cannot share a batch of 128 samples evenly" in result.output
    assert not list(tmp_path.iterdir())


def test_results_that_are_there_are_refused_before_processes_start(cli, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    result = cli.invoke(app, ["compare", "digits", "--nproc", "2", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--overwrite" in result.output


def test_the_last_word_after_an_interruption_tells_how_to_go_on(cli, tmp_path, monkeypatch):
    def launch(size, words):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "launch", launch)
    result = cli.invoke(app, ["compare", "digits", "--nproc", "2", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert result.output.rstrip().endswith("Go on with --resume.")


def test_medians_of_each_process():
    runs = [
        fake_run("adamw", 0, ranks=ranks((1.0, 10, 5), (2.0, 20, 6))),
        fake_run("adamw", 1, ranks=ranks((3.0, 30, 5), (4.0, 40, 6))),
        fake_run("sgd"),  # by one process, or by an older version
    ]
    assert by_rank(runs) == {"adamw": ranks((2.0, 20, 5), (3.0, 30, 6))}


def test_the_report_shows_processes(tmp_path):
    results = fake_results()
    assert page_content(results)["ranks"] == []
    results["settings"]["nproc"] = 2
    for run in results["runs"]:
        run["ranks"] = ranks((0.0125, 54_321, 1000), (0.025, 65_432, 2000))
    assert command(results).endswith("--nproc 2")
    write_report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in ("<h2>Processes</h2>", "12.5 ms", "54,321", "65,432"):
        assert words in page, words


@pytest.mark.slow
def test_two_processes_train_as_one_does(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["compare", "digits", "--optimizers", "adamw,shampoo", "--seeds", "1", "--steps", "4"]
    found = []
    for nproc in (1, 2):
        folder = tmp_path / str(nproc)
        result = cli.invoke(app, [*words, "--nproc", str(nproc), "--out", str(folder)])
        assert result.exit_code == 0, result.output
        assert (folder / "report.html").exists()
        found.append(json.loads((folder / "results.json").read_text()))
    one, two = found
    assert "nproc" not in one["settings"] and two["settings"]["nproc"] == 2
    for alone, both in zip(one["runs"], two["runs"], strict=True):
        assert both["status"] == "finished"
        assert both["train"]["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-4)
        assert both["eval"]["metric"] == pytest.approx(alone["eval"]["metric"], rel=1e-4)
        assert "ranks" not in alone and len(both["ranks"]) == 2
        assert all(rank["optimizer_seconds"] > 0 for rank in both["ranks"])
    adamw, shampoo = two["runs"]
    assert [rank["bytes_sent"] for rank in adamw["ranks"]] == [0, 0]
    assert all(rank["bytes_sent"] > 0 for rank in shampoo["ranks"])
    alone = one["runs"][1]["state_bytes"]
    assert max(rank["state_bytes"] for rank in shampoo["ranks"]) == shampoo["state_bytes"] < alone
