# SPDX-License-Identifier: Apache-2.0
"""Checkpoints without roots, for other block sizes, and in directories of any number of ranks."""

from parabola.checkpoint.dicts import reblock, slim
from parabola.checkpoint.directory import load, save

__all__ = ["load", "reblock", "save", "slim"]
