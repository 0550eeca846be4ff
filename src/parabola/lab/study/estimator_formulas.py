# SPDX-License-Identifier: Apache-2.0
r"""The variance of one draw of each estimator of the Gauss-Newton diagonal, in closed form.

With $a_{nc}$ the rows of $S_n^\top J_n U$ (S S^T the Hessian of the loss by the logits), $D_i =
\frac1N \sum a_{nci}^2$, and $s_n$ the projected gradient of sample n for a label drawn from the
model:

    mc          (1/N^2) sum_n (E s_n^4 - (E s_n^2)^2)
    gnb         2 D^2 + (1/N^2) sum_n (E s_n^4 - 3 (E s_n^2)^2)
    factor      2 D^2 - (2/N^2) sum_nc a_nc^4
    hutchinson  sum_{j != i} G_ij^2         random signs; zero in the eigenbasis of G

The sum of independent terms with mean zero has the fourth cumulant of its terms; a sign has -2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


def instance(seed: int, sharpness: float, samples: int) -> tuple[nn.Module, Tensor]:
    """A 4-5-3 network with tanh, float64, and its inputs; softmax cross-entropy.

    Args:
        seed: Of weights and inputs.
        sharpness: Factor on the weights of the output: confident models have large ones.
        samples: Number of inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        inputs = torch.randn(samples, 4, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(sharpness)
    return model, inputs


@dataclass(frozen=True)
class Columns:
    """What D is made of, in coordinates of the parameters.

    Attributes:
        probabilities: (N, C).
        scores: Gradient of each sample for each label, (N, C, P).
        factors: Rows of S^T J, (N, C, P).
    """

    probabilities: Tensor
    scores: Tensor
    factors: Tensor

    @property
    def matrix(self) -> Tensor:
        """The Gauss-Newton matrix, (P, P)."""
        rows = self.factors.flatten(0, 1)
        return rows.mT @ rows / len(self.factors)


def columns(model: nn.Module, inputs: Tensor) -> Columns:
    """Every sample's Jacobian of the logits, and what follows from it."""
    params = dict(model.named_parameters())

    def logits(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, dict(values), (x[None],))[0]
        return out

    rows = vmap(jacrev(logits), (None, 0))(params, inputs)
    jacobian = torch.cat([j.flatten(2) for j in rows.values()], -1).detach()
    p = model(inputs).softmax(-1).detach()
    mean = torch.einsum("nc,ncp->np", p, jacobian)[:, None]
    # grad of -log p_y is (p - e_y)^T J; S^T J has the rows sqrt(p_c) (J_c - mean).
    return Columns(p, mean - jacobian, p.sqrt()[..., None] * (jacobian - mean))


def bases(model: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    """The three bases as (P, P) matrices.

    The Kronecker one has the eigenvectors of E[G G^T] and E[G^T G] for each weight matrix, with G
    the gradient of a sample for a label of the model; biases keep their coordinates.
    """
    kronecker = torch.eye(len(matrix), dtype=matrix.dtype)
    start = 0
    for p in model.parameters():
        stop = start + p.numel()
        if p.ndim == 2:
            block = matrix[start:stop, start:stop].reshape(*p.shape, *p.shape)
            left = torch.linalg.eigh(torch.einsum("aibi->ab", block)).eigenvectors
            right = torch.linalg.eigh(torch.einsum("aiaj->ij", block)).eigenvectors
            kronecker[start:stop, start:stop] = torch.kron(left, right)
        start = stop
    return {
        "identity": torch.eye(len(matrix), dtype=matrix.dtype),
        "kronecker": kronecker,
        "full": torch.linalg.eigh(matrix).eigenvectors,
    }


def variances(found: Columns, basis: Tensor) -> dict[str, Tensor]:
    """The variance of one draw of each estimator, (P,) each."""
    count = len(found.factors)
    p = found.probabilities[..., None]
    score, factor = found.scores @ basis, found.factors @ basis
    second, fourth = (p * score**2).sum(1), (p * score**4).sum(1)
    d = second.mean(0)
    matrix = basis.mT @ found.matrix @ basis
    return {
        "mc": (fourth - second**2).sum(0) / count**2,
        "gnb": 2 * d**2 + (fourth - 3 * second**2).sum(0) / count**2,
        "factor": 2 * d**2 - 2 * (factor**4).sum((0, 1)) / count**2,
        "hutchinson": (matrix**2).sum(1) - matrix.diagonal() ** 2,
    }
