# SPDX-License-Identifier: Apache-2.0
"""From the training of many networks to rows, and what experiments with networks share."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from parabola.lab.study.experiment import Quadrants, Sheet
from parabola.lab.study.network_runs import Curves, Method, Recipe, train
from parabola.lab.study.rows import Row, best_row

NAMES = {"full": "gauss_newton", "empirical": "empirical"}


def sweep(
    recipe: Recipe,
    method: Method,
    rates: Sequence[float],
    damping: float,
    seeds: Sequence[int],
) -> tuple[Row, Curves]:
    """One row: all learning rates and seeds of a method at one damping.

    Returns:
        The row, whose settings name damping and estimator, and the runs themselves.
    """
    began = time.perf_counter()
    curves = train(recipe, method, rates, [damping], seeds)
    plain = method.source == "gradient"
    loss = curves.loss[:, 0].nan_to_num(nan=torch.inf).median(-1).values  # (checks, rates)
    settings: dict[str, Any] = {} if plain else {"damping": damping}
    if recipe.network.loss == "softmax" and not plain:
        settings = {"estimator": method.source, **settings}
    row = best_row(
        "gradient" if plain else "gauss_newton",
        method.power,
        basis=NAMES.get(method.basis, method.basis),
        batch=str(recipe.batch),
        schedule="constant",
        rates=rates,
        values=curves.steps[0].tolist(),
        curves=loss.T.tolist(),
        every=recipe.check,
        seconds=time.perf_counter() - began,
        **settings,
    )
    return row, curves


def tuned(rows: Iterable[Row]) -> list[Row]:
    """The best damping of each method, basis, batch and estimator."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.method, row.basis, row.batch, row.settings.get("estimator"))
        if key not in best or row.metric < best[key].metric:
            best[key] = row
    return list(best.values())


def picture(title: str, rows: Iterable[Row], large: str, small: str, basis: str) -> Quadrants:
    """The two-by-two picture of tuned rows, with a large batch in the place of the full one."""
    batches = {large: "full", small: "small"}
    bases = {"identity": "identity", basis: "gauss_newton"}
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.batch in batches and row.basis in bases:
            cell = cells.setdefault((batches[row.batch], bases[row.basis]), {})
            cell[row.method] = row.metric
    return Quadrants(title, cells)


def without_averages(recipe: Recipe, fresh: bool) -> Recipe:
    """The recipe, with the curvature computed anew at every refresh if `fresh`."""
    return replace(recipe, curvature_decay=0.0) if fresh else recipe


def settings_sheet(**settings: object) -> Sheet:
    """What all rows share, as a table: it belongs into the record, not into every row."""
    lines = [(name.replace("_", " "), _word(value)) for name, value in settings.items()]
    return Sheet("Settings", ("setting", "value"), lines)


def _word(value: object) -> float | str:
    return float(value) if isinstance(value, int | float) else str(value)


def recipe_sheet(recipe: Recipe, **more: object) -> Sheet:
    """What all rows of a recipe share; `more` in addition, or instead."""
    b1, b2 = recipe.betas
    settings = {
        "network": " - ".join(map(str, recipe.network[:3])),
        "loss": recipe.network.loss,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "curvature_batch": recipe.curvature_batch,
        "target": recipe.target,
        "steps_between_refreshes": recipe.refresh,
        "steps_between_evaluations": recipe.check,
        "betas": f"{b1:g}, {b2:g}",
        "curvature_decay": f"{recipe.curvature_decay:g} per refresh",
        "eps": recipe.eps,
        "dtype": str(recipe.dtype).removeprefix("torch."),
    }
    return settings_sheet(**{**settings, **more})
