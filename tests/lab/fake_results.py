# SPDX-License-Identifier: Apache-2.0
"""Made-up but plausible results of a comparison, for the tests of the report."""

import math
import random
from typing import Any

# Decay of the loss per step, seconds per step in model and optimizer, state bytes per parameter.
SPEEDS = {
    "adamw": (0.022, 9e-4, 2e-4, 8.0),
    "sgd": (0.014, 9e-4, 1e-4, 4.0),
    "muon": (0.027, 9e-4, 6e-4, 4.4),
    "shampoo": (0.036, 9e-4, 9e-4, 14.2),
}
PARAMETERS = 26_122
TARGET = 0.05


def fake_run(optimizer: str, seed: int = 0, steps: int = 300, **changes: Any) -> dict[str, Any]:
    """A finished run whose loss falls exponentially at the optimizer's rate, with noise."""
    draw = random.Random(f"{optimizer} {seed}")
    rate, model, own, state = SPEEDS.get(optimizer, (0.02, 9e-4, 3e-4, 8.0))
    rate *= draw.uniform(0.9, 1.1)
    total = (model + own) * draw.uniform(1.0, 1.05) + 5e-5

    def level(step: int) -> float:
        return 2.3 * math.exp(-rate * step) + 0.002

    evaluated = [*range(0, steps, 6), steps]
    metric = [level(step) for step in evaluated]
    reached = next((s for s, m in zip(evaluated, metric, strict=True) if m <= TARGET), None)
    run: dict[str, Any] = {
        "workload": "digits",
        "optimizer": optimizer,
        "hyperparameters": {"lr": 0.01, "betas": [0.9, 0.99]},
        "tuned": "sweep of lr on seed 1000, 300 steps",
        "schedule": None,
        "seed": seed,
        "status": "finished",
        "error": None,
        "train": {
            "step": list(range(1, steps + 1)),
            "loss": [level(s) * draw.lognormvariate(0, 0.25) for s in range(1, steps + 1)],
            "seconds": [total * s for s in range(1, steps + 1)],
        },
        "eval": {
            "step": evaluated,
            "metric": metric,
            "seconds": [total * s for s in evaluated],
            "others": {"test_accuracy": [1 - 0.9 * m / 2.3 for m in metric]},
        },
        "final_metric": metric[-1],
        "best_metric": min(metric),
        "target": TARGET,
        "steps_to_target": reached,
        "seconds_to_target": None if reached is None else total * reached,
        "seconds_per_step": {"total": total, "model": model, "optimizer": own},
        "compile_seconds": 0.31,
        "state_bytes": int(state * PARAMETERS),
        "parameter_bytes": 4 * PARAMETERS,
        "versions": {"python": "3.11.4", "torch": "2.13.0", "parabola": "0.1.0"},
    }
    return {**run, **changes}


def diverged(optimizer: str, seed: int = 0, at: int = 40) -> dict[str, Any]:
    """A run whose loss stopped being finite, as the trainer records it."""
    run = fake_run(optimizer, seed)
    for part, cut in (("train", at), ("eval", at // 6 + 1)):
        run[part] = {k: v[:cut] for k, v in run[part].items() if k != "others"}
    unreached = {"final_metric": run["eval"]["metric"][-1], "steps_to_target": None}
    return (
        run
        | unreached
        | {
            "status": "diverged",
            "error": f"loss is nan at step {at + 1}",
            "best_metric": min(run["eval"]["metric"]),
            "seconds_to_target": None,
        }
    )


def empty(optimizer: str, status: str, error: str | None = None, seed: int = 0) -> dict[str, Any]:
    """A run that ended before its first step."""
    return fake_run(
        optimizer,
        seed,
        status=status,
        error=error,
        train={"step": [], "loss": [], "seconds": []},
        eval={"step": [], "metric": [], "seconds": [], "others": {}},
        final_metric=None,
        best_metric=None,
        steps_to_target=None,
        seconds_to_target=None,
        seconds_per_step={"total": 0.0, "model": 0.0, "optimizer": 0.0},
        state_bytes=0,
        parameter_bytes=0,
    )


def at_target(optimizer: str, steps: int | None, seconds: float | None, seed: int = 0) -> Any:
    """A run of which only the way to the target matters."""
    return fake_run(optimizer, seed, steps_to_target=steps, seconds_to_target=seconds)


def fake_results(runs: list[dict[str, Any]] | None = None, **workload: Any) -> dict[str, Any]:
    """A whole results file; by default four optimizers with three seeds each."""
    if runs is None:
        runs = [fake_run(name, seed) for seed in range(3) for name in SPEEDS]
    return {
        "schema": "parabola.compare/1",
        "created": "2026-01-05T12:00:00+00:00",
        "workload": {
            "name": "digits",
            "description": "MLP 64-128-128-10 on scikit-learn's 8x8 digits; no download",
            "metric": "train_loss",
            "goal": "min",
            "target": TARGET,
            "steps": 300,
            "batch_size": 128,
            "parameters": PARAMETERS,
            **workload,
        },
        "environment": {
            "python": "3.11.4",
            "torch": "2.13.0",
            "parabola": "0.1.0",
            "device": "cpu",
            "threads": 2,
            "platform": "Linux-6.1-x86_64",
        },
        "settings": {
            "workload": "digits",
            "steps": 300,
            "seconds": None,
            "device": "cpu",
            "threads": 2,
        },
        "runs": runs,
    }
