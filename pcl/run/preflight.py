"""What is checked before a process is started or a file written, and `Plan`: what that finds out."""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pcl import checkpoint
from pcl.builder import MoCo
from pcl.cli import Parser
from pcl.errors import RunError
from pcl.run import kept
from pcl.run.logs import log
from pcl.run.rendezvous import Place, place_of
from pcl.terminal import warn

# Options that are not compared when a run is resumed: without effect on what it learns, or checked elsewhere (data, arch).
INDIFFERENT = {
    "data", "fit", "init", "skip_unreadable", "workers", "print_freq", "resume", "start_epoch", "arch", "small_stem",
    "pretrained", "random_init", "pixels", "nproc", "gpu", "world_size", "rank", "local_rank", "dist_url",
    "dist_backend", "dist_timeout", "multiprocessing_distributed", "exp_dir", "save_freq", "save_steps", "keep",
    "keep_every", "monitor_freq", "evaluate", "id", "output",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What was found out before a run, beside the options as they were given."""

    place: Place = field(default_factory=Place)
    batch: int = 1  # images in a step of one process
    workers: int = 0  # loader processes of one process
    seed: int | None = None  # base of the random seeds; None: to be drawn
    deterministic: bool = False  # a seed was given
    images: Path = Path()  # the folder of the training images
    num_images: int = 0
    files: str = ""  # number and fingerprint of the images
    unreadable: Mapping[str, str] = field(default_factory=dict)  # images to leave out: path and reason
    resume: str = ""  # the checkpoint to go on from
    epoch: int = 0  # where this process begins: epoch and step, both from 0
    step: int = 0

    @property
    def global_batch(self) -> int:
        """Images in a step over all ranks."""
        return self.batch * self.place.world

    def settings(self, args: Namespace) -> dict[str, str]:
        """What a checkpoint keeps in its field "args", to be compared when the run is resumed."""
        found = {"seed": self.seed, "files": self.files, "processes": self.place.world}
        return {name: str(value) for name, value in {**vars(args), **found}.items()}


def note_changes(state: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Say which settings are not those of the run that wrote a checkpoint."""
    before = state.get("args")
    if not isinstance(before, dict):  # the published program keeps none
        return
    for name, value in now.items():
        if name not in INDIFFERENT and name in before and before[name] != value:
            option = name if name in ("files", "processes") else f"--{name.replace('_', '-')}"
            log(f"note: {option} {value}, before {before[name]}")


def check_launch(parser: Parser, args: Namespace) -> Plan:
    """Stop on impossible processes, machines or batches; return a plan with processes, batch and seed."""
    wrong_address = f"--dist-url {args.dist_url}: give tcp://HOST:PORT, the address of node 0"
    if args.dist_url and args.dist_url != "env://" and not is_address(args.dist_url):  # env:// is a launcher's address
        parser.error(wrong_address)
    with parser.telling(2):
        place = place_of(args)
    gpus, nproc = torch.cuda.device_count(), place.local_world
    for wrong, message in (
        (gpus and not torch.cuda.is_available(),
         f"torch {torch.__version__} cannot use the {gpus} GPUs of this machine: install a newer driver or an older torch, or "
         "hide them (CUDA_VISIBLE_DEVICES=) to use the CPU"),
        (args.gpu is not None and args.gpu >= gpus,
         f"--gpu {args.gpu}: this machine shows {gpus} GPUs; leave the option out to use what there is"),
        (args.gpu is not None and (args.nproc or 1) > 1,
         f"--gpu trains on one GPU: leave it out with --nproc {args.nproc}"),
        (not place.spawns and (args.nproc is not None or args.gpu is not None),
         "--nproc and --gpu: the launcher that started this process decides that; leave them out"),
        (place.spawns and getattr(args, "local_rank", False),
         "--local-rank: a launcher sets LOCAL_RANK, RANK and WORLD_SIZE too; start with torchrun"),
        (place.spawns and gpus and nproc > gpus and args.dist_backend == "nccl",
         f"--nproc: {nproc} processes for {gpus} GPUs; start fewer, give --dist-backend gloo, or hide the GPUs "
         "(CUDA_VISIBLE_DEVICES=) to use the CPU"),
        (place.spawns and args.rank >= args.world_size,
         f"--rank {args.rank}: the nodes of --world-size {args.world_size} are 0 to {args.world_size - 1}"),
        (place.spawns and args.world_size > 1 and not args.dist_url,
         "--world-size: several nodes need --dist-url tcp://HOST:PORT, the address of node 0"),
        (place.spawns and args.dist_url == "env://", wrong_address),
        (args.batch_size % nproc,
         f"--batch-size {args.batch_size}: it is not divisible by the {nproc} processes of this node; "
         f"try {max(args.batch_size - args.batch_size % nproc, nproc)}"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)
    workers = place.cores if args.workers is None else -(-args.workers // nproc)
    return Plan(place, args.batch_size // nproc, workers, args.seed, args.seed is not None)


def is_address(url: str) -> bool:
    """Whether it is tcp://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as a connection does; UnicodeError is a ValueError
        return parts.scheme == "tcp" and bool(host) and bool(parts.port) and url.isprintable() and " " not in url
    except ValueError:
        return False


def check_output(parser: Parser, args: Namespace) -> None:
    """Stop if the result could not be written after all the work."""
    if not args.output:
        return
    if args.output.is_symlink() and not args.output.resolve().parent.is_dir():
        parser.error(f"--output {args.output}: a broken link; name another file")
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file")
    if args.output.exists() and not os.access(args.output, os.W_OK):
        parser.error(f"--output: no permission to write {args.output}; name another file")
    if args.output.is_file():
        with args.output.open("rb") as file:
            if file.read(1) not in (b"", b"{"):  # a checkpoint, say
                parser.error(f"--output {args.output} exists and holds no results; name another file")
    check_folder(parser, "--output", args.output.parent)


def check_folder(parser: Parser, option: str, folder: Path) -> None:
    """Stop if nothing could be written into a folder, which a run makes if need be."""
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        parser.error(f"{option}: {place} is not a folder; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        parser.error(f"{option}: no permission to write into {place}; name another folder")


def check_memory(parser: Parser, option: str, numbers: int, what: str) -> None:
    """Stop if so many float32 numbers are more than this machine could ever hold."""
    need, have = 4 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        parser.error(f"{option}: {what} would take {need / 1e9:.0f} GB, this machine has {have / 1e9:.0f}; lower it")


def check_image_size(parser: Parser, args: Namespace, images: int, rows: int) -> None:
    """Stop if no memory could hold a step's images (of `images` in all), or with --pixels this many rows of features."""
    size, pixels = f"--image-size {args.image_size}", 3 * args.image_size**2
    batch = min(args.batch_size, images)
    check_memory(parser, size, batch * pixels, f"{batch} images in a step (--batch-size)")
    if args.pixels:
        check_memory(parser, size, rows * pixels, "--pixels")


def check_number(parser: Parser, args: Namespace, plan: Plan) -> None:
    """Stop if there are fewer images than a batch or the clusters need."""
    num_images = plan.num_images
    if num_images < plan.global_batch:
        parser.error(f"--batch-size: {plan.global_batch} images in a step, but {plan.images} holds {num_images}; lower it")
    most = max(args.num_cluster)
    if args.warmup_epoch < args.epochs and most > num_images:
        parser.error(f"--num-cluster {most}: more clusters than the {num_images} images; lower it, or let --fit choose")


def check_lone_image(parser: Parser, args: Namespace, plan: Plan, model: MoCo) -> None:
    """Stop if BatchNorm gets one number of a channel, where a process has one image in a step; `model` is on "meta"."""
    try:
        if plan.batch == 1:
            model.encoder_q(torch.empty(1, 3, args.image_size, args.image_size, device="meta"))
    except ValueError:
        remedy = f"give -b {2 * plan.place.local_world} or more, or a larger --image-size"
        parser.error(f"--batch-size {args.batch_size}: BatchNorm needs more than one image in a process's step; {remedy}")


def find_run(parser: Parser, args: Namespace, plan: Plan, model: MoCo) -> tuple[Plan, dict[str, Any] | None]:
    """Load the checkpoint to resume from, if any, into the model; return the plan with its epoch and seed, and its contents."""
    notes: list[str] = []
    resume = args.resume or ""
    if args.init and resume not in ("", "auto"):
        parser.error("--init begins a new run, --resume goes on with one; leave one out")
    if resume == "auto":
        resume = str(kept.newest(args.exp_dir, notes.append) or "")
        if notes and not resume:
            parser.error(f"--resume auto: no checkpoint of {args.exp_dir} can be opened; move them away to start over")
    plan = replace(plan, resume=resume, epoch=args.start_epoch)
    try:
        state = checkpoint.load_for_resume(resume, model, args.arch) if resume else None
        check_other_run(args, plan)
        if args.init and not resume:
            checkpoint.load_init(args.init, model, args.arch)
    except checkpoint.CheckpointError as error:
        parser.error(f"{'--resume' if resume else '--init'}: {error}")
    if state:
        plan = replace(plan, epoch=state["epoch"])
        if plan.epoch >= args.epochs and args.resume != "auto":
            parser.error(f"--resume: {resume} has {plan.epoch} epochs; raise --epochs above that to go on")
        if args.seed is None:
            plan = replace(plan, seed=state["seed"], deterministic=state["deterministic"])
    elif plan.epoch >= args.epochs:
        parser.error(f"--start-epoch {plan.epoch}: the epochs of --epochs {args.epochs} are 0 to {args.epochs - 1}")
    for note in notes if plan.place.rank == 0 else []:  # printed last: an error must be the only line
        warn(note)
    return plan, state


def check_other_run(args: Namespace, plan: Plan) -> None:
    """RunError if --exp-dir holds a run that is not to be resumed, or one further than --resume; repeated under the lock."""
    folder = f"--exp-dir {args.exp_dir}"
    if args.resume == "auto":
        return
    if not plan.resume:
        if [*args.exp_dir.glob("log.jsonl"), *args.exp_dir.glob("checkpoint_*")]:
            raise RunError(f"{folder} holds another run; name another folder, or go on with it (--resume auto)")
    elif (newest := kept.newest(args.exp_dir)) and newest.resolve() != Path(plan.resume).resolve():
        raise RunError(f"--resume: {folder} holds a newer checkpoint, {newest.name}; move it away, or name another folder")
