"""Checks before anything starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

import torch

from pcl.errors import RunError
from pcl.run.options import Parser
from pcl.run.rendezvous import launched_outside, local_processes, own_processes


def check_output(parser: Parser, args: argparse.Namespace) -> None:
    """Stop if the result could not be written after all the work."""
    if args.output and args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file")
    if args.output:
        check_folder(parser, "--output", args.output.parent)


def check_folder(parser: Parser, option: str, folder: Path) -> None:
    """Stop if nothing could be written into a folder, which a run makes if need be."""
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        parser.error(f"{option}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        parser.error(f"{option}: no right to write into {place}; name another folder")


def check_memory(parser: Parser, option: str, numbers: int, what: str) -> None:
    """Stop if so many float32 numbers are more than this machine could ever hold."""
    need, have = 4 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        parser.error(f"{option}: {what} would take {need / 1e9:.0f} GB, this machine has {have / 1e9:.0f}; lower it")


def check_image_size(parser: Parser, args: argparse.Namespace, images: int, rows: int) -> None:
    """Stop if no memory could hold a step's images (of `images` in all), or with --pixels this many rows of features."""
    size, pixels = f"--image-size {args.image_size}", 3 * args.image_size**2
    batch = min(args.batch_size, images)
    check_memory(parser, size, batch * pixels, f"{batch} images in a step (--batch-size)")
    if args.pixels:
        check_memory(parser, size, rows * pixels, "--pixels")


def check_launch(parser: Parser, args: argparse.Namespace) -> None:
    """Stop on options that name processes or machines that cannot be; note whether a seed asks for a run that repeats."""
    args.deterministic = args.seed is not None
    wrong_address = f"--dist-url {args.dist_url}: give tcp://HOST:PORT, the address of node 0"
    if args.dist_url and args.dist_url != "env://" and not is_address(args.dist_url):  # env:// is a launcher's address
        parser.error(wrong_address)
    try:
        outside = launched_outside(args)
    except RunError as error:
        parser.error(str(error))
    gpus, nproc = torch.cuda.device_count(), own_processes(args)
    if outside and outside.is_task and outside.local_world == 1 and nproc > 1:
        # srun has started one task on each node, and the task starts the node's processes.
        args.rank, args.world_size, args.dist_url = outside.rank, outside.world, f"tcp://{outside.host}:{outside.port}"
        outside = None
    if args.gpu is not None and args.gpu >= gpus:
        parser.error(f"--gpu {args.gpu}: this machine shows {gpus} GPUs; leave the option out to use what there is")
    if args.gpu is not None and (args.nproc or 1) > 1:
        parser.error(f"--gpu trains on one GPU: leave it out with --nproc {args.nproc}")
    if outside:
        if args.nproc is not None or args.gpu is not None:
            parser.error("--nproc and --gpu: the launcher that started this process decides that; leave them out")
        return
    if getattr(args, "local_rank", 0):
        parser.error(
            f"--local-rank {args.local_rank}: a launcher sets LOCAL_RANK, RANK and WORLD_SIZE too; start with torchrun"
        )
    if gpus and nproc > gpus and args.dist_backend == "nccl":
        remedy = "start fewer, give --dist-backend gloo, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU"
        parser.error(f"--nproc: {nproc} processes for {gpus} GPUs; {remedy}")
    if args.rank >= args.world_size:
        parser.error(f"--rank {args.rank}: the nodes of --world-size {args.world_size} are 0 to {args.world_size - 1}")
    if args.world_size > 1 and not args.dist_url:
        parser.error("--world-size: several nodes need --dist-url tcp://HOST:PORT, the address of node 0")
    if args.dist_url == "env://":
        parser.error(wrong_address)


def is_address(url: str) -> bool:
    """Whether it is tcp://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as a connection does; UnicodeError is a ValueError
        return parts.scheme == "tcp" and bool(host) and bool(parts.port) and url.isprintable() and " " not in url
    except ValueError:
        return False


def check_batch(parser: Parser, args: argparse.Namespace) -> None:
    """Stop unless this node's processes divide its batch evenly."""
    nproc = local_processes(args)
    if args.batch_size % nproc:
        lower = max(args.batch_size - args.batch_size % nproc, nproc)
        parser.error(f"--batch-size {args.batch_size}: the {nproc} processes of this node do not divide it; try {lower}")
