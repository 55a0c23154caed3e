"""What the tests share: one thread a process, a tiny image folder, two ranks that run a function together."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, here and in the processes that tests start
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # before TensorBoard's reader imports it, for the logger

import multiprocessing
import socket
import sys
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.overrides import TorchFunctionMode

from pcl import distributed
from pcl.builder import MoCo
from pcl.checkpoint import load
from pcl.run import launch
from pcl.run.preflight import Plan
from pcl.run.rendezvous import place_of

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))  # the scripts


def pytest_collection_modifyitems(items):
    """The modules that take longest come first, or a process would be alone with one of them at the end."""
    longest = ["test_watch", "test_main_pcl", "test_command_lines", "test_eval_cls_imagenet"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@contextmanager
def without_gpu():
    """For fixtures of a module, which are made before `_on_the_cpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield patch


@pytest.fixture(autouse=True)
def _on_the_cpu(request, monkeypatch):
    """Only tests marked gpu see one, so that the others ask the same of every machine; without one they run on the CPU."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        yield
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork_from_server)
    with CpuForGpu() if request.node.get_closest_marker("gpu") else nullcontext():
        yield


def fork_server():
    """The context of processes that need not import torch, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_pcl", "eval_cls_imagenet", "pytest", "pcl.figures", "sklearn.manifold"])
    return context


def fork_from_server(function, arguments, nprocs, join):
    """Stands for `torch.multiprocessing.spawn`."""
    fork_server()
    start = torch.multiprocessing.start_processes
    return start(run_forked, (Streams(), function, arguments), nprocs, join, start_method="forkserver")


def run_forked(local_rank, streams, function, arguments):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    worker, args, plan, _, start_method = arguments
    function(local_rank, worker, args, plan, os.getppid(), start_method)  # its parent is the server, not the launcher


class Streams:
    """Where this process prints; a forked one would print where the server did at its start."""

    def __reduce__(self):
        return list, ([DupFd(1), DupFd(2)],)


class CpuForGpu(TorchFunctionMode):
    """Inside, what is sent to a GPU or made there is on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        here = ["cpu" if isinstance(a, str | torch.device) and str(a).startswith("cuda") else a for a in args]
        return func(
            *here, **{k: "cpu" if k == "device" and str(v).startswith("cuda") else v for k, v in (kwargs or {}).items()}
        )


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """DIR with train/{a,b} of 10 + 15 noisy images and val/{a,b} of 3 + 3."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for folder, count in (("train/a", 10), ("train/b", 15), ("val/a", 3), ("val/b", 3)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def six_classes(tmp_path_factory):
    """DIR with train/ of 6 + 6 + ... + 7 images and val/ of 3 of each of six classes, each of its own brightness."""
    root = tmp_path_factory.mktemp("six")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in range(6):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count + (split == "train" and label == 5)):
                pixels = rng.integers(0, 60, (36, 36, 3), dtype=np.uint8) + np.uint8(36 * label)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A seeded shufflenet_v2_x0_5 in the published form."""
    torch.manual_seed(0)
    model = MoCo(torchvision.models.shufflenet_v2_x0_5, dim=8, r=16)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "c.pth.tar"
    torch.save({"epoch": 1, "arch": "shufflenet_v2_x0_5", "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.fixture
def two_ranks(tmp_path):
    """Runs `worker(device, args)` on two ranks; each saves its result to args.out with `save_result`; returns them."""

    def run(worker, **options):
        usual = {"nproc": 2, "gpu": None, "world_size": 1, "rank": 0, "dist_url": None, "dist_backend": "nccl", "seed": 0}
        args = Namespace(**usual | {"deterministic": True, "dist_timeout": 60, "out": tmp_path} | options)
        launch.launch(worker, args, plan_of(args))
        return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(args.nproc)]

    return run


def plan_of(args):
    """The plan of processes and seed, as the scripts' checks make it."""
    return Plan(place_of(args), seed=args.seed, deterministic=args.deterministic)


def free_port():
    """A TCP port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_script(module, *options):
    """`python SCRIPT.py OPTIONS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
        module.main()


def assert_same(a, b, where="checkpoint"):
    """Equal to the bit, through dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def weights(exp_dir, epoch=2):
    state = load(exp_dir / f"checkpoint_{epoch:04d}.pth.tar")
    return {name: state[name] for name in ("epoch", "arch", "state_dict", "optimizer", "seed")}


def save_result(args, **result):
    torch.save(result, args.out / f"rank{distributed.get_rank()}.pt")


def write_voc_shaped(root):
    """A VOC-shaped set of 40 + 20 images, 20 pixels wide, of classes "dog" (red) and "train" (green)."""
    rng = np.random.default_rng(0)
    folder = root / "VOCdevkit" / "VOC2007"
    lists, images = folder / "ImageSets" / "Main", folder / "JPEGImages"
    lists.mkdir(parents=True)
    images.mkdir()
    for split, first, count in (("trainval", 1, 40), ("test", 41, 20)):
        labels = np.array([(1, -1), (-1, 1), (-1, -1), (0, 1)])[rng.choice(4, count, p=[0.5, 0.3, 0.1, 0.1])]
        names = [f"{first + i:06d}" for i in range(count)]
        for name, label in zip(names, labels, strict=True):
            pixels = rng.integers(0, 80, (20, 20, 3), dtype=np.uint8)
            pixels[:, :, :2] += (150 * (label > 0)).astype(np.uint8)
            Image.fromarray(pixels).save(images / f"{name}.jpg")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for column, label in enumerate(("dog", "train")):
            lines = [f"{name} {value:2d}\n" for name, value in zip(names, labels[:, column], strict=True)]
            (lists / f"{label}_{split}.txt").write_text("".join(lines))
    return root
