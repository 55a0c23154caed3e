"""Write the backbone of a checkpoint, without its fc, for other libraries.

python -m pcl.checkpoint export CHECKPOINT OUT.pth          for torchvision
python -m pcl.checkpoint export CHECKPOINT OUT.safetensors  the same names and weights
python -m pcl.checkpoint export CHECKPOINT OUT.pkl          for detectron2
python -m pcl.checkpoint export CHECKPOINT OUT              a folder for timm and Hugging Face
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import dump  # writes only
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from pcl import cli
from pcl.augment import MEAN, STD
from pcl.checkpoint import CheckpointError, load_backbone, trained_at, write_whole
from pcl.networks import architectures, has_small_stem, takes_small_stem
from pcl.terminal import tell

Weights = dict[str, Tensor]  # of `load_backbone`: float32, and int64 counts
DETECTRON2 = {  # torchvision's names -> detectron2's, as MoCo's script converts them
    **{r"^(?!layer)": "stem.", r"bn(\d)": r"conv\1.norm", r"downsample\.0": "shortcut", r"downsample\.1": "shortcut.norm"},
    **{f"^layer{i}": f"res{i + 1}" for i in range(1, 5)},
}


def write_detectron2(weights: Weights, file: BinaryIO) -> None:
    """Write a ResNet as a pickle for detectron2's `MODEL.WEIGHTS`; this project never reads it."""
    renamed = {}
    for name, value in weights.items():
        if not name.endswith("num_batches_tracked"):
            for pattern, new in DETECTRON2.items():
                name = re.sub(pattern, new, name)
            renamed[name] = value.numpy()
    dump({"model": renamed, "__author__": "PCL", "matching_heuristics": True}, file)


WRITERS: dict[str, Callable[[Weights, BinaryIO], Any]] = {
    **{".pth": torch.save, ".pt": torch.save, ".pkl": write_detectron2},
    ".safetensors": lambda weights, file: file.write(safetensors.torch.save(weights, {"format": "pt"})),
}


def write_folder(out: Path, arch: str, weights: Weights, size: int) -> None:
    """Write a folder for timm and Hugging Face, whole or not at all, of a network that was trained at `size` pixels."""
    pretrained = {"input_size": [3, size, size], "interpolation": "bilinear", "crop_pct": 0.875, "mean": MEAN, "std": STD}
    pretrained |= {"num_classes": 0, "first_conv": "conv1", "classifier": "fc"}
    features = len(weights["layer4.0.downsample.0.weight"])
    config = {"architecture": arch, "num_classes": 0, "num_features": features, "pretrained_cfg": pretrained}
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
    part.mkdir()
    try:
        write_whole(part / "model.safetensors", lambda file: WRITERS[".safetensors"](weights, file))
        write_whole(part / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def get_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(__doc__, "python -m pcl.checkpoint")
    command = parser.add_subparsers(dest="command", required=True).add_parser("export", help="write a backbone without its fc")
    command.add_argument("checkpoint", type=cli.path, help="of main_pcl.py or of released PCL, or a torchvision state dict")
    command.add_argument("out", type=cli.path, help="a new file that ends in .pth, .safetensors or .pkl, or a new folder")
    command.add_argument("-a", "--arch", choices=architectures(), metavar="NAME", help="by default the one that the file names")
    return parser


def export(checkpoint: str | Path, out: str | Path, arch: str | None = None) -> list[str]:
    """Write a checkpoint's backbone to `out`, whose ending says for which library.

    Returns:
        lines that say how to load it.

    Raises:
        RunError: a checkpoint, an ending or an architecture that cannot be exported so; a full disk.
    """
    out = Path(out)
    if out.suffix not in (*WRITERS, "") or out.name.startswith("."):
        raise CheckpointError(f"{out}: give a name with the extension .pth, .safetensors or .pkl, or none for timm's folder")
    if out.exists() or not out.parent.is_dir():
        raise CheckpointError(f"{out}: exists already, or its folder does not; name another file")
    network, arch = load_backbone(checkpoint, arch)
    weights = network.state_dict()
    small = has_small_stem(arch, weights)
    if out.suffix in (".pkl", "") and (small or not takes_small_stem(arch)):
        stem = " with --small-stem" if small else ""
        raise CheckpointError(f"{out}: timm and detectron2 have no {arch}{stem} of these names; write .pth or .safetensors")
    lines = [f"{out}: {arch} without its fc. To load it:"]
    if not out.suffix:
        write_folder(out, arch, weights, trained_at(checkpoint) or 224)
        return [*lines, f"  network = timm.create_model({f'local-dir:{out.resolve()}'!r}, pretrained=True)"]
    write_whole(out, lambda file: WRITERS[out.suffix](weights, file))
    if out.suffix == ".pkl":
        pixels = "MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]"  # MEAN and STD of 0..255
        depth, channels = re.findall(r"\d+", arch)[0], weights["layer2.0.conv1.weight"].shape[1]
        sizes = {"DEPTH": depth, "NUM_GROUPS": network.groups, "WIDTH_PER_GROUP": network.base_width}
        sizes |= {"RES2_OUT_CHANNELS": channels, "STRIDE_IN_1X1": False}
        resnet = " ".join(f"MODEL.RESNETS.{name} {value}" for name, value in sizes.items())
        return [*lines, f"  MODEL.WEIGHTS {out} {resnet} INPUT.FORMAT RGB {pixels}"]
    lines.append(f"  network = torchvision.models.{arch}()")
    if small:
        lines.append("  network.maxpool = torch.nn.Identity()  # it was trained with --small-stem")
        lines.append(f"  network.conv1 = torch.nn.{network.conv1}")
    is_torch = WRITERS[out.suffix] is torch.save
    opened = f"torch.load({str(out)!r}, weights_only=True)" if is_torch else f"safetensors.torch.load_file({str(out)!r})"
    return [*lines, f"  network.load_state_dict({opened}, strict=False)  # fc stays random"]


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    with parser.telling(2):
        for line in export(args.checkpoint, args.out, args.arch):
            tell(line)
