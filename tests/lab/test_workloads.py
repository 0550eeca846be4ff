# SPDX-License-Identifier: Apache-2.0
"""Every built-in workload keeps the contract, on tiny files in the formats of the real ones."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from parabola.lab.compare import setting
from parabola.lab.errors import MissingDataError
from parabola.lab.optimizers import OPTIMIZERS
from parabola.lab.registry import find_workload
from parabola.lab.workloads import WORKLOADS
from parabola.lab.workloads.cifar10_resnet import augment
from parabola.lab.workloads.stdlib_lm import held_out, library_files

NAMES = list(WORKLOADS)


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of a few files instead of the real one's ten megabytes."""
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text(f"value = {number}\n" * 20)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_workload_trains_and_evaluates(name, data_dir, small_library):
    task = find_workload(name)
    torch.manual_seed(0)
    model = task.model()
    task.load(data_dir)
    loss = task.loss(model, next(task.batches(0)))
    assert loss.shape == ()
    assert math.isfinite(loss.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        metrics = task.evaluate(model)
    assert task.metric in metrics
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_batches_follow_the_seed(name, data_dir, small_library):
    task = find_workload(name)
    task.load(data_dir)

    def first(seed):
        batches = islice(task.batches(seed), 3)
        return [torch.cat([t.flatten().float() for t in b]) for b in batches]

    assert all(torch.equal(a, b) for a, b in zip(first(7), first(7), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first(7), first(8), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_metadata_and_settings(name):
    task = find_workload(name)
    assert task.name == name
    assert task.goal in ("min", "max")
    for optimizer in OPTIMIZERS:
        chosen = setting(task, optimizer)  # also checks that the options exist
        assert optimizer in task.settings
        assert chosen.tuned
        assert "lr" in chosen.options


@pytest.mark.parametrize("name", [n for n in NAMES if WORKLOADS[n].data_files])
def test_missing_data_names_the_file(name, tmp_path):
    task = WORKLOADS[name]()
    with pytest.raises(MissingDataError) as caught:
        task.load(tmp_path)
    assert str(tmp_path / task.data_files[0]) in str(caught.value)
    assert "http" in str(caught.value)


def test_schedule_is_positive_inside_and_ends_low():
    for name in NAMES:
        task = find_workload(name)
        factors = [task.schedule((step + 0.5) / 1000) for step in range(1000)]
        assert all(0 < factor <= 1 for factor in factors)
        assert max(factors) > 0.99
        assert factors[-1] <= 0.101
        assert factors[0] < 0.05


def test_autoencoder_is_the_published_one():
    model = find_workload("mnist-autoencoder").model()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [layer.in_features for layer in layers] + [layers[-1].out_features] == widths
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    kinds = [type(m).__name__ for m in model]
    assert kinds == ["Linear", "Tanh"] * 3 + ["Linear"] + ["Linear", "Tanh"] * 3 + ["Linear"]
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_autoencoder_loss_is_summed_over_pixels(data_dir):
    task = find_workload("mnist-autoencoder")
    task.load(data_dir)
    model = nn.Linear(784, 784)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    # With zero logits every pixel costs ln 2, whatever its value.
    assert task.loss(model, next(task.batches(0))).item() == pytest.approx(
        784 * math.log(2), rel=1e-5
    )
    assert task.evaluate(model)["train_loss"] == pytest.approx(784 * math.log(2), rel=1e-5)


@pytest.fixture
def spiked(tmp_path):
    task = find_workload("spiked-regression")
    task.load(tmp_path)
    return task


def test_spiked_metric_is_the_expected_loss(spiked):
    torch.manual_seed(0)
    model = spiked.model()
    assert spiked.evaluate(model)["relative_loss"] == pytest.approx(1.0)
    batches = list(islice(spiked.batches(3), 100))
    with torch.no_grad():
        start = sum(spiked.loss(model, batch).item() for batch in batches)
        model.weight.normal_()
        moved = sum(spiked.loss(model, batch).item() for batch in batches)
        # 6400 samples of a square: a few percent.
        assert moved / start == pytest.approx(spiked.evaluate(model)["relative_loss"], rel=0.1)
        model.weight.copy_(spiked.target_weights)
    assert spiked.evaluate(model)["relative_loss"] == 0.0
    assert spiked.loss(model, batches[0]).item() == pytest.approx(0.0, abs=1e-6)


def test_spiked_inputs_have_four_large_variances(spiked):
    values = torch.linalg.eigvalsh(spiked.covariance)
    assert values[-4:].tolist() == pytest.approx([100.0, 200.0, 300.0, 400.0])
    assert (values[0].item(), values[-5].item()) == pytest.approx((0.5, 1.0))
    x = torch.cat([x for x, _ in islice(spiked.batches(0), 100)]).double()
    empirical = torch.linalg.eigvalsh(x.mT @ x / len(x))
    assert empirical[-4:].tolist() == pytest.approx(values[-4:].tolist(), rel=0.1)


def test_gpt_is_causal():
    torch.manual_seed(0)
    model = find_workload("stdlib-lm").model()
    tokens = torch.randint(256, (2, 64))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-3)


def test_augment_gives_shifted_or_mirrored_pieces_of_the_same_image():
    images = torch.randint(1, 256, (16, 3, 32, 32), dtype=torch.uint8)
    out = augment(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    flipped = 0
    for image, source in zip(out, padded, strict=True):
        crops = [source[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        straight = any(torch.equal(image, crop) for crop in crops)
        mirrored = any(torch.equal(image, crop.flip(-1)) for crop in crops)
        assert straight or mirrored
        flipped += mirrored
    assert 0 < flipped < 16


def test_cifar_holds_out_the_last_tenth(data_dir):
    task = find_workload("cifar10-resnet")
    task.load(data_dir)
    assert (len(task.train_x), len(task.test_x)) == (54, 6)


def test_library_files_are_sorted_and_leave_out_tests(tmp_path):
    wanted = ["asyncio/base.py", "os.py"]
    unwanted = [
        "test/x.py",
        "site-packages/y.py",
        "idlelib/z.py",
        "_sysconfigdata_linux.py",
        "os.txt",
    ]
    for name in [*reversed(wanted), *unwanted]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert [f.as_posix() for f in library_files(tmp_path)] == wanted


def test_library_split_is_by_name_and_about_one_in_ten():
    files = [Path(f"module{i}.py") for i in range(2000)]
    share = sum(held_out(f) for f in files) / len(files)
    assert 0.07 < share < 0.13


def test_shakespeare_refuses_other_text(tmp_path):
    path = tmp_path / "tinyshakespeare/input.txt"
    path.parent.mkdir()
    path.write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match="byte 255 is not ASCII"):
        find_workload("shakespeare-lm").load(tmp_path)
    path.write_text("short")
    with pytest.raises(ValueError, match="too few"):
        find_workload("shakespeare-lm").load(tmp_path)
