# SPDX-License-Identifier: Apache-2.0
"""The digits experiment: its data, its rows, and a small outcome."""

from parabola.lab.study import images
from parabola.lab.study.experiment import Context


def test_pixels_and_classes():
    pixels, labels = images.digits()
    assert pixels.shape == (1797, 64) and pixels.min() == 0.0 and pixels.max() == 1.0
    assert sorted(set(labels.tolist())) == list(range(10))


def test_every_row_once():
    rows = images.items(Context())
    keys = {(i.batch, i.method, i.damping) for i in rows}
    assert len(keys) == len(rows) == 2 * 2 * (1 + 2 * 2 * 3)


def test_outcome(monkeypatch):
    monkeypatch.setattr(images, "STEPS", 40)
    monkeypatch.setattr(images, "TARGET", 1.5)
    monkeypatch.setattr(images, "ADAM", (-6, -4))
    grids = {0.5: {1e-4: (-5, -3)}, 1.0: {1e-2: (-6, -4)}}
    monkeypatch.setattr(images, "GRIDS", grids)
    monkeypatch.setattr(images, "LARGE", 64)
    outcome = images.EXPERIMENT.run(Context(seeds=(0,), quick=True))
    assert {row.settings.get("estimator") for row in outcome.rows} == {None, "mc", "gnb"}
    assert len(outcome.checks) == 3 and all(check.passed for check in outcome.checks)
    assert len(outcome.quadrants) == 2
    for picture in outcome.quadrants:
        assert all(set(cell) == {"Adam", "GN^-1/2", "GN^-1"} for cell in picture.cells.values())
