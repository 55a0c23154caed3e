"""Checkpoints: written whole or not at all, opened without running code, loaded with exact keys.

The backbone of one, as a state dict of torchvision without its fc:

    python -m pcl.checkpoint export CHECKPOINT OUT.pth
"""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcl.errors import USER_ERRORS, RunError, reason_of
from pcl.networks import architectures, backbone, has_small_stem, new_network
from pcl.terminal import leave_on_signals, printable, tell

NAMES = "checkpoint_*.pth.tar"  # in a run's folder: those of finished epochs by number, and the last one
LAST = "checkpoint_last.pth.tar"
LAST_E_STEP = "e_step.pth.tar"  # in the same folder, for pcl.figures


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged or of something else; the message names it and what is wrong."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` such that, whenever the machine stops, the old file or the new one is there, whole.

    Raises:
        RunError: a full disk, a read-only folder; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.part")  # what a killed process leaves is overwritten the next time
    try:
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        # torch tells of a full disk by a RuntimeError of its own, raised while the one of the disk is handled.
        if isinstance(error, OSError | RuntimeError):
            cause = error if isinstance(error, OSError) else error.__context__ or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise RunError(f"{path} cannot be written: {reason}; what was saved before is whole") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make sure that a renamed file keeps its new name if the power fails, where the file system can do that for a folder."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def newest(folder: Path, tell: Callable[[str], Any] = str) -> Path | None:
    """The checkpoint in a run's folder from which least is to be done; None without any.

    One that cannot be opened is passed over, of which `tell` is given a line. Those before the newest numbered one are not
    opened: a file is read whole to find damage.
    """
    found = []
    for number, path in sorted(_numbered(folder), reverse=True):
        try:
            state = load(path, map_location="meta")
        except CheckpointError as error:
            tell(f"passed over: {error}")
            continue
        epoch, steps = state.get("epoch"), state.get("steps", 0)
        if is_count(epoch) and is_count(steps):
            found.append((epoch, steps, path))
            if number < math.inf:
                break
    return max(found)[2] if found else None


def save_numbered(folder: Path, state: Mapping[str, Any], keep: int, keep_every: int) -> None:
    """Save a finished epoch's checkpoint under its number, in place of the last one; `prune` the others."""
    save(folder / f"checkpoint_{state['epoch'] - 1:04d}.pth.tar", state)
    (folder / LAST).unlink(missing_ok=True)
    prune(folder, keep, keep_every)


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove the numbered checkpoints of a run but for the `keep` newest (0: all), and those of each `keep_every`-th epoch."""
    numbered = sorted((number, path) for number, path in _numbered(folder) if number < math.inf)
    for epoch, path in numbered[:-keep] if keep else []:
        if not keep_every or (epoch + 1) % keep_every:
            path.unlink()


def _numbered(folder: Path) -> list[tuple[float, Path]]:
    """The checkpoints in a run's folder with their numbers; infinity where the name has none."""
    found = [(re.search(r"_(\d+)\.pth", path.name), path) for path in folder.glob(NAMES)]
    return [(int(match[1]) if match else math.inf, path) for match, path in found]


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary in a checkpoint; nothing in the file is run.

    Raises:
        CheckpointError: no such file, or not a checkpoint that opens with `weights_only=True`.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: {'this is a folder; name a file' if Path(path).is_dir() else 'no such file'}")
    try:
        _check_records(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what looks like a file of another kind, which the error tells too
            state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for a damaged or unsafe file
        raise CheckpointError(f"{path} is not a checkpoint that can be opened safely: {_reason(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the dictionary of a checkpoint")
    return state


def _check_records(path: Path) -> None:
    """Find damage, which torch does not look for, and records that would need more memory than the file has bytes.

    Raises:
        ValueError: a record is damaged, compressed or overlaps another one.
        Exception: of many kinds, what is no whole ZIP archive. A file that does not begin like one (torch before 1.6) passes.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("its records are compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its records are larger than the file")
            # With torch.serialization.set_crc32_options(False), no record has a checksum.
            if any(record.CRC for record in records) and (damaged := archive.testzip()):
                raise ValueError(f"it is damaged in {damaged}")


def _reason(error: Exception) -> str:
    """The first sentence of what torch found, without its advice to open the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].partition(". ")[0]


def load_for_resume(path: str | Path, model: nn.Module, arch: str) -> dict[str, Any]:
    """A pre-training checkpoint, whose weights are loaded into the model that is to go on from it.

    Args:
        path: the file.
        model: as it will be trained (on any device, "meta" too), without DistributedDataParallel around it.
        arch: its architecture's name.

    Raises:
        CheckpointError: also where architecture, keys or shapes differ, weights are not finite, or a field is nothing that
            a run writes.
    """
    # The published program writes the first four alone.
    state = {"seed": None, "deterministic": False, "steps": 0} | load(path)
    published = {"epoch": is_count, "arch": is_text, "state_dict": is_anything, "optimizer": is_dict}
    _check_fields(f"{path} is no checkpoint of a run to resume", state, {**published, **REPEATABLE, "steps": is_count})
    if state["arch"] != arch:
        raise CheckpointError(f"{path} holds a {state['arch']}, not a {arch}: give --arch {state['arch']}")
    weights = _weights(path, state["state_dict"])
    _load_exactly(path, model, weights, "the options (--mlp, --low-dim, --pcl-r, --small-stem?)")
    _check_optimizer(path, state["optimizer"], model.parameters())
    return state


def load_backbone(path: str | Path, arch: str | None = None) -> tuple[nn.Module, str]:
    """The query encoder of a checkpoint as a torchvision network without its head (`fc` is the identity), in eval mode.

    Args:
        path: a checkpoint of this project or the published one, its keys with or without `module.`, with the v1 or the
            v2 head; or a torchvision state dict.
        arch: its architecture; by default the one that the file names.

    Returns:
        the network and the name of its architecture.

    Raises:
        CheckpointError: also where a key of the backbone is missing or left over, or a weight is not finite: never random
            weights.
    """
    state = load(path)
    arch = arch or state.get("arch")
    if arch not in architectures():
        raise CheckpointError(f"{path}: architecture {arch} is not one of those offered; name it with --arch")
    weights = _weights(path, state.get("state_dict", state.get("model", state)))
    if any(name.startswith("encoder_q.") for name in weights):
        weights = {n.removeprefix("encoder_q."): v for n, v in weights.items() if n.startswith("encoder_q.")}
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    network = backbone(arch, has_small_stem(arch, weights))
    _load_exactly(path, network, weights, arch)
    return network, arch


def trained_at(path: str | Path) -> int | None:
    """The side in pixels of the views that a backbone was trained on, if its checkpoint tells."""
    settings = load(path, map_location="meta").get("args")
    size = str(settings.get("image_size")) if isinstance(settings, dict) else ""
    return int(size) if re.fullmatch("[0-9]{1,9}", size) else None


def load_probe(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A linear probe as `eval_cls_imagenet.py` saves it.

    Returns:
        the torchvision network with its trained head `fc`, in eval mode, and all that the file holds.

    Raises:
        CheckpointError: the file is something else.
    """
    state = load(path)
    fields = {
        "epoch": is_count,
        "arch": is_text,
        "state_dict": is_anything,
        "optimizer": is_dict,
        "classes": is_list_of(is_text),
    }
    fields |= {**REPEATABLE, "source": is_dict, "history": is_list_of(is_dict)}
    _check_fields(f"{path} is no checkpoint of a linear probe", state, fields)
    if state["arch"] not in architectures():
        raise CheckpointError(f"{path}: a probe of {state['arch']} cannot be opened again")
    weights = _weights(path, state["state_dict"])
    network = new_network(state["arch"], has_small_stem(state["arch"], weights), num_classes=len(state["classes"])).eval()
    _load_exactly(path, network, weights, f"{state['arch']} with {len(state['classes'])} classes")
    _check_optimizer(path, state["optimizer"], network.get_submodule("fc").parameters())
    return network, state


def is_anything(value: Any) -> bool:
    """For what is looked into elsewhere."""
    return True


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_dict(value: Any) -> bool:
    """Whether it is a dictionary whose keys are all strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The question whether it is a list, and `holds` of each element."""
    return lambda value: isinstance(value, list) and all(map(holds, value))


def is_seed(value: Any) -> bool:
    """Whether a run's seed can be so; one that was not given is None."""
    return value is None or (is_count(value) and value < 2**32)


REPEATABLE: dict[str, Callable[[Any], bool]] = {"seed": is_seed, "deterministic": lambda value: isinstance(value, bool)}


def _check_fields(message: str, state: Mapping[str, Any], fields: Mapping[str, Callable[[Any], bool]]) -> None:
    missing = [name for name in fields if name not in state]
    if missing:
        raise CheckpointError(f"{message}: it has no {', '.join(missing)}")
    wrong = [name for name, holds in fields.items() if not holds(state[name])]
    if wrong:
        raise CheckpointError(f"{message}: its {', '.join(wrong)} cannot be right")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Go on from a saved optimizer's momentum; learning rate, weight decay and the like stay as they are."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def _check_optimizer(path: str | Path, saved: dict[str, Any], parameters: Iterable[Tensor]) -> None:
    """A step with tensors that hold no numbers takes no time, and fails where a step of the run would."""
    hollow = [torch.empty_like(parameter, device="meta", requires_grad=True) for parameter in parameters]
    try:
        optimizer = torch.optim.SGD(hollow, lr=1.0)
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["fused"] = False  # which needs numbers
        for parameter in hollow:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        momentum = {f"momentum {n}": v for n, one in saved["state"].items() for v in one.values() if isinstance(v, Tensor)}
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{path}: its optimizer is not one of SGD over this model's weights") from error
    _check_finite(path, momentum)


def _load_exactly(path: str | Path, network: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load what torch takes with `strict=True`: without `num_batches_tracked`, for one, which old files lack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network without numbers, which stays so
            network.load_state_dict(weights)
    except Exception as error:  # of many kinds: tensors without numbers, of no floating-point kind, ..
        expected = network.state_dict()
        missing = [n for n in expected.keys() - weights.keys() if not n.endswith("num_batches_tracked")]
        differ = [n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape]
        shapes = [f"{n}: {tuple(weights[n].shape)} in the file, {tuple(expected[n].shape)} in the model" for n in differ]
        reasons = {"missing": missing, "unexpected": weights.keys() - expected.keys(), "of another shape": shapes}
        told = "; ".join(f"{kind} {_some(sorted(names))}" for kind, names in reasons.items() if names)
        raise CheckpointError(f"{path} does not fit {what}: {told or str(error).splitlines()[-1].strip()}") from error
    _check_finite(path, weights)


def _check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, value in tensors.items() if value.is_meta or not value.float().isfinite().all()]:
        raise CheckpointError(
            f"{path}: not all numbers of {_some(wrong)} are finite, as in a run that has failed; name another"
        )


def _weights(path: str | Path, found: Any) -> dict[str, Tensor]:
    """A state dict whose names have no `module.` in front."""
    if isinstance(found, dict) and all(isinstance(n, str) and _is_plain(v) for n, v in found.items()):
        return {name.removeprefix("module."): value for name, value in found.items()}
    raise CheckpointError(f"{path} holds neither a pre-training checkpoint nor a state dict")


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that can be copied into a weight."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_complex() or value.is_quantized)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


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


if __name__ == "__main__":
    with leave_on_signals():
        main()
