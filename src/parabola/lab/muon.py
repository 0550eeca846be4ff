# SPDX-License-Identifier: Apache-2.0
"""Muon on the hidden weights and AdamW on everything else, as one optimizer (Jordan et al. 2024).

`torch.optim.Muon` takes 2-D tensors only, and its authors advise AdamW for embeddings, the output
layer, norms and biases. The class here holds both, so that learning-rate schedules, checkpoints and
the lab see a single optimizer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def hidden_weights(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], set[str]]:
    """Split a model's parameters by the custom of Muon.

    Returns:
        The named hidden weights (those with two axes or more, outside embeddings and outside the
        output layer, which is the last such weight of the model), and the names of all other
        parameters.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [(name, p) for name, p in named if p.ndim >= 2 and id(p) not in embeddings][:-1]
    return weights, {name for name, _ in named} - {name for name, _ in weights}


class MuonWithAdamW(Optimizer):
    """One optimizer out of `torch.optim.Muon` and `torch.optim.AdamW`.

    Both parts share this object's state and parameter groups, so its state_dict is complete and a
    schedule that writes ``group["lr"]`` here reaches them. A convolution is given to Muon as a
    matrix (out, in * h * w) that shares its memory.

    Args:
        hidden: Named weights for Muon, two axes or more, contiguous.
        muon_options: Keyword options of `torch.optim.Muon`.
        others: Named parameter groups for AdamW.
        adamw_options: Keyword options of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        hidden: list[tuple[str, nn.Parameter]],
        muon_options: Mapping[str, Any],
        others: list[dict[str, Any]],
        adamw_options: Mapping[str, Any],
    ) -> None:
        self.weights = [p for _, p in hidden]
        self.matrices = [
            p if p.ndim == 2 else nn.Parameter(p.detach().view(len(p), -1)) for p in self.weights
        ]
        self.parts: list[Optimizer] = []
        if hidden:
            named = [(name, m) for (name, _), m in zip(hidden, self.matrices, strict=True)]
            self.parts.append(
                torch.optim.Muon(named, adjust_lr_fn="match_rms_adamw", **muon_options)
            )
        if others:
            self.parts.append(torch.optim.AdamW(others, fused=True, **adamw_options))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both parts."""
        super().load_state_dict(state_dict)
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, the convolutions' own tensors included."""
        super().zero_grad(set_to_none)
        for weight in self.weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if matrix is not weight:
                gradient: Tensor | None = weight.grad
                matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)
        for part in self.parts:
            part.step()
        return loss
