# SPDX-License-Identifier: Apache-2.0
"""Linear regression on inputs of four large variances: what curvature of low rank is made for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from parabola.curvature import sampled_loss
from parabola.lab.schedules import warmup_cosine
from parabola.lab.workload import Setting, Workload

SIZE = 200
SPIKES = (400.0, 300.0, 200.0, 100.0)
_GRID = "best lr of the powers of two from 2^-12 to 2 on seed 1000: relative_loss "
_WITH_DAMPING = f"damping of 1e-3, 1e-2, 1e-1, {_GRID}"


class SpikedRegression(Workload):
    """200 inputs in a random rotation, variances 400, 300, 200, 100, the others 0.5 to 1.

    The target is linear and has no noise, so that nothing but the step limits the loss. The metric
    is the population loss, in closed form, over that of zero weights, where all runs start. The
    learning rate rises over the first 100 of 400 steps: the curvature settles meanwhile.
    """

    name = "spiked-regression"
    description = "linear regression on 200 inputs, 4 of them of large variance; no download"
    metric = "relative_loss"
    goal: Literal["min", "max"] = "min"
    target = 1e-4
    steps = 400
    batch_size = 64
    evaluations = 80
    settings: Mapping[str, Setting] = {
        "adamw": Setting({"lr": 0.5}, _GRID + "8.0e-06"),
        "sgd": Setting({"lr": 2**-9}, _GRID + "3.5e-04"),
        "muon": Setting(
            {"lr": 0.5}, f"{_GRID}8.0e-06; all of it is AdamW's, as there is no hidden weight"
        ),
        "shampoo": Setting({"lr": 0.25}, _GRID + "4.5e-05"),
        "sonew": Setting({"lr": 2.0}, _GRID + "3.9e-04"),
        "jorge": Setting({"lr": 2**-8}, _GRID + "1.7e-06"),
        "soap": Setting({"lr": 0.125}, _GRID + "6.1e-06"),
        "ginger": Setting(
            {"lr": 0.25, "damping": 1.0, "graft": None, "start_step": 0}, _GRID + "2.1e-12"
        ),
        "sophia": Setting({"lr": 2**-5}, _GRID + "3.5e-04"),
        "gn": Setting({"lr": 0.25, "damping": 0.1, "clip": None}, _WITH_DAMPING + "7.8e-05"),
        "gn-sqrt": Setting({"lr": 0.125, "damping": 1e-3, "clip": None}, _WITH_DAMPING + "5.4e-08"),
    }

    def load(self, data_dir: Path) -> None:
        """Draw rotation and target; the data folder is not used."""
        random = torch.Generator().manual_seed(0)
        draw = torch.randn(SIZE, SIZE + 1, generator=random, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(draw[:, :SIZE])
        bulk = torch.linspace(0.5, 1.0, SIZE - len(SPIKES), dtype=torch.float64)
        variances = torch.cat([torch.tensor(SPIKES, dtype=torch.float64), bulk])
        root = variances.sqrt().unsqueeze(1) * rotation.mT
        self.root, self.target_weights = root.float(), draw[:, SIZE].float()
        self.covariance = root.mT @ root

    def model(self) -> nn.Module:
        """A linear map to one number, without a bias, from zero."""
        model = nn.Linear(SIZE, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (64, 200), never the same twice, and targets (64, 1)."""
        random = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(self.batch_size, SIZE, generator=random) @ self.root
            yield x, x @ self.target_weights.unsqueeze(1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Half the squared error, so that its Hessian is the inputs' covariance."""
        inputs, targets = batch
        return 0.5 * functional.mse_loss(model(inputs), targets)

    def curvature_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on targets drawn around the model's own."""
        return sampled_loss(model(batch[0]), "mse", reduction="half")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The expected loss over that of zero weights."""
        (weights,) = model.parameters()
        start = self.target_weights.double()
        left = weights.detach().cpu().double().squeeze(0) - start
        return {"relative_loss": self._loss(left) / self._loss(start)}

    def _loss(self, difference: Tensor) -> float:
        return float(difference @ self.covariance @ difference)

    def schedule(self, progress: float) -> float:
        """Linear rise over a quarter of the run, then a cosine down to 0."""
        return warmup_cosine(progress, warmup=0.25)
