# SPDX-License-Identifier: Apache-2.0
"""Who computes what: the seam between the engine and the processes of a job."""

from parabola.distributed.exchange import Exchange, Local

__all__ = ["Exchange", "Local"]
