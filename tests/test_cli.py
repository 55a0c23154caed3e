import gc
import os
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, save_result
from PIL import Image

import eval_cls_imagenet
import eval_svm_voc
import main_pcl
from pcl import cli, export, features, figures, samples
from pcl.checkpoint import CheckpointError
from pcl.distributed import get_rank
from pcl.errors import RunError
from pcl.loader import IndexedFolder
from pcl.run import inputs, options, preflight
from pcl.run.logs import write_result
from pcl.run.options import learning_rate_factor
from pcl.run.preflight import check_launch
from pcl.run.rendezvous import Place, place_of


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1", {"lr": 0.03, "schedule": [120, 160], "epochs": 200, "cos": False}),
        ("v2", {"lr": 0.03, "schedule": [120, 160], "epochs": 200, "cos": True}),
        ("linear", {"lr": 5, "schedule": [60, 80], "epochs": 100}),  # this script has no --cos
    ],
)
def test_learning_rates_are_the_published_ones(name, options):
    with np.load(GOLDEN / "learning_rate.npz") as golden:
        ours = [options["lr"] * learning_rate_factor(Namespace(**options), epoch) for epoch in range(options["epochs"])]
        np.testing.assert_allclose(ours, golden[name], rtol=1e-5, atol=1e-12)


def test_numbers_are_read_or_refused():
    assert cli.integers("25000,50000") == [25000, 50000]
    for wrong in ("", "a", "3,,4", "3.5", "0", "-2", "5,5"):
        with pytest.raises(ArgumentTypeError):
            cli.integers(wrong)
    assert (cli.natural("0"), cli.positive("1"), cli.fraction("1"), cli.nonnegative_float("0")) == (
        0,
        1,
        1.0,
        0.0,
    )
    for kind, wrong in (
        (cli.natural, "-1"), (cli.positive, "0"), (cli.positive_float, "0"), (cli.positive_float, "nan"),
        (cli.positive_float, "inf"), (cli.nonnegative_float, "-1"), (cli.fraction, "1.1"), (cli.fraction, "x"),
    ):  # fmt: skip
        with pytest.raises(ArgumentTypeError, match=wrong):
            kind(wrong)


def test_a_random_backbone_may_have_a_small_stem():
    parser = cli.Parser("text")
    options.add_backbone(parser)

    def opened(*words):
        return inputs.open_backbone(parser.parse_args(["--small-stem", *words]))[0]

    assert opened("--random-init", "-a", "resnet18").conv1.kernel_size == (3, 3)
    with pytest.raises(CheckpointError, match="a checkpoint's own is recognized"):
        opened("--pretrained", "c.pth.tar")
    with pytest.raises(CheckpointError, match="shufflenet_v2_x0_5 does not begin with"):
        opened("--random-init", "-a", "shufflenet_v2_x0_5")


@pytest.mark.parametrize("script", [main_pcl, eval_cls_imagenet, eval_svm_voc, features, figures, samples, export])
@pytest.mark.parametrize("words", [["--unknown"], ["--hel"], ["x", "x", ""]])
def test_an_error_of_a_command_line_is_one_line_and_exit_code_2(script, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", *words])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_are_totals_over_a_node():
    args = Namespace(batch_size=256, workers=8, nproc=4, gpu=None, world_size=3, rank=0, seed=None)
    args.dist_url, args.dist_backend = "tcp://a:1", "nccl"
    plan = check_launch(cli.Parser(None), args)
    assert (plan.batch, plan.workers, plan.global_batch) == (64, 2, 768)


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "png")


# Images below DIR -> what pre-training takes: the folder, its classes and the number of images.
SHAPES = {
    "classes in train": (["train/a/1.png", "train/b/2.png", "val/a/3.png"], "train", ["a", "b"], 2),
    "classes": (["a/1.png", "b/2.png", "b/3.png"], "", ["a", "b"], 3),
    "nested classes": (["train/x/a/1.png", "train/x/b/2.png", "train/y/c/3.png"], "train", ["x", "y"], 3),
    "images in train": (["train/1.png", "train/2.png"], "train", [], 2),
    "images in train beside folders": (["train/1.png", "train/a/2.png"], "train", [], 2),
    "images": (["1.png", "2.png"], "", [], 2),
    "images beside folders": (["1.png", "trip/2.png", "trip/train/3.png"], "", [], 3),
    "a class that is called train": (["road/a/2.png", "x/y/train/3.png"], "", ["road", "x"], 2),
    "what is hidden beside classes": ([".x.png", "a/1.png", ".trash/train/2.png", "b/.3.png"], "", ["a", "b"], 1),
}


@pytest.mark.parametrize(("names", "below", "classes", "number"), SHAPES.values(), ids=SHAPES)
def test_the_shape_of_a_folder_is_recognized(tmp_path, names, below, classes, number):
    write(tmp_path, *names)
    images = inputs.open_folder(cli.Parser(""), tmp_path, "train", labeled=False)
    assert (images.root, images.classes, len(images)) == (tmp_path / below, classes, number)


def test_a_folder_may_be_named_by_a_link_or_from_where_one_stands(tmp_path, monkeypatch):
    write(tmp_path, "real/a/1.png", "real/b/1.png")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "train").symlink_to(tmp_path / "real")
    assert inputs.open_folder(cli.Parser(""), tmp_path / "link", "train").root == tmp_path / "real"
    monkeypatch.chdir(tmp_path / "real")
    images = inputs.open_folder(cli.Parser(""), Path("."), "train", labeled=False)
    assert (images.root, images.classes) == (tmp_path / "real", ["a", "b"])


LACKS = "{}: it has no folder train/"

# Images below DIR, the folder that is named, whether labels are needed, and what is said of it.
MISSHAPEN = {
    "a folder around it": (["imagenet/train/a/1.png"], "", False, f"{LACKS}, but {{}}/imagenet has; give that one"),
    "ImageNet's archive": (
        ["ILSVRC/Annotations/CLS-LOC/train/a/1.xml", "ILSVRC/Annotations/CLS-LOC/val/1.xml", "ILSVRC/ImageSets/CLS-LOC/x.txt"]
        + [f"ILSVRC/Data/CLS-LOC/{name}" for name in ("train/a/1.png", "train/b/2.png", "val/3.png", "test/4.png")],
        "",
        False,
        f"{LACKS}, but {{}}/ILSVRC/Data/CLS-LOC has; give that one",
    ),
    "the same in a folder, for labels": (
        ["imagenet/ILSVRC/Data/CLS-LOC/train/a/1.png", "imagenet/ILSVRC/Data/CLS-LOC/val/3.png"],
        "",
        True,
        f"{LACKS}, but {{}}/imagenet/ILSVRC/Data/CLS-LOC has; give that one",
    ),
    "the same for labels": (["imagenet/train/a/1.png"], "", True, f"{LACKS}, but {{}}/imagenet has; give that one"),
    "train itself for labels": (["train/a/1.png"], "/train", True, "{}/train: it has no folder train/, but {} has; give that"),
    "val alone": (["val/a/1.png"], "", False, f"{LACKS}; put the images into {{}}/train/<class>/, or straight into {{}} if"),
    "nothing": ([".a/1.png"], "", False, f"{LACKS}; put the images into {{}}/train/<class>/, or straight into {{}} if"),
    "classes for labels": (["a/1.png"], "", True, f"{LACKS}; put the images into {{}}/train/<class>/\n"),
    "images for labels": (["train/1.png"], "", True, "{}: images lie in {}/train itself; put them into {}/train/<class>/"),
    "nothing but hidden images": (["a/._1.png"], "", False, "{}: no image in {}/<class>/; put JPEG, PNG or other images there"),
    "other files alone": (
        ["1.heic", "2.HEIC", "3.txt"],
        "",
        False,
        f"{LACKS}; put the images into {{}}/train/<class>/, or straight into {{}} if they have no labels; "
        "2 .heic, 1 .txt there are left out: the extensions read are .apng, ",
    ),
    "other files alone in classes": (
        ["train/a/1.heic", "train/b/2.heic", "train/b/.3.heic", "train/b/@eaDir/3.heic", "train/b/Thumbs.db", "train/README"],
        "",
        True,
        "{}: no image in {}/train/<class>/; put JPEG, PNG or other images there; "
        "2 .heic, 1 without extension there are left out: the extensions read are .apng, ",
    ),
    "ImageNet's flat val": (
        ["train/ILSVRC2012_val_00000001.JPEG"],
        "",
        True,
        "{}: images lie in {}/train itself; put them into {}/train/<class>/, which names their label; "
        "or move train/ away, put ILSVRC2012_img_train.tar and ILSVRC2012_devkit_t12.tar.gz into {}, and call torchvision",
    ),
    "no images in train": (["train/a/.1.png", "1.png"], "", False, "{}: no image in {}/train/<class>/"),
}


@pytest.mark.parametrize(("names", "below", "labeled", "message"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_folder_of_another_shape_is_one_line_with_its_remedy(tmp_path, capsys, names, below, labeled, message):
    write(tmp_path, *names)
    with pytest.raises(SystemExit) as stop:
        inputs.open_folder(cli.Parser(""), Path(f"{tmp_path}{below}"), "train", labeled)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"error: DIR {message.replace('{}', str(tmp_path))}" in err
    assert err.count("\n") == 1


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, capsys, monkeypatch):
    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    write(tmp_path, "train/a/1.png", "train/b/2.png")
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SystemExit):
        inputs.open_folder(cli.Parser(""), tmp_path, "train")
    assert f"{tmp_path}/train/b cannot be listed: Permission denied; make it readable" in capsys.readouterr().err


def skipping(folder, **options):
    return Namespace(skip_unreadable=True, data=folder, rank=0, nproc=1, gpu=None, world_size=1, dist_url=None, **options)


def test_unreadable_images_are_listed_and_left_out(tmp_path, capsys):
    write(tmp_path, *[f"train/{c}/{i:02d}.png" for c in "ab" for i in range(30)], *[f"val/a/{i}.png" for i in range(3)])
    gone = [f"train/a/{i:02d}.png" for i in range(2, 30)]
    for name in gone:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    (tmp_path / "val" / "a" / "2.png").unlink()
    (tmp_path / "val" / "a" / "2.png").symlink_to("nowhere")
    train, val = (inputs.open_folder(cli.Parser(""), tmp_path, split) for split in ("train", "val"))
    args = skipping(tmp_path)
    kept, unreadable = inputs.leave_out_unreadable(cli.Parser(""), args, Place(), train, val)
    assert [len(images) for images in kept] == [32, 2]
    assert kept[0].labels.tolist() == [0] * 2 + [1] * 30
    assert list(unreadable) == [str(tmp_path / name) for name in [*gone, "val/a/2.png"]]

    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "unreadable and left out: 29 of 63 images"
    assert [line.split(": ")[0] for line in lines] == [f"  {tmp_path / name}" for name in gone[:20]]
    assert all(line.split(": ")[1] for line in lines)
    assert last == "  and 9 more; unreadable.txt beside the checkpoints will name all"
    inputs.keep_unreadable(tmp_path, unreadable)
    text = (tmp_path / "unreadable.txt").read_text().splitlines()
    inputs.keep_unreadable(tmp_path, {})  # they were mended, and the run goes on
    assert not (tmp_path / "unreadable.txt").exists()
    assert [line.split("\t")[0] for line in text] == list(unreadable)
    assert text[-1].split("\t")[1] == "no such file (removed meanwhile, or a broken link)"

    args.skip_unreadable = False
    kept, unreadable = inputs.leave_out_unreadable(cli.Parser(""), args, Place(), train, val)
    assert ([len(images) for images in kept], unreadable) == ([60, 3], {})


def test_where_nothing_can_be_read_nothing_is_left_to_do(tmp_path, capsys):
    (tmp_path / "caf\udce9.jpg").write_bytes(b"")
    images = inputs.open_folder(cli.Parser(""), tmp_path, "train", labeled=False)
    args = skipping(tmp_path)
    with pytest.raises(SystemExit) as stop:
        inputs.leave_out_unreadable(cli.Parser(""), args, Place(), images)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "caf\\udce9.jpg: it is empty, or not an image of a known format" in out
    assert f"DIR {tmp_path}: none of the 1 images of {tmp_path} can be read" in err
    path = str(tmp_path / "caf\udce9.jpg")
    inputs.keep_unreadable(tmp_path, {path: "it is empty"})
    assert (tmp_path / "unreadable.txt").read_bytes().startswith(os.fsencode(tmp_path) + b"/caf\xe9.jpg\t")


@pytest.mark.parametrize(("rank", "node", "tells"), [("0", 0, True), ("3", 0, False), (None, 1, False)])
def test_of_several_processes_that_read_the_images_one_tells(tmp_path, capsys, monkeypatch, rank, node, tells):
    write(tmp_path, "1.png")
    images = inputs.open_folder(cli.Parser(""), tmp_path, "train", labeled=False)
    if rank:
        for name, value in {"RANK": rank, "WORLD_SIZE": "8", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
    args = skipping(tmp_path)
    args.rank, args.dist_url, args.world_size = node, "tcp://a:1", 1 if rank else node + 1
    inputs.leave_out_unreadable(cli.Parser(""), args, place_of(args), images)
    assert capsys.readouterr().out == ("unreadable and left out: 0 of 1 images\n" if tells else "")


def test_ctrl_c_while_images_are_read_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(path):
        os.kill(os.getpid(), signal.SIGINT)  # it reaches the main thread
        time.sleep(0.1)

    write(tmp_path, "1.png")
    images = inputs.open_folder(cli.Parser(""), tmp_path, "train", labeled=False)
    monkeypatch.setattr(inputs, "why_unreadable", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    gc.collect()  # of objects that are deleted meanwhile, one might take the signal
    with pytest.raises(SystemExit) as stop:
        inputs.leave_out_unreadable(cli.Parser(""), skipping(tmp_path), Place(), images)
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


def compare_images(device, args, plan):
    found = []
    for roots in (args.same, args.other, (args.same[0], None)):
        root = roots[get_rank()]
        try:
            inputs.check_same_images(Path("images"), root and IndexedFolder(root, None))
            found.append("")
        except RunError as error:
            found.append(str(error))
    save_result(args, found=found)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("--pretrained own", 40),
        ("--pretrained own --image-size 96", 96),
        ("--pretrained released", 224),
        ("--pretrained released --resume own", 40),
        ("--pretrained own --resume probe", 64),
        ("--pretrained own --resume auto --id one", 64),
        ("--resume auto --id several --lr 0.3,1", 64),
        ("--pretrained missing", 224),
        ("--random-init", 224),
        ("--resume auto", 224),
    ],
)
def test_an_evaluation_takes_the_size_that_its_checkpoint_tells(tmp_path, monkeypatch, words, size):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": {"image_size": "40"}}, "own")
    torch.save({"state_dict": {}}, "released")
    for probe in ("probe", "Linear_eval/one/checkpoint.pth.tar", "Linear_eval/several/lr_1/checkpoint.pth.tar"):
        Path(probe).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"args": {"image_size": "64"}}, probe)
    monkeypatch.setattr(sys, "argv", ["eval_cls_imagenet.py", "DIR", *words.split()])
    assert eval_cls_imagenet.parse(eval_cls_imagenet.get_parser()).image_size == size


@pytest.mark.dist
def test_processes_that_find_different_images_are_stopped(tmp_path, two_ranks):
    write(tmp_path, "one/a/1.png", "two/a/1.png", "three/a/2.png")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for result in two_ranks(compare_images, same=(one, two), other=(one, three)):
        same, other, none = result["found"]
        assert same == ""
        assert other == none
        assert other == "the processes found different images in images; give every node the same files, and start again"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory. Tried")]
)
def test_out_of_memory_is_one_line_with_its_remedy(error, capsys):
    with pytest.raises(SystemExit) as stop, cli.Parser(None, "svm").telling(1):
        raise error
    assert stop.value.code == 1
    line = f"{error}" or "MemoryError"
    assert capsys.readouterr().err == f"svm: error: out of memory: lower --batch-size or --image-size ({line})\n"
    with pytest.raises(ZeroDivisionError), cli.Parser(None).telling(1):
        raise ZeroDivisionError  # a fault of the program is not hidden


def test_a_result_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "old.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "old.json")  # root may write everywhere
    with pytest.raises(SystemExit):
        preflight.check_output(cli.Parser(""), Namespace(output=tmp_path / "old.json"))
    assert capsys.readouterr().err.endswith(f"--output: no permission to write {tmp_path}/old.json; name another file\n")
    write_result(tmp_path / "earlier.json", {})
    preflight.check_output(cli.Parser(""), Namespace(output=tmp_path / "earlier.json"))
    torch.save({}, tmp_path / "c.pth.tar")  # the checkpoint itself, or another
    (tmp_path / "link.json").symlink_to("c.pth.tar")
    with pytest.raises(SystemExit):
        preflight.check_output(cli.Parser(""), Namespace(output=tmp_path / "link.json"))
    told = f"--output {tmp_path}/link.json exists and holds no results; name another file\n"
    assert capsys.readouterr().err.endswith(told)


def test_a_result_that_a_broken_link_would_lose_is_told_before_the_work(tmp_path, capsys):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "result.json")
    preflight.check_output(cli.Parser(""), Namespace(output=link))
    link.unlink()
    link.symlink_to(tmp_path / "gone" / "result.json")
    with pytest.raises(SystemExit):
        preflight.check_output(cli.Parser(""), Namespace(output=link))
    assert capsys.readouterr().err.endswith(f"--output {link}: a broken link; name another file\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--fit 60", ([2, 3, 6], 8, 8, 0.03 / 32, 0.99, 20)),
        ("--fit 5000", ([125, 250, 500], 512, 64, 0.0075, 0.99, 20)),
        ("--fit 5000 --epochs 18 -b 128", ([125, 250, 500], 512, 128, 0.015, 0.99, 6)),
        ("--fit 5000 --lr 0.03 --num-cluster 7", ([7], 512, 64, 0.03, 0.99, 20)),
        ("--fit 1281167", ([25000, 50000, 100000], 16384, 256, 0.03, 0.999, 20)),  # the published ones
        ("--fit 100", ([2, 5, 10], 8, 8, 0.03 / 32, 0.99, 20)),
        ("", ([25000, 50000, 100000], 16384, 256, 0.03, 0.999, 20)),
    ],
)
def test_fit_sets_what_is_not_given_by_the_number_of_images(words, expected):
    args = options.parse_fitted(main_pcl.get_parser(), ["DIR", *words.split()])
    assert tuple(getattr(args, name) for name in options.FITTED) == expected
