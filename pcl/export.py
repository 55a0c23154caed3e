"""Write the backbone of a checkpoint, without its fc, where other libraries read it; the ending of OUT says for which:

python -m pcl.checkpoint export CHECKPOINT OUT.pth          # a torchvision state dict
python -m pcl.checkpoint export CHECKPOINT OUT.safetensors  # the same, as safetensors
python -m pcl.checkpoint export CHECKPOINT OUT.pkl          # a ResNet for detectron2
python -m pcl.checkpoint export CHECKPOINT OUT/             # a folder for timm and Hugging Face
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pcl.checkpoint import CheckpointError, load_backbone, save
from pcl.errors import USER_ERRORS, reason_of
from pcl.networks import architectures, has_small_stem
from pcl.terminal import printable, tell


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m pcl.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser("export", help="write a torchvision backbone")
    command.add_argument("checkpoint", type=Path, help="of main_pcl.py, a released one of PCL, or a torchvision state dict")
    command.add_argument("out", type=Path, help="the file to write; not there yet")
    command.add_argument("-a", "--arch", choices=architectures(), metavar="NAME", help="by default the one that the file names")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    try:
        if args.out.exists() or not args.out.parent.is_dir():
            raise CheckpointError(f"{args.out}: exists already, or its folder does not; name another file")
        network, arch = load_backbone(args.checkpoint, args.arch)
        save(args.out, network.state_dict())
    except USER_ERRORS as error:
        parser.exit(2, f"{parser.prog}: error: {printable(reason_of(error))}\n")
    tell(f"{args.out}: {arch} without its fc. To load it:")
    tell(f"  network = torchvision.models.{arch}()")
    if has_small_stem(arch, network.state_dict()):
        tell("  network.maxpool = torch.nn.Identity()  # it was trained with --small-stem")
        tell(f"  network.conv1 = torch.nn.{network.conv1}")
    tell(f'  network.load_state_dict(torch.load("{args.out}", weights_only=True), strict=False)  # fc stays random')
