# SPDX-License-Identifier: Apache-2.0
"""A small transformer on the source of Python's standard library: real text without a download."""

import hashlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from parabola.lab.errors import MissingDataError
from parabola.lab.language import NextByte
from parabola.lab.models import GPT
from parabola.lab.workload import Setting

_TUNED = "best of 5 trials of parabola tune over lr, 250 steps, seed 1000: "
_OF = "best lr of {}, 200 steps, seed 1000: loss {}"
# Tests, other people's packages, and what distributors leave out: none of it is the library's text.
_EXCLUDED = {
    *("__pycache__", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3"),
    *("site-packages", "test", "tests", "tkinter", "turtledemo"),
}


def library_files(root: Path) -> list[Path]:
    """The library's Python files, relative to its root, in the order of their names."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    # Files named _sysconfigdata* are written at build time and differ between machines.
    kept = (
        f for f in files if not _EXCLUDED & set(f.parts) and not f.name.startswith("_sysconfigdata")
    )
    return sorted(kept, key=lambda f: f.as_posix())


def held_out(file: Path) -> bool:
    """Whether a file belongs to the evaluation text: one in ten, by the hash of its name."""
    return hashlib.sha256(file.as_posix().encode()).digest()[0] % 10 == 0


class StdlibLM(NextByte):
    """Next-byte prediction on the standard library's ``.py`` files, split by file.

    The metric is the cross-entropy in nats per byte on a fixed sample of held-out files. The text
    is that of the running interpreter, so figures of different Python versions differ a little.
    """

    name = "stdlib-lm"
    description = (
        "byte-level GPT (2 layers, width 128) on the Python standard library's source; no download"
    )
    target = 1.9
    steps = 800
    settings: Mapping[str, Setting] = {
        "adamw": Setting(
            {"lr": 1.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 2.332"
        ),
        "sgd": Setting({"lr": 0.075, "momentum": 0.9}, _TUNED + "loss 2.667"),
        "muon": Setting(
            {"lr": 0.012, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 1.776"
        ),
        "shampoo": Setting(
            {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 2.02"
        ),
        "jorge": Setting(
            {"lr": 6e-3, "graft": "adam", "betas": (0.9, 0.99), "weight_decay": 0.1},
            "best of lr 3e-3, 6e-3, 1.2e-2 with Adam's graft and 0.1, 0.3 with SGD's, 250 steps, "
            "seed 1000: loss 2.539",
        ),
        "sonew": Setting(
            {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
            "best lr of 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 250 steps, seed 1000: loss 2.141",
        ),
        "soap": Setting(
            {"lr": 6e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
            _OF.format("3e-3, 6e-3, 1.2e-2", 1.948),
        ),
        "ginger": Setting(
            {"lr": 3e-3, "weight_decay": 0.1}, _OF.format("1.5e-3, 3e-3, 6e-3", 2.529)
        ),
        "sophia": Setting(
            {"lr": 7.5e-4, "weight_decay": 0.1},
            _OF.format("3.75e-4, 7.5e-4, 1.5e-3, 3e-3", 2.775),
        ),
        "gn": Setting(
            {"lr": 3.33e-3, "damping": 0.1, "clip": 1.0, "weight_decay": 0.1},
            _OF.format("1.11e-3, 3.33e-3, 1e-2, 3e-2", 2.717),
        ),
        "gn-sqrt": Setting(
            {"lr": 1e-2, "damping": 0.1, "clip": 1.0, "weight_decay": 0.1},
            _OF.format("4e-3, 1e-2, 2.5e-2", 2.577),
        ),
    }

    def load(self, data_dir: Path) -> None:
        """Read the library of the running interpreter; the data folder is not used."""
        root = Path(sysconfig.get_path("stdlib"))
        files = library_files(root)
        if not files:
            what = "the source of Python's standard library"
            raise MissingDataError(
                root / "*.py", what, "a Python installation that ships its library as source files"
            )
        texts: dict[bool, list[bytes]] = {False: [], True: []}
        for file in files:
            texts[held_out(file)].append((root / file).read_bytes())
        train, test = (
            torch.frombuffer(bytearray(b"\n".join(texts[held])), dtype=torch.uint8)
            for held in (False, True)
        )
        self.split(train, test)

    def model(self) -> nn.Module:
        """A GPT over bytes."""
        return GPT(vocabulary=256, context=self.context, width=128, layers=2, heads=4)
