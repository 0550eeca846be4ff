# SPDX-License-Identifier: Apache-2.0
"""The built-in workloads, one file each."""

from parabola.lab.workload import Workload
from parabola.lab.workloads.cifar10_resnet import Cifar10ResNet
from parabola.lab.workloads.digits import Digits
from parabola.lab.workloads.mnist_autoencoder import MnistAutoencoder
from parabola.lab.workloads.shakespeare_lm import ShakespeareLM
from parabola.lab.workloads.spiked_regression import SpikedRegression
from parabola.lab.workloads.stdlib_lm import StdlibLM

WORKLOADS: dict[str, type[Workload]] = {
    workload.name: workload
    for workload in (
        *(Digits, SpikedRegression, StdlibLM),
        *(MnistAutoencoder, ShakespeareLM, Cifar10ResNet),
    )
}
