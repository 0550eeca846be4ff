# SPDX-License-Identifier: Apache-2.0
"""A user's module as a function of its trainable parameters, that leaves no trace.

Buffers are copied for every call and the random state comes back after it, so that the statistics
of BatchNorm and the stream of dropout masks in training go on as if nothing had happened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = Tensor | tuple[Any, ...]
Named = dict[str, Tensor]


class Functional:
    """A module with its trainable parameters taken out.

    Args:
        model: Returns one tensor.
        inputs: Its argument, or a tuple of arguments.

    Attributes:
        params: The parameters that require gradients, detached, in the module's order.
        inputs: A tuple.

    Raises:
        ValueError: no parameter of the model requires gradients.
    """

    def __init__(self, model: Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        named = dict(model.named_parameters())
        self.params: Named = {k: p.detach() for k, p in named.items() if p.requires_grad}
        if not self.params:
            raise ValueError(
                "Invalid model: no parameter requires gradients (allowed: at least one)"
            )
        self._frozen = {k: p.detach() for k, p in named.items() if not p.requires_grad}

    def __call__(self, params: Named, inputs: tuple[Any, ...] | None = None) -> Tensor:
        """What the model returns for these parameters; call it inside `untouched`."""
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        state = {**self._frozen, **buffers, **params}
        outputs = functional_call(self.model, state, self.inputs if inputs is None else inputs)
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"Invalid model: it returns {type(outputs).__name__} (allowed: one tensor)"
            )
        return outputs

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Every such block starts from one random state: the masks of two of them are equal.

        Attention is taken apart into plain products, which unlike its fused kernels can be
        differentiated twice.
        """
        devices = {p.device for p in self.params.values() if p.device.type != "cpu"}
        kind = next((d.type for d in devices), "cuda")
        with (
            torch.random.fork_rng(devices=list(devices), device_type=kind),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield

    def rows(self) -> int:
        """Length of the batch, if every sample can be looked at by itself.

        Raises:
            ValueError: BatchNorm mixes the samples, or the inputs are no batches of equal length.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                raise ValueError(
                    f"Invalid model for a method of single samples: {name} takes the statistics of "
                    "the batch (allowed: BatchNorm with running statistics after model.eval())"
                )
        lengths = {x.shape[:1] for x in self.inputs if isinstance(x, Tensor)}
        if len(lengths) != 1 or not all(isinstance(x, Tensor) for x in self.inputs):
            raise ValueError(
                "Invalid inputs for a method of single samples: "
                f"{[tuple(x.shape) if isinstance(x, Tensor) else x for x in self.inputs]} "
                "(allowed: tensors that share their first axis)"
            )
        (length,) = lengths
        return length[0] if length else 0
