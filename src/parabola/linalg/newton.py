# SPDX-License-Identifier: Apache-2.0
r"""Inverse roots by matrix products only: coupled Newton and coupled Newton-Schulz.

Both drive a product `M` to the identity while an iterate `X` runs to the root, and both need the
spectrum of the start below a bound, so the largest eigenvalue is estimated first.

- Coupled Newton (Guo and Higham 2006; used by Anil et al. 2020, "Scalable Second Order Optimization
  for Deep Learning"): $M_0 = zA$, $X_0 = z^{1/p} I$, $T = (1 + 1/p) I - M/p$, $X \leftarrow X T$,
  $M \leftarrow T^p M$; then $X^p A = M$ throughout and $X \to A^{-1/p}$ for $zA$ in $(0, p+1)$.
- Coupled Newton-Schulz (Higham 2008, "Functions of Matrices", section 6.7): $Y_0 = A/c$, $Z_0 = I$,
  $E = (3I - ZY)/2$, $Y \leftarrow YE$, $Z \leftarrow EZ$; then $Y \to (A/c)^{1/2}$ and
  $Z \to (A/c)^{-1/2}$. A $2^k$-th root applies it k times, each time to the square root just found.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from parabola.linalg.precision import full_precision

_MAX_STEPS = 100
# A step may raise max|M - I| a little while large eigenvalues settle; more is divergence.
_GROWTH = 1.2
# Below this max|M - I| convergence is quadratic: a step that does not halve it sees round-off.
_ASYMPTOTIC = 1e-3
# Headroom over the estimated largest eigenvalue. Newton converges with an estimate of half the true
# value and Newton-Schulz with a third, so this is generous.
_HEADROOM = 1.05
_PROBES = 8
_POWER_ROUNDS = 16
_POWER_RTOL = 1e-4


def probes(n: int, count: int, like: Tensor) -> Tensor:
    """Fixed Gaussian vectors `(n, count)` in the dtype and on the device of `like`.

    They come from a generator of their own on the CPU, so that all ranks, devices and resumed runs
    see the same vectors and the user's random stream is left alone.
    """
    generator = torch.Generator().manual_seed(1729)
    return torch.randn(n, count, generator=generator, dtype=torch.float64, device="cpu").to(like)


def normalize(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring each matrix of `(b, n, n)` to a largest entry in [0.5, 1) by an exact power of two.

    Returns:
        `(scaled, scale, finite, zero)`: matrices that are zero or not finite are replaced by the
        identity in `scaled` (selected, never multiplied away: 0 * NaN is NaN); `scale` is `(b,)`
        float64 with `matrix = scale * scaled`; `finite` and `zero` are `(b,)` bool.
    """
    entries = matrix.flatten(1)
    largest = torch.maximum(entries.amax(dim=1), -entries.amin(dim=1))  # no temporary, keeps NaN
    finite, zero = largest.isfinite(), largest == 0
    unusable = ~finite | zero
    _, power = torch.frexp(largest.masked_fill(unusable, 1.0))
    # The clamp keeps 2**power a normal number of the dtype; denormal input stays a bit below 0.5.
    limit = 126 if matrix.dtype == torch.float32 else 1022
    scale = torch.exp2(power.clamp(-limit, limit).double())
    scaled = matrix / scale.to(matrix.dtype)[:, None, None]
    scaled.masked_fill_(unusable[:, None, None], 0.0)
    scaled.diagonal(dim1=1, dim2=2).masked_fill_(unusable[:, None], 1.0)
    return scaled, scale, finite, zero


@torch.no_grad()
def largest_eigenvalue(matrix: Tensor) -> Tensor:
    r"""Largest eigenvalue of symmetric positive semidefinite matrices by block power iteration.

    Eight fixed start vectors are multiplied by $A^8$ (three squarings) until the best Rayleigh
    quotient changes by less than 1e-4 of itself, at most 16 times: up to 128 power iterations in 16
    thin products. The result never exceeds the true value by more than rounding. It is low by
    less than about one percent in the worst case, a crowd of eigenvalues just below the largest.

    Args:
        matrix: `(..., n, n)`, float32 or float64, any scale; n >= 1.

    Returns:
        `(...)` in the dtype of `matrix`; zero for a zero matrix and NaN for one that is not finite.

    Raises:
        ValueError: `matrix` is not a batch of square float32 or float64 matrices.
    """
    check_matrix(matrix)
    n = matrix.shape[-1]
    flat = matrix.reshape(math.prod(matrix.shape[:-2]), n, n)
    if flat.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-2])
    with full_precision(), torch.autocast(matrix.device.type, enabled=False):
        scaled, scale, finite, zero = normalize(flat)
        value = power_iteration(scaled).double() * scale
        value = value.masked_fill(zero, 0.0).masked_fill(~finite, torch.nan)
    return value.to(matrix.dtype).reshape(matrix.shape[:-2])


def check_matrix(matrix: Tensor) -> None:
    """Raise a ValueError unless `matrix` is a batch of square float32 or float64 matrices."""
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Invalid matrix dtype: {matrix.dtype} (allowed: float32, float64)")
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"Invalid matrix shape: {tuple(matrix.shape)} (allowed: (..., n, n))")


def power_iteration(scaled: Tensor) -> Tensor:
    """Largest eigenvalues `(b,)` of finite, nonzero, normalized matrices `(b, n, n)`."""
    b, n, _ = scaled.shape
    eighth = scaled
    for _ in range(3):
        eighth = eighth @ eighth
        eighth = eighth / eighth.abs().amax(dim=(1, 2), keepdim=True)  # or n^8 overflows float32
    vectors = probes(n, min(n, _PROBES), scaled).expand(b, n, -1)
    value = scaled.new_zeros(b)
    active = torch.ones(b, dtype=torch.bool, device=scaled.device)
    stride = _host_read_stride(scaled)
    for step in range(1, _POWER_ROUNDS + 1):
        vectors = torch.nn.functional.normalize(eighth @ vectors, dim=1)
        quotient = (vectors * (scaled @ vectors)).sum(dim=1).amax(dim=1)
        settled = (quotient - value).abs() <= _POWER_RTOL * quotient
        # A settled item keeps its value, so that no item depends on its neighbors in the batch.
        value = torch.where(active, quotient, value)
        active = active & ~settled
        if step % stride == 0 and not bool(active.any()):
            break
    return value


def newton_root(matrix: Tensor, p: int, damping: float) -> tuple[Tensor, Tensor]:
    """`(A + ridge I)^(-1/p)` of normalized `(b, n, n)` by coupled Newton, and the ridge `(b,)`."""
    return _scaled_solve(matrix, damping, lambda damped, bound: _newton(damped, p, bound))


def newton_schulz_root(matrix: Tensor, p: int, damping: float) -> tuple[Tensor, Tensor]:
    """`(A + ridge I)^(-1/p)`, p a power of two >= 2, by square roots in turn, and the ridge."""
    return _scaled_solve(matrix, damping, lambda damped, bound: _newton_schulz(damped, p, bound))


def _scaled_solve(
    matrix: Tensor, damping: float, solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Damp and solve, scaled by the estimated largest eigenvalue; a sure bound where that fails."""
    largest = power_iteration(matrix)
    ridge = damping * largest
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    root, error = solve(damped, _HEADROOM * (largest + ridge))
    diverged = ~(error < 0.1)
    if bool(diverged.any()):
        index = diverged.nonzero().squeeze(1)
        frobenius = torch.linalg.vector_norm(damped[index], dim=(1, 2))
        root[index] = solve(damped[index], frobenius)[0]
    return (root + root.mT).mul_(0.5), ridge


def _newton(damped: Tensor, p: int, bound: Tensor) -> tuple[Tensor, Tensor]:
    z = ((1 + p) / 2 / bound)[:, None, None]
    identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)

    def advance(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        t = torch.add((1 + 1 / p) * identity, m, alpha=-1 / p)
        return x @ t, torch.linalg.matrix_power(t, p) @ m

    (x, _), error = _drive_to_identity(advance, (z ** (1 / p) * identity, z * damped), identity)
    return x, error


def _newton_schulz(damped: Tensor, p: int, bound: Tensor) -> tuple[Tensor, Tensor]:
    c = bound[:, None, None]
    identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)

    def advance(y: Tensor, z: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        e = torch.add(1.5 * identity, m, alpha=-0.5)
        y, z = y @ e, e @ z
        return y, z, z @ y

    y = damped / c
    worst = damped.new_zeros(len(damped))
    for _ in range(p.bit_length() - 1):
        y = (y + y.mT).mul_(0.5)
        (y, z, _), error = _drive_to_identity(advance, (y, identity.expand_as(y), y), identity)
        worst = torch.maximum(worst, error)
    return z * c ** (-1 / p), worst


def _drive_to_identity(
    advance: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...], identity: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Iterate until the last tensor of `state` is the identity, item by item.

    An item stops when it has converged, when round-off keeps it from improving, or when it
    diverges, and then keeps its last good state. Selection is by `torch.where`, without a host
    decision per item, so a batch of mixed condition numbers costs no synchronization.

    Returns:
        The state and max|M - I| of it, `(b,)`; NaN or large where an item never converged.
    """
    eps = torch.finfo(identity.dtype).eps
    error = _distance(state[-1], identity)
    active = torch.ones_like(error, dtype=torch.bool)
    stride = _host_read_stride(identity)
    for step in range(1, _MAX_STEPS + 1):
        proposal = advance(*state)
        proposed = _distance(proposal[-1], identity)
        accept = active & (proposed <= _GROWTH * error)  # False for NaN: it counts as divergence
        keep = accept[:, None, None]
        pairs = zip(proposal, state, strict=True)
        state = tuple(torch.where(keep, new, old) for new, old in pairs)
        stalled = (error < _ASYMPTOTIC) & (proposed > 0.5 * error)
        error = torch.where(accept, proposed, error)
        active = accept & (error > 8 * eps) & ~stalled
        if step % stride == 0 and not bool(active.any()):
            break
    return state, error


def _distance(matrix: Tensor, identity: Tensor) -> Tensor:
    return (matrix - identity).abs_().flatten(1).amax(dim=1)


def _host_read_stride(tensor: Tensor) -> int:
    """Iterations between reads of the stop flag: reading is free on the CPU, a sync elsewhere."""
    return 1 if tensor.device.type == "cpu" else 4
