# SPDX-License-Identifier: Apache-2.0
"""The one step that all optimizers of the library share.

g  <- gradient (sign for maximize; + weight_decay p when the decay is coupled)
h  <- g, or the vectors that ``opt.curvature()`` was given                    METHOD says which
S  <- accumulate(S, h)                              METHOD
P  <- refresh(S, P), every ``update_every`` steps   METHOD
S  <- measure(S, project(P, h))                     METHOD, if it works in a basis of its own
m  <- beta1-filter(project(P, g)), bias-corrected
a  <- the graft's own direction
d  <- apply(P, m)                                   METHOD
d  <- d |a| / |d|
d  <- restore(P, d)                                 METHOD, the inverse of project
v  <- momentum v + d ;  d <- v, or d + momentum v
p  <- p - lr (d + weight_decay p)

A method that filters the direction (``Method.filter_direction``) has momentum on ``a``, an average
over ``apply(P, g)`` in ``d``, and none after the rescaling.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

from parabola import chains, faults, grafting, metrics, offload, spans
from parabola.blocks import Bucket
from parabola.curvature.feed import Feed, captured
from parabola.distributed import Exchange, Intake, Local, Spread, Verdict, connect
from parabola.distributed.forecast import Rank, forecast, simulate
from parabola.geometry import gradient
from parabola.kernels import Elements
from parabola.layout import Layout, entries, names_of, options_of, routes_of, wanted
from parabola.linalg import full_precision
from parabola.method import ChainMethod, Method, Options, SpanMethod
from parabola.options import frozen, validate
from parabola.plan import Plan, plan_groups
from parabola.refresh import refresh
from parabola.schedule import ready

Vectors = Sequence[Sequence[Tensor]]
"""Vectors that a bucket takes in: each one tensor a member."""


class SecondOrder(Optimizer):
    """Base of every optimizer of the library: the engine around a `Method`.

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Recomputes the loss and the gradients; called once, with gradients enabled.

        Returns:
            The loss that the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or not finite under ``nonfinite="raise"``: nothing
                has changed then. Or a root failed under ``nonfinite="raise"``: the step is done
                then, with the previous root.
        """
        loss, exchange = None, self._connected()
        with exchange.telling(len(self._feed.vectors)):
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            intakes = [self._intake(i, group) for i, group in enumerate(self.param_groups)]
        verdicts = exchange.open(intakes, self._feed.vectors)
        failures = self.stats["root_failures"]
        with exchange.telling(len(self._feed.vectors)):
            work = list(self._work(verdicts))
            clock = self._clock() if any(map(self.method.fed, self.param_groups)) else 0
            for index, layout in work:
                self._step_group(index, layout, verdicts[index], clock)
        exchange.close()
        self.stats["steps"] += bool(work)
        self.stats["bytes_sent"] += exchange.sent
        self._feed = Feed()
        failures = self.stats["root_failures"] - failures
        if failures and any(self.param_groups[i]["nonfinite"] == "raise" for i, _ in work):
            faults.raise_failed_roots(failures)
        return loss

    def _step_group(self, index: int, layout: Layout, verdict: Verdict, clock: int) -> None:
        """One step of a parameter group, whose gradients have passed inspection."""
        method, exchange, joint = self.method, self._exchange, []
        group, feed = self.param_groups[index], self._feed
        if group.get("refresh") == "async" and group["latency"] == "auto":
            layout.warmup.tick(group, layout.taken + 1, self.stats, exchange.agree)
        due = method.fed(group) and self._due(group, layout, clock)
        if due and not feed.vectors:
            due = verdict.telling
        grads = exchange.spread(index, 0)
        given = [exchange.spread(index, 1 + i) for i in range(len(feed.vectors))]
        for bucket in layout.active(verdict.has):
            own = grads.of(bucket.members)
            options = options_of(method, bucket.block, group)
            if grafting.fused_adam(bucket, options):
                grafting.fused_adam_step(bucket, own, layout.steps_of(bucket), options)
                continue
            vectors = self._vectors(bucket, own, given, due, options)
            with torch.autocast(bucket.device.type, enabled=False):
                if bucket.block.shape or not bucket.block.treated:
                    self._advance(bucket, own, vectors, options)
                elif isinstance(method, ChainMethod):
                    chains.step(method, exchange, bucket, own, options)
                elif isinstance(method, SpanMethod):
                    params = [layout.params[slot] for slot in bucket.slots]
                    joint.append(spans.Span(bucket, own, vectors, params))
                else:
                    self._advance_elements(bucket, own, vectors, options)
        if joint:
            assert isinstance(method, SpanMethod)
            with torch.autocast(joint[0].bucket.device.type, enabled=False):
                spans.step(method, exchange, joint, group)
        given_now = bool(feed.vectors) or (due and not feed.dropped)
        layout.informed = verdict.informed or given_now

    def _advance(
        self, bucket: Bucket, grads: Sequence[Tensor], vectors: Vectors, options: Options
    ) -> None:
        """One step of one bucket: the equations at the top of this file, line by line."""
        # Statistics and roots need true float32; the direction may follow the user's own setting.
        method, block = self.method, bucket.block
        given = [bucket.stack(vector) for vector in vectors if vector is not grads]
        g = self._exchange.collect(bucket, grads, options)
        if block.treated:
            with full_precision():
                if vectors:
                    method.accumulate(bucket.state, given or [g], block, options)
                if options.get("refresh") == "async":
                    offload.refresh(method, bucket, options, self.stats)
                else:
                    refresh(method, bucket, g, options, self.stats, self._exchange.solve)
                g = method.project(bucket.state, g, block, options)
                if vectors:
                    given = [method.project(bucket.state, h, block, options) for h in given]
                    self._measure(bucket, given or [g], options)
        early = method.filter_direction
        grafting.accumulate(bucket, g, options)
        m = grafting.filtered(bucket, g, options)
        correction = grafting.correction(bucket, grafting.second_decay(options))
        a = d = grafting.direction(bucket.state, m, correction, options)
        if early:
            a = d = grafting.momentum(bucket, a, options)
        rows: bool | Tensor = block.treated
        if rows and method.grafts:
            rows = ready(bucket, options)
        if rows is not False:
            d = method.apply(bucket.seen, g if early else m, block, options)
            if early:
                d = grafting.averaged(bucket, d, options)
            if options["graft"] is not None:
                d = grafting.rescale(bucket, d, a)
            if rows is not True:
                d = torch.where(bucket.expand(rows), d, a)
        if block.treated:
            d = method.restore(bucket.state, d, block, options)
        if not early:
            d = grafting.momentum(bucket, d, options)
        self._exchange.deliver(bucket, d, options)

    def _advance_elements(
        self, run: Bucket, grads: Sequence[Tensor], vectors: Vectors, options: Options
    ) -> None:
        """One step of a run whose elements are treated one by one, in stretches of a cache."""
        kernel, taken = None, 0
        if run.params[0].is_contiguous():
            kernel = self.method.kernel(run.device, run.params[0].dtype, options)
        if run.shards is not None and vectors:
            self._measure_shards(run, grads, vectors, options)
            vectors = []
        for piece in run.pieces if vectors or kernel is None else ():
            piece.t, end = run.t, taken + len(piece.members)
            own = grads[taken:end]
            cut = [own if vector is grads else vector[taken:end] for vector in vectors]
            if kernel is None:
                self._advance(piece, own, cut, options)
            else:
                self._measure(piece, [piece.stack(vector) for vector in cut], options)
            taken = end
        if kernel is not None:
            assert isinstance(run.t, int)
            if "elements" not in run.memo:
                state = {name: run.vectors(name) for name in run.state}
                run.memo["elements"] = Elements(run.params, state, run.numbers)
            kernel.step(run.memo["elements"], grads, run.t, options)

    def _measure_shards(
        self, run: Bucket, grads: Sequence[Tensor], vectors: Vectors, options: Options
    ) -> None:
        """Take the vectors of all pieces in first: means are those of whole parameters."""
        taken = 0
        for piece in run.pieces:
            own = slice(taken, taken + len(piece.members))
            taken = own.stop
            stacks = [
                self._exchange.collect(piece, grads[own], options)
                if vector is grads
                else piece.stack(vector[own])
                for vector in vectors
            ]
            self.method.measure(piece.state, stacks, piece.block, options)
        self.method.tick(run.numbers, run.means, options)

    def _measure(self, bucket: Bucket, vectors: Sequence[Tensor], options: Options) -> None:
        """Take projected vectors into what is measured in the basis."""
        self.method.measure(bucket.state, vectors, bucket.block, options)
        self.method.tick(bucket.numbers, bucket.means, options)

    @contextmanager
    def curvature(
        self, model: nn.Module | None = None, *, scaler: GradScaler | None = None
    ) -> Iterator[None]:
        """Gradients of this block feed the curvature, not the step.

        What is in ``p.grad`` when the block ends is one vector h; the curvature is E[h h^T]. It
        comes from ``parabola.curvature.sampled_loss(...).backward()``, or is set by hand. Several
        blocks before a step average their h h^T. The gradients of training, the running statistics
        of normalization layers and the random state are afterwards what they were before.

        Args:
            model: The model that is called in the block; to be given if it is compiled, since its
                normalization layers are not seen from outside then.
            scaler: The gradient scaler of mixed precision, if ``scaler.scale(loss)`` went backward
                here: the vector is divided by its scale.

        Raises:
            RuntimeError: no parameter has a gradient when the block ends, or one has a sparse one.
            TypeError: ``model`` is no module.

        Example:
            >>> if opt.wants_curvature:
            ...     with opt.curvature():
            ...         parabola.curvature.sampled_loss(model(x), "cross_entropy").backward()
        """
        params = [p for group in self.param_groups for p in group["params"]]
        blocks = len(self._feed.vectors) + self._feed.dropped
        with captured(params, 64 * self._clock() + blocks, model, scaler) as vector:
            yield
        if not any(map(self.method.fed, self.param_groups)):
            faults.on_idle_curvature(self.stats, type(self).__name__)
            return
        trusting = all(group["nonfinite"] == "ignore" for group in self.param_groups)
        sound = trusting or faults.all_finite(list(vector.values()))
        if self._connected().every(sound):
            self._feed.vectors.append(vector)
            self.stats["curvature_vectors"] += 1
        else:
            self._feed.dropped += 1
            faults.on_nonfinite_curvature(self.stats)

    @property
    def wants_curvature(self) -> bool:
        """True when the coming step takes in what `curvature` was given: every ``update_every``."""
        self._connected()
        clock = self._clock()
        return any(
            self.method.fed(group)
            and (clock == 0 or self._due(group, self._layout(i, group), clock))
            for i, group in enumerate(self.param_groups)
        )

    def _due(self, group: dict[str, Any], layout: Layout, clock: int) -> bool:
        """Whether curvature is due in the coming step, or overdue: steps were taken without any."""
        overdue = layout.taken > 0 and not layout.informed
        return overdue or clock % group["update_every"] == 0

    def _clock(self) -> int:
        """Steps taken so far, by the parameter that took most."""
        if len(self._layouts) == len(self.param_groups):
            return max(layout.taken for layout in self._layouts.values())
        params = (p for group in self.param_groups for p in group["params"] if p in self.state)
        return int(max((float(self.state[p].get("step", 0)) for p in params), default=0.0))

    def _vectors(
        self,
        bucket: Bucket,
        grads: Sequence[Tensor],
        given: Sequence[Spread],
        due: bool,
        options: Options,
    ) -> Vectors:
        """The vectors that a bucket takes in now: each one tensor a member."""
        if not bucket.block.treated:
            return []
        if not self.method.fed(options):
            return [grads]
        if given:
            return [vector.of(bucket.members) for vector in given]
        if self._feed.dropped or not due:
            return []
        if options["curvature"] != "empirical":
            faults.on_missing_curvature(self.stats, type(self).__name__)
        return [self.method.stand_in(grads, options)]

    def _intake(self, index: int, group: dict[str, Any]) -> Intake:
        """Inspect the gradients of a group.

        Raises:
            RuntimeError: one of them is of a kind that no method can take.
            ValueError: a keyword has changed to a wrong value.
        """
        params = [p for p in group["params"] if wanted(p)]
        grads = [gradient(p) for p in params]
        given = [g for g in grads if g is not None]
        if not given:
            return Intake(group, params, grads, telling=False)
        self._check(index, group)
        names = dict(zip(group["params"], names_of(group), strict=True))
        faults.refuse(grads, [names[p] for p in params])
        finite = group["nonfinite"] == "ignore" or faults.all_finite(given)
        telling = informed = True
        if self.method.fed(group):
            if not self._feed.vectors:
                # A gradient of zeros, as checkpoints make to initialize a state, tells nothing.
                telling = any(bool(g.any()) for g in given)
            informed = self._layout(index, group).informed
        return Intake(group, params, grads, finite, telling, informed)

    def _work(self, verdicts: Sequence[Verdict]) -> Iterator[tuple[int, Layout]]:
        """Groups to step, after every gradient of every group has passed inspection."""
        for index, verdict in enumerate(verdicts):
            group = self.param_groups[index]
            if not any(verdict.has):
                continue
            layout = self._layout(index, group)
            if verdict.bad:
                grads = [gradient(p) for p in layout.params]
                policy = group["nonfinite"]
                faults.on_nonfinite(self.stats, grads, layout.names, policy, verdict.bad)
                continue
            yield index, layout

    def _connected(self) -> Exchange:
        """Who takes part in a step."""
        if not self._exchange.serves(self.param_groups):
            self._exchange = connect(self.method, self.param_groups, self._exchange)
        return self._exchange

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
                self._layout(index, group).land(group, self.stats)

    def plan(self, vectors: int = 0) -> Plan:
        """What every parameter gets, why, and what it costs; ``print(opt.plan())`` is a table.

        With several processes a collective call before the first step: what each of them will do.

        Args:
            vectors: How many curvature vectors come into the step whose messages are counted.
        """
        return plan_groups(self.method, self.param_groups, self._ranks(vectors))

    def _ranks(self, vectors: int) -> tuple[Rank, ...]:
        """What every process of this run does."""
        divided = self._connected().divided()
        if divided is None:
            return simulate(self.method, self.param_groups, vectors=vectors)
        division, held = divided
        return forecast(self.method, self.param_groups, held, division, vectors)

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
        of a bfloat16 model; here the saved tensors themselves are copied back.
        """
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
        if not self._connected().alone:
            self._take_own()

    def _take_own(self) -> None:
        """Build the layouts of loaded state at once: all processes learn whether theirs is there.

        Raises:
            ValueError: on every rank, where one lacks the state of something that it steps.
        """
        error = None
        try:
            for index, group in enumerate(self.param_groups):
                if any(p in self.state for p in group["params"]):
                    self._layout(index, group)
        except ValueError as e:
            error = e
        if not self._exchange.every(error is None):
            raise error or ValueError("another rank lacks state that it needs; see its own message")

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
