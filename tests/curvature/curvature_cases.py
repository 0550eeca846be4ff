# SPDX-License-Identifier: Apache-2.0
"""Small models with every loss and convention, and their Gauss-Newton matrices by plain autograd.

The matrix is J^T H J with J row by row and H the Hessian of the user's own loss, a function of
torch: no formula of the library's is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOUBLE = torch.float64


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def labels(high, *shape, seed=3):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def net(inputs: int, hidden: int, outputs: int, seed: int = 0) -> nn.Module:
    """A tanh network in float64, away from the symmetric point."""
    torch.manual_seed(seed)
    layers = nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


class Channels(nn.Module):
    """Classes on axis 1, as images have them."""

    def __init__(self):
        super().__init__()
        self.inner = net(3, 3, 3)

    def forward(self, x):
        return self.inner(x).movedim(-1, 1)


@dataclass(frozen=True)
class Case:
    """A model, a batch, the user's loss as a function of the outputs, and the library's words."""

    id: str
    kind: str
    model: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.id


def _tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def _tokens_sum(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / len(z)


def _bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y)


def _squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y, reduction="sum") / len(z)


_PADDED = labels(4, 3, 4)
_PADDED[0, 2:] = _PADDED[2, 1:] = -100
_SEEN = uniform(4, 3, seed=5) < 0.6

CASES = [
    Case("ce", "cross_entropy", lambda: net(4, 3, 3), normal(6, 4), labels(3, 6), F.cross_entropy),
    Case(
        "ce-images",
        "cross_entropy",
        Channels,
        normal(2, 2, 2, 3),
        labels(3, 2, 2, 2),
        F.cross_entropy,
        {"dim": 1},
    ),
    Case(
        "ce-tokens",
        "cross_entropy",
        lambda: net(2, 3, 4),
        normal(3, 4, 2),
        labels(4, 3, 4),
        _tokens,
    ),
    Case(
        "ce-masked-tokens",
        "cross_entropy",
        lambda: net(2, 3, 4),
        normal(3, 4, 2),
        _PADDED,
        _tokens,  # leaves out -100, in the sum and in the count
        {"mask": _PADDED != -100},
    ),
    Case(
        "ce-sequences",
        "cross_entropy",
        lambda: net(2, 3, 4),
        normal(3, 4, 2),
        _PADDED,
        _tokens_sum,
        {"mask": _PADDED != -100, "reduction": "batchmean"},
    ),
    Case(
        "bce",
        "binary_cross_entropy",
        lambda: net(4, 3, 2),
        normal(5, 4),
        labels(2, 5, 2).double(),
        _bce,
    ),
    Case(
        "bce-masked",
        "binary_cross_entropy",
        lambda: net(4, 3, 3),
        normal(4, 4),
        labels(2, 4, 3).double(),
        lambda z, y: _bce(z[_SEEN], y[_SEEN]),
        {"mask": _SEEN},
    ),
    Case(
        "bce-rows",
        "binary_cross_entropy",
        lambda: net(4, 3, 2),
        normal(5, 4),
        labels(2, 5, 2).double(),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z),
        {"reduction": "batchmean"},
    ),
    Case("mse", "mse", lambda: net(4, 3, 2), normal(5, 4), normal(5, 2, seed=9), F.mse_loss),
    Case(
        "mse-rows",
        "mse",
        lambda: net(4, 3, 2),
        normal(5, 4),
        normal(5, 2, seed=9),
        _squares,
        {"reduction": "batchmean"},
    ),
    Case(
        "mse-half",
        "mse",
        lambda: net(4, 3, 2),
        normal(5, 4),
        normal(5, 2, seed=9),
        lambda z, y: _squares(z, y) / 2,
        {"reduction": "half"},
    ),
    Case(
        "mse-flat",
        "mse",
        lambda: nn.Sequential(net(4, 3, 1), nn.Flatten(0)),
        normal(5, 4),
        normal(5, seed=9),
        F.mse_loss,
    ),
]

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def case(name: str) -> Case:
    """The case of this name."""
    return next(c for c in CASES if c.id == name)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """d outputs / d trainable parameters, `(outputs, P)`, one backward pass a row."""
    params = [p for p in model.parameters() if p.requires_grad]
    z = model(x).reshape(-1)
    rows = []
    for value in z:
        grads = torch.autograd.grad(
            value, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def output_hessian(case: Case, model: nn.Module) -> Tensor:
    """The Hessian of the user's loss in the outputs, `(outputs, outputs)`."""
    z = model(case.x).detach()
    hessian = torch.autograd.functional.hessian(lambda z: case.loss(z, case.y), z)
    return hessian.reshape(z.numel(), z.numel())


def dense_matrix(case: Case, model: nn.Module) -> Tensor:
    """J^T H J, `(P, P)`."""
    j = jacobian(model, case.x)
    return j.mT @ output_hessian(case, model) @ j


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """Tensors by name, end to end."""
    return torch.cat([v.detach().reshape(-1) for v in named.values()])


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix in float64."""
    return torch.linalg.qr(normal(n, n, seed=seed))[0].contiguous()


def assert_mean(samples: Tensor, expected: Tensor, errors: float) -> None:
    """The mean over axis 0 is the expected value within a number of standard errors."""
    mean = samples.mean(0)
    error = samples.std(0) / len(samples) ** 0.5
    # Entries that are the same in all samples err by rounding: counts of masks are float32.
    excess = (mean - expected).abs() - 1e-6 * expected.abs().max()
    assert (excess <= errors * error).all(), (excess / error).max()
