# SPDX-License-Identifier: Apache-2.0
"""What the language-model workloads share: windows of a byte sequence and next-byte prediction."""

from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from parabola.curvature import sampled_loss
from parabola.lab.data import windows
from parabola.lab.schedules import warmup_cosine
from parabola.lab.workload import Workload


class NextByte(Workload):
    """Predict the next byte; `load` calls `split`, `model` returns a model of logits.

    The metric is the cross-entropy in nats per byte on a fixed sample of 32,768 held-out bytes.

    Attributes:
        context: Bytes that the model sees.
    """

    metric = "loss"
    goal: Literal["min", "max"] = "min"
    batch_size = 32
    evaluations = 40
    context = 64

    def split(self, train: Tensor, test: Tensor) -> None:
        """Take the two texts, uint8 vectors, and draw the held-out sample."""
        self.train = train
        self.test = list(islice(windows(test, self.context, 128, seed=0), 4))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes and the bytes that follow them, both (32, 64)."""
        return windows(self.train, self.context, self.batch_size, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats per byte."""
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def curvature_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on bytes drawn from the model."""
        return sampled_loss(model(batch[0]), "cross_entropy")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross-entropy in nats per byte over the held-out sample."""
        device = next(model.parameters()).device
        losses = [self.loss(model, (x.to(device), y.to(device))) for x, y in self.test]
        return {"loss": torch.stack(losses).mean().item()}

    def schedule(self, progress: float) -> float:
        """Warm-up over 5 % of the run, then a cosine down to a tenth."""
        return warmup_cosine(progress, floor=0.1)
