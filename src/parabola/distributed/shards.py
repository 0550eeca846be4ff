# SPDX-License-Identifier: Apache-2.0
"""Parameters of which every rank holds a box: sums over all of it, and what lies near the cuts.

Methods of linear cost work on the boxes where they are. What they need from others is small: sums
over whole parameters, and a few elements on the far side of each cut. Ranks take part in every
collective, whether they hold anything or not.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parabola.distributed.halos import FLOAT64, Edges, distinct, edges
from parabola.distributed.mail import gather
from parabola.geometry import Box

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Halos(NamedTuple):
    """The cuts of all members of a run together: int64 on the run's device.

    Attributes:
        picks: For every member the elements, of its flattened box, that are read.
        rows: The same as rows of the run, all members one after another.
        given: Which of them are sent, by receiving rank.
        sends: How many to each rank.
        fetched: Slots that are received, by sending rank.
        receives: How many from each rank.
        own: ``(2, k)``: slots, and which of the picked elements fill them.
        targets: ``(2, k)``: slots, and the rows that they stand for, in ascending order.
        breaks: For k = 1..b the slots whose k-th successor is not in their chain, or patch.
        slots: Slots of each member, on the host.
        cut: Whether anything travels between any two ranks.
    """

    picks: list[Tensor]
    rows: Tensor
    given: Tensor
    sends: list[int]
    fetched: Tensor
    receives: list[int]
    own: Tensor
    targets: Tensor
    breaks: list[Tensor]
    slots: Tensor
    cut: bool


def _join(found: Sequence[Edges], sizes: Sequence[int], world: int, device: torch.device) -> Halos:
    """Put the edges of the members of a run together; ``sizes`` are those of this rank's boxes."""
    slots = [e.slots for e in found]
    picks = [torch.cat([e.given[0], e.own[1]]) for e in found]
    given = [torch.arange(e.given.shape[1], device="cpu") for e in found]
    own = [
        torch.arange(e.given.shape[1], len(x), device="cpu")
        for e, x in zip(found, picks, strict=True)
    ]
    counts = list(map(len, picks))
    to = torch.cat([e.given[1] for e in found])
    source = torch.cat([e.fetched[1] for e in found])
    own_pairs = [_joined([e.own[0] for e in found], slots), _joined(own, counts)]
    targets = [
        _joined([e.targets[0] for e in found], slots),
        _joined([e.targets[1] for e in found], sizes),
    ]
    breaks = [_joined(parts, slots) for parts in zip(*(e.breaks for e in found), strict=True)]
    fetched = _joined([e.fetched[0] for e in found], slots)
    return Halos(
        [x.to(device) for x in picks],
        _joined(picks, sizes).to(device),
        _joined(given, counts)[to.argsort(stable=True)].to(device),
        torch.bincount(to, minlength=world).tolist(),
        fetched[source.argsort(stable=True)].to(device),
        torch.bincount(source, minlength=world).tolist(),
        torch.stack(own_pairs).to(device),
        torch.stack(targets).to(device),
        [x.to(device) for x in breaks],
        torch.tensor(slots, device="cpu"),
        any(e.cut for e in found),
    )


def _joined(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Positions in parts, as positions in all parts one after another, of so many elements each."""
    return torch.cat(
        [x + start for x, start in zip(parts, accumulate(counts, initial=0), strict=False)]
    )


class Shards:
    """What the ranks of a group hold of the members of a run.

    Attributes:
        group: The ranks among which the parameters are sharded.
        shapes: Of the whole parameters, one a member.
        boxes: For every member what each rank of the group holds; boxes are distinct, and make up
            the parameter, or equal: replicas, of which the first one counts.
    """

    def __init__(
        self,
        group: "ProcessGroup",
        shapes: Sequence[tuple[int, ...]],
        boxes: Sequence[Sequence[Box]],
    ) -> None:
        self.group = group
        self.shapes = [tuple(shape) for shape in shapes]
        self.boxes = [list(own) for own in boxes]
        self._sent = [0]  # shared with the selections of this one
        self._halos: dict[tuple[object, ...], Halos] = {}

    def select(self, members: Iterable[int]) -> "Shards":
        """The same for some of the members."""
        chosen = list(members)
        found = Shards(
            self.group, [self.shapes[i] for i in chosen], [self.boxes[i] for i in chosen]
        )
        found._sent = self._sent
        return found

    @cached_property
    def rank(self) -> int:
        """Of this process within the group."""
        return dist.get_rank(self.group)

    @cached_property
    def world(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each whole parameter."""
        return [prod(shape) for shape in self.shapes]

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far, one copy to each receiver."""
        return self._sent[0]

    @cached_property
    def _counts(self) -> Tensor:
        """Whose sums count, ``(ranks, members)`` bool: the first holder's of every box."""
        found = torch.zeros(self.world, len(self.boxes), dtype=torch.bool, device="cpu")
        for i, boxes in enumerate(self.boxes):
            found[[ranks[0] for ranks in distinct(boxes).values()], i] = True
        return found

    def total(self, x: Tensor) -> Tensor:
        """Sums over whole parameters.

        Args:
            x: ``(members, ...)``, the sums over what this rank holds.

        Returns:
            The same shape, in float64; the same bits on every rank. One collective.
        """
        return totals([(self, x)])[0]

    def halos(self, chains: Sequence[int], band: int, device: torch.device) -> Halos:
        """What crosses the cuts of chains.

        Args:
            chains: Elements of one chain of each member, counted over the whole parameter.
            band: How far they are coupled.
            device: Of the run.
        """
        key = (tuple(chains), band, device)
        if key not in self._halos:
            members = zip(self.shapes, self.boxes, chains, strict=True)
            found = [edges(*member, band, self.rank) for member in members]
            sizes = [boxes[self.rank].numel for boxes in self.boxes]
            self._halos[key] = _join(found, sizes, self.world, device)
        return self._halos[key]

    def patches(self, halos: Halos, picked: Tensor) -> Tensor:
        """Fill the patches around cuts, of several tensors at once.

        Args:
            halos: Of this run.
            picked: ``(fields, k)``: the elements that `Halos.picks` names, of each tensor.

        Returns:
            ``(fields, slots)``, zero beyond the ends of chains. One collective if anything travels
            between any two ranks, else none.
        """
        filled = picked.new_zeros(len(picked), int(halos.slots.sum()))
        slots, own = halos.own
        filled[:, slots] = picked.index_select(1, own)
        if halos.cut:
            out = picked.index_select(1, halos.given).T.contiguous()
            into = picked.new_empty(len(halos.fetched), len(picked))
            dist.all_to_all_single(into, out, halos.receives, halos.sends, group=self.group)
            filled[:, halos.fetched] = into.T
            self._sent[0] += out.numel() * out.element_size()
        return filled


def totals(parts: Sequence[tuple[Shards, Tensor]]) -> list[Tensor]:
    """`Shards.total` of several runs, by one collective for each of their groups and devices."""
    found: list[Tensor | None] = [None] * len(parts)
    together: dict[tuple[int, torch.device], list[int]] = {}
    for i, (shards, x) in enumerate(parts):
        together.setdefault((id(shards.group), x.device), []).append(i)
    for chosen in together.values():
        first = parts[chosen[0]][0]
        rows = [parts[i][1].double().reshape(len(parts[i][1]), -1) for i in chosen]
        gathered = _gathered(first, torch.cat([x.flatten() for x in rows]))
        pieces = torch.split(gathered, [x.numel() for x in rows], dim=1)
        for i, x, piece in zip(chosen, rows, pieces, strict=True):
            shards, given = parts[i]
            counts = shards._counts.to(x.device).unsqueeze(2)
            terms = torch.where(counts, piece.view(-1, *x.shape), 0.0)
            found[i] = terms.sum(0).view(given.shape)
    return [x for x in found if x is not None]


def _gathered(shards: Shards, x: Tensor) -> Tensor:
    """Every rank's own ``(n,)`` numbers, ``(ranks, n)``."""
    shards._sent[0] += FLOAT64 * len(x) * (shards.world - 1)
    return gather(x, shards.group)
