"""A ResNet-8 for images of 32 pixels: runs one of the scripts with it.

    python benchmarks/resnet8.py main_pcl.py -a resnet8 [options of main_pcl.py, with --nproc 1]

The network of He et al. 2016 (https://arxiv.org/abs/1512.03385), section 4.2, with n = 1: a first convolution, and one block
each of 16, 32 and 64 channels. It has 77,000 weights and gives features of 64 numbers. Unlike there, a convolution of 1x1 leads
past a block that changes the shape, as in torchvision's networks.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import _api, resnet

ROOT = Path(__file__).resolve().parent.parent
RESNET8 = "resnet8"


class ResNet8(nn.Module):
    """(N, 3, H, W) float images to (N, num_classes) float; its layers bear the names of torchvision's ResNets."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = resnet.BasicBlock(16, 16)
        self.layer2 = resnet.BasicBlock(16, 32, stride=2, downsample=shortcut(16, 32))
        self.layer3 = resnet.BasicBlock(32, 64, stride=2, downsample=shortcut(32, 64))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def shortcut(channels: int, out_channels: int) -> nn.Sequential:
    """From the input of a block of stride 2 to its output."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels))


def build(*, weights: None = None, **options: Any) -> ResNet8:
    """As torchvision's builders."""
    return ResNet8(**options)


def register() -> None:
    """Let this process find it among torchvision's networks."""
    build.__module__ = resnet.__name__  # where torchvision looks for what it lists
    _api.BUILTIN_MODELS[RESNET8] = build


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    register()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))  # the scripts
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
