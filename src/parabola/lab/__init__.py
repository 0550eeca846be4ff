# SPDX-License-Identifier: Apache-2.0
"""The lab: train several optimizers on the same real task and see which one gets there first.

Needs the extra ``parabola[lab]``. Start with ``parabola --help``, or from Python::

    from parabola.lab.registry import find_workload
    from parabola.lab.compare import Comparison, compare

The pieces, one idea a file: `workload` (what a task is), `workloads` (the tasks), `registry` (tasks
by name), `optimizers` (the table of competitors), `train` (one run), `compare` (many runs, one
results file), `results` (the shape of that file), `report` (the page), `tune` (a search for good
settings).
"""
