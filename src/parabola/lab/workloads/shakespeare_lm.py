# SPDX-License-Identifier: Apache-2.0
"""A character transformer on Tiny Shakespeare, the corpus of Karpathy's char-rnn."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from parabola.lab.data import require
from parabola.lab.language import NextByte
from parabola.lab.models import GPT
from parabola.lab.workload import Setting

_TUNED = "best of 3 trials of parabola tune over lr, 150 steps, seed 1000: "
_AS_STDLIB = "the values of stdlib-lm; not searched"


class ShakespeareLM(NextByte):
    """Next-character prediction; the first 90 % of the text is trained on, the last 10 % held out.

    The metric is the cross-entropy in nats per character on a fixed sample of the held-out text.
    The text is ASCII, so bytes below 128 are the vocabulary and the model does not depend on the
    file.
    """

    name = "shakespeare-lm"
    description = "character-level GPT (4 layers, width 128) on Tiny Shakespeare"
    target = 1.85
    steps = 1000
    data_files: ClassVar[tuple[str, ...]] = ("tinyshakespeare/input.txt",)
    settings: Mapping[str, Setting] = {
        "adamw": Setting(
            {"lr": 1.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 2.522"
        ),
        "sgd": Setting({"lr": 0.15, "momentum": 0.9}, _TUNED + "loss 3.351"),
        "muon": Setting(
            {"lr": 6e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 2.249"
        ),
        "shampoo": Setting(
            {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _TUNED + "loss 2.371"
        ),
        "jorge": Setting(
            {"lr": 3e-3, "graft": "adam", "betas": (0.9, 0.99), "weight_decay": 0.1},
            "best lr of 3e-3, 6e-3, 1.2e-2 with Adam's graft, 150 steps, seed 1000: loss 2.763",
        ),
        "sonew": Setting(
            {"lr": 1.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
            "best lr of 1.5e-3, 3e-3, 6e-3, 150 steps, seed 1000: loss 2.524",
        ),
        "soap": Setting({"lr": 6e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, _AS_STDLIB),
        "ginger": Setting({"lr": 3e-3, "weight_decay": 0.1}, _AS_STDLIB),
        "sophia": Setting({"lr": 7.5e-4, "weight_decay": 0.1}, _AS_STDLIB),
        "gn": Setting(
            {"lr": 3.33e-3, "damping": 0.1, "clip": 1.0, "weight_decay": 0.1}, _AS_STDLIB
        ),
        "gn-sqrt": Setting(
            {"lr": 1e-2, "damping": 0.1, "clip": 1.0, "weight_decay": 0.1}, _AS_STDLIB
        ),
    }

    def load(self, data_dir: Path) -> None:
        """Read ``tinyshakespeare/input.txt``."""
        path = require(
            data_dir / self.data_files[0],
            "Tiny Shakespeare, about 1.1 MB of plain ASCII text",
            "https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt)",
        )
        text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        if int(text.max()) >= 128:
            raise ValueError(f"{path}: byte {int(text.max())} is not ASCII")
        cut = text.numel() * 9 // 10
        if text.numel() - cut <= self.context + 1:
            raise ValueError(
                f"{path}: {text.numel()} characters are too few for windows of {self.context}"
            )
        self.split(text[:cut], text[cut:])

    def model(self) -> nn.Module:
        """A GPT over ASCII characters."""
        return GPT(vocabulary=128, context=self.context, width=128, layers=4, heads=4)
