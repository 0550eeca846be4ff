# SPDX-License-Identifier: Apache-2.0
"""The one step that all optimizers of the library share.

g  <- gradient (sign for maximize; + weight_decay p when the decay is coupled)
S  <- accumulate(S, g)                              METHOD
P  <- refresh(S, P), every ``update_every`` steps   METHOD
m  <- beta1-filter(g), bias-corrected
a  <- the graft's own direction
d  <- apply(P, m)                                   METHOD
d  <- d |a| / |d|
v  <- momentum v + d ;  d <- v, or d + momentum v
p  <- p - lr (d + weight_decay p)

A method that filters the direction (``Method.filter_direction``) has momentum on ``a``, an average
over ``apply(P, g)`` in ``d``, and none after the rescaling.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from parabola import chains, faults, grafting
from parabola.blocks import Bucket
from parabola.distributed import Exchange, Local
from parabola.layout import Layout, routes_of
from parabola.linalg import full_precision
from parabola.method import ChainMethod, Method
from parabola.options import validate
from parabola.plan import Plan, plan_groups
from parabola.refresh import ready, refresh


class SecondOrder(Optimizer):
    """Base of every optimizer of the library: the engine around a `Method`.

    Attributes:
        method: The method, a set of pure functions.
        stats: Counters as plain numbers: ``steps`` in which something was stepped;
            ``skipped_steps`` of a parameter group, for ``nonfinite_gradients`` of parameters;
            ``refreshes`` of factors, of which ``root_retries`` climbed the numerical fallback chain
            and ``root_failures`` kept the old root; ``fallbacks`` of factors to the graft's step.
    """

    method: ClassVar[Method]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._layouts: dict[int, Layout] = {}
        self._checked: dict[int, list[Any]] = {}
        self._exchange: Exchange = Local()
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work, failures = list(self._work()), self.stats["root_failures"]
        for group, layout, grads in work:
            for bucket, bucket_grads in layout.active(grads):
                if grafting.fused_adam(bucket, group):
                    grafting.fused_adam_step(bucket, bucket_grads, layout.steps_of(bucket), group)
                    continue
                with torch.autocast(bucket.device.type, enabled=False):
                    if isinstance(self.method, ChainMethod) and bucket.block.chained:
                        chains.step(self.method, self._exchange, bucket, bucket_grads, group)
                    else:
                        self._advance(bucket, bucket_grads, group)
        self.stats["steps"] += bool(work)
        failures = self.stats["root_failures"] - failures
        if failures and any(group["nonfinite"] == "raise" for group, _, _ in work):
            faults.raise_failed_roots(failures)
        return loss

    def _advance(self, bucket: Bucket, grads: list[Tensor], group: dict[str, Any]) -> None:
        """One step of one bucket: the equations at the top of this file, line by line."""
        # Statistics and roots need true float32; the direction may follow the user's own setting.
        g = self._exchange.collect(bucket, grads, group)
        if bucket.block.axes:
            with full_precision():
                self.method.accumulate(bucket.state, g, bucket.block, group)
            refresh(self.method, bucket, g, group, self.stats)
        early = self.method.filter_direction
        grafting.accumulate(bucket, g, group)
        m = grafting.filtered(bucket, g, group)
        correction = grafting.correction(bucket, grafting.second_decay(group))
        a = d = grafting.direction(bucket.state, m, correction, group)
        if early:
            a = d = grafting.momentum(bucket, a, group)
        rows = ready(bucket, group) if bucket.block.axes else False
        if rows is not False:
            d = self.method.apply(bucket.state, g if early else m, bucket.block, group)
            if early:
                d = grafting.averaged(bucket, d, group)
            if group["graft"] is not None:
                d = grafting.rescale(bucket, d, a)
            if rows is not True:
                d = torch.where(bucket.expand(rows), d, a)
        if not early:
            d = grafting.momentum(bucket, d, group)
        self._exchange.deliver(bucket, d, group)

    def _work(self) -> Iterator[tuple[dict[str, Any], Layout, list[Tensor | None]]]:
        """Groups to step, after every gradient of every group has passed inspection."""
        found = []
        for index, group in enumerate(self.param_groups):
            if all(p.grad is None for p in group["params"]):
                continue
            self._check(index, group)
            layout = self._layout(index, group)
            grads = [p.grad for p in layout.params]
            faults.refuse(grads, layout.names)
            found.append((group, layout, grads))
        for group, layout, grads in found:
            given = [g for g in grads if g is not None]
            if group["nonfinite"] != "ignore" and not faults.all_finite(given):
                faults.on_nonfinite(self.stats, grads, layout.names, group["nonfinite"])
                continue
            yield group, layout, grads

    def _check(self, index: int, group: dict[str, Any]) -> None:
        """Validate keywords that have changed since the last step; the learning rate may be any."""
        values = [group[key] for key in self.defaults if key != "lr"]
        if values != self._checked.get(index):
            validate(group, self.method.checks)
            self.method.check(group)
            self._checked[index] = values

    def _layout(self, index: int, group: dict[str, Any]) -> Layout:
        layout = self._layouts.get(index)
        if layout is None or not layout.fits(group, self.state):
            layout = Layout(self.method, group, self.state, layout)
            self._layouts[index] = layout
        return layout

    def plan(self) -> Plan:
        """What every parameter gets, why, and what it costs; ``print(opt.plan())`` is a table."""
        return plan_groups(self.method, self.param_groups)

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
            routes_of(self.method, group)  # refuses parts that do not fit a shape
            for p in group["params"]:
                if hasattr(p, "placements"):
                    raise ValueError(
                        "parabola optimizers do not support DTensor parameters yet, got placements "
                        f"{p.placements}; allowed: plain tensors"
                    )
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

    def __getstate__(self) -> dict[str, Any]:
        # Clones: a pickle would write a whole bucket behind every view of it.
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for p, own in self.state.items():
            state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
        return {**super().__getstate__(), "state": state, "stats": dict(self.stats)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("stats", faults.new_stats())
        self._exchange = Local()
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
