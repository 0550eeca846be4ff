# SPDX-License-Identifier: Apache-2.0
"""E[h h^T] of sampled losses is the Gauss-Newton matrix of the user's own loss; of empirical ones
the empirical Fisher matrix."""

import pytest
import torch
from curvature_cases import (
    CASES,
    assert_mean,
    case,
    dense_matrix,
    every_case,
    jacobian,
    labels,
    normal,
    output_hessian,
)
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from parabola.curvature import empirical_loss, sampled_loss
from parabola.curvature.terms import counting

DRAWS = 10_000
# Of a few hundred entries the worst is about three standard errors off.
ERRORS = 5.0


def draws(loss, z, count=DRAWS):
    """`(count, outputs)`: the gradients in the outputs of that many independent samples."""
    copies = z.detach().expand(count, *z.shape).clone()
    return vmap(grad(loss), randomness="different")(copies).flatten(1)


def outer(h):
    return h[:, :, None] * h[:, None, :]


@every_case
def test_the_mean_of_h_h_is_the_gauss_newton_matrix(case):
    model = case.model()
    z = model(case.x)
    h = draws(lambda z: sampled_loss(z, case.kind, **case.options), z)
    hessian = output_hessian(case, model)
    assert_mean(outer(h), hessian, ERRORS)
    assert_mean(h, torch.zeros_like(hessian[0]), ERRORS)
    # At the parameters, where a wrong factor of 2, of the classes or of the mask cannot hide.
    matrix = dense_matrix(case, model)
    estimate = outer(h @ jacobian(model, case.x).detach()).mean(0)
    assert torch.linalg.norm(estimate - matrix) < 0.05 * torch.linalg.norm(matrix)


@pytest.mark.parametrize("name", ["ce", "ce-masked-tokens", "bce-rows", "mse-half"])
def test_four_micro_batches_make_one_vector(name):
    c = case(name)
    model = c.model()
    z = model(c.x)
    cuts = [1, 2, 1, 2] if len(z) == 6 else [1, 1, 0, 1] if len(z) == 3 else [1, 1, 1, 2]
    mask = c.options.get("mask")

    def accumulated(z):
        with counting() as terms:
            total, low = 0.0, 0
            for size in cuts:
                part = slice(low, low + size)
                options = {**c.options} if mask is None else {**c.options, "mask": mask[part]}
                total = total + sampled_loss(z[part], c.kind, **options)
                low += size
        return total * terms.correction()

    assert_mean(outer(draws(accumulated, z)), output_hessian(c, model), ERRORS)


@every_case
def test_the_gradient_is_that_of_torchs_loss_on_some_labels(case):
    """One sample through backward(): the loss on its own labels, times the root of the count."""
    model = case.model()
    z = model(case.x).detach().requires_grad_()
    sampled_loss(z, case.kind, **case.options).backward()
    mask = case.options.get("mask")
    if case.kind == "mse":
        c = 0.5 if case.options.get("reduction") == "half" else 1.0
        count = len(z) if "reduction" in case.options else z.numel()
        expected = torch.full_like(z, (2 * c / count) ** 0.5)  # of either sign
        torch.testing.assert_close(z.grad.abs(), expected)
        return
    count = (
        len(z) if "reduction" in case.options else (case.y.numel() if mask is None else mask.sum())
    )
    scaled = z.grad * count**0.5
    if case.kind == "binary_cross_entropy":
        y = z.detach().sigmoid() - scaled
        y = y if mask is None else y[mask]
        torch.testing.assert_close(y, y.round(), atol=1e-6, rtol=0)
        assert mask is None or not scaled[~mask].any()
        return
    dim = case.options.get("dim", -1)
    y = (z.detach().softmax(dim) - scaled).movedim(dim, -1)
    if mask is not None:
        assert not scaled[~mask].any()
        y = y[mask]
    torch.testing.assert_close(y, y.round(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.sum(-1), torch.ones_like(y[..., 0]))


def test_the_value_is_the_users_loss_on_the_sampled_labels():
    """At a certain prediction the labels are known: the loss is the user's, times the root of N."""
    logits = 50 * F.one_hot(labels(3, 8), 3).double()
    loss = sampled_loss(logits + 1, "cross_entropy")
    expected = F.cross_entropy(logits, logits.argmax(-1)) * 8**0.5
    torch.testing.assert_close(loss, expected)


def test_nothing_is_differentiated_through_the_sampling():
    z = normal(50, 3).requires_grad_()
    g = torch.Generator().manual_seed(1)
    sampled_loss(z, "mse", generator=g).backward()
    # Were the label z + e, the difference would not depend on z at all.
    assert (z.grad.abs() > 0).all()


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_outputs_are_sampled_in_float32(kind, dtype):
    z = (3 * normal(64, 10)).to(dtype)
    low, high = z.clone().requires_grad_(), z.float().requires_grad_()
    losses = [
        sampled_loss(x, kind, generator=torch.Generator().manual_seed(2)) for x in (low, high)
    ]
    assert losses[0].dtype == torch.float32
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    assert low.grad.dtype == dtype
    assert torch.equal(low.grad, high.grad.to(dtype))


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_autocast_changes_nothing_but_the_model(kind):
    model = nn.Linear(5, 4)
    x = normal(6, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        assert z.dtype == torch.bfloat16
        loss = sampled_loss(z, kind, generator=torch.Generator().manual_seed(2))
    again = sampled_loss(z, kind, generator=torch.Generator().manual_seed(2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, again)
    loss.backward()
    assert model.weight.grad.isfinite().all()


def test_very_unlikely_classes_and_infinite_logits_are_never_drawn():
    z = torch.zeros(1000, 4)
    z[:, 0] = -1e4
    z[:, 1] = -torch.inf
    z.requires_grad_()
    sampled_loss(z, "cross_entropy").backward()
    drawn = z.detach().softmax(-1) - z.grad * 1000**0.5
    torch.testing.assert_close(drawn[:, :2], torch.zeros(1000, 2), atol=1e-6, rtol=0)


def test_a_model_that_broke_gives_a_vector_that_is_not_finite():
    for kind in ("cross_entropy", "binary_cross_entropy", "mse"):
        z = torch.full((3, 4), torch.nan, requires_grad=True)
        sampled_loss(z, kind).backward()
        assert not z.grad.isfinite().any()


def test_a_batch_without_a_single_term_has_no_mean():
    z = normal(2, 3, 4).requires_grad_()
    loss = sampled_loss(z, "cross_entropy", mask=torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert not z.grad.any()  # the block's correction makes this infinity times zero, and drops it


@every_case
def test_the_mean_of_empirical_h_h_is_the_fisher_matrix_of_true_labels(case):
    model = case.model()
    z = model(case.x).detach()
    gradients = []
    for i in range(len(z)):  # one term after another: only its elements of the user's loss
        if "reduction" in case.options:
            gradients.append(_gradient_of_rows(case, z, [i]))
        else:
            gradients += _gradients_of_elements(case, z, i)
    count = len(gradients)
    # A term is count times its part of the mean.
    fisher = sum(torch.outer(g, g) for g in gradients) * count
    h = draws(lambda z: empirical_loss(z, case.y, case.kind, **case.options), z)
    assert_mean(outer(h), fisher, ERRORS)


def _gradient_of_rows(case, z, rows):
    """Gradient of the user's whole loss, of which only some rows are let through."""
    g = grad(lambda z: case.loss(z, case.y))(z)
    kept = torch.zeros_like(g)
    kept[rows] = g[rows]
    return kept.flatten()


def _gradients_of_elements(case, z, row):
    """The same, element by element of a row; masked elements are none."""
    g = grad(lambda z: case.loss(z, case.y))(z)
    dim = case.options.get("dim", -1) if case.kind == "cross_entropy" else None
    mask = case.options.get("mask")
    shape = g.shape if dim is None else g.movedim(dim, -1).shape[:-1]
    found = []
    for index in torch.ones(shape[1:]).nonzero():
        place = (row, *index.tolist())
        if mask is not None and not mask[place]:
            continue
        kept = torch.zeros_like(g)
        if dim is None:
            kept[place] = g[place]
        else:
            kept.movedim(dim, -1)[place] = g.movedim(dim, -1)[place]
        found.append(kept.flatten())
    return found


def test_ignored_targets_are_a_mask():
    c = case("ce-masked-tokens")
    z = c.model()(c.x).detach()
    results = []
    for options in ({}, c.options):
        leaf = z.clone().requires_grad_()
        generator = torch.Generator().manual_seed(4)
        empirical_loss(leaf, c.y, c.kind, generator=generator, **options).backward()
        results.append(leaf.grad)
    assert torch.equal(*results)
    padded = c.y.masked_fill(c.y == -100, 7)
    leaf = z.clone().requires_grad_()
    generator = torch.Generator().manual_seed(4)
    empirical_loss(leaf, padded, c.kind, ignore_index=7, generator=generator).backward()
    assert torch.equal(leaf.grad, results[0])


def test_empirical_curvature_vanishes_where_every_label_is_fitted():
    z = normal(5, 3).requires_grad_()
    empirical_loss(z, z.detach(), "mse").backward()
    assert not z.grad.any()
    sampled_loss(z, "mse").backward()
    assert z.grad.all()


BAD = {
    "kind": ({"kind": "nll"}, "Invalid kind: 'nll'.*cross_entropy, binary_cross_entropy, mse"),
    "reduction": ({"reduction": "sum"}, "Invalid reduction.*'sum'.*mean, batchmean"),
    "half": ({"reduction": "half"}, "Invalid reduction for cross_entropy: 'half'"),
    "dim 0": ({"dim": 0}, "Invalid dim: 0"),
    "dim 2": ({"dim": 2}, r"Invalid dim: 2 .*\(4, 3\)"),
    "dim of mse": ({"kind": "mse", "dim": 1}, "Invalid dim for mse: 1"),
    "mask shape": ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"Invalid mask.*shape \(4,\)"),
    "mask dtype": ({"mask": torch.ones(4)}, "Invalid mask: torch.float32"),
    "images": ({"outputs": torch.zeros(2, 3, 4, 4)}, "Invalid dim: None.*1 as in torch"),
    "axes": ({"outputs": torch.zeros(3)}, "Invalid outputs for cross_entropy.*2 axes"),
    "scalar": ({"outputs": torch.zeros(()), "kind": "mse"}, "Invalid outputs for mse"),
    "integers": ({"outputs": torch.zeros(4, 3, dtype=torch.long)}, "torch.int64"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_a_wrong_argument_is_named(change):
    options, message = change
    given = {"outputs": torch.zeros(4, 3), "kind": "cross_entropy", **options}
    with pytest.raises(ValueError, match=message):
        sampled_loss(**given)
    with pytest.raises(ValueError, match=message):
        empirical_loss(targets=torch.zeros(4, dtype=torch.long), **given)


def test_targets_have_to_fit():
    with pytest.raises(ValueError, match=r"Invalid targets for mse: shape \(4,\).*\(4, 3\)"):
        empirical_loss(torch.zeros(4, 3), torch.zeros(4), "mse")


def test_the_cases_cover_every_kind_and_reduction():
    seen = {(c.kind, c.options.get("reduction", "mean")) for c in CASES}
    kinds = ("cross_entropy", "binary_cross_entropy", "mse")
    assert seen == {(k, r) for k in kinds for r in ("mean", "batchmean")} | {("mse", "half")}
