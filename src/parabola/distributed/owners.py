# SPDX-License-Identifier: Apache-2.0
"""A step of several processes: gradients to the owners of blocks, directions back to everybody.

One collective each way. The first one also carries what every rank has seen (a NaN, a missing
gradient, an error of its own), so that all of them decide alike before any state has changed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parabola.blocks import Bucket, state_dtype
from parabola.curvature.feed import Vector
from parabola.distributed import header
from parabola.distributed.consolidate import consolidate
from parabola.distributed.division import Division, Held, divide
from parabola.distributed.exchange import Intake, Local, Verdict, coupled, move
from parabola.distributed.mail import Mail, Piece
from parabola.distributed.shards import Shards
from parabola.distributed.survey import survey
from parabola.distributed.transfers import Transfer
from parabola.geometry import local, local_box
from parabola.method import Method, Options
from parabola.tiles import Share
from parabola.treatment import Roster, local_share, roster, signature, wanted


class Owners(Local):
    """The exchange of a process group in which blocks have owners.

    Args:
        method: What is done with the parameters.
        groups: The parameter groups.
        ranks: The process group.
        state: The state of the optimizer: who holds a block of it owns the block.

    Raises:
        ValueError: on every rank, where they do not agree on the model or its options.
    """

    alone = False

    def __init__(
        self,
        method: Method,
        groups: Sequence[Mapping[str, Any]],
        ranks: "dist.ProcessGroup",
        state: Mapping[Tensor, Any],
    ) -> None:
        super().__init__()
        self._method, self._ranks = method, ranks
        self._rank, self._world = dist.get_rank(ranks), dist.group.WORLD
        self._terms = [_terms(method, group) for group in groups]
        self._rosters = [roster(method, group) for group in groups]
        self._params = [[local(p) for p in found.params] for found in self._rosters]
        self._boxes = [[local_box(p) for p in found.params] for found in self._rosters]
        self._held, known = survey(groups, self._rosters, state, ranks)
        self._shards: dict[tuple[int, ...], Shards] = {}
        size = dist.get_world_size(ranks)
        self.division = divide(method, groups, self._rosters, self._held, size, known)
        fed = zip(self.division.units, self.division.fed, strict=True)
        if any(needed and coupled(groups[unit.group]) for unit, needed in fed):
            # The owner of a block would take the decayed gradient for a missing curvature vector.
            raise ValueError(
                "Invalid decoupled value: False with weight_decay and curvature from outside, with "
                "several processes; allowed for decoupled there: True"
            )
        self._inward = _sorted(self.division.inward, self._rank)
        self._outward = _sorted(self.division.outward, self._rank)
        self._stand_ins = list(map(self._stand_in, range(len(self.division.units))))
        self._mails: dict[int | None, Mail] = {}
        self._failed = False
        self._intakes: Sequence[Intake] = []
        self._verdicts: list[Verdict] = []
        self._sent_before = 0
        self._ready: dict[int, Tensor] = {}

    def serves(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """As long as parameters, treatment and processes are the same."""
        return (
            dist.is_initialized()
            and self._world is dist.group.WORLD
            and len(groups) == len(self._terms)
            and all(
                all(map(is_, params, group["params"])) and terms == _terms(self._method, group)[1]
                for group, (params, terms) in zip(groups, self._terms, strict=True)
            )
        )

    def group_for(self, ranks: Sequence[int]) -> "dist.ProcessGroup | None":
        """This process group, if it is alive and of these global ranks."""
        alive = self._world is dist.group.WORLD
        same = alive and dist.get_process_group_ranks(self._ranks) == list(ranks)
        return self._ranks if same else None

    def divided(self) -> tuple[Division, Held]:
        """The division, and the boxes behind it."""
        return self.division, self._held

    def shares(self, index: int, roster: Roster) -> list[Share]:
        """Runs as they lie here; of blocks all, with a stand-in for each logical part."""
        numbered = enumerate(self.division.units)
        units = {(u.slot, u.first): i for i, u in numbered if u.group == index}
        found = []
        for slot, (p, route) in enumerate(zip(roster.params, roster.routes, strict=True)):
            for tile, first in route.placed:
                if (slot, first) not in units or not tile.block.shape:
                    found.append(local_share(slot, p, tile, first))
                    continue
                for _ in range(tile.parts):
                    i = units[slot, first]
                    own, mine = self.division.tiles[i], self.division.owners[i] == self._rank
                    found.append(Share(slot, self._stand_ins[i], own, first, mine))
                    first += own.rows
        return found

    def shards(self, index: int, slots: Sequence[int]) -> Shards:
        """The boxes of these parameters on all ranks; what is sent for them counts here too."""
        key, params = (index, *slots), self._rosters[index].params
        if key not in self._shards:
            self._shards[key] = Shards(
                self._ranks,
                [tuple(params[slot].shape) for slot in slots],
                [self._held[index][slot] for slot in slots],
            )
        return self._shards[key]

    @contextmanager
    def telling(self, vectors: Callable[[], int] | None) -> Iterator[None]:
        """An error inside is told to the other ranks, in the collective that they wait in."""
        try:
            yield
        except Exception:
            failed = torch.ones(self.division.header, dtype=torch.uint8, device="cpu")
            if vectors is not None:
                self._mail(vectors()).post(failed, [])
            elif self.division.returns:
                self._mail(None).post(failed[:1], [])
            else:
                self._failed = True  # told when the next step begins
            raise

    def open(self, intakes: Sequence[Intake], vectors: Sequence[Vector]) -> list[Verdict]:
        """Exchange what every rank has seen, and the gradients of the blocks.

        Raises:
            RuntimeError: another rank reported an error; nothing has changed then.
        """
        if self._failed:
            with self.telling(lambda: len(vectors)):
                raise RuntimeError("this rank raised an error in the step before: start anew")
        super().open(intakes, vectors)
        self._intakes = intakes
        self._params = [list(map(local, found.params)) for found in self._rosters]
        division, mail = self.division, self._mail(len(vectors))
        leaving, coming, staying = self._inward
        pieces = [piece for t in leaving for piece in self._pieces(t, len(vectors))]
        headers, received = mail.post(header.write(intakes), pieces)
        self.sent = mail.sent
        header.refuse_errors(headers, self._rank, "nothing was changed")
        self._verdicts = list(header.read(intakes, headers))
        arrived: dict[int, list[tuple[Transfer, list[Tensor]]]] = {}
        found = iter(received)
        for t in coming:
            tensors = [next(found) for _ in range(division.count(t, len(vectors)))]
            arrived.setdefault(t.unit, []).append((t, tensors))
        for t in staying:
            arrived.setdefault(t.unit, []).append((t, self._pieces(t, len(vectors))))
        for i, parts in arrived.items():
            key, index = id(self._stand_ins[i]), division.units[i].group
            for vector in range(len(parts[0][1])):
                whole = self._joined(i, [(t, tensors[vector]) for t, tensors in parts])
                self._spreads[index][vector].parts[key] = whole
        self._sent_before = sum(shards.sent for shards in self._shards.values())
        return self._verdicts

    def collect(self, bucket: Bucket, grads: Sequence[Tensor], options: Options) -> Tensor:
        """The stack of gradients; coupled decay was added to those of blocks where they lay."""
        if not bucket.block.shape:
            return super().collect(bucket, grads, options)
        g = bucket.gather(grads)
        return g.neg_() if options["maximize"] and not coupled(options) else g

    def deliver(self, bucket: Bucket, d: Tensor, options: Options) -> None:
        """Runs move at once; directions of blocks wait until all are there."""
        if not bucket.block.shape:
            super().deliver(bucket, d, options)
            return
        for member, value in zip(bucket.members, bucket.scatter(d)[1], strict=True):
            self._ready[id(member.param)] = value

    def close(self, failed: bool) -> bool:
        """Send the directions back, and move all that lies here.

        Raises:
            RuntimeError: another rank reported an error; what has an owner has not moved then.
        """
        division, received = self.division, list[Tensor]()
        leaving, coming, staying = self._outward
        if division.returns:
            mail = self._mail(None)
            told = torch.full((1,), header.FAILED * failed, dtype=torch.uint8, device="cpu")
            headers, received = mail.post(told, [self._direction(t) for t in leaving])
            self.sent += mail.sent
            header.refuse_errors(headers, self._rank, "the statistics have moved already")
            failed = bool((headers == header.FAILED).any())
        found = [*zip(coming, received, strict=True), *((t, self._direction(t)) for t in staying)]
        moved = defaultdict[int, list[tuple[Tensor, Tensor]]](list)
        for t, d in found:
            unit = division.units[t.unit]
            verdict = self._verdicts[unit.group]
            if verdict.has[unit.slot] and not verdict.bad:
                p = self._here(t, self._params)
                moved[unit.group].append((p, d.to(p.device)))
        for index, pairs in moved.items():
            params, directions = map(list, zip(*pairs, strict=True))
            move(params, directions, self._intakes[index].group)
        self.sent += sum(shards.sent for shards in self._shards.values()) - self._sent_before
        self._ready, self._intakes = {}, []
        return super().close(failed)

    def agree(self, value: float) -> float:
        """The largest of all ranks."""
        box = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._ranks)
        return float(box)

    def every(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        box = torch.tensor(flag, dtype=torch.int32, device=self._device)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self._ranks)
        return bool(box)

    def consolidate(self, state_dict: dict[str, Any], to: int | None) -> dict[str, Any] | None:
        """See `parabola.distributed.consolidate`."""
        return consolidate(state_dict, to, self._ranks)

    @property
    def _device(self) -> torch.device:
        return next((p.device for params in self._params for p in params), torch.device("cpu"))

    def _stand_in(self, i: int) -> Tensor:
        """A tensor of the shape of a unit that takes no memory."""
        unit = self.division.units[i]
        p = self._params[unit.group][unit.slot]
        return torch.zeros((), dtype=p.dtype, device=p.device).expand(unit.box.size)

    def _mail(self, vectors: int | None) -> Mail:
        """The messages with gradients and so many curvature vectors; None: with directions."""
        if vectors not in self._mails:
            division = self.division
            (leaving, coming, _), dtypes, length = self._inward, division.wires, division.header
            if vectors is None:
                (leaving, coming, _), dtypes, length = self._outward, division.dtypes, 1

            def pieces(found: list[Transfer], end: Callable[[Transfer], int]) -> list[list[Piece]]:
                messages: list[list[Piece]] = [[] for _ in division.loads]
                for t in found:
                    count = 1 if vectors is None else division.count(t, vectors)
                    messages[end(t)] += [Piece(t.box.size, dtypes[t.unit])] * count
                return messages

            self._mails[vectors] = Mail(
                self._ranks,
                pieces(leaving, lambda t: t.target),
                pieces(coming, lambda t: t.source),
                length,
                self._device,
            )
        return self._mails[vectors]

    def _here(self, t: Transfer, tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        """The piece of a transfer, of tensors that lie as the parameters do: a view."""
        unit = self.division.units[t.unit]
        return t.box.within(self._boxes[unit.group][unit.slot], tensors[unit.group][unit.slot])

    def _pieces(self, t: Transfer, vectors: int) -> list[Tensor]:
        """The gradient of a piece, with its coupled decay, and the curvature vectors."""
        unit, found = self.division.units[t.unit], []
        options, box = self._intakes[unit.group].group, self._boxes[unit.group][unit.slot]
        for vector in range(self.division.count(t, vectors)):
            x = self._spreads[unit.group][vector].pieces[unit.slot]
            if x is None:
                x = self._here(t, self._params).new_zeros(()).expand(t.box.size)
            else:
                x = t.box.within(box, x)
            if vector == 0 and coupled(options):
                p = self._here(t, self._params)
                x = x.to(state_dtype(p), copy=True)
                x = (x.neg_() if options["maximize"] else x).add_(p, alpha=options["weight_decay"])
            found.append(x)
        return found

    def _joined(self, i: int, parts: Sequence[tuple[Transfer, Tensor]]) -> Tensor:
        """A unit, put together from its pieces."""
        box = self.division.units[i].box
        if len(parts) == 1 and parts[0][0].box == box:
            return parts[0][1]
        whole = torch.empty(box.size, dtype=parts[0][1].dtype, device=self._device)
        torch._foreach_copy_([t.box.within(box, whole) for t, _ in parts], [x for _, x in parts])
        return whole

    def _direction(self, t: Transfer) -> Tensor:
        """The piece of a direction that was delivered; zeros where none was."""
        box, stand_in = self.division.units[t.unit].box, self._stand_ins[t.unit]
        return t.box.within(box, self._ready.get(id(stand_in), stand_in))


def _terms(method: Method, group: Mapping[str, Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """What of a group decides the division: its parameters, and how they are treated."""
    params = list(group["params"])
    shared = (group["decoupled"], group["distributed"], method.fed(group) and coupled(group))
    rest = (len(params), signature(method, group), *shared)
    return params, (*rest, *((wanted(p), p.dtype, p.device) for p in params))


def _sorted(
    transfers: Sequence[Transfer], rank: int
) -> tuple[list[Transfer], list[Transfer], list[Transfer]]:
    """What leaves a rank, target after target; what comes in, source after source; what stays."""
    leaving = [t for t in transfers if t.source == rank != t.target]
    coming = [t for t in transfers if t.target == rank != t.source]
    staying = [t for t in transfers if t.source == t.target == rank]
    leaving.sort(key=lambda t: t.target)
    coming.sort(key=lambda t: t.source)
    return leaving, coming, staying
