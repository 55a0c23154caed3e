"""Checkpoints: written whole or not at all, opened without running code, loaded with exact keys.

Export a checkpoint's backbone for torchvision, without fc (`pcl.export` has further formats):

    python -m pcl.checkpoint export CHECKPOINT OUT.pth
"""

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pcl.errors import RunError
from pcl.networks import architectures, backbone, has_small_stem, new_network
from pcl.terminal import leave_on_signals

NAMES = "checkpoint_*.pth.tar"  # in a run's folder: finished epochs by number, and the last one
LAST = "checkpoint_last.pth.tar"
LAST_E_STEP = "e_step.pth.tar"  # in the same folder, for pcl.figures

# Types of the fields that `_rehearse_step` does not try. They are compared by `type`, since True is an int for `isinstance`.
TYPES: dict[str, tuple[type, ...]] = {
    **{"epoch": (int,), "steps": (int,), "seed": (int, type(None)), "deterministic": (bool,)},
    **{"classes": (list,), "source": (dict,), "history": (list,)},
}


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged or of something else; the message names it and what is wrong."""


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """`torch.save` by `write_whole`."""
    write_whole(Path(path), lambda file: torch.save(dict(state), file))


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` with a file for `path`. Whenever the machine stops, either the old file or the new one is there, whole.

    Raises:
        RunError: a full disk, a read-only folder; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.part")  # if the process is killed, the next save overwrites it
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # the new name survives a power failure, if the file system can sync a folder
            os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch raises its own RuntimeError for a full disk, while it handles the disk's OSError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise RunError(f"{path} cannot be written: {reason}; earlier files are intact") from error
    finally:
        with suppress(OSError):
            part.unlink()


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
            warnings.simplefilter("ignore")  # about files of another kind: the error says it too
            state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # of many kinds
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = text.splitlines()[0].partition(". ")[0]  # the first sentence: not torch's advice to open it unsafely
        reason += "; save its state dict alone, with torch.save, and give that" if " GLOBAL " in reason else ""
        raise CheckpointError(f"{path} is not a checkpoint that can be opened safely: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the dictionary of a checkpoint")
    return state


def _check_records(path: Path) -> None:
    """Raise ValueError on damage, and on records that would need more memory than the file has bytes; torch checks neither."""
    with path.open("rb") as file:
        if (start := file.read(4)) != b"PK\3\4":
            if start[:1] != b"\x80" and path.suffix != ".safetensors":  # how torch before 1.6 begins
                raise ValueError("it is empty, a text (a web page, a pointer of Git LFS) or an archive; give the file itself")
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            if not stored or all(record.filename.rpartition("/")[2] != "data.pkl" for record in records):
                raise ValueError("it is an archive that torch.save did not write, or that was packed anew")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its records are larger than the file")
            # There are no checksums after torch.serialization.set_crc32_options(False).
            if any(record.CRC for record in records) and (damaged := archive.testzip()):
                raise ValueError(f"it is damaged in {damaged}")


def load_for_resume(path: str | Path, model: nn.Module, arch: str) -> dict[str, Any]:
    """Load a pre-training checkpoint; its weights go into `model`, an `arch` on any device ("meta" too) without DDP around it.

    Raises:
        CheckpointError: also if architecture, keys or shapes differ, weights are not finite, or a field is wrong.
    """
    state = {"seed": None, "deterministic": False, "steps": 0} | load(path)  # the published program writes none of these
    if wrong := wrong_fields(state, ["epoch", "arch", "state_dict", "optimizer", "seed", "deterministic", "steps"]):
        raise CheckpointError(f"{path} is not a checkpoint that a run can resume from: {wrong}")
    if state["arch"] != arch:
        raise CheckpointError(f"{path} holds a {state['arch']}, not a {arch}: give --arch {state['arch']}")
    _load_exactly(path, model, weights_of(path, state), "the options (--mlp, --low-dim, --pcl-r, --small-stem?)")
    _rehearse_step(path, state["optimizer"], model.parameters())
    return state


def load_init(path: str | Path, model: Any, arch: str) -> bool:
    """Load both encoders of a new run from a checkpoint of PCL or MoCo, or from a torchvision state dict.

    Returns:
        whether the head was loaded too; one of another size keeps its random weights.

    Raises:
        CheckpointError: also if the architecture or a key or shape of the backbone differs, or a weight is not finite.
    """
    state = load(path)
    named = _named_arch(state)
    if named in architectures() and named != arch:
        raise CheckpointError(f"{path} holds a {named}, not a {arch}: give --arch {named}")
    weights, heads = weights_of(path, state), []
    for name, encoder in (("encoder_q.", model.encoder_q), ("encoder_k.", model.encoder_k)):
        # A state dict of torchvision has one network; so may a checkpoint from which the key encoder was removed.
        prefix = next((p for p in (name, "encoder_q.") if any(n.startswith(p) for n in weights)), "")
        own = {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}
        found = {n.removeprefix("fc."): own.pop(n) for n in list(own) if n.startswith("fc.")}
        head, encoder.fc = encoder.fc, nn.Identity()
        _load_exactly(path, encoder, own, f"the options (--arch {arch}, --small-stem?)")
        encoder.fc = head
        heads.append({n: v.shape for n, v in found.items()} == {n: v.shape for n, v in head.state_dict().items()})
        if heads[-1]:
            _load_exactly(path, head, found, "the head")
    return all(heads)


def load_backbone(path: str | Path, arch: str | None = None) -> tuple[nn.Module, str]:
    """The query encoder of a checkpoint as a torchvision network whose `fc` is the identity, in eval mode; its architecture.

    Args:
        path: a checkpoint of this project or the published one, its keys with or without `module.`, with the v1 or the
            v2 head; or a torchvision state dict.
        arch: its architecture; by default the one that the file names.

    Raises:
        CheckpointError: also if a key is missing or unexpected, or a weight is not finite: weights are never random.
    """
    state = load(path)
    named = _named_arch(state)
    if arch and named in architectures() and named != arch:
        raise CheckpointError(f"{path} holds a {named}, not a {arch}: leave --arch out")
    arch = arch or named
    if arch not in architectures():
        raise CheckpointError(f"{path} names {f'{arch}, which is unknown' if arch else 'no architecture'}; name it with --arch")
    weights = weights_of(path, state)
    weights = {n.removeprefix("encoder_q."): v for n, v in weights.items() if n.startswith("encoder_q.")} or weights
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    network = backbone(arch, has_small_stem(arch, weights))
    _load_exactly(path, network, weights, arch)
    return network, arch


def _named_arch(state: dict[str, Any]) -> str | None:
    return named if isinstance(named := state.get("arch"), str) else None


def trained_at(path: str | Path) -> int | None:
    """Side in pixels of the views that a backbone was trained on, if its checkpoint tells."""
    settings = load(path).get("args")
    size = str(settings.get("image_size")) if isinstance(settings, dict) else ""
    return int(size) if re.fullmatch("[0-9]{1,9}", size) else None


def load_probe(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a linear probe or fine-tuning has saved, with its head `fc`, in eval mode; the file's dictionary.

    Raises:
        CheckpointError: the file is something else.
    """
    state = load(path)
    names = ["epoch", "arch", "state_dict", "optimizer", "classes", "seed", "deterministic", "source", "history"]
    if wrong := wrong_fields(state, names):
        raise CheckpointError(f"{path} is not a checkpoint of a linear probe: {wrong}; a pre-trained one goes to --pretrained")
    arch, classes = state["arch"], state["classes"]
    if arch not in architectures():
        raise CheckpointError(f"{path}: a probe of {arch} cannot be opened again")
    weights = weights_of(path, state)
    network = new_network(arch, has_small_stem(arch, weights), num_classes=len(classes)).eval()
    _load_exactly(path, network, weights, f"{arch} with {len(classes)} classes")
    trained = network if state.get("finetune") else network.get_submodule("fc")
    _rehearse_step(path, state["optimizer"], trained.parameters())
    return network, state


def wrong_fields(state: Mapping[str, Any], names: list[str]) -> str:
    """What is wrong with these fields of a checkpoint; empty if a run can go on from them."""
    if missing := [name for name in names if name not in state]:
        return f"it has no {', '.join(missing)}"
    wrong = [name for name in names if name in TYPES and type(state[name]) not in TYPES[name]]
    wrong += [name for name in names if type(state[name]) is int and not 0 <= state[name] < 2**32]
    if not wrong and "history" in names and not all(type(r) is dict and "test_acc" in r for r in state["history"]):
        wrong.append("history")
    return f"its {', '.join(wrong)} cannot be right" if wrong else ""


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Go on from a saved optimizer's momentum; learning rate, weight decay and other options stay as they are."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():  # in the weight's own layout, which a fused step takes for granted
        state |= {name: torch.empty_like(parameter).copy_(value) for name, value in state.items() if value is not None}


def _rehearse_step(path: str | Path, saved: dict[str, Any], parameters: Iterable[Tensor]) -> None:
    """Take a step on the meta device, which takes no time and fails if a step of the run would."""
    hollow = [torch.empty_like(parameter, device="meta", requires_grad=True) for parameter in parameters]
    try:
        rest = iter(hollow)
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        optimizer = torch.optim.SGD([{"params": [*islice(rest, size)]} for size in sizes], lr=1.0)
        if any(True for _ in rest):
            raise ValueError("parameters in no group")
        optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group["fused"] = False  # fused steps need numbers
        for parameter in hollow:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        momentum = {f"momentum {n}": v for n, one in saved["state"].items() for v in one.values() if isinstance(v, Tensor)}
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{path}: its optimizer is not one of SGD over this model's weights") from error
    check_finite(path, momentum)


def _load_exactly(path: str | Path, network: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load with `strict=True`, for which torch accepts old files that lack `num_batches_tracked`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network on the meta device stays there
            network.load_state_dict(weights)
    except Exception as error:  # of many kinds
        expected = network.state_dict()
        missing = [n for n in expected.keys() - weights.keys() if not n.endswith("num_batches_tracked")]
        differ = [n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape]
        shapes = [f"{n}: {tuple(weights[n].shape)} in the file, {tuple(expected[n].shape)} in the model" for n in differ]
        reasons = {"missing": missing, "unexpected": weights.keys() - expected.keys(), "of another shape": shapes}
        told = "; ".join(f"{kind} {_some(sorted(names))}" for kind, names in reasons.items() if names)
        raise CheckpointError(f"{path} does not fit {what}: {told or str(error).splitlines()[-1].strip()}") from error
    check_finite(path, weights)


def check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, value in tensors.items() if value.is_meta or not value.float().isfinite().all()]:
        raise CheckpointError(f"{path}: not all numbers of {_some(wrong)} are finite, as after a failed run; name another")


def weights_of(path: str | Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in what `load` returns, tensors that can be copied into others, by their names in the plain module.

    That is without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add.
    """
    found = state.get("state_dict", state.get("model", state))

    def is_plain(value: Any) -> bool:
        return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_complex() or value.is_quantized)

    if not isinstance(found, dict) or not all(isinstance(name, str) and is_plain(found[name]) for name in found):
        raise CheckpointError(f"{path} holds neither a pre-training checkpoint nor a state dict")
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in found.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


if __name__ == "__main__":
    from pcl.export import main  # imports this module

    with leave_on_signals():
        main()
