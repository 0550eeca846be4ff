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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from parabola import chains, faults, grafting, offload, spans
from parabola.blocks import Bucket
from parabola.curvature.feed import Feed, captured
from parabola.distributed import Intake, Spread, Verdict
from parabola.geometry import gradient
from parabola.kernels import Elements
from parabola.layout import Layout
from parabola.linalg import full_precision
from parabola.method import ChainMethod, Options, SpanMethod
from parabola.refresh import refresh
from parabola.schedule import ready
from parabola.stateful import Stateful
from parabola.treatment import names_of, options_of, roster, wanted

Vectors = Sequence[Sequence[Tensor]]
"""Vectors that a bucket takes in: each one tensor a member."""


class SecondOrder(Stateful):
    """Base of every optimizer of the library: the engine around a `Method`."""

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
        for index, group in enumerate(self.param_groups):
            self._check(index, group)
        loss, exchange = None, self._connected()
        if closure is not None:
            with exchange.telling(self._feed.count), torch.enable_grad():
                loss = closure()
            exchange = self._connected()  # it may have cleared the gradient of a frozen parameter
        with exchange.telling(self._feed.count):
            intakes = [self._intake(i, group) for i, group in enumerate(self.param_groups)]
        verdicts = exchange.open(intakes, self._feed.vectors)
        self._skip(verdicts, intakes)
        failures = self.stats["root_failures"]
        with exchange.telling(None):
            work = list(self._work(verdicts))
            clock = self._clock() if any(map(self.method.fed, self.param_groups)) else 0
            for index, layout in work:
                self._step_group(index, layout, verdicts[index], clock)
        failures = self.stats["root_failures"] - failures
        failed = exchange.close(failures > 0)
        self.stats["steps"] += bool(work)
        self.stats["bytes_sent"] += exchange.sent
        self._feed = Feed()
        if failed and any(self.param_groups[i]["nonfinite"] == "raise" for i, _ in work):
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
        m = grafting.filtered(bucket, g, options, spare=None if early else g)
        rows: bool | Tensor = block.treated
        if rows and method.grafts:
            rows = ready(bucket, options)
        a = d = m
        if rows is not True or options["graft"] is not None:  # somebody looks at it
            correction = grafting.correction(bucket, grafting.second_decay(options))
            a = d = grafting.direction(bucket.state, m, correction, options)
            if early:
                a = d = grafting.momentum(bucket, a, options)
        if rows is not False:
            d = method.apply(bucket.seen, g if early else m, block, options)
            if early:
                d = grafting.averaged(bucket, d, rows, options)
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
        fed = any(map(self.method.fed, self.param_groups))
        blocks = len(self._feed.vectors) + self._feed.dropped
        try:
            with captured(params, 64 * self._clock() + blocks, model, scaler) as vector:
                yield
        except Exception:
            if fed:
                self._connected().every(False)  # the others drop their part of the vector
            raise
        if not fed:
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
        """
        params = [p for p in group["params"] if wanted(p)]
        grads = [gradient(p) for p in params]
        given = [g for g in grads if g is not None]
        if not given:
            return Intake(group, params, grads, telling=False)
        if any(g.layout is not torch.strided for g in given):
            names = zip(group["params"], names_of(group), strict=True)
            faults.refuse(grads, [name for p, name in names if wanted(p)])
        finite = group["nonfinite"] == "ignore" or faults.all_finite(given)
        telling = informed = True
        if self.method.fed(group):
            informed = self._layout(index, group).informed
            if not informed and not self._feed.vectors:
                # A gradient of zeros, as checkpoints make to initialize a state, tells nothing.
                telling = any(bool(g.any()) for g in given)
        return Intake(group, params, grads, finite, telling, informed)

    def _skip(self, verdicts: Sequence[Verdict], intakes: Sequence[Intake]) -> None:
        """Count the groups with a bad gradient, or raise: on all processes alike, so untold."""
        for verdict, intake in zip(verdicts, intakes, strict=True):
            if verdict.bad and any(verdict.has):
                names, policy = roster(self.method, intake.group).names, intake.group["nonfinite"]
                faults.on_nonfinite(self.stats, intake.grads, names, policy, verdict.bad)

    def _work(self, verdicts: Sequence[Verdict]) -> Iterator[tuple[int, Layout]]:
        """Groups to step."""
        for index, verdict in enumerate(verdicts):
            if any(verdict.has):
                layout = self._layout(index, self.param_groups[index])
                if not verdict.bad:
                    yield index, layout
