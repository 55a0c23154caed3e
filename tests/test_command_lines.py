"""Wrong command lines, folders and files, drawn at random: each is one line and exit code 2, before anything has happened."""

import ast
import io
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, write_voc_shaped
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval_cls_imagenet
import eval_svm_voc
import main_pcl
from pcl.builder import MoCo
from pcl.clustering import Clustering
from pcl.loader import IndexedFolder
from pcl.run import inputs
from pcl.run.preflight import Plan
from pcl.run.progress import terms_of

ARCH = "shufflenet_v2_x0_5"
EXAMPLES = 250

# A command line is a DIR and a list of options, each a list of words; what is spoilt has the names that the error may give.

VALID = {
    main_pcl: f"-a {ARCH} | --image-size 32 | -b 8 | --pcl-r 20 | --low-dim 16 | --num-cluster 3,5 | --warmup-epoch 1 | -j 0 | "
    "--epochs 3",
    eval_cls_imagenet: f"--random-init | -a {ARCH} | --image-size 32 | -b 8 | --epochs 3 | --schedule 1 2 | -j 0",
    eval_svm_voc: f"--random-init | -a {ARCH} | --image-size 32 | --num-workers 0 | --batch-size 8",
}
HARMLESS = {
    main_pcl: "--lr 0.1 | --seed 3 | --mlp | --aug-plus | --cos | --wd 0 | -p 3 | --moco-m 0.9 | --exp-dir new | --keep 2 | "
    "--save-steps 0 | --world-size 1 | --dist-url tcp://localhost:29500 | --temperature 1e-2 | --momentum 0 | "
    "--kmeans sharded | --exp-dir new/deep/ö图 | --dist-timeout 60",
    eval_cls_imagenet: "--lr 1 | --finetune | --gamma 0.5 | --seed 0 | --wd 1e-4 | -p 1 | --percent 50 | --id other | "
    "--momentum 1 | --id a/b | --output new/o.json",
    eval_svm_voc: "--cost 0.5,1 | --ignore-difficult | --seed 4294967295 | --output o.json",
}
GOOD = {
    main_pcl: ["../six", "../six/train/../", "../ö 图 folder", "../photos"],
    eval_cls_imagenet: ["../six", "../ö 图 folder"],
    eval_svm_voc: ["../voc"],
}

LARGE = 2**31 - 1
TRAINING = {
    **{"-j": (0, 1024), "--epochs": (1, LARGE), "--start-epoch": (0, LARGE), "--batch-size": (1, 2**20)},
    **{"--schedule": (0, LARGE), "--print-freq": (1, LARGE), "--nproc": (1, 1024), "--gpu": (0, LARGE)},
    **{"--world-size": (1, 2**16), "--rank": (0, LARGE), "--seed": (0, 2**32 - 1), "--image-size": (1, 2**13)},
}
INTEGERS = {  # the least and the largest that may be meant
    main_pcl: {
        **TRAINING,
        **{"--low-dim": (1, 2**16), "--pcl-r": (1, LARGE), "--num-cluster": (1, LARGE), "--warmup-epoch": (0, LARGE)},
        **{"--monitor-freq": (0, LARGE), "--save-freq": (1, LARGE), "--save-steps": (0, LARGE), "--keep": (0, LARGE)},
        **{"--keep-every": (0, LARGE)},
    },
    eval_cls_imagenet: TRAINING,
    eval_svm_voc: {
        "--seed": (0, 2**32 - 1), "--batch-size": (1, 2**20), "--num-workers": (0, 1024), "--image-size": (1, 2**13),
    },
}  # fmt: skip
SMALL = 5e-324
NUMBERS = {
    main_pcl: {
        **{"--lr": (SMALL, 1e30), "--momentum": (0, 1), "--wd": (0, 1e30), "--dist-timeout": (1, 2592000)},
        **{"--moco-m": (0, 1), "--temperature": (SMALL, 1e30)},
    },
    eval_cls_imagenet: {
        **{"--lr": (SMALL, 1e30), "--momentum": (0, 1), "--weight-decay": (0, 1e30), "--dist-timeout": (1, 2592000)},
        **{"--percent": (SMALL, 100), "--gamma": (0, 1), "--lr-backbone": (SMALL, 1e30)},
    },
    eval_svm_voc: {"--cost": (SMALL, 1e30)},
}
CHOICES = {
    main_pcl: ["--arch", "--augment-on", "--amp", "--kmeans", "--dist-backend"],
    eval_cls_imagenet: ["-a", "--dist-backend"],
    eval_svm_voc: ["--arch"],
}
ALIASES = {"-j": "--workers", "-a": "--arch", "--weight-decay": "--wd"}

# What else is wrong: the DIR (None: the valid one), further options, and what the error must name.
NO_CHECKPOINT = [
    *("nowhere", "../ckpt", "empty.pth", "text", "evil.pth", "evil.pkl", "zip.pth", "list.pth", "tensor.pth", "cut.pth"),
    *("none.pth", "int keys.pth", "weights no tensors.pth", "../six/train/class 0/0.png", "a/../nowhere", "script.pth"),
    *("sparse.pth", "no weights.pth"),
]
NO_PATH = ["", "\0", "a\0b", "../file/below", "x" * 300, "\ud800", "../loop"]
NO_RUN = [  # fields of a checkpoint to resume that are wrong, by their name; see `spoil_field`
    "epoch", "epoch -1", "epoch True", "arch", "arch list", "state_dict", "optimizer", "optimizer {}", "optimizer shape",
    "optimizer params", "optimizer momentum", "seed", "seed -1", "deterministic",
]  # fmt: skip
NO_MIDDLE = ["steps", "terms", "terms tensor", "clusterings", "clusterings dtype", "clusterings short", "meters", "meters sums"]
NO_PROBE = ["classes", "classes dict", "source", "history", "history of numbers"]
OTHER = {
    main_pcl: [
        *((d, "", "DIR") for d in ("nowhere", "../ckpt/text", "../empty", "../no images", "../no\nline", *NO_PATH)),
        *((None, f"--resume|{'../ckpt/' + c if c[:1] != '.' else c}", "--resume") for c in NO_CHECKPOINT),
        *(("../six", f"--resume|../ckpt/run {c}.pth", "--resume") for c in [*NO_RUN, *NO_MIDDLE]),
        *((None, f"{option}|{p}", option) for p in NO_PATH for option in ("--resume", "--exp-dir")),
        *((None, f"--resume|../ckpt/{c}", "--resume") for c in ("probe.pth", "other model.pth")),
        (None, "--resume|../ckpt/run.pth|--low-dim|8", "--resume"),
        (None, "--resume|../ckpt/run.pth|-a|resnet18", "--resume"),
        (None, "--resume|../ckpt/run.pth|--epochs|1", "--resume"),
        *((None, f"--exp-dir|{p}", "--exp-dir") for p in ("../file", "../taken", "../dangling/run")),
        ("../six", "--exp-dir|../six/train/class 0/x", "--exp-dir"),
        ("../photos", "--exp-dir|../photos/run", "--exp-dir"),
        (None, "--resume|auto|--exp-dir|../mixed|--low-dim|8", "--resume"),
        (None, "-b|100", "--batch-size"),
        (None, "-b|9|--nproc|2", "--batch-size"),
        (None, "--pcl-r|7", "--pcl-r"),
        (None, f"--pcl-r|{LARGE}|--low-dim|65536", "--pcl-r"),
        (None, "--image-size|8192|-b|1048576", "--image-size --batch-size"),
        (None, "--num-cluster|3,1000", "--num-cluster"),
        (None, "--num-cluster|3,3", "--num-cluster"),
        (None, "--kmeans|super", "--kmeans"),
        (None, "--kmeans-tf32|--kmeans|faiss", "--kmeans-tf32"),
        (None, "--cos|--schedule|1|2", "--cos --schedule"),
        (None, "--lr=--", "--lr"),
        (None, "-b--", "-b"),
        (None, "--start-epoch|7", "--start-epoch"),
        (None, "--keep-every|3|--keep|0", "--keep-every"),
    ],
    eval_cls_imagenet: [
        *((d, "", "DIR") for d in ("nowhere", "../ckpt/text", "../empty", "../no images", "../no val", "../photos", *NO_PATH)),
        *((d, "", "DIR") for d in ("../one", "../other classes", "../a class short", "../no\nline", "../an empty class")),
        *((None, f"--resume|{'../ckpt/' + c if c[:1] != '.' else c}", "--resume") for c in NO_CHECKPOINT),
        *((None, f"--resume|../ckpt/probe {c}.pth", "--resume") for c in [*NO_RUN, *NO_PROBE]),
        *((None, f"{option}|{p}", option) for p in NO_PATH for option in ("--resume", "--output", "--pretrained")),
        *((None, f"--id|{p}", "--id") for p in [*NO_PATH[:3], *NO_PATH[4:6], "..", "/x", "a/../../b", ".", "taken", "a file"]),
        (None, "--resume|../ckpt/run.pth", "--resume"),
        (None, "--resume|../ckpt/probe.pth|-a|resnet18", "--resume"),
        (None, "--resume|../ckpt/probe.pth|--epochs|1", "--resume"),
        (None, "--resume|../ckpt/probe.pth|--pretrained|../ckpt/run.pth", "--resume --pretrained"),
        ("../five", "--resume|../ckpt/probe.pth|-a|" + ARCH, "--resume"),
        (None, "--pretrained|../ckpt/run.pth", "--pretrained"),
        (None, "--pixels", "--pretrained"),
        *((None, f"--subset|{p}", "--subset") for p in (*NO_PATH, "nowhere", "..", "../ckpt/text")),
        (None, "--finetune|--subset|nowhere", "--subset"),
        (None, "--finetune|--lr|1,2", "--lr"),
        (None, "--finetune|-b|1", "--batch-size"),
        (None, "--lr-backbone|1", "--lr-backbone"),
        (None, "--lr|1,,2", "--lr"),
        (None, "--lr|1,1", "--lr"),
        (None, "--resume|../ckpt/probe.pth|--lr|1,2", "--lr"),
        (None, "--resume|../ckpt/probe.pth|--finetune", "--resume"),
        (None, "-e", "--evaluate"),
        (None, "--output|.", "--output"),
        (None, "--output|../file/x/o.json", "--output"),
        (None, "-b|9|--nproc|2", "--batch-size"),
        (None, "-b|500|--nproc|500", "--percent"),
        (None, "--start-epoch|7", "--start-epoch"),
        (None, "--image-size|abc|--cos", "--image-size"),
    ],
    eval_svm_voc: [
        *((d, "", "DIR") for d in ("nowhere", "../ckpt/text", "../empty", "../six", "../no\nline", *NO_PATH)),
        *((f"../voc {name}", "", "DIR") for name in ("no list", "no test", "no class", "label", "image", "bytes", "short")),
        *((f"../voc {name}", "", "DIR") for name in ("positive", "folder", "twice", "nothing")),
        *((None, f"{option}|{p}", option) for p in NO_PATH for option in ("--output", "--pretrained")),
        (None, "--pixels", "--pretrained"),
        (None, "--pretrained|../ckpt/run.pth", "--pretrained"),
        ("../file/x", "--download", "DIR"),
        ("../file", "--download", "DIR"),
        (None, "--cost|1,1", "--cost"),
        (None, "--cost|1,,2", "--cost"),
        (None, "--output|..", "--output"),
        (None, "--output|../file", "--output"),
        (None, "--output|../dangling/x", "--output"),
    ],
}
LAUNCH = [
    (None, "--gpu|0", "--gpu"),
    (None, "--gpu|0|--nproc|2", "--gpu --nproc"),
    (None, "--rank|1", "--rank"),
    (None, "--world-size|2", "--world-size"),
    *(
        (None, f"--world-size|2|--dist-url|{url}", "--dist-url")
        for url in (
            "tcp://host:99999999",
            "tcp://host",
            "host:1",
            "tcp://:1",
            "",
            "tcp://a b:1",
            "tcp://h\n:1",
            "tcp://[:1",
            "é" * 9,
        )
    ),
    (None, f"--dist-url|tcp://{'é' * 100}.org:1", "--dist-url"),
]
ONE_BACKBONE = [  # in place of --random-init
    *((None, f"--pretrained|{'../ckpt/' + c if c[:1] != '.' else c}", "--pretrained") for c in NO_CHECKPOINT),
    (None, "--pretrained|../ckpt/run.pth|-a|resnet18", "--pretrained"),
    (None, "--pretrained|../ckpt/run arch list.pth", "--pretrained"),
    (None, "--pretrained|../ckpt/run state_dict.pth", "--pretrained"),
    (None, "", "--pretrained"),
    (None, f"--pixels|-a|{ARCH}", "--arch"),
]


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


def spoil_field(state, wrong):
    """A copy of a checkpoint, of which one field is nothing that a run writes."""
    name, _, how = wrong.partition(" ")
    state = dict(state)
    value = {
        "-1": -1, "True": True, "list": [1, "two"], "{}": {}, "tensor": {"images": torch.zeros(3)}, "dict": {"a": "b"},
        "of numbers": [1, 2],
    }.get(how)  # fmt: skip
    if name == "optimizer" and how not in ("", "{}"):
        value = pickle.loads(pickle.dumps(state["optimizer"]))
        if how == "shape":
            value["state"][0]["momentum_buffer"] = torch.zeros(7)
        elif how == "params":
            value["param_groups"][0]["params"].pop()
        else:
            value["param_groups"][0]["momentum"] = "much"
    elif name == "clusterings" and how:
        first, *rest = state["clusterings"]
        value = [first] if how == "short" else [first | {"im2cluster": first["im2cluster"].float()}, *rest]
    elif how == "sums":
        value = {"steps": 1, "sums": {"loss": "low"}}
    elif not how:
        value = torch.zeros(2) if name in ("arch", "state_dict") else "text"
    return state | {name: value}


def write_checkpoints(folder):
    folder.mkdir()
    model = MoCo(torchvision.models.get_model_builder(ARCH), dim=16, r=20)
    network = torchvision.models.get_model(ARCH, num_classes=6)

    def trained(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return optimizer.state_dict()

    common = {"epoch": 2, "arch": ARCH, "seed": 1, "deterministic": True}
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    run = common | {"state_dict": weights, "optimizer": trained(model.parameters())}
    clusterings = [vars(Clustering(torch.zeros(37, dtype=torch.int64), torch.zeros(k, 16), torch.ones(k))) for k in (3, 5)]
    line = f"DIR {VALID[main_pcl]} --seed 1".replace("|", "").split()
    args = main_pcl.get_parser().parse_args(line)
    files = inputs.describe_files(IndexedFolder(folder.parent / "six/train", str))
    terms = terms_of(2, args, Plan(batch=args.batch_size, seed=args.seed, files=files))
    middle = run | {"steps": 2, "terms": terms, "clusterings": clusterings, "meters": {"steps": 2, "sums": {"loss": 3.0}}}
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    probe = common | {"state_dict": weights, "optimizer": trained(network.fc.parameters())}
    probe |= {"classes": [f"class {i}" for i in range(6)], "source": {"arch": ARCH, "weights": "random"}}
    probe |= {"history": [{"epoch": e, "test_acc": 1.0, "test_acc5": 2.0} for e in range(2)], "best_acc1": 1.0}
    other = MoCo(torchvision.models.get_model_builder(ARCH), dim=8, r=20).state_dict()
    first = next(iter(run["state_dict"]))
    files = {
        "run": run, "middle": middle, "probe": probe, "list": [1, 2], "tensor": torch.zeros(3), "none": None, "evil": Evil(),
        "int keys": {1: 2}, "weights no tensors": run | {"state_dict": {"a": 1}},
        "no weights": {"state_dict": {}, "arch": ARCH},
        "other model": run | {"state_dict": {f"module.{n}": v for n, v in other.items()}},
        "sparse": run | {"state_dict": run["state_dict"] | {first: run["state_dict"][first].to_sparse()}},
    }  # fmt: skip
    files |= {f"run {wrong}": spoil_field(run, wrong) for wrong in NO_RUN}
    files |= {f"run {wrong}": spoil_field(middle, wrong) for wrong in NO_MIDDLE}
    files |= {f"probe {wrong}": spoil_field(probe, wrong) for wrong in [*NO_RUN, *NO_PROBE]}
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script.pth"))
    (folder / "empty.pth").touch()
    (folder / "text").write_text("no checkpoint\n" * 9)
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (folder / "cut.pth").write_bytes((folder / "run.pth").read_bytes()[:100_000])
    shutil.make_archive(str(folder / "zip"), "zip", folder, "text")
    (folder / "zip.zip").rename(folder / "zip.pth")


def write_folders(root):
    """Image folders and VOC-shaped ones, of which each lacks something."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in range(6):
            folder = root / "six" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count + (split == "train" and label == 5)):
                Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    for name in ("ö 图 folder", "no val", "one", "five", "other classes", "a class short", "an empty class"):
        shutil.copytree(root / "six", root / name)
    shutil.copytree(root / "six/train/class 5", root / "photos")
    shutil.copytree(
        root / "six/train/class 5", root / "photos", copy_function=lambda a, b: shutil.copy(a, b + "2.png"), dirs_exist_ok=True
    )
    shutil.rmtree(root / "no val/val")
    for split in ("train", "val"):
        for label in range(1, 6):
            shutil.rmtree(root / "one" / split / f"class {label}")
        shutil.rmtree(root / "five" / split / "class 3")
    (root / "other classes/val/class 3").rename(root / "other classes/val/z\nz")
    shutil.rmtree(root / "a class short/train/class 2")
    for file in (root / "an empty class/train/class 2").iterdir():
        file.unlink()
    (root / "empty").mkdir()
    (root / "no images/train/a").mkdir(parents=True)
    (root / "no images/val/a").mkdir(parents=True)
    (root / "no images/train/a/a.txt").touch()
    (root / "no\nline").mkdir()

    rename = {
        "trainval": "ImageSets/Main/trainval.txt",
        "test": "ImageSets/Main/test.txt",
        "dog": "ImageSets/Main/dog_test.txt",
    }
    write_voc_shaped(root / "voc")

    def spoilt(name):
        shutil.copytree(root / "voc", root / f"voc {name}")
        folder = root / f"voc {name}" / "VOCdevkit/VOC2007"
        return {key: folder / place for key, place in rename.items()} | {"images": folder / "JPEGImages"}

    spoilt("no list")["trainval"].unlink()
    spoilt("no test")["dog"].unlink()
    for path in spoilt("no class")["trainval"].parent.glob("*_trainval.txt"):
        path.unlink()
    path = spoilt("label")["dog"]
    path.write_text(path.read_text().replace(" -1", " 7", 1))
    (spoilt("image")["images"] / "000007.jpg").unlink()
    spoilt("bytes")["test"].write_bytes(b"\xff\xfe\n\x00")
    path = spoilt("short")["dog"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    path = spoilt("positive")["dog"]
    path.write_text(path.read_text().replace("  1", " -1"))
    path = spoilt("folder")["trainval"]
    path.unlink()
    path.mkdir()
    spoilt("twice")["test"].write_text("000041\n000041\n")
    spoilt("nothing")["test"].write_text("\n \n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Files and folders of many kinds; the working folder lies among them."""
    root = tmp_path_factory.mktemp("tree")
    torch.manual_seed(0)
    write_folders(root)
    write_checkpoints(root / "ckpt")
    (root / "file").write_text("precious")
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "gone")
    (root / "taken").mkdir()
    (root / "taken/log.jsonl").write_text("{}\n")
    (root / "mixed").mkdir()
    shutil.copy(root / "ckpt/run.pth", root / "mixed/checkpoint_0001.pth.tar")
    shutil.copy(root / "ckpt/text", root / "mixed/checkpoint_0002.pth.tar")
    shutil.copy(root / "ckpt/run epoch.pth", root / "mixed/checkpoint_0003.pth.tar")
    (root / "work/Linear_eval/taken/old").mkdir(parents=True)
    (root / "work/Linear_eval/a file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "work")
        yield root


def state_of(root):
    """Name, kind, size and time of change of everything below a folder."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files, "."]:
            status = os.lstat(os.path.join(folder, name))
            found.append((folder, name, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return found


class Started(BaseException):
    """Training or the extraction of features would have begun."""


def forbidden(*_, **__):
    raise AssertionError("a process was started, or the network asked")


def started(*_):
    raise Started


def end_of(module, line):
    """How `python SCRIPT LINE` ends, in this process: its exit code (None: it has started), what it prints and warns of."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *line])
        patch.setattr("pcl.run.launch.launch", started)
        patch.setattr(eval_svm_voc, "features_of", started)
        for place, name in ((subprocess, "Popen"), (os, "fork"), (os, "posix_spawn"), (socket, "socket")):
            patch.setattr(place, name, forbidden)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                module.main()
                code = 0
            except SystemExit as stop:
                code = stop.code
            except Started:
                code = None
    return code, out.getvalue(), err.getvalue() + "".join(f"{w.filename}: {w.message}\n" for w in warned)


def spelt(draw, option, value):
    """An option and its value as one word or two."""
    if option == "--schedule" or (option.startswith("--") and draw(st.booleans())):
        return [f"{option}={value}"]
    return [option, value]


def reads(kind, text):
    try:
        kind(text)
    except ValueError:
        return False
    return True


ODD = st.sampled_from(
    ["", " ", "\n", "1\n2", "\0", "nan", "inf", "-inf", "--", "-", "-x", "%s", "{}", "\uff11x", "1e", "\udcff", "½"]
)


@st.composite
def wrong_number(draw, options, kind):
    """An option whose value is beyond its bounds, or no number."""
    option = draw(st.sampled_from(sorted(options)))
    least, most = options[option]
    if kind is int:
        below, above = st.integers(max_value=least - 1), st.integers(min_value=most + 1)
        beyond = st.one_of(below, above, st.sampled_from([10**12, 10**30, -(10**30), 10**5000])).map(decimal)
        beyond |= st.sampled_from(["1.5", "1e3", "0x10", "inf"])
    else:
        below = st.floats(max_value=least, exclude_max=True, allow_nan=False)
        above = st.floats(min_value=most, exclude_min=True, allow_nan=False)
        beyond = st.one_of(below, above).map(repr) | st.sampled_from(["nan", "inf", "-inf", "1e308", "1e999", "-1e-9"])
    text = (ODD | st.text(max_size=20)).filter(lambda text: not reads(float, text) and "," not in text)
    value = draw(st.one_of(beyond, text))
    if option == "--schedule" and value == "":
        value = "x"
    return None, spelt(draw, option, value), {option, ALIASES.get(option, option)}


def decimal(number):
    """Python refuses to write integers of more than 4300 digits."""
    return "1" + 5000 * "0" if number == 10**5000 else str(number)


@st.composite
def wrong_choice(draw, options):
    option = draw(st.sampled_from(options))
    value = draw(ODD | st.text(max_size=10) | st.sampled_from(["vgg16", "NCCL", "resnet", "bf16 "]))
    if value in ("faiss", "super", "sharded", "workers", "device", "off", "bf16", "nccl", "gloo"):
        value += "x"
    return None, spelt(draw, option, value), {option, ALIASES.get(option, option)}


@st.composite
def wrong_option(draw, module):
    """One that there is not, an abbreviated or a misspelt one, one without its value, a second DIR."""
    actions = module.get_parser()._actions
    flags = [a.option_strings[-1] for a in actions if a.nargs == 0 and a.option_strings[0] != "-h"]
    valued = [a.option_strings[-1] for a in actions if a.option_strings and a.nargs is None]
    how = draw(st.sampled_from(["unknown", "short", "misspelt", "no value", "a value", "second"]))
    if how == "no value":
        option = draw(st.sampled_from(valued))
        return None, [option], {option}
    if how == "a value":
        option = draw(st.sampled_from(flags))
        return None, [f"{option}={draw(st.sampled_from(['1', '', 'no', chr(10)]))}"], {option}
    if how == "second":
        word = draw(st.sampled_from(["folder", "../six", "ö 图", "a\nb"]))
        return None, [word], {word.replace("\n", "\\n")}
    known = {name for action in actions for name in action.option_strings}
    option = draw(st.sampled_from([name for name in flags + valued if len(name) > 4]))
    letters = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
    word = {"unknown": "--" + draw(letters), "short": option[:-1], "misspelt": "--" + option[2:].replace("-", "_") + "_"}[how]
    if word in known:
        word += "_"
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in word)
    return None, [word], {shown}


def other(cases):
    return st.sampled_from(cases).map(lambda case: (case[0], case[1].split("|") if case[1] else [], set(case[2].split())))


@st.composite
def wrong_lines(draw, module):
    """A valid command line, in an order and with further options of its own, spoilt in a way or two; and the names to blame."""
    cases = OTHER[module] + (LAUNCH if module is not eval_svm_voc else [])
    unread = st.one_of(
        wrong_number(INTEGERS[module], int),
        wrong_number(NUMBERS[module], float),
        wrong_choice(CHOICES[module]),
        wrong_option(module),
    )
    without = set()
    if module is not main_pcl and draw(st.integers(0, 5)) == 0:
        without, cases = {"--random-init", "-a"}, ONE_BACKBONE
    kind = draw(st.sampled_from(["unread", "other", "other", "both"])) if not without else "other"
    spoils = [draw(other(cases))] if kind != "unread" else []
    if kind != "other":
        spoils.append(draw(unread))
    if any("../ckpt/run" in word for word in spoils[0][1]):
        without = without | {"--seed"}  # with another one, an epoch begins anew
    data, options = draw(valid_lines(module, without))
    for folder, words, _ in spoils:
        data, options = data if folder is None else folder, [*options, *words]
    return [data, *options], set().union(*(names for *_, names in spoils))


@st.composite
def valid_lines(draw, module, without=()):
    """DIR and its options."""
    needed, further = ([option.split() for option in line[module].split(" | ")] for line in (VALID, HARMLESS))
    further = draw(st.lists(st.sampled_from(further), max_size=3, unique_by=lambda option: option[0]))
    options = [option for option in draw(st.permutations(needed + further)) if option[0] not in without]
    options.sort(key=lambda option: option[0] != "--schedule")  # it takes as many words as follow
    return draw(st.sampled_from(GOOD[module])), [word for option in options for word in option]


@pytest.mark.slow
@pytest.mark.parametrize("module", VALID, ids=lambda module: module.__name__)
def test_a_wrong_command_line_ends_before_anything_has_happened(module, tree):
    before, seen = state_of(tree), set()

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @given(wrong_lines(module))
    def check(drawn):
        line, names = drawn
        seen.add(tuple(line))
        code, out, err = end_of(module, line)
        assert (code, out) == (2, "")
        assert err.count("\n") == len(err.splitlines()) == 1
        assert err.startswith(f"{module.__name__}.py: error: ")
        assert err.strip().isprintable()
        assert any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", err) for name in names), (names, err)
        assert state_of(tree) == before

    check()
    assert len(seen) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("module", VALID, ids=lambda module: module.__name__)
def test_every_single_case_is_an_error_that_names_its_argument(module, tree):
    """What the draws above may leave out."""
    before = state_of(tree)
    needed = [option.split() for option in VALID[module].split(" | ")]
    backbones = ONE_BACKBONE if module is not main_pcl else []
    for cases, without in (
        (OTHER[module] + (LAUNCH if module is not eval_svm_voc else []), ()),
        (backbones, ("--random-init", "-a")),
    ):
        for data, words, names in cases:
            options = [word for option in needed if option[0] not in without for word in option]
            line = [GOOD[module][0] if data is None else data, *options, *(words.split("|") if words else [])]
            code, out, err = end_of(module, line)
            assert (code, out, err.count("\n")) == (2, "", 1), (line, err)
            assert any(name in err for name in names.split()), (line, err)
            assert "to `False`" not in err  # torch's advice to open a file unsafely
    assert state_of(tree) == before


@pytest.mark.slow
@pytest.mark.parametrize("module", VALID, ids=lambda module: module.__name__)
def test_what_is_spoilt_there_starts_as_it_is(module, tree):
    """Or else the errors above could be of something else."""

    @settings(max_examples=15, derandomize=True, deadline=None, database=None)
    @given(valid_lines(module))
    def check(drawn):
        data, options = drawn
        assert end_of(module, [data, *options])[0] is None

    check()
    further = {
        main_pcl: ["--resume ../ckpt/run.pth", "--resume ../ckpt/middle.pth", "--resume auto --exp-dir ../mixed"],
        eval_cls_imagenet: ["--resume ../ckpt/probe.pth"],
        eval_svm_voc: ["--output ../taken/log.jsonl"],
    }
    for options in further[module]:
        line = [GOOD[module][0], *VALID[module].replace("|", "").split(), *options.split()]
        assert end_of(module, line)[0] is None, options


SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("pcl/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("img/*.py")])


def name_of(node):
    """Such as torch.load."""
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_what_a_file_or_an_argument_holds(path):
    assert unsafe(path.read_text(encoding="utf-8"), path.name) == []


PARALLEL = ("joblib.Parallel", "joblib.delayed", "joblib.parallel_config")  # it also has a `load`


def unsafe(text, file):
    """What could run code, or ask the network where nobody asked for it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imported += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in imported:
            runs = name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
            asks = name.startswith(("urllib.request", "http", "requests", "torch.hub", "ftplib"))
            talks = name.split(".")[0] == "socket" and file not in (
                "launch.py",
                "rendezvous.py",
                "watch.py",
            )  # the processes of a run
            writes = (file, name) == ("export.py", "pickle.dump")
            if (runs and name not in PARALLEL and not writes) or (asks and file != "voc.py") or talks:
                found.append(name)
        if isinstance(node, ast.Call):
            name, options = name_of(node.func), {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
            runs = name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load")
            opens = name == "torch.load" and options.get("weights_only") is not True
            unpacks = name.endswith(".extractall") and options.get("filter") != "data"
            if runs or opens or unpacks or options.get("shell") or options.get("allow_pickle"):
                found.append(name)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "import urllib.request", "import socket", "eval('1')", "os.system(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)", "torch.load(f, weights_only=w)", "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)", "tar.extractall(d)", "tar.extractall(d, filter='tar')",
    ],
)  # fmt: skip
def test_what_is_looked_for_in_the_sources_is_found(text):
    assert unsafe(text, "main_pcl.py")
