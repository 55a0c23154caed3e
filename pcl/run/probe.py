"""What a linear probe opens and saves: a head for each learning rate, and the files of each."""

import copy
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcl import checkpoint
from pcl.distributed import is_main
from pcl.errors import RunError
from pcl.run import inputs
from pcl.run.preflight import Plan

RESULTS = Path("Linear_eval")  # as published
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"


@dataclass
class Head:
    """A classifier that is trained at a learning rate of its own."""

    lr: float
    folder: Path  # of its checkpoints
    layer: nn.Linear  # (B, C) -> (B, classes)
    mark: str = ""  # ends the names of its values, such as "_0.3"; empty for a single head
    epoch: int = 0  # the next to train, from 0
    state: dict[str, Any] | None = None  # the checkpoint to go on from
    history: list[dict[str, float]] = field(default_factory=list)  # a record for each epoch
    network: nn.Module = field(init=False)  # what is trained: the layer, or the backbone and the layer
    optimizer: torch.optim.Optimizer = field(init=False)

    def settings(self, args: Namespace, plan: Plan) -> dict[str, str]:
        """What its checkpoint keeps of the run; the same as of a run with this learning rate alone."""
        return plan.settings(args) | {"lr": str(self.lr)}


@dataclass
class Probe:
    """A network and the heads on its features."""

    backbone: nn.Module  # (B, 3, H, W) -> (B, C)
    heads: list[Head]
    source: dict[str, str]  # where the backbone comes from


def places_of(args: Namespace) -> list[tuple[str, Path, str]]:
    """Of each head the name, the folder of its checkpoints, and the checkpoint to go on from; empty if there is none.

    Names are such as "0.3" and "5"; of a single learning rate "", whose files and values bear no mark.
    """
    names = [str(lr).removesuffix(".0") for lr in args.lr] if len(args.lr) > 1 else [""]
    folders = [RESULTS / args.id / f"lr_{name}" if name else RESULTS / args.id for name in names]
    paths = [str(args.resume or "")] * len(names)
    if args.resume == "auto":
        paths = [str(folder / LAST) if (folder / LAST).exists() else "" for folder in folders]
    return list(zip(names, folders, paths, strict=True))


def open_probe(args: Namespace, classes: list[str]) -> Probe:
    """New heads on the backbone that the options name, or those to go on from; CheckpointError if a file does not fit."""
    places = places_of(args)
    paths = [path for _, _, path in places]
    if args.pretrained or not all(paths):  # first, so that new heads begin alike beside those to go on from and without them
        backbone, source = inputs.open_backbone(args)
        with torch.no_grad():  # a copy without numbers takes no time, however large the images are
            images = torch.zeros(1, 3, args.image_size, args.image_size, device="meta")
            size = copy.deepcopy(backbone).to("meta")(images).shape[1]
        layer = nn.Linear(size, len(classes))
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    loaded = {path: _load(path, args, classes) for path in paths if path}
    for i, (path, (network, _, state)) in enumerate(loaded.items()):
        if not all(paths) and source["arch"] != state["arch"]:  # new heads would not fit
            held = f"{path} holds a {state['arch']}, not a {source['arch']}"
            raise checkpoint.CheckpointError(f"--resume: {held}; give --arch as before")
        frozen = not state.get("finetune")
        if frozen and (i or args.pretrained) and (changed := first_difference(network, backbone.state_dict())):
            given = "--pretrained" if args.pretrained else next(iter(loaded))
            raise checkpoint.CheckpointError(f"--resume: {path} has a different backbone from {given}: {changed}")
        backbone, source = network, state["source"]
    heads = []
    for lr, (name, folder, path) in zip(args.lr, places, strict=True):
        head = Head(lr, folder, layer=loaded[path][1] if path else copy.deepcopy(layer), mark=f"_{name}" if name else "")
        head.state = loaded[path][2] if path else None
        head.epoch = head.state["epoch"] if head.state else args.start_epoch
        head.history = list(head.state["history"]) if head.state else []
        heads.append(head)
    return Probe(backbone, heads, source)


def _load(path: str, args: Namespace, classes: list[str]) -> tuple[nn.Module, nn.Linear, dict[str, Any]]:
    """Backbone, head and fields of a probe's checkpoint."""
    try:
        network, state = checkpoint.load_probe(path)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"--resume: {error}") from error
    layer: nn.Linear = network.fc  # type: ignore[assignment]
    network.fc = nn.Identity()
    if args.arch not in (None, state["arch"]):
        raise checkpoint.CheckpointError(f"--resume: {path} holds a {state['arch']}, not a {args.arch}")
    if state["classes"] != classes:
        raise checkpoint.CheckpointError(f"--resume: {path} was trained on other classes than those of {args.data}")
    if bool(state.get("finetune")) != args.finetune and not args.evaluate:
        found = "a linear probe; leave --finetune out" if args.finetune else "a fine-tuned network; give --finetune"
        raise checkpoint.CheckpointError(f"--resume: {path} holds {found}")
    return network, layer, state


def first_difference(network: nn.Module, expected: dict[str, Tensor]) -> str | None:
    """The first weight or BatchNorm statistic that is not equal to the bit, named."""
    for name, value in network.state_dict().items():
        if name not in expected or not torch.equal(value, expected[name]):
            return f"{name} differs"
    return None


def save(model: Probe, head: Head, classes: list[str], args: Namespace, plan: Plan) -> None:
    """Write the head's last checkpoint, and its best if this epoch is the best so far: whole torchvision classifiers."""
    if not is_main():
        return
    network = model.backbone.state_dict() | {f"fc.{name}": value for name, value in head.layer.state_dict().items()}
    weights = {f"module.{name}": value for name, value in network.items()}
    state = {"epoch": head.epoch, "arch": model.source["arch"], "state_dict": weights, "optimizer": head.optimizer.state_dict()}
    best = max(head.history, key=lambda metrics: metrics["test_acc"])  # the first of equal ones, as published
    state |= {"history": head.history, "best_acc1": best["test_acc"]}
    state |= {"classes": classes, "source": model.source, "finetune": args.finetune}
    state |= {"seed": plan.seed, "deterministic": plan.deterministic, "args": head.settings(args, plan)}
    head.folder.mkdir(exist_ok=True)
    if head.history[-1] is best:  # first, so that a run stopped in between repeats the epoch
        checkpoint.save(head.folder / BEST, state)
    checkpoint.save(head.folder / LAST, state)


def check_other_run(args: Namespace) -> None:
    """RunError if --id holds a run that is not to be resumed, or one of other learning rates; repeated under the lock."""
    folder = RESULTS / args.id
    goes_on = args.resume and (args.resume == "auto" or Path(args.resume).resolve() == (folder / LAST).resolve())
    if not (goes_on or args.evaluate) and folder.is_dir() and {path.name for path in folder.iterdir()} - {".lock"}:
        remedy = "" if args.pixels else ", or go on with it (--resume auto)"
        raise RunError(f"--id {args.id}: {folder} holds another run; name another{remedy}")
    if args.resume == "auto" and ((folder / LAST).exists() if len(args.lr) > 1 else [*folder.glob("lr_*")]):
        held = "one learning rate" if len(args.lr) > 1 else "several learning rates"
        raise RunError(f"--lr: {folder} holds a probe of {held}; give --lr as before, or name another --id")
