"""torchvision's networks with an `fc` head, and the small stem for small images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NO_SMALL_STEM = "--small-stem: {} does not begin with a convolution and a max-pool; take a resnet, resnext or wide_resnet"


def architectures() -> list[str]:
    """Names of torchvision's classifiers whose only head is a linear layer called `fc`."""
    families = ("regnet", "resnet", "resnext", "shufflenet", "wide_resnet")
    return [name for name in torchvision.models.list_models(module=torchvision.models) if name.startswith(families)]


def new_network(arch: str, small_stem: bool = False, num_classes: int = 1000) -> nn.Module:
    """A torchvision network of one of `architectures`, with random weights and `num_classes` outputs.

    The small stem is for images of at most 64 pixels, which a ResNet would halve twice before its first block: a first
    convolution of 3x3 with stride 1, no max-pool (He et al. 2016, section 4.2).
    """
    if small_stem and not takes_small_stem(arch):
        raise ValueError(NO_SMALL_STEM.format(arch))
    network = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    if small_stem:
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        network.maxpool = nn.Identity()
    return network


def backbone(arch: str, small_stem: bool = False) -> nn.Module:
    """`new_network` without its head (`fc` is the identity), in eval mode."""
    network = new_network(arch, small_stem)
    network.fc = nn.Identity()
    return network.eval()


def takes_small_stem(arch: str) -> bool:
    """Whether the architecture can have a small stem: it begins with one convolution and a max-pool."""
    return arch.startswith(("resnet", "resnext", "wide_resnet"))


def has_small_stem(arch: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a network with these weights has a small stem."""
    return takes_small_stem(arch) and "conv1.weight" in weights and weights["conv1.weight"].shape[2:] == (3, 3)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Build networks on the meta device: they have shapes but no numbers, and take neither time nor memory."""
    with torch.device("meta"), _ArithmeticOnCPU():
        yield


class _ArithmeticOnCPU(TorchFunctionMode):
    """torchvision computes a RegNet's widths with tensors, and needs their numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "cpu"} if func in (torch.arange, torch.tensor) else {}))
