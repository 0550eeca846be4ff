# SPDX-License-Identifier: Apache-2.0
"""The staircase function: sparse parity's companion, see `sparse_parity`."""

from parabola.lab.study.sparse_parity import STAIRCASE as EXPERIMENT

__all__ = ["EXPERIMENT"]
