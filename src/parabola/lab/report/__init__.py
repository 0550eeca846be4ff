# SPDX-License-Identifier: Apache-2.0
"""The comparison report: `results.json` as one html page that needs no network.

`summary` has the numbers, `verdict` the sentence at the head, `curves` the medians over seeds,
`charts` and `tables` what is shown; `page` puts it together, `picture` photographs it for a README.
"""

from parabola.lab.report.page import write_report
from parabola.lab.report.picture import write_picture

__all__ = ["write_picture", "write_report"]
