# SPDX-License-Identifier: Apache-2.0
"""Chains of local shards near their cuts: worked out in patches, with what other ranks hold.

The walk over a run of shards takes a cut for the end of a chain. Within a band of each cut its
results are wrong, and those of the patches take their place. See `parabola.distributed.halos`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.distributed.shards import Halos, Shards
from parabola.method import ChainMethod, Options


class Patches:
    """The patches of a run in one step; to be made before its state changes.

    Attributes:
        state: As the method sees it, ``(slots,)`` each.
        g: The gradient, ``(slots,)``.
    """

    def __init__(
        self,
        method: ChainMethod,
        bucket: Bucket,
        shards: Shards,
        grads: Sequence[Tensor],
        options: Options,
    ) -> None:
        chains = [member.tile.chain for member in bucket.members]
        self.halos = shards.halos(chains, method.halo(options), bucket.device)
        self._method, self._bucket, self._options = method, bucket, options
        self._directions: Tensor | None = None
        g = _gradients(bucket, grads, self.halos, options)
        picked = [x.index_select(0, self.halos.rows).to(g.dtype) for x in bucket.state.values()]
        *state, self.g = shards.patches(self.halos, torch.stack([*picked, g]))
        self.state = dict(zip(bucket.state, state, strict=True))

    def accumulate(self) -> None:
        """Take the gradient into the statistics."""
        if not len(self.g):
            return
        self._method.accumulate_chain(self.state, self.g, self.halos.breaks, self._options)
        if "exp_avg" in self.state:
            self.state["exp_avg"].lerp_(self.g, 1.0 - self._options["betas"][0])
        for name, value in self._bucket.state.items():
            self.state[name] = self.state[name].to(value.dtype).to(self.g.dtype)

    def store(self) -> None:
        """Put the statistics where the run has wrong ones: at the end, the walk needs its own."""
        if not len(self.g):
            return
        slots, rows = self.halos.targets
        for name, value in self._bucket.state.items():
            kept = self.state[name].index_select(0, slots)
            value.index_copy_(0, rows, kept.to(value.dtype))

    def direct(self, means: Tensor, correction: float) -> None:
        """Work out the directions.

        Args:
            means: Mean of ``exp_avg_sq`` over each whole parameter, ``(members,)``.
            correction: See `ChainMethod.apply_chain`.
        """
        if not len(self.g):
            return
        lengths = self.halos.slots.to(means.device)
        mean = means.repeat_interleave(lengths, output_size=len(self.g))
        m = self.state.get("exp_avg", self.g)
        u = self._method.apply_chain(self.state, m, mean, correction, self._options)
        self._directions = u.index_select(0, self.halos.targets[0])

    def mend(self, u: Tensor, start: int) -> None:
        """Put directions where those of the run are wrong: ``u`` begins at its row ``start``."""
        if not len(self.g):
            return
        key, memo = ("mended", start, len(u)), self._bucket.memo
        if key not in memo:
            rows = self.halos.targets[1].cpu()
            edges = torch.tensor([start, start + len(u)], device="cpu")
            low, high = torch.searchsorted(rows, edges).tolist()
            memo[key] = slice(low, high), (rows[low:high] - start).to(u.device)
        own, at = memo[key]
        assert self._directions is not None
        u.index_copy_(0, at, self._directions[own])


def needed(method: ChainMethod, bucket: Bucket, shards: Shards, options: Options) -> bool:
    """Whether this rank has patches, or others have and may want to hear from it."""
    if not method.halo(options):
        return False
    chains = [member.tile.chain for member in bucket.members]
    found = shards.halos(chains, method.halo(options), bucket.device)
    return found.cut or bool(found.slots.any())


def _gradients(bucket: Bucket, grads: Sequence[Tensor], halos: Halos, options: Options) -> Tensor:
    """The picked elements of all gradients as they enter the step, in the dtype of all arithmetic.

    With their sign and the coupled decay, as `parabola.distributed.Exchange.collect` has it.
    """

    def picked(tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(tensors, halos.picks, strict=True)
        found = [x.reshape(-1).index_select(0, at) for x, at in pairs if len(at)]
        nothing = torch.empty(0, dtype=bucket.dtype, device=bucket.device)
        return torch.cat([nothing, *(x.to(bucket.dtype) for x in found)])

    g = picked(grads)
    if options["maximize"]:
        g.neg_()
    if options["weight_decay"] and not options["decoupled"]:
        g.add_(picked(bucket.params), alpha=options["weight_decay"])
    return g
