# SPDX-License-Identifier: Apache-2.0
"""What surrounds the step: parameter groups, state dicts, plans, counters."""

import copy
from collections import defaultdict
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from parabola import faults, metrics
from parabola.curvature.feed import Feed
from parabola.distributed import Exchange, Local, connect
from parabola.distributed.forecast import Rank, forecast, simulate
from parabola.distributed.ranks import participants
from parabola.geometry import is_sharded
from parabola.layout import Layout
from parabola.method import Method
from parabola.options import frozen, validate
from parabola.plan import Plan, plan_groups
from parabola.treatment import entries, routes_of


class Stateful(Optimizer):
    """An optimizer but for its step.

    Attributes:
        method: The method, a set of pure functions.
        stats: Counters as plain numbers: ``steps`` in which something was stepped;
            ``skipped_steps`` of a parameter group, for ``nonfinite_gradients`` of parameters;
            ``refreshes`` of factors, of which ``root_retries`` climbed the numerical fallback chain
            and ``root_failures`` kept the old root; ``fallbacks`` of factors to the graft's step;
            ``stalls`` where a step waited for a result of the host threads, ``stall_seconds`` in
            all, ``skipped_refreshes`` that were due while the last one was under way,
            ``worker_deaths`` of host threads at work, ``timeouts`` of their jobs;
            ``curvature_vectors`` given, ``nonfinite_curvature`` of them dropped,
            ``missing_curvature`` where the gradient stood in, for each bucket and step;
            ``idle_curvature`` blocks of an optimizer that takes none.
    """

    method: ClassVar[Method]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._layouts: dict[int, Layout] = {}
        self._checked: dict[int, list[Any]] = {}
        self._exchange: Exchange = Local()
        self._feed = Feed()
        self.stats = faults.new_stats()
        validate(defaults, self.method.checks)
        super().__init__(params, defaults)

    def _connected(self) -> Exchange:
        """Who takes part in a step."""
        if not self._exchange.serves(self.param_groups):
            self._exchange = connect(self.method, self.param_groups, self.state, self._exchange)
        return self._exchange

    def _clock(self) -> int:
        """Steps taken so far, by the parameter that took most."""
        if len(self._layouts) == len(self.param_groups):
            return max(layout.taken for layout in self._layouts.values())
        params = (p for group in self.param_groups for p in group["params"] if p in self.state)
        return int(max((float(self.state[p].get("step", 0)) for p in params), default=0.0))

    def _check(self, index: int, group: dict[str, Any]) -> None:
        """Validate keywords that have changed since the last step; the learning rate may be any."""
        values = [frozen(group[key]) for key in self.defaults if key != "lr"]
        if values != self._checked.get(index):
            validate(group, self.method.checks)
            self.method.check(group)
            self._checked[index] = values

    def _layout(self, index: int, group: dict[str, Any]) -> Layout:
        layout, exchange = self._layouts.get(index), self._exchange
        if layout is None or not layout.fits(group, self.state, exchange):
            layout = Layout(self.method, index, group, self.state, exchange, layout)
            self._layouts[index] = layout
        return layout

    def metrics(self) -> dict[str, float]:
        """How old and how good the roots in use are, as a flat dictionary for any logger.

        Returns:
            For every factor of every block, such as ``"fc.weight/b0/left"``: ``.../age``, steps
            since the snapshot of the statistics behind the root in use, once there is one;
            ``.../residual``, how far that root is from its matrix, where the method says it;
            ``.../failures``, failed refreshes in a row. Over all of them ``age_max``, ``age_mean``,
            ``factors``, ``factors_without_root`` and ``jobs_in_flight`` (snapshots whose result is
            not in use yet), and ``stalls``, ``stall_seconds`` and ``skipped_refreshes`` of
            ``stats``.
        """
        return metrics.metrics(self.method, self.param_groups, self._layouts, self.stats)

    def state_dict(self) -> dict[str, Any]:
        """The state, as in torch.optim; waits for the jobs of host threads that are in flight.

        With several processes it holds what this one has: ``torch.distributed.checkpoint`` puts the
        parts together, and so does `consolidate`.
        """
        self._land()
        return super().state_dict()

    def consolidate(self, to: int | None = 0) -> dict[str, Any] | None:
        """The complete state of all processes, on the host; a collective call.

        Args:
            to: The rank that receives it; None: all of them.

        Returns:
            A state dict that any number of processes can load; None on the other ranks.
        """
        return self._connected().consolidate(self.state_dict(), to)

    def _land(self) -> None:
        """Bring the results of jobs in flight into the state."""
        for index, layout in list(self._layouts.items()):
            if any(bucket.tickets for bucket in layout.buckets):
                group = self.param_groups[index]
                # Other parameters, such as a frozen one less, are divided anew by the next step, by
                # all processes together: until then everything lies where it lay.
                current = self._exchange.serves(self.param_groups)
                (self._layout(index, group) if current else layout).land(group)

    def plan(self, vectors: int = 0) -> Plan:
        """What every parameter gets, why, and what it costs; ``print(opt.plan())`` is a table.

        With several processes it tells what each of them does; of parameters that are sharded only
        after the first step, in which the processes learn of each other. No collective call.

        Args:
            vectors: How many curvature vectors come into the step whose messages are counted.
        """
        return plan_groups(self.method, self.param_groups, self._ranks(vectors))

    def _ranks(self, vectors: int) -> tuple[Rank, ...]:
        """What every process of this run does; nothing where only a step would tell."""
        groups, divided = self.param_groups, self._exchange.divided()
        if divided is not None and self._exchange.serves(groups):
            division, held = divided
            return forecast(self.method, groups, held, division, vectors)
        ranks = participants(groups)
        if any(is_sharded(p) for group in groups for p in group["params"]) and ranks:
            return ()
        return simulate(self.method, groups, replicas=max(len(ranks), 1), vectors=vectors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, at any time; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: a keyword has a wrong value, or a parameter is complex; the optimizer is
                unchanged then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate(group, self.method.checks)
            self.method.check(group)
            for route in routes_of(self.method, group):  # refuse what does not fit a shape
                for tile in route.tiles:
                    entries(self.method, tile.block, group)
            for p in group["params"]:
                if p.is_complex():
                    raise ValueError(
                        f"parabola optimizers do not support complex parameters, got {p.dtype}; "
                        "allowed: real dtypes (optimize torch.view_as_real of it)"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every state tensor keeps the dtype that it was saved in.

        torch casts floating state to the parameter's dtype, which would round float32 statistics
        of a bfloat16 model; here the saved tensors themselves are copied back. ``distributed``
        stays what it is: it belongs to the job, not to the run. A collective call where there are
        several processes.

        Raises:
            ValueError: on every rank, where one lacks the state of something that it steps.
        """
        modes = [group["distributed"] for group in self.param_groups]
        raw: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, given: raw.update(given))
        after = self.register_load_state_dict_post_hook(
            lambda optimizer: _restore(optimizer, raw), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        for group, mode in zip(self.param_groups, modes, strict=True):
            group["distributed"] = mode
        # Who loads nothing, as wrappers do to move state that is not there yet, is not compared.
        if self.state and not self._connected().alone:
            self._take_own()

    def _take_own(self) -> None:
        """Build the layouts of loaded state now: all processes learn whether theirs is there."""
        error: Exception | None = None
        try:
            for index, group in enumerate(self.param_groups):
                if any(p in self.state for p in group["params"]):
                    self._layout(index, group)
        except Exception as e:  # whatever it is: the others must not wait for this rank
            error = e
        if not self._exchange.every(error is None):
            raise error or ValueError("another rank lacks state that it needs; see its own message")
        for index, layout in sorted(self._layouts.items()):
            if self.method.fed(self.param_groups[index]):
                layout.informed = self._exchange.every(layout.informed)

    def __getstate__(self) -> dict[str, Any]:
        self._land()
        # Clones: a pickle would write a whole bucket behind every view of it.
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for p, own in self.state.items():
            state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
        return {**super().__getstate__(), "state": state, "stats": dict(self.stats)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.stats = {**faults.new_stats(), **self.__dict__.get("stats", {})}
        self._exchange, self._feed = Local(), Feed()
        self._layouts, self._checked = {}, {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _restore(optimizer: Optimizer, raw: dict[str, Any]) -> None:
    """Put the tensors of a loaded state dict back as they were saved, copied."""
    saved = (i for group in raw["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    for index, p in zip(saved, params, strict=True):
        for key, value in raw["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                device = optimizer.state[p][key].device
                optimizer.state[p][key] = value.detach().to(device, copy=True)
            else:
                optimizer.state[p][key] = copy.deepcopy(value)
