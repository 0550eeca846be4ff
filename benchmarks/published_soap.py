# SPDX-License-Identifier: Apache-2.0
"""SOAP as its authors published it (arXiv:2409.11321), for `step_cost.py`: their scheme.

A loop over parameters. Every step rotates the gradient into the basis and the direction back, and
takes the first moment out of the basis and in again, because the basis may have changed between:
with the statistics 10 mn(m + n) floating point operations for an m x n matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class PublishedSOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's factors, refreshed by one QR every `every` steps."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        every: int = 10,
        longest: int = 1024,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "every": every, "longest": longest}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self._step(p, p.grad, self.state[p], group)

    def _step(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        beta1, beta2 = group["betas"]
        matrices = p.dim() > 1
        rotated = [matrices and d <= group["longest"] for d in p.shape]
        if not state:
            state["t"] = 0
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            state["gg"] = [
                torch.zeros(d, d) if r else None for d, r in zip(p.shape, rotated, strict=True)
            ]
            self._statistics(g, state, beta2)
            state["q"] = [None if s is None else torch.linalg.eigh(s)[1] for s in state["gg"]]
            return
        state["t"] += 1
        x = self._rotate(g, state["q"], back=False)
        state["m"].lerp_(x, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(x, x, value=1 - beta2)
        rate = group["lr"] * (1 - beta2 ** state["t"]) ** 0.5 / (1 - beta1 ** state["t"])
        d = state["m"] / (state["v"].sqrt() + group["eps"])
        p.add_(self._rotate(d, state["q"], back=True), alpha=-rate)
        m = self._rotate(state["m"], state["q"], back=True)
        self._statistics(g, state, beta2)
        if state["t"] % group["every"] == 0:
            self._refresh(state)
        state["m"] = self._rotate(m, state["q"], back=False)

    @staticmethod
    def _rotate(x: Tensor, bases: list, *, back: bool) -> Tensor:
        for q in bases:  # each product moves the first axis to the end
            if q is None:
                x = x.permute(*range(1, x.dim()), 0)
            else:
                x = torch.tensordot(x, q, dims=([0], [1 if back else 0]))
        return x

    @staticmethod
    def _statistics(g: Tensor, state: dict, beta2: float) -> None:
        for axis, s in enumerate(state["gg"]):
            if s is not None:
                others = [i for i in range(g.dim()) if i != axis]
                s.lerp_(torch.tensordot(g, g, dims=(others, others)), 1 - beta2)

    @staticmethod
    def _refresh(state: dict) -> None:
        for axis, (s, q) in enumerate(zip(state["gg"], state["q"], strict=True)):
            if s is None:
                continue
            product = s @ q
            order = (q * product).sum(0).argsort(descending=True)
            state["v"] = state["v"].index_select(axis, order)
            state["q"][axis] = torch.linalg.qr(product[:, order])[0]
