# SPDX-License-Identifier: Apache-2.0
"""All experiments by id, in the order in which they are listed and run."""

import importlib
from collections.abc import Sequence

from parabola.lab.errors import UsageError, unknown
from parabola.lab.study.experiment import Experiment

# One module an experiment, each with a constant EXPERIMENT.
MODULES = (
    "linreg_block",
    "logreg_tension",
    "linreg_noise",
    "adam_vs_gn_diag",
    "basis_interp",
    "low_precision",
    "sparse_parity",
    "staircase",
    "images",
    "tiny_transformer",
    "estimators",
    "empirical_fisher_basis",
    "quadrants",
)


def known() -> dict[str, Experiment]:
    """Every experiment by its id."""
    found = [importlib.import_module(f"{__package__}.{name}").EXPERIMENT for name in MODULES]
    return {experiment.id: experiment for experiment in found}


def choose(
    experiments: dict[str, Experiment], words: Sequence[str], everything: bool
) -> list[tuple[Experiment, str | None]]:
    """The experiments that a command line asks for, with the argument of those that take one.

    Args:
        experiments: Experiments by id.
        words: Ids; an id that takes an argument is followed by it.
        everything: All experiments that take no argument.

    Raises:
        UsageError: An unknown id, a missing argument, or ids beside `everything`.
    """
    if everything:
        if words:
            raise UsageError("--all runs every experiment: leave out the ids")
        return [(item, None) for item in experiments.values() if item.argument is None]
    chosen: list[tuple[Experiment, str | None]] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word not in experiments:
            raise unknown("experiment", word, experiments)
        experiment, argument = experiments[word], None
        if experiment.argument is not None:
            if not left:
                raise UsageError(
                    f"{word} needs a word after it: parabola study {word} {experiment.argument}"
                )
            argument = left.pop(0)
        chosen.append((experiment, argument))
    return list(dict.fromkeys(chosen))
