# SPDX-License-Identifier: Apache-2.0
"""A small ResNet on CIFAR-10, read from the official binary files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from parabola.curvature import sampled_loss
from parabola.lab.data import read_cifar, require, shuffled
from parabola.lab.models import ResNet
from parabola.lab.workload import Setting, Workload

_CUSTOM = "customary values for small ResNets; not searched"
_UNSEARCHED = "values that suit the other workloads; not searched"
_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
_STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop after padding by 4 pixels and random horizontal flip, per image.

    Args:
        images: (n, 3, 32, 32) in uint8.
        generator: Source of the crops and flips.
    """
    count = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    span = torch.arange(32)
    rows = top + span  # (n, 32)
    columns = left + torch.where(flip, 31 - span, span)
    sample = torch.arange(count).view(-1, 1, 1)
    # Indexing around the channel slice puts the channels last.
    return (
        padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()
    )


class Cifar10ResNet(Workload):
    """ResNet-8 (He et al. 2016, section 4.2, with n = 1) with random crops and flips.

    Trained on the first 45,000 training images; the metric is the accuracy on the last 5,000, so
    that the test set stays untouched by tuning.
    """

    name = "cifar10-resnet"
    description = "ResNet-8 on CIFAR-10 with crops and flips; the metric is validation accuracy"
    metric = "accuracy"
    goal: Literal["min", "max"] = "max"
    target = 0.72
    steps = 1500
    batch_size = 128
    evaluations = 20
    data_files: ClassVar[tuple[str, ...]] = tuple(
        f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)
    )
    settings: Mapping[str, Setting] = {
        "adamw": Setting({"lr": 3e-3, "weight_decay": 0.05}, _CUSTOM),
        "sgd": Setting(
            {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-3},
            "best of 6 over 1500 steps on seed 1000: lr 0.05, 0.1, 0.2 at weight_decay 5e-3 and "
            "0.1, 0.2, 0.4 at 5e-4: accuracy 0.766",
        ),
        "jorge": Setting(
            {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-3},
            "Jorge.from_sgd of SGD's setting, its schedule included; no search",
            schedule="warmup-thirds",
        ),
        "sonew": Setting(
            {"lr": 1e-2, "weight_decay": 0.05},
            "best lr of 1e-3, 3e-3, 1e-2 over 500 steps on seed 1000: accuracy 0.616",
        ),
        "muon": Setting({"lr": 3e-3, "weight_decay": 0.05}, _CUSTOM),
        "shampoo": Setting({"lr": 3e-3, "weight_decay": 0.05}, _CUSTOM),
        "soap": Setting({"lr": 3e-3, "weight_decay": 0.05}, _UNSEARCHED),
        "ginger": Setting({"lr": 3e-3, "weight_decay": 0.05}, _UNSEARCHED),
        "sophia": Setting({"lr": 1e-3, "weight_decay": 0.05}, _UNSEARCHED),
        "gn": Setting({"lr": 1e-2, "damping": 0.1, "clip": 1.0, "weight_decay": 5e-3}, _UNSEARCHED),
        "gn-sqrt": Setting(
            {"lr": 1e-2, "damping": 0.1, "clip": 1.0, "weight_decay": 0.05}, _UNSEARCHED
        ),
    }

    def load(self, data_dir: Path) -> None:
        """Read the five training files of the binary version."""
        source = "https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-binary.tar.gz)"
        what = "one fifth of CIFAR-10's training images, binary version"
        parts = [read_cifar(require(data_dir / file, what, source)) for file in self.data_files]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        held_out = len(images) // 10
        self.train_x, self.train_y = images[:-held_out], labels[:-held_out]
        self.test_x, self.test_y = images[-held_out:], labels[-held_out:]

    def model(self) -> nn.Module:
        """ResNet-8 with torch's default initialization."""
        return ResNet(blocks=1, width=16, classes=10)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images (128, 3, 32, 32) in uint8 and labels (128,)."""
        generator = torch.Generator().manual_seed(seed)
        for index in shuffled(len(self.train_x), self.batch_size, seed):
            yield augment(self.train_x[index], generator), self.train_y[index]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats."""
        images, labels = batch
        return functional.cross_entropy(model(_normalize(images)), labels)

    def curvature_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on labels drawn from the model."""
        return sampled_loss(model(_normalize(batch[0])), "cross_entropy")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and cross-entropy on the validation images."""
        device = next(model.parameters()).device
        logits = torch.cat(
            [model(_normalize(part.to(device))) for part in torch.split(self.test_x, 500)]
        )
        labels = self.test_y.to(device)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        return {"accuracy": accuracy, "loss": functional.cross_entropy(logits, labels).item()}


def _normalize(images: Tensor) -> Tensor:
    return (images.float() / 255.0 - _MEAN.to(images.device)) / _STD.to(images.device)
