# SPDX-License-Identifier: Apache-2.0
"""Draw the README's picture: `python docs/make_picture.py results.json docs/images/demo.png`."""

import argparse
import json
import sys
from pathlib import Path

from parabola.lab.report.picture import write_picture


def main() -> int:
    """Reads the results, writes the picture, and says in one line what is wrong if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of `parabola compare`")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    try:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
        write_picture(results, arguments.picture)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"make_picture: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
