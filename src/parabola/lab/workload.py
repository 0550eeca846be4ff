# SPDX-License-Identifier: Apache-2.0
"""What a workload is: a model, a stream of batches, a loss, and a metric with a target.

A workload says nothing about optimizers except which settings suit them, so that every optimizer
sees the same initial weights, the same batches and the same learning-rate schedule.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from parabola.lab.schedules import warmup_linear


class Setting(NamedTuple):
    """Hyperparameters of one optimizer on one workload.

    Attributes:
        options: Keyword arguments of the optimizer, as the optimizer table of the lab takes them.
        tuned: How these values were found, in a sentence; it is printed in the report.
        schedule: Name in `schedules.SCHEDULES` of a learning-rate schedule that belongs to the
            recipe behind these values. None: the workload's own, as for all others.
    """

    options: Mapping[str, Any]
    tuned: str
    schedule: str | None = None


class Workload(Protocol):
    """One training task: subclass it, or write a class that looks like it.

    The class is constructed without arguments and must be cheap to construct; `load` reads the
    data.

    Attributes:
        name: Short name, as typed on the command line.
        description: One line for people.
        metric: Key of the deciding metric in what `evaluate` returns.
        goal: ``"min"`` or ``"max"``: which direction of the metric is better.
        target: Value of the metric that counts as "trained"; time to target is measured against it.
        steps: Default training budget, in optimizer steps.
        batch_size: Samples in a batch (for the report; `batches` decides).
        settings: Hyperparameters by optimizer name. An optimizer without an entry gets the table's
            defaults.
        evaluations: How often a run is evaluated, spread evenly over its budget, the end included.
        data_files: Files under the data folder that `load` reads; empty when nothing must be
            downloaded.
    """

    name: str
    description: str
    metric: str
    goal: Literal["min", "max"]
    target: float
    steps: int
    batch_size: int
    settings: Mapping[str, Setting] = {}
    evaluations: int = 50
    data_files: ClassVar[tuple[str, ...]] = ()

    def load(self, data_dir: Path) -> None:
        """Read the data set: called once before `batches` and `evaluate`, not before `model`.

        Args:
            data_dir: The data folder (``--data-dir``, else ``$PARABOLA_DATA``, else ``./data``).

        Raises:
            MissingDataError: A file is not there.
        """

    def model(self) -> nn.Module:
        """A freshly initialized model, drawn from torch's global random state."""
        ...

    def batches(self, seed: int) -> Iterator[Any]:
        """An endless stream of training batches on the CPU, the same for the same seed.

        A batch is a tensor or a tuple, list or dict of tensors; the trainer moves it to the device.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Training loss of one batch, a scalar."""
        ...

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """All metrics of the model by name, `metric` among them (eval mode, no gradients)."""
        ...

    def schedule(self, progress: float) -> float:
        """Learning-rate factor at a point of the run, the same for every optimizer.

        Args:
            progress: Used part of the budget, strictly between 0 and 1.
        """
        return warmup_linear(progress)


@runtime_checkable
class Curved(Protocol):
    """What a workload adds for optimizers that take curvature from outside.

    Without it they take the gradient itself, the empirical Fisher.
    """

    def curvature_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A loss whose gradient is one curvature vector: `parabola.curvature.sampled_loss`.

        Its kind and its reduction are those of `loss`. The batch is not the one that is trained on.
        """
        ...
