"""Measure training steps and k-means on a GPU, the published way and this project's in one run.

    python benchmarks/gpu.py                  PCL v2 at ImageNet's size; prints tables and writes benchmarks/results_gpu.md

The images are made up and lie on the GPU already, so that neither loading nor augmentation counts. The published side is a
plain transcription, in other words, of what the published program does in a step on one GPU.
"""

import argparse
import contextlib
import io
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import random_clustering
from pcl.augment import normalize
from pcl.builder import MoCo
from pcl.cli import Parser, integer, integers, positive
from pcl.clustering import Clustering, cluster_all, faiss_lacks
from pcl.run.launch import SingleProcess
from pcl.run.logs import describe_machine, versions
from pcl.run.preflight import Plan
from pcl.run.progress import Progress
from pcl.sharded import cluster_all_sharded

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts

import main_pcl  # noqa: E402

OPTIONS = {
    "here": "",
    "`--amp bf16 --channels-last`": "--amp bf16 --channels-last",
    "`--compile`": "--compile",
    "`--amp bf16 --channels-last --compile`": "--amp bf16 --channels-last --compile",
}
LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize"}  # the profiler itself waits for the device at its end


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("-a", "--arch", default="resnet50", metavar="NAME", help="a network of main_pcl.py")
    parser.add_argument("-b", "--batch-size", type=integer(2), default=256, metavar="N", help="images in a step")
    parser.add_argument("--image-size", type=positive, default=224, metavar="PIXELS", help="side of a view")
    parser.add_argument("--images", type=positive, default=1_281_167, metavar="N", help="images that are clustered")
    parser.add_argument("--num-cluster", type=integers, default="25000,50000,100000", metavar="K,K,...", help="clusters")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="steps that are timed, after as many others")
    return parser


def settings(args: argparse.Namespace, options: str) -> argparse.Namespace:
    """The options of main_pcl.py for PCL v2."""
    words = ["DIR", "-a", args.arch, "-b", str(args.batch_size), "--image-size", str(args.image_size), "--mlp", "--aug-plus"]
    words += ["--cos", "--warmup-epoch", "0", "--num-cluster", ",".join(map(str, args.num_cluster)), *options.split()]
    return main_pcl.get_parser().parse_args(words)


class Batches:
    """Stands for a loader of `count` made-up batches; calls `between` before it gives one."""

    sampler = SimpleNamespace(skip=0, set_epoch=lambda epoch: None)

    def __init__(self, given: tuple[Any, Tensor], count: int, between: Callable[[int], Any]) -> None:
        self.given, self.count, self.between, self.batch_size = given, count, between, len(given[1])

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for number in range(self.count):
            self.between(number)
            yield self.given


def epoch_here(model: MoCo, batches: Batches, clusterings: list[Clustering], given: argparse.Namespace) -> float:
    """`main_pcl.m_step`; the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), given.lr, given.momentum, weight_decay=given.wd, fused=True)
    record = SimpleNamespace(write=lambda **_: None, metrics=lambda *_, **__: None)
    plan, progress = Plan(batch=given.batch_size, seed=0), Progress(clusterings=clusterings)
    return main_pcl.m_step(SingleProcess(model), batches, optimizer, progress, given, plan, record)["loss"]


def epoch_published(model: MoCo, batches: Batches, clusterings: list[Clustering], given: argparse.Namespace) -> float:
    """The same in the published way; the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), given.lr, given.momentum, weight_decay=given.wd)
    model.train()
    losses = []
    for (im_q, im_k), index in batches:
        q = F.normalize(model.encoder_q(normalize(im_q)), dim=1)
        with torch.no_grad():
            for key, query in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
                key.data = key.data * model.m + query.data * (1.0 - model.m)
            order = torch.randperm(len(im_k)).to(im_k.device)
            k = F.normalize(model.encoder_k(normalize(im_k)[order]), dim=1)[order.argsort()]
        queue, start = model.queue.clone().detach(), int(model.queue_ptr)
        model.queue[:, start : start + len(k)] = k.T
        model.queue_ptr[0] = (start + len(k)) % model.r
        own, others = torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,ck->nk", q, queue)
        logits = torch.cat([own, others], dim=1) / given.temperature
        loss, shown = F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.long)), [logits.topk(1).indices]
        terms = []
        for clustering in clusterings:
            mine = clustering.im2cluster[index]
            numbers = [number for number in range(int(clustering.im2cluster.max()) + 1)]  # noqa: C416 - as it is there
            rest = set(numbers) - set(mine.tolist())
            drawn = random.sample(tuple(rest), min(given.pcl_r, len(rest)))
            chosen = torch.cat([clustering.prototypes[mine], clustering.prototypes[drawn]])
            phi = torch.cat([clustering.concentration[mine], clustering.concentration[torch.LongTensor(drawn)]])
            logits = q @ chosen.T / phi
            terms.append(F.cross_entropy(logits, torch.arange(len(q)).to(q.device)))
            shown.append(logits.topk(1).indices)
        loss = loss + sum(terms) / len(terms)
        losses.append(loss.item())  # it is shown as a mean over the steps so far
        for best in shown:
            (best[:, 0] == 0).float().sum()  # fetched where it is shown
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(losses) / len(losses)


def measure(epoch: Callable[..., float], options: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    """Time of a step, images/s, kernel launches and waits of one, GB of memory, as cells of a table."""
    given = settings(args, options)
    torch.manual_seed(0)
    memory_format = torch.channels_last if given.channels_last else torch.contiguous_format
    model = main_pcl.start_model(given, Plan()).to(device, memory_format=memory_format)
    view = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    batch = (view, view.flip(3)), torch.arange(args.batch_size) % args.images
    clusterings = [random_clustering(args.images, k).to(device) for k in args.num_cluster]
    start, profiler = [0.0], torch.profiler.profile()

    def begin(number: int) -> None:
        if number == args.steps:  # the first ones compile, choose algorithms and fill caches
            _wait(device)
            start[0] = time.perf_counter()

    def record(number: int) -> None:
        if number == 1:
            profiler.start()
        elif number == 2:
            profiler.stop()

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # a bar waits for the GPU
        epoch(model, Batches(batch, 2 * args.steps, begin), clusterings, given)
        _wait(device)
        seconds = (time.perf_counter() - start[0]) / args.steps
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        epoch(model, Batches(batch, 3, record), clusterings, given)
    counts = {event.key: event.count for event in profiler.key_averages()}
    launches, waits = (sum(counts.get(name, 0) for name in names) for names in (LAUNCHES, WAITS))
    return [f"{1e3 * seconds:.1f} ms", f"{args.batch_size / seconds:.0f}", str(launches), str(waits), f"{memory:.1f} GB"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """A table of the training steps, line by line."""
    yield f"A step of {args.arch} at {args.image_size} pixels, batch {args.batch_size}; K = {args.num_cluster}."
    yield from ["", "| | time | images/s | kernel launches | waits of the host | memory |", "|---|---|---|---|---|---|"]
    sides: dict[str, tuple[Any, str]] = {"published": (epoch_published, "")}
    sides |= {name: (epoch_here, options) for name, options in OPTIONS.items()}
    for name, (epoch, options) in sides.items():
        yield f"| {name} | " + " | ".join(measure(epoch, options, args, device)) + " |"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()


def clusters(args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """A table of an E-step's k-means, line by line."""
    features = F.normalize(torch.randn(args.images, 128, device=device), dim=1)
    sides: dict[str, Callable[[], Any]] = {
        "`--kmeans faiss`": lambda: cluster_all(features, args.num_cluster, 0.2),
        "`--kmeans sharded`": lambda: cluster_all_sharded(features, args.images, args.num_cluster, 0.2),
        "`--kmeans sharded --kmeans-tf32`": lambda: cluster_all_sharded(
            features, args.images, args.num_cluster, 0.2, tf32=True
        ),
    }
    yield from [f"k-means of {args.images:,} features, 5 restarts of each K.", "", "| | time |", "|---|---|"]
    for name, side in list(sides.items())[faiss_lacks(device) :]:  # where it would be the next one's time again
        start = time.perf_counter()
        side()
        _wait(device)
        yield f"| {name} | {time.perf_counter() - start:.1f} s |"


def main() -> None:
    args = get_parser().parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no GPU here; nothing was measured")
        return
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = ["# Measured by `make bench` on a GPU", "", f"Machine: {describe_machine()}.", f"Versions: {numbers}.", ""]
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # as in a run without --seed, here and in the published program
    with (ROOT / "benchmarks" / "results_gpu.md").open("w") as file:
        for line in chain(lines, steps(args, device), [""], clusters(args, device)):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
