# SPDX-License-Identifier: Apache-2.0
"""What must hold for the diagonal family whatever the implementation: symmetries, bounds."""

import pytest
import torch

from methods import make_grads, make_params, train
from parabola import Diagonal
from parabola.linalg import eigen

# Adam, GN^-1/2 and GN^-1.
SOURCES = {
    "adam": {"curvature": "gradient", "power": 0.5},
    "root": {"curvature": "gauss_newton", "power": 0.5},
    "newton": {"curvature": "gauss_newton", "power": 1.0},
}
every_source = pytest.mark.parametrize("source", SOURCES)
FRESH = {"betas": (0.0, 0.0), "damping": 0.0, "eps": 0.0}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def parameter(values):
    return torch.nn.Parameter(values.detach().clone())


def feed(optimizer, p, vectors):
    for h in vectors:
        with optimizer.curvature():
            p.grad = h.clone()


def walk(optimizer, p, grads, vectors=None):
    """The trajectory of one parameter on given gradients and curvature vectors."""
    path = []
    for i, grad in enumerate(grads):
        if vectors is not None:
            feed(optimizer, p, vectors[i])
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


# ---- equivariance


class Regression:
    """y = x w with correlated inputs and noise; the loss is half the mean square."""

    def __init__(self, inputs=6, outputs=None, turn=None, other=None):
        self.x = normal(512, inputs, seed=1) * torch.linspace(1.5, 0.3, inputs).double()
        self.x = self.x @ orthogonal(inputs, 2).T
        target = normal(inputs, seed=3) if outputs is None else normal(inputs, outputs, seed=3)
        self.y = self.x @ target
        self.y = self.y + 0.1 * normal(*self.y.shape, seed=4)
        if turn is not None:
            self.x = self.x @ turn.T
        if other is not None:
            self.y = self.y @ other

    def batch(self, step, size=16):
        rows = torch.arange(step * size, (step + 1) * size) % 512
        return self.x[rows], self.y[rows]

    def loss(self, w):
        return (self.x @ w - self.y).square().mean().item() / 2

    def run(self, w, steps, separate=16, **options):
        """Losses of a run on minibatches, with curvature from other samples of its own."""
        p = parameter(w)
        optimizer = Diagonal([p], **options)
        losses = []
        for step in range(steps):
            if optimizer.wants_curvature:
                x, _ = self.batch(step + 7, separate)
                feed(optimizer, p, list(x))  # h = x: E[h h^T] is the Gauss-Newton matrix
            x, y = self.batch(step)
            p.grad = x.T @ (x @ p.detach() - y) / len(x)
            optimizer.step()
            losses.append(self.loss(p.detach()))
        return torch.tensor(losses, dtype=torch.float64)


def data_basis(problem):
    """The same rule in any coordinates: eigenvectors of the inputs' second moments."""
    return torch.linalg.eigh(problem.x.T @ problem.x)[1]


@every_source
@pytest.mark.parametrize("basis", ["data", "full", "identity"])
def test_rotating_the_parameters(source, basis):
    """60 minibatch steps: equal losses in a basis that turns along, other ones in the identity."""
    turn = orthogonal(6, 9)
    plain, turned = Regression(), Regression(turn=turn)
    start = normal(6, seed=5)
    # Adam's own full basis has directions without any gradient at first: eps drowns their rounding.
    options = {"lr": 0.05, "betas": (0.9, 0.95), "damping": 1e-3, "eps": 1e-3, "update_every": 1}
    options |= SOURCES[source]
    curves = []
    for problem, w in ((plain, start), (turned, turn @ start)):
        own = data_basis(problem) if basis == "data" else basis
        curves.append(problem.run(w, 60, basis=own, **options))
    assert curves[0][-1] < 0.9 * curves[0][0]
    difference = ((curves[0] - curves[1]).abs() / curves[0]).max()
    if basis == "identity":
        assert difference > 1e-2
    else:
        assert difference < 1e-12


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_rotating_both_sides_of_a_matrix(power):
    """The Kronecker basis turns with W -> O1 W O2; a rotation of all elements is beyond it."""
    left, right = orthogonal(5, 9), orthogonal(5, 10)
    start = normal(5, 5, seed=5)
    options = {"lr": 0.02, "betas": (0.9, 0.95), "basis": "kronecker", "update_every": 3}
    options |= {"power": power, "damping": 1e-3}
    curves = []
    for turn, other, w in ((None, None, start), (left, right, left @ start @ right)):
        problem = Regression(5, 5, turn, other)
        curves.append(problem.run(w, 60, **options))
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert ((curves[0] - curves[1]).abs() / curves[0]).max() < 1e-6
    options["basis"] = "identity"
    curves = [Regression(5, 5).run(start, 60, **options), None]
    curves[1] = Regression(5, 5, left, right).run(left @ start @ right, 60, **options)
    assert ((curves[0] - curves[1]).abs() / curves[0]).max() > 1e-2


# ---- eigenvectors are known up to sign and order


@every_source
def test_signs_and_order_of_a_given_basis_do_not_matter(source):
    basis, order = orthogonal(6, 1), torch.randperm(6)
    signs = torch.where(torch.rand(6) < 0.5, -1.0, 1.0).double()
    options = {"lr": 0.05, "clip": 0.7, "update_every": 1, **SOURCES[source]}
    fed = source != "adam"
    paths = []
    for u in (basis, basis[:, order] * signs):
        p = parameter(normal(3, 2, seed=2))
        grads = [normal(3, 2, seed=i) for i in range(20)]
        vectors = [[normal(3, 2, seed=100 + i)] for i in range(20)] if fed else None
        paths.append(walk(Diagonal([p], basis=u, **options), p, grads, vectors))
    close(*paths)


@pytest.mark.parametrize("kind", ["signs", "order"])
@pytest.mark.parametrize("basis", ["kronecker", "full"])
def test_signs_and_order_at_a_refresh_do_not_matter(basis, kind, monkeypatch):
    """D and the first moment go along when every decomposition comes out differently."""
    real, calls = eigen.eigh, []

    def other(matrix):
        values, vectors = real(matrix)
        calls.append(1)
        generator = torch.Generator().manual_seed(len(calls))
        n = len(values[0])
        if kind == "signs":
            flips = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
            return values, vectors * flips
        shuffled = torch.randperm(n, generator=generator)
        return values[:, shuffled], vectors[:, :, shuffled]

    paths = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(eigen, "eigh", other)
        shape = (5, 5) if basis == "kronecker" else (3, 2)
        p = parameter(normal(*shape, seed=2))
        options = {"basis": basis, "tracking": "eigh", "update_every": 2, "start_step": 6}
        grads = [normal(*shape, seed=i) for i in range(20)]
        paths.append(walk(Diagonal([p], lr=0.05, **options), p, grads))
    assert calls
    close(*paths, 1e-8)


# ---- exact cases


@pytest.mark.parametrize("given", [True, False], ids=["given", "full"])
def test_a_quadratic_is_solved_in_one_step(given):
    """H = F F^T, fed column by column; power 1, lr 1, no damping: Newton's step."""
    factor = normal(6, 6, seed=1) + 2 * torch.eye(6).double()
    hessian, target = factor @ factor.T, normal(6, seed=2)
    basis = torch.linalg.eigh(hessian)[1] if given else "full"
    p = parameter(normal(6, seed=3))
    options = {"curvature": "gauss_newton", "power": 1.0, **FRESH}
    optimizer = Diagonal([p], lr=1.0, basis=basis, **options)
    vectors = [6**0.5 * column for column in factor.T]  # the mean of h h^T
    walk(optimizer, p, [hessian @ (p.detach() - target)], [vectors])
    close(p.detach(), target)


def test_the_identity_basis_solves_it_only_if_it_is_diagonal():
    p = parameter(normal(6, seed=3))
    scales, target = torch.linspace(0.1, 9, 6).double(), normal(6, seed=2)
    optimizer = Diagonal([p], lr=1.0, curvature="gauss_newton", power=1.0, **FRESH)
    vectors = [6**0.5 * row for row in torch.diag(scales.sqrt())]
    walk(optimizer, p, [scales * (p.detach() - target)], [vectors])
    close(p.detach(), target)


def test_a_linear_layer_under_squared_error_is_diagonal_in_the_kronecker_basis():
    """G = I (x) E[x x^T]: Kronecker and full basis make the same steps."""
    x = normal(12, 4, seed=1) * torch.tensor([2.0, 1.0, 0.5, 0.2]).double()
    vectors = [3**0.5 * torch.outer(unit, row) for unit in torch.eye(3).double() for row in x]
    paths = []
    for basis in ("kronecker", "full"):
        p = parameter(normal(3, 4, seed=2))
        options = {"curvature": "gauss_newton", "power": 1.0, "damping": 1e-3, "update_every": 4}
        optimizer = Diagonal([p], lr=0.1, basis=basis, tracking="eigh", **options)
        grads = [normal(3, 4, seed=i) for i in range(12)]
        paths.append(walk(optimizer, p, grads, [vectors if i % 4 == 0 else [] for i in range(12)]))
    close(*paths)


@pytest.mark.parametrize("basis", ["identity", "kronecker", "full", "given"])
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
def test_power_zero_is_gradient_descent_with_averaged_gradients(basis, curvature):
    p = parameter(normal(4, 3, seed=2))
    own = orthogonal(12, 1) if basis == "given" else basis
    options = {"power": 0.0, "update_every": 2, "curvature": curvature}
    optimizer = Diagonal([p], lr=0.1, basis=own, betas=(0.9, 0.95), **options)
    grads = [normal(4, 3, seed=i) for i in range(12)]
    vectors = [[normal(4, 3, seed=50 + i)] for i in range(12)]
    path = walk(optimizer, p, grads, vectors if curvature != "gradient" else None)
    q, m = normal(4, 3, seed=2), torch.zeros(4, 3).double()
    for t, (grad, seen) in enumerate(zip(grads, path, strict=True), start=1):
        m = 0.9 * m + 0.1 * grad
        q = q - 0.1 * m / (1 - 0.9**t)
        close(seen, q, 1e-12)


def test_a_constant_diagonal_makes_it_gradient_descent():
    """In the identity basis GN sees 1 everywhere, whatever lies off the diagonal."""
    correlated = 0.7 * torch.ones(5, 5).double() + 0.3 * torch.eye(5).double()
    factor = torch.linalg.cholesky(correlated)
    vectors = [5**0.5 * column for column in factor.T]
    for power in (0.5, 1.0):
        p = parameter(normal(5, seed=2))
        options = {"curvature": "gauss_newton", "power": power, "damping": 0.0, "betas": (0, 0.9)}
        optimizer = Diagonal([p], lr=0.1, update_every=1, **options)
        q = p.detach().clone()
        for _ in range(8):
            grad = correlated @ (p.detach() - 1.0)
            walk(optimizer, p, [grad], [vectors])
            q = q - 0.1 * correlated @ (q - 1.0)
            close(p.detach(), q)


# ---- scales


@every_source
@pytest.mark.parametrize("basis", ["identity", "kronecker", "given"])
def test_the_scale_of_the_loss(source, basis):
    """s L: Adam and GN^-1 make the same steps, GN^-1/2 sqrt(s) times as long ones."""
    s, paths = 16.0, []
    own = orthogonal(9, 1) if basis == "given" else basis
    for scale in (1.0, s):
        p = parameter(torch.zeros(3, 3))
        options = {"damping": 0.0, "eps": 0.0, "update_every": 2, **SOURCES[source]}
        optimizer = Diagonal([p], lr=0.1, basis=own, **options)
        grads = [scale * normal(3, 3, seed=i).float() for i in range(9)]
        vectors = [[scale**0.5 * normal(3, 3, seed=50 + i).float()] for i in range(9)]
        paths.append(walk(optimizer, p, grads, vectors if source != "adam" else None))
    factor = s**0.5 if source == "root" else 1.0
    torch.testing.assert_close(factor * paths[0][-1], paths[1][-1], rtol=1e-4, atol=1e-5)


@every_source
def test_the_scale_of_a_feature(source):
    """z = x theta: GN^-1 moves z by the same whatever x is; the other two move it in proportion."""
    features = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    p = parameter(torch.zeros(4).double())
    optimizer = Diagonal([p], lr=0.1, update_every=1, **FRESH, **SOURCES[source])
    grads, vectors = [0.3 * features], [[0.8 * features]]
    walk(optimizer, p, grads, vectors if source != "adam" else None)
    moved = -features * p.detach()
    expected = torch.ones(4).double() if source == "newton" else features
    close(moved / moved[1], expected)


# ---- bounds


@every_source
@pytest.mark.parametrize("basis", ["identity", "kronecker", "given"])
def test_no_coordinate_moves_by_more_than_the_clip(source, basis):
    own = orthogonal(12, 1) if basis == "given" else basis
    p = parameter(normal(4, 3, seed=2))
    options = {"clip": 0.5, "update_every": 3, "betas": (0.5, 0.9), **SOURCES[source]}
    optimizer = Diagonal([p], lr=0.1, basis=own, **options)
    reached = 0
    for i in range(12):
        before = p.detach().clone()
        vectors = [[0.1 * normal(4, 3, seed=50 + i)]] if source != "adam" and i % 3 == 0 else [[]]
        walk(optimizer, p, [normal(4, 3, seed=i)], vectors)
        moved = before - p.detach()
        if basis == "given":
            moved = own.T @ moved.flatten()
        elif basis == "kronecker":
            state = optimizer.state[p]
            moved = state["b0/left_basis"].T @ moved @ state["b0/right_basis"]
        assert moved.abs().max() <= 0.05 * (1 + 1e-9)
        reached += int((moved.abs() > 0.05 * (1 - 1e-9)).sum())
    assert reached > 10


@every_source
@pytest.mark.parametrize("basis", ["identity", "kronecker", "full"])
def test_second_moments_never_become_negative(source, basis):
    """Nor do they when they are carried from one basis to the next, in float32."""
    shapes = ((6, 6), (4, 7), (5,)) if basis != "full" else ((3, 2), (5,))
    params = make_params(shapes, dtype=torch.float32)
    optimizer = Diagonal(params, lr=0.01, basis=basis, update_every=2, **SOURCES[source])
    for step in range(20):
        if source != "adam" and step % 2 == 0:
            with optimizer.curvature():
                for p, h in zip(params, make_grads(params, 100 + step), strict=True):
                    p.grad = h
        train(optimizer, params, range(step, step + 1))
    for p in params:
        found = [v for k, v in optimizer.state[p].items() if k.endswith(("diagonal", "_sq"))]
        assert found and all((v >= 0).all() and v.isfinite().all() for v in found)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_negative_estimates_of_a_diagonal_count_as_zero(power):
    p = parameter(torch.zeros(4).double())
    options = {"curvature": "hutchinson", "power": power, "damping": 0.25, "betas": (0.0, 0.0)}
    optimizer = Diagonal([p], lr=1.0, **options)
    walk(
        optimizer, p, [torch.ones(4).double()], [[torch.tensor([-3.0, -1e-3, 0.0, 0.75]).double()]]
    )
    close(-p.detach(), torch.tensor([4.0, 4.0, 4.0, 1.0]).double() ** power)


def test_without_any_curvature_in_a_direction_nothing_moves_along_it():
    """No damping and D = 0: 0 times infinity is no step."""
    p = parameter(torch.zeros(3))
    options = {"curvature": "gauss_newton", "power": 1.0, **FRESH}
    optimizer = Diagonal([p], lr=1.0, **options)
    walk(optimizer, p, [torch.tensor([1.0, 2.0, 3.0])], [[torch.tensor([1.0, 0.0, 2.0])]])
    close(-p.detach(), torch.tensor([1.0, 0.0, 0.75]))
