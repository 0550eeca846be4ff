# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of study.md: `python docs/make_study_pictures.py docs/images`."""

import argparse
import sys
import time
from pathlib import Path

from parabola.lab.study.catalog import known
from parabola.lab.study.experiment import Context
from parabola.lab.study.picture import write_picture
from parabola.lab.study.record import Finished, Settings

PICTURES = {
    "linreg-block": (
        "Learning rates, constant in blocks, identity basis",
        "Learning rates, random, identity basis",
    ),
    "logreg-tension": ("Learning rates, cosine, W 4", "Learning rates, cosine, W 8"),
    "linreg-noise": (
        "Learning rates, batch 16, identity basis",
        "Learning rates, full batch, identity basis",
    ),
    "adam-vs-gn-diag": ("Correlation of log D with log h and log c^2",),
    "basis-interp": (
        "Basis interpolation, full batch",
        "Basis interpolation, batch 8, label noise 1",
    ),
}


def main() -> int:
    """Runs the experiments in full and writes one picture each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    parser.add_argument("--only", choices=PICTURES, nargs="+", default=list(PICTURES))
    arguments = parser.parse_args()
    experiments = known()
    for name in arguments.only:
        began = time.perf_counter()
        outcome = experiments[name].run(Context())
        item = Finished(experiments[name], None, outcome, None, time.perf_counter() - began)
        path = arguments.folder / f"study-{name}.png"
        width = 1200 if len(PICTURES[name]) > 1 else 640
        write_picture(item, Settings(), path, PICTURES[name], width=width)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
