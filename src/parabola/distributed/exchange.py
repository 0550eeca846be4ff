# SPDX-License-Identifier: Apache-2.0
"""How gradients reach the blocks, and how directions come back to the parameters.

The engine asks an `Exchange` two questions about every bucket, and never how many processes there
are. `Local` is the answer of a single process: gather and scatter in memory.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.method import Options


class Exchange(Protocol):
    """The two questions."""

    def collect(self, bucket: Bucket, grads: Sequence[Tensor], options: Options) -> Tensor:
        """The gradients of a bucket's parameters as its stack ``(n, *block)``."""
        ...

    def deliver(self, bucket: Bucket, d: Tensor, options: Options) -> None:
        """Move the parameters of a bucket along its directions ``(n, *block)``."""
        ...

    def agree(self, value: float) -> float:
        """One value for all processes, where each has measured its own."""
        ...


class Local:
    """Everything in this process."""

    def collect(self, bucket: Bucket, grads: Sequence[Tensor], options: Options) -> Tensor:
        """The stack of gradients: sign for ``maximize``, plus the coupled decay. Copies."""
        g = bucket.gather(grads)
        if options["maximize"]:
            g.neg_()
        if options["weight_decay"] and not options["decoupled"]:
            bucket.add(g, bucket.params, alpha=options["weight_decay"])
        return g

    def agree(self, value: float) -> float:
        """The value itself."""
        return value

    def deliver(self, bucket: Bucket, d: Tensor, options: Options) -> None:
        """``p <- p - lr (d + weight_decay p)``; ``d`` is used up.

        The bracket is formed in the state's dtype and rounded once, into the parameter: in
        bfloat16 a decay factor of ``1 - 1e-5`` on its own would round to 1.
        """
        lr, params, values = options["lr"], *bucket.scatter(d)
        if options["weight_decay"] and options["decoupled"]:
            torch._foreach_add_(values, params, alpha=options["weight_decay"])
        if isinstance(lr, Tensor):
            torch._foreach_mul_(values, lr.to(d.device, d.dtype).reshape(()))
            lr = 1.0
        torch._foreach_add_(params, values, alpha=-lr)
