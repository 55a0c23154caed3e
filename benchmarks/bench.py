"""Measure what this project does faster than the published code, both sides in one run on the same machine.

    python benchmarks/bench.py [PART ...]      all parts by default; prints a table and writes benchmarks/results.md

The published side is a plain transcription, in other words, of what the published program does there.
"""

import argparse
import contextlib
import copy
import gc
import io
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pcl and the scripts

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

import eval_cls_imagenet
import eval_svm_voc
import main_pcl
from pcl.augment import MEAN, STD, DeferredView, TwoViews, apply_deferred, center_view, random_view
from pcl.builder import MoCo
from pcl.cli import Parser
from pcl.clustering import ITERATIONS, RESTARTS, Clustering, concentration, kmeans
from pcl.distributed import assign_jobs
from pcl.images import read_image, read_tensor
from pcl.loader import IndexedFolder, make_loader
from pcl.losses import prototype_logits, prototype_loss, sample_negatives
from pcl.run import probe, probe_checks
from pcl.run.launch import launch
from pcl.run.logs import describe_machine, versions
from pcl.run.preflight import Plan
from pcl.samples import write_image_folder, write_voc
from pcl.sharded import kmeans_sharded

ROOT = Path(__file__).resolve().parent.parent


class ImagesPassed:
    """Counts the images that eval_svm_voc.py passes through the network."""

    def __init__(self) -> None:
        self.count, extract = 0, eval_svm_voc.features_of

        def counting(network, images, args):
            self.count += len(images)
            return extract(network, images, args)

        eval_svm_voc.features_of = counting

    def pop(self) -> int:
        """The count, which starts anew."""
        count, self.count = self.count, 0
        return count


@dataclass(frozen=True)
class Row:
    """One comparison."""

    part: str
    published: float
    ours: float
    note: str
    unit: str = "s"


def low_shot() -> Row:
    """Low-shot evaluation of a ResNet-18 on 1,000 + 500 collages of 112 pixels, features once or anew for each draw."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        write_image_folder(root)
        write_voc(root, root)
        options = [folder, "--random-init", "--arch", "resnet18", "--image-size", "112", "--low-shot", "--num-workers", "2"]
        parser = eval_svm_voc.get_parser()
        args = parser.parse_args(options)
        images_passed = ImagesPassed()

        start = time.perf_counter()
        eval_svm_voc.evaluate(*eval_svm_voc.open_all(parser, args), args)
        ours, ours_passed = time.perf_counter() - start, images_passed.pop()

        start = time.perf_counter()
        network, _ = eval_svm_voc.inputs.open_backbone(args)
        view = eval_svm_voc.center_view(args.image_size)
        train, test = (eval_svm_voc.voc.VOCSplit(folder, split, view) for split in ("trainval", "test"))
        test_features = eval_svm_voc.features_of(network, test, args)
        for k in eval_svm_voc.SHOTS:
            for draw in range(eval_svm_voc.DRAWS):
                train_features = eval_svm_voc.features_of(network, train, args)
                rows = eval_svm_voc.voc.draw_low_shot(train.labels, k, args.seed, draw)
                features = eval_svm_voc.Features(train_features, train.labels, test_features, test.labels, train.classes)
                eval_svm_voc.precisions(features, [rows], args.cost[0], args)
        published, published_passed = time.perf_counter() - start, images_passed.pop()
    saved = (
        f"{published_passed:,} against {ours_passed:,} images through the network, {published_passed / ours_passed:.1f} times"
    )
    return Row("low-shot evaluation", published, ours, saved)


def linear_probe() -> Row:
    """Ten epochs of the probe of a ResNet-18 on 4,000 + 1,000 images: validation features once, or anew at each epoch."""
    validate, extract, opened = eval_cls_imagenet.validate, eval_cls_imagenet.extract_features, eval_cls_imagenet.open_probe
    passed, calls, seconds = [], [], []

    def open_and_count(*arguments):
        model = opened(*arguments)
        model.backbone.register_forward_hook(lambda _, images, __: passed.append(len(images[0])))
        return model

    def remember(*arguments):
        calls.append(arguments)
        return extract(*arguments)

    def through_the_network(head, _, labels):
        network, _, count, device = calls[-1]
        return validate(head, extract(network, val_loader, count, device), labels)

    eval_cls_imagenet.open_probe, eval_cls_imagenet.extract_features = open_and_count, remember
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        for module in (eval_cls_imagenet, probe, probe_checks):
            module.RESULTS = root / "Linear_eval"
        write_image_folder(root)
        val = IndexedFolder(root / "val", center_view(32))
        val_loader = make_loader(val, range(len(val)), 256, workers=2)
        images = []
        for name in ("published", "ours"):
            eval_cls_imagenet.validate = validate if name == "ours" else through_the_network
            options = "--random-init -a resnet18 --image-size 32 --epochs 10 --lr 0.5 --seed 0 --nproc 1 -j 2 --id"
            args = eval_cls_imagenet.get_parser().parse_args([*options.split(), name, folder])
            plan = eval_cls_imagenet.check(eval_cls_imagenet.get_parser(), args)
            start = time.perf_counter()
            launch(eval_cls_imagenet.probe, args, plan)
            seconds.append(time.perf_counter() - start)
            images.append(sum(passed))
            passed.clear()
    # The published side has the first pass on top, which it does not need: it is taken off, images and time in proportion.
    seconds[0] *= 1 - len(val) / images[0]
    images[0] -= len(val)
    saved = f"images through the network: {images[0]:,} against {images[1]:,}, {1 - images[1] / images[0]:.1%} saved"
    return Row("linear probe, 10 epochs", *seconds, saved)


def fastest(*sides: Callable[[], object], times: int = 5, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of the fastest of several runs of each side, the sides taking turns."""
    seconds = [math.inf] * len(sides)
    for _ in range(times):
        for i, side in enumerate(sides):
            start = clock()
            side()
            seconds[i] = min(seconds[i], clock() - start)
    return seconds


def random_clustering(num_images: int, num_cluster: int) -> Clustering:
    """Of the size of a run's, with nothing in it."""
    prototypes = F.normalize(torch.randn(num_cluster, 128), dim=1)
    return Clustering(torch.randint(num_cluster, (num_images,)), prototypes, torch.rand(num_cluster) + 0.1)


def negatives(logits: bool = False) -> Row:
    """A step's negatives on the CPU, at ImageNet's size; with `logits`, also their comparison with the queries."""
    clusterings = [random_clustering(1_281_167, k) for k in IMAGENET]
    q, index = F.normalize(torch.randn(32, 128), dim=1), torch.randint(1_281_167, (32,))
    for clustering in clusterings:
        clustering.num_used  # noqa: B018 - once an epoch

    def published() -> None:
        for clustering in clusterings:
            positive = clustering.im2cluster[index]
            numbers = [number for number in range(int(clustering.im2cluster.max()) + 1)]  # noqa: C416 - as it is there
            others = set(numbers) - set(positive.tolist())
            negative = random.sample(tuple(others), 16384)  # as Python did itself with a set, up to 3.10
            if logits:
                chosen = torch.cat([clustering.prototypes[positive], clustering.prototypes[negative]])
                phi = torch.cat([clustering.concentration[positive], clustering.concentration[torch.LongTensor(negative)]])
                q @ chosen.T / phi

    def ours() -> None:
        for clustering in clusterings:
            positive = clustering.im2cluster[index]
            negative = sample_negatives(positive, clustering.num_used, 16384)
            if logits:
                prototype_logits(q, positive, negative, clustering)

    seconds = fastest(published, ours, times=20)
    name = "negatives and prototype logits of a step" if logits else "negatives of a step"
    note = "target 8; the matrix products are the same on both sides" if logits else "K = 25,000 + 50,000 + 100,000, r = 16,384"
    return Row(name, *(1e3 * t for t in seconds), note, "ms")


def concentrations() -> Row:
    """Concentrations of 1.28 million images at three granularities."""
    rng = np.random.default_rng(0)
    inputs = [(rng.random(1_281_167, np.float32), rng.integers(k, size=1_281_167), k) for k in IMAGENET]

    def published() -> None:
        for squared, im2cluster, k in inputs:
            members: list[list[float]] = [[] for _ in range(k)]
            for image, number in enumerate(im2cluster):
                members[number].append(squared[image])
            phi = np.zeros(k)
            for number, distances in enumerate(members):
                if len(distances) > 1:
                    phi[number] = (np.asarray(distances) ** 0.5).mean() / np.log(len(distances) + 10)
            largest = phi.max()
            for number, distances in enumerate(members):
                if len(distances) <= 1:
                    phi[number] = largest
            phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
            torch.Tensor(0.2 * phi / phi.mean())

    def ours() -> None:
        for squared, im2cluster, k in inputs:
            concentration(torch.from_numpy(squared).sqrt(), im2cluster, k, temperature=0.2)

    return Row("concentrations, 1.28 million images", *fastest(published, ours, times=3), "target 100")


def made_up_features(num_images: int, directions: int = 8) -> np.ndarray:
    """(N, 128) unit-length rows with almost all variance in some directions.

    Of the ResNet-18 of 16 epochs on CIFAR-10 that the README shows, 8 directions hold 98 %.
    """
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(num_images, directions)) * np.linspace(1, 0.3, directions)
    rows = latent @ np.linalg.qr(rng.normal(size=(128, directions)))[0].T + 0.02 * rng.normal(size=(num_images, 128))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def restarts_over_ranks() -> Row:
    """k-means of three granularities with five restarts each on one rank, or dealt to eight: from the jobs' measured times."""
    features = made_up_features(12_800)
    jobs = [(k, seed, restart) for seed, k in enumerate((250, 500, 1000)) for restart in range(RESTARTS)]
    seconds = []
    for job in jobs:
        start = time.perf_counter()
        kmeans(features, *job)
        seconds.append(time.perf_counter() - start)
    owner = assign_jobs([k for k, _, _ in jobs], 8)
    makespan = max(sum(s for s, o in zip(seconds, owner, strict=True) if o == rank) for rank in range(8))
    ideal = max(sum(seconds) / 8, *seconds)
    note = f"{makespan / ideal:.2f} times the ideal; target 1.3"
    return Row("k-means on 8 ranks, reckoned from the times of its jobs", sum(seconds), makespan, note)


def pruned_kmeans(directions: int) -> Row:
    """faiss's Clustering and SuperKMeans on the CPU, 50,000 x 128, K = 2,500, one restart."""
    features, objective = made_up_features(50_000, directions), {}

    def run(algorithm: str) -> Callable[[], None]:
        return lambda: objective.update({algorithm: kmeans(features, 2500, 0, algorithm=algorithm)[0]})

    seconds = fastest(run("faiss"), run("super"), times=4 if directions < 128 else 1)
    note = f"objective {objective['super'] / objective['faiss'] - 1:+.3%}; target 1.3, 0.1 %"
    return Row(f"`--kmeans super`, features in {directions} directions", *seconds, note)


def sharded_kmeans() -> Row:
    """The same against `--kmeans sharded` in one process."""
    features, objective = made_up_features(50_000), {}
    whole = torch.from_numpy(features)
    seconds = fastest(
        lambda: objective.update(faiss=kmeans(features, 2500, 0)[0]),
        lambda: objective.update(sharded=kmeans_sharded(whole, 50_000, 2500, 0)[0]),
        times=2,
    )
    difference = objective["sharded"] / objective["faiss"] - 1
    return Row("`--kmeans sharded`, one process", *seconds, f"objective {difference:+.4%}; target 0.1 %; for memory, not speed")


def photographs(folder: Path, count: int = 40) -> list[Path]:
    """JPEGs of 500 x 375 pixels with detail at every scale, some 75 kB each."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        pixels = np.full((375, 500, 3), 128.0)
        for scale in (1, 2, 4, 8, 32, 128):
            noise = rng.normal(0, 12, (375 // scale + 1, 500 // scale + 1, 3 if scale > 8 else 1))
            image = np.broadcast_to(128 + noise * (4 if scale > 8 else 1), (*noise.shape[:2], 3)).clip(0, 255)
            pixels += np.asarray(Image.fromarray(image.astype(np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)) - 128.0
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def per_image(published: Callable, ours: Callable, name: str, note: Callable[[list[Path]], str]) -> Row:
    """CPU time of one thread for an image, in milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder))
        sides = [lambda side=side: [side(path) for path in paths] for side in (published, ours)]
        seconds = fastest(*sides, clock=time.process_time)
        remark = note(paths)
    torch.set_num_threads(threads)
    return Row(name, *(1e3 * t / len(paths) for t in seconds), remark, "ms")


def as_published(view: transforms.Compose) -> Callable[[Image.Image], Tensor]:
    """A view of PIL's that ends in normalized floating-point numbers."""
    return transforms.Compose([*view.transforms[:-1], transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def two_views() -> Row:
    """The two v2 views of a JPEG in a worker: with PIL, or the part of `--augment-on device` that is left to it."""
    published, ours = TwoViews(as_published(random_view(224, aug_plus=True))), TwoViews(DeferredView(224, aug_plus=True))

    def rest(paths: list[Path]) -> str:
        views = [DeferredView(224, True)(read_tensor(path)) for path in paths]
        batch, recipe = (torch.stack(parts) for parts in zip(*views, strict=True))
        (seconds,) = fastest(lambda: apply_deferred(batch, recipe, True), clock=time.process_time)
        return f"and {2e3 * seconds / len(paths):.1f} ms on the device, were it this CPU; target 2.7 ms"

    return per_image(
        lambda path: published(read_image(path)),
        lambda path: ours(read_tensor(path)),
        "two views of a 500 x 375 JPEG, v2",
        rest,
    )


def center_crop() -> Row:
    """The E-step's center crop of a JPEG in a worker, with PIL or on tensors."""
    exact, fast = center_view(224), center_view(224, tensors=True)

    def difference(paths: list[Path]) -> str:
        apart = [(exact(read_image(path)).int() - fast(read_tensor(path)).int()).abs().max() for path in paths]
        return f"pixels differ by {int(max(apart))} of 255 at most; target 1.6"

    published = as_published(exact)
    return per_image(
        lambda path: published(read_image(path)),
        lambda path: fast(read_tensor(path)),
        "center crop for the E-step",
        difference,
    )


def momentum_update() -> Row:
    """The momentum update of a ResNet-50 on the CPU."""
    model = MoCo(torchvision.models.resnet50, r=256, mlp=True)

    @torch.no_grad()
    def published() -> None:
        for key, query in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
            key.data = key.data * 0.999 + query.data * (1.0 - 0.999)

    seconds = fastest(published, model._update_key_encoder, times=20)
    return Row("momentum update of a ResNet-50", *(1e3 * t for t in seconds), "to the bit the same", "ms")


def moco_step() -> Row | None:
    """A step of MoCo v2 alone against lightly's: ResNet-18, 32 pixels, batch 64, r = 4,096; None if lightly cannot be fetched.

    CPU time of the training process, with one thread, and of its one loader worker: what one core takes. The sides take
    turns step by step. The plain loop around lightly's parts is that of its own benchmark of MoCo v2, with nothing shown or
    recorded; this project's side is `main_pcl.m_step` as it is, with its seeds, figures and question whether to stop.
    """
    threads, m_step = torch.get_num_threads(), main_pcl.m_step
    seconds: list[list[float]] = []  # of each epoch: lightly's and ours
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        packages = ["lightly==1.6.0", "lightning_utilities"]  # of what lightly requires, all that its MoCo needs
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", f"{folder}/packages", *packages]
        if subprocess.run(pip, capture_output=True).returncode:
            return None
        sys.path.append(f"{folder}/packages")
        write_image_folder(Path(folder))
        model = "-a resnet18 --image-size 32 -b 64 -j 1 --pcl-r 4096 --moco-m 0.99 --mlp --aug-plus --cos --seed 0 --nproc 1"
        run = f"--epochs 4 --warmup-epoch 4 --monitor-freq 0 --exp-dir {folder}/run {folder}/val"
        parser = main_pcl.get_parser()
        args = parser.parse_args([*model.split(), *run.split()])
        plan = replace(main_pcl.check(parser, args), deterministic=False)
        steps_of_lightly = moco_of_lightly(args, plan)

        def in_turns(model, loader, *rest):
            start, before, epoch = time.process_time(), of_workers(), [0.0, 0.0]

            def step_of_lightly(*_):
                begin = time.process_time()
                next(steps_of_lightly)
                epoch[0] += time.process_time() - begin

            hook = model.register_forward_pre_hook(step_of_lightly)
            means = m_step(model, loader, *rest)
            hook.remove()
            epoch[1] += time.process_time() - start - epoch[0]
            for worker, spent in of_workers().items():
                epoch[worker in loader.workers] += spent - before.get(worker, 0)
            seconds.append(epoch)
            return means

        main_pcl.m_step = in_turns
        launch(main_pcl.train, args, plan)
    main_pcl.m_step = m_step
    torch.set_num_threads(threads)
    steps = (len(seconds) - 1) * (plan.num_images // 64)  # the first epoch includes the start of the workers
    theirs, ours = (sum(side[1:]) / steps for side in zip(*seconds, strict=True))
    note = f"{64 / theirs:.0f} against {64 / ours:.0f} images/s on one core; target 1"
    return Row("a step of MoCo v2, lightly's on the left", 1e3 * theirs, 1e3 * ours, note, "ms")


def of_workers() -> dict[Any, float]:
    """CPU seconds of each process that this one has started."""
    # The number of the clock of another process on Linux, as its clock_getcpuclockid gives it.
    return {child: time.clock_gettime(~child.pid << 3 | 2) for child in mp.active_children()}


def moco_of_lightly(args: argparse.Namespace, plan: Plan) -> Iterator[None]:
    """lightly's MoCo v2 with the options of `main_pcl.py`, a step at a time, for ever."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
    from lightly.transforms import MoCoV2Transform

    images = LightlyDataset(str(plan.images), transform=MoCoV2Transform(args.image_size))
    loader = DataLoader(images, args.batch_size, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True)
    backbone, head = torchvision.models.resnet18(), MoCoProjectionHead(512, 512, args.low_dim)
    backbone.fc = torch.nn.Identity()
    backbone_k, head_k = copy.deepcopy(backbone), copy.deepcopy(head)
    criterion = NTXentLoss(args.temperature, (args.pcl_r, args.low_dim))
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.wd)
    while True:
        for (im_q, im_k), *_ in loader:
            query = head(backbone(im_q))
            update_momentum(backbone, backbone_k, args.moco_m)
            update_momentum(head, head_k, args.moco_m)
            with torch.no_grad():
                im_k, order = batch_shuffle(im_k)
                key = batch_unshuffle(head_k(backbone_k(im_k)), order)
            loss = criterion(query, key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def file_list() -> Row:
    """What a loader's worker copies of 1.28 million file names by reading them all: a list of strings, or the array."""
    names = [f"/data/imagenet/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(1_281_167)]
    array = np.array([os.fsencode(name) for name in names])
    grown = []
    for held in (names, array):
        gc.collect()
        receive, send = mp.Pipe(duplex=False)
        child = mp.get_context("fork").Process(target=_read_all, args=(held, send))
        child.start()
        grown.append(receive.recv())
        child.join()
    note = f"the array itself has {array.nbytes / 2**20:.0f} MiB, once"
    return Row("1.28 million file names, copied by a worker", *grown, note, "MiB")


def _read_all(held: Any, send: Any) -> None:
    def own_memory() -> float:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024

    before = own_memory()
    for i in range(len(held)):
        held[i]
    send.send(own_memory() - before)


IMAGENET = (25_000, 50_000, 100_000)
PARTS: dict[str, Callable[[], Row | None]] = {
    "low-shot": low_shot,
    "linear-probe": linear_probe,
    "negatives": negatives,
    "negatives-and-logits": partial(negatives, logits=True),
    "concentrations": concentrations,
    "restarts": restarts_over_ranks,
    "super": partial(pruned_kmeans, 8),
    "super-everywhere": partial(pruned_kmeans, 128),
    "sharded": sharded_kmeans,
    "views": two_views,
    "center-crop": center_crop,
    "momentum": momentum_update,
    "step": moco_step,
    "file-list": file_list,
}


def scaling() -> list[str]:
    """How a step's prototype term and an E-step's k-means grow, as lines of a table."""
    lines = ["| what grows | | time | for each |", "|---|---|---|---|"]
    q, index = F.normalize(torch.randn(32, 128), dim=1), torch.arange(32)
    for k in IMAGENET:
        clustering = random_clustering(k, k)
        clustering.num_used  # noqa: B018 - once an epoch
        draw, step = fastest(
            lambda c=clustering, k=k: sample_negatives(c.im2cluster[index], k, 16384),
            lambda c=clustering: prototype_loss(q, index, [c], 16384),
            times=20,
        )
        rest = f"{1e3 * (step - draw):.1f} ms without drawing"
        lines.append(f"| K of a step, r = 16,384 | {k:,} | {1e3 * step:.1f} ms | {rest} |")
    for num_images, num_cluster in ((10_000, 250), (20_000, 250), (40_000, 250), (20_000, 500), (20_000, 1000)):
        features = made_up_features(num_images)
        (seconds,) = fastest(lambda f=features, k=num_cluster: kmeans(f, k, 0), times=3)
        rate = 1e12 * seconds / (num_images * num_cluster * ITERATIONS)
        size = f"N = {num_images:,}, K = {num_cluster:,}"
        lines.append(f"| k-means, one restart | {size} | {seconds:.2f} s | {rate:.0f} ps for each N K iteration |")
    return lines


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU, also where there is a GPU: benchmarks/gpu.py is for that
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [f"Machine: {describe_machine()}.", f"Versions: {numbers}.", ""]
    lines += ["| part | published, or faiss | here | ratio | |", "|---|---|---|---|---|"]
    for part in chosen:
        if (row := PARTS[part]()) is None:
            print(f"{part}: left out, since lightly cannot be fetched", flush=True)
            continue
        ratio = row.published / row.ours
        lines.append(f"| {row.part} | {row.published:.3g} {row.unit} | {row.ours:.3g} {row.unit} | {ratio:.1f} | {row.note} |")
        print(lines[-1], flush=True)
    lines += ["", *scaling()] if chosen == list(PARTS) else []
    print("\n".join(["", *lines]))
    if chosen == list(PARTS):
        head = ["# Measured by `make bench`", "", "Both sides in one run on the machine below; what travels is the ratio.", ""]
        (ROOT / "benchmarks" / "results.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
