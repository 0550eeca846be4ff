# SPDX-License-Identifier: Apache-2.0
"""Entry point of the console script ``parabola``; the commands are in ``parabola.lab.commands``."""

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from parabola.lab.commands import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "parabola":
            raise
        sys.exit(f'parabola: {error.name} is missing; install it with pip install "parabola[lab]"')
    app(prog_name="parabola")


if __name__ == "__main__":
    main()
