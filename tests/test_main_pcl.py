import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, assert_same, free_port, run_script, weights, without_gpu
from PIL import Image

import main_pcl
from pcl.augment import TwoViews, center_view, normalize, random_view
from pcl.builder import MoCo
from pcl.checkpoint import LAST, load
from pcl.clustering import Clustering, cluster_all
from pcl.distributed import seed_everything
from pcl.errors import PREEMPTED
from pcl.features import load_momentum_encoder
from pcl.loader import EpochSampler, IndexedFolder
from pcl.losses import instance_logits, prototype_loss
from pcl.run import inputs, launch, monitor, rendezvous, report
from pcl.run.logs import Meters, claim
from pcl.run.preflight import Plan
from pcl.run.progress import Progress

TINY = "-a shufflenet_v2_x0_5 --image-size 32 -b 8 --pcl-r 20 --low-dim 16 --num-cluster 3,5 --warmup-epoch 1 --epochs 3 "
TINY += "--mlp --aug-plus --cos --moco-m 0.9 -p 1 -j 0 --monitor-freq 0 --seed 1"
MONITOR = ("--monitor-freq", 10)  # and draw pictures at the end, which takes seconds


def run(*options, tiny=TINY):
    """main_pcl.py in this process, with the tiny settings and then these."""
    run_script(main_pcl, *tiny.split(), *options)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def records_of(exp_dir):
    return [json.loads(line) for line in (exp_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A run of three epochs, of which the second and third have an E-step."""
    exp_dir = tmp_path_factory.mktemp("runs") / "finished"
    with without_gpu():
        run(image_folder, "--exp-dir", exp_dir, *MONITOR)
    return exp_dir


@pytest.mark.slow
def test_a_run_ends_with_a_checkpoint_in_the_published_form_and_a_log(finished):
    (board,) = (finished / "tensorboard").iterdir()
    pictures = ("concentration", "prototypes_3", "prototypes_5", "seconds", "training_curves", "tsne")
    assert files_below(finished) == [
        ".lock",
        "checkpoint_0002.pth.tar",
        "e_step.pth.tar",
        "figures",
        *(f"figures/{name}.png" for name in pictures),
        "log.jsonl",
        "tensorboard",
        f"tensorboard/{board.name}",
    ]
    state = load(finished / "checkpoint_0002.pth.tar")
    assert [state[name] for name in ("epoch", "arch", "seed", "deterministic")] == [3, "shufflenet_v2_x0_5", 1, True]
    assert state["state_dict"]["module.queue"].shape == (16, 20)
    assert state["state_dict"]["module.queue_ptr"].tolist() == [3 * 3 * 8 % 20]
    for encoder in ("encoder_q", "encoder_k"):
        assert state["state_dict"][f"module.{encoder}.fc.2.weight"].shape == (16, 1024)

    head, *records = records_of(finished)
    assert head["args"]["num_cluster"] == [3, 5]
    assert (records[0]["images"], records[0]["steps_of_an_epoch"], records[0]["negatives_at_most"]) == (25, 3, [2, 4])
    assert [r["epoch"] for r in records if "kmeans_seconds" in r] == [1, 2]
    epochs = [r for r in records if "seconds" in r]
    assert [("loss_prototype" in r, "acc_prototype" in r) for r in epochs] == [(False, False), (True, True), (True, True)]
    assert [r["lr"] for r in epochs] == pytest.approx([0.03, 0.0225, 0.0075])
    for r in epochs[1:]:
        assert r["loss"] == pytest.approx(r["loss_instance"] + r["loss_prototype"])
    assert sum("step" in r for r in records) == 3 * 3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_whatever_the_workers(image_folder, finished, tmp_path):
    run(image_folder, "--exp-dir", tmp_path, "-j", 2)
    assert_same(weights(tmp_path), weights(finished))
    run(image_folder, "--exp-dir", tmp_path / "other", "--seed", 2, "--epochs", 1)
    assert not torch.equal(
        weights(tmp_path / "other", 0)["state_dict"]["module.queue"], weights(finished)["state_dict"]["module.queue"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "weight"), [(False, 1.0), (True, 0.5)])
def test_a_run_is_that_of_a_plain_loop(image_folder, tmp_path, mask, weight):
    options = ["--proto-weight", weight, *["--mask-duplicates"] * mask]
    run(image_folder, "--exp-dir", tmp_path, "--pcl-r", 8, "--num-cluster", "3,24", *options)  # few of many negatives are drawn
    seed_everything(1)
    model = MoCo(torchvision.models.shufflenet_v2_x0_5, dim=16, r=8, m=0.9, mlp=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    images = IndexedFolder(image_folder / "train", TwoViews(random_view(32, aug_plus=True)), seed=1)
    center, sampler, clusterings, hits = images.with_transform(center_view(32)), EpochSampler(images, 1), [], []
    for epoch, lr in enumerate((0.03, 0.0225, 0.0075)):
        if epoch >= 1:
            features = model.eval()(normalize(torch.stack([center[i][0] for i in range(25)])))
            clusterings = cluster_all(features, [3, 24], 0.2)
        model.train()
        sampler.set_epoch(epoch)
        order, optimizer.param_groups[0]["lr"] = list(sampler), lr
        for step in range(3):
            pairs, index = zip(*(images[key] for key in order[8 * step : 8 * step + 8]), strict=True)
            seed_everything(1, epoch, step + 1)
            q, k, queue = model(*(normalize(torch.stack(views)) for views in zip(*pairs, strict=True)))
            logits, target = instance_logits(q, k, queue, 0.2)
            loss = F.cross_entropy(logits, target)
            hits.append(float((logits.argmax(1) == 0).float().mean()))
            if clusterings:
                loss = loss + weight * prototype_loss(q, torch.tensor(index), clusterings, 8, mask)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = load(tmp_path / "checkpoint_0002.pth.tar")["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"module.{name}"], value)
    told = [r["acc_instance"] for r in records_of(tmp_path) if "seconds" in r]
    assert told == pytest.approx([sum(hits[3 * epoch : 3 * epoch + 3]) / 3 for epoch in range(3)])


@pytest.mark.slow
def test_looking_changes_nothing(image_folder, finished, tmp_path):
    run(image_folder, "--exp-dir", tmp_path)
    assert_same(weights(tmp_path), weights(finished))
    looks = [[r["epoch"] for r in records_of(folder) if "monitor_seconds" in r] for folder in (finished, tmp_path)]
    assert looks == [[0, 1, 2], []]
    assert [(folder / "figures").exists() for folder in (finished, tmp_path)] == [True, False]
    last = next(r for r in records_of(finished) if "monitor_seconds" in r and r["epoch"] == 2)
    assert {"knn_train", "knn_val", "clusters_5/ami", "clusters_5/changed"} <= last.keys()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["train", ""])
def test_images_without_class_folders_are_enough(image_folder, tmp_path, capsys, where):
    shutil.copytree(image_folder / "train" / "b", tmp_path / "photos" / where)
    run(tmp_path / "photos", "--exp-dir", tmp_path / "run", "--epochs", 2, *MONITOR)
    assert f"15 images without labels in {tmp_path / 'photos' / where}" in capsys.readouterr().out
    last = load(tmp_path / "run" / "e_step.pth.tar")
    assert (last["epoch"], last["classes"], len(last["labels"])) == (1, [], 15)
    assert (tmp_path / "run" / "figures" / "prototypes_5.png").exists()
    looks = [r for r in records_of(tmp_path / "run") if "monitor_seconds" in r]
    assert [(r["epoch"], "clusters_5/empty" in r, "knn_train" in r) for r in looks] == [(1, True, False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--kmeans sharded", "--kmeans super --low-dim 32", "--augment-on device --amp bf16 --channels-last"]
)
def test_a_run_with_a_faster_part_comes_to_its_end(image_folder, finished, tmp_path, options):
    run(image_folder, "--exp-dir", tmp_path, *options.split(), *MONITOR)
    assert (tmp_path / "figures" / "prototypes_5.png").exists()
    ours, published = ([r["loss"] for r in records_of(folder) if "seconds" in r] for folder in (tmp_path, finished))
    assert ours == pytest.approx(published, rel=0.5)
    if options == "--kmeans sharded":
        assert ours == pytest.approx(published, rel=0.02)  # the same clusters


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_what_is_clustered(image_folder, tmp_path):
    run(image_folder, "--exp-dir", tmp_path, "--nproc", "2", "--kmeans", "sharded", *MONITOR)
    last = load(tmp_path / "e_step.pth.tar")
    assert last["seen"].tolist() == list(range(0, 25, 2))
    for granularity in last["granularities"]:
        assert len(granularity["im2cluster"]) == 25
        assert len(granularity["cosine"]) == 13
    looks = [r for r in records_of(tmp_path) if "monitor_seconds" in r]
    assert [("knn_train" in r, "clusters_5/ami" in r) for r in looks] == [(True, False), (True, True), (True, True)]
    assert (tmp_path / "figures" / "prototypes_5.png").exists()


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(image_folder, finished, tmp_path, monkeypatch, capsys):
    class Stop(Exception):  # noqa: N818
        pass

    step, steps = main_pcl.m_step, []

    def m_step(*args):
        steps.append([path.name for path in tmp_path.glob("checkpoint*")])
        if len(steps) == 3:
            raise Stop
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(main_pcl, "m_step", m_step)
        with pytest.raises(Stop):
            run(image_folder, "--exp-dir", tmp_path, "--save-freq", 2, "--save-steps", 0)
    assert steps == [[], [LAST], ["checkpoint_0001.pth.tar"]]

    unseeded = TINY.removesuffix("--seed 1")  # the seed comes from the checkpoint
    run(image_folder, "--exp-dir", tmp_path, "--resume", tmp_path / "checkpoint_0001.pth.tar", tiny=unseeded)
    assert_same(weights(tmp_path), weights(finished))
    assert (tmp_path / "log.jsonl").read_text().count('"command"') == 2
    assert load(tmp_path / "checkpoint_0002.pth.tar")["deterministic"] is True
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("processes were started"))
    run(image_folder, "--exp-dir", tmp_path, "--resume", "auto")
    assert "nothing is left to do: " in capsys.readouterr().out
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 7}.items():
        monkeypatch.setenv(name, str(value))
    run(image_folder, "--exp-dir", tmp_path, "--resume", "auto")
    assert capsys.readouterr().out == ""  # process 0 tells


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "told"),
    [(0, "different images in {}/train;"), (1, "different images in {}/val;"), (2, "from different checkpoints;")],
)
def test_nodes_that_begin_differently_are_stopped(image_folder, tmp_path, monkeypatch, capsys, which, told):
    answers = iter([True] * which)
    monkeypatch.setattr(inputs, "equal_on_all_ranks", lambda number: next(answers, False))
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", tmp_path, *MONITOR)
    assert stop.value.code == 1
    assert told.format(image_folder) in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_waited_for_another_one_goes_on_from_its_checkpoint(image_folder, finished, tmp_path, monkeypatch):
    def claim_late(folder):
        shutil.copytree(finished, folder, dirs_exist_ok=True)  # meanwhile the other has come and gone
        return claim(folder)

    monkeypatch.setattr("pcl.run.logs.claim", claim_late)
    run(image_folder, "--exp-dir", tmp_path, "--resume", "auto")
    assert records_of(tmp_path)[-1]["first_epoch"] == 3
    assert (tmp_path / "checkpoint_0002.pth.tar").read_bytes() == (finished / "checkpoint_0002.pth.tar").read_bytes()


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_options_says_so_and_does(image_folder, finished, tmp_path, capsys):
    state = load(finished / "checkpoint_0002.pth.tar")
    state["optimizer"]["param_groups"][0]["maximize"] = True
    state |= {"steps": 1, "terms": {"seed": "another"}}
    torch.save(state, tmp_path / "c.pth.tar")
    changed = "--epochs 4 --wd 0.5 --momentum 0.8 --temperature 0.3 --moco-m 0.95 --mask-duplicates --proto-weight 0.5 "
    run(image_folder, "--exp-dir", tmp_path / "run", "--resume", tmp_path / "c.pth.tar", *changed.split(), "-p", 7, "--seed", 2)
    lines = capsys.readouterr().out.splitlines()
    assert f"epoch 4 starts over: images, batch, seed or clusters are not those of {tmp_path / 'c.pth.tar'}" in lines
    assert [line for line in lines if line.startswith("note: ")] == [
        "note: --epochs 4, before 3",
        "note: --momentum 0.8, before 0.9",
        "note: --wd 0.5, before 0.0001",
        "note: --moco-m 0.95, before 0.9",
        "note: --temperature 0.3, before 0.2",
        "note: --mask-duplicates True, before False",
        "note: --proto-weight 0.5, before 1.0",
        "note: --seed 2, before 1",
    ]
    group = load(tmp_path / "run" / "checkpoint_0003.pth.tar")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"], group["maximize"]) == (0.5, 0.8, False)


@pytest.mark.parametrize(
    ("options", "steps", "clusters"),
    [
        ("--lr 0.1 --wd 0 --moco-m 0.5 --print-freq 5 --epochs 9 --proto-weight 2", 2, 2),
        *((options, 0, 0) for options in ("--temperature 0.3", "--image-size 24", "--kmeans sharded", "--amp bf16", "-b 4")),
        *((options, 0, 0) for options in ("--augment-on device", "--num-cluster 4,5", "--kmeans-every 2", "--seed 2")),
        *((options, 0, 0) for options in ("--warmup-epoch 2", "--fixed-phi", "--kmeans-tf32")),
        ("other images", 0, 0),
    ],
)
def test_what_is_done_of_an_epoch_counts_if_it_fits_the_options(image_folder, options, steps, clusters, tmp_path):
    folder = shutil.copytree(image_folder / "train", tmp_path / "train")

    def parsed(*more):
        args = main_pcl.get_parser().parse_args([str(folder), *TINY.split(), *more])
        files = inputs.describe_files(IndexedFolder(folder, str))
        return args, Plan(batch=args.batch_size, seed=args.seed, num_images=25, files=files)

    clusterings = [Clustering(torch.zeros(25, dtype=torch.int64), torch.zeros(k, 16), torch.ones(k)) for k in (3, 5)]
    meters = Meters.from_state({"steps": 2, "sums": {"loss": 3.0}})
    state = Progress(1, 2, clusterings, meters).state_over_ranks(*parsed())
    if options == "other images":
        (folder / "a" / "00.png").write_bytes(b"of another size")
        options = ""
    args, plan = parsed(*options.split())
    progress = Progress.from_state(state, args, plan)
    assert (progress.epoch, progress.steps, len(progress.clusterings)) == (1, steps, clusters)
    with pytest.raises(ValueError, match="more steps") if steps else nullcontext():
        Progress.from_state(state | {"steps": 25 // plan.global_batch + 1}, args, plan)
    clusterings[0].prototypes[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite") if steps else nullcontext():
        Progress.from_state(state, args, plan)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_of_two_runs_into_one_folder_the_second_writes_nothing(image_folder, finished, tmp_path, monkeypatch, capsys, resumed):
    exp_dir, older = tmp_path / "run", tmp_path / "older.pth.tar"
    torch.save(load(finished / "checkpoint_0002.pth.tar") | {"epoch": 2}, older)

    def claim_late(folder):
        shutil.copytree(finished, folder, dirs_exist_ok=True)  # meanwhile the first has come and gone
        return claim(folder)

    monkeypatch.setattr("pcl.run.logs.claim", claim_late)
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", exp_dir, *(["--resume", older] if resumed else []))
    assert stop.value.code == 1
    told = "holds a newer checkpoint, checkpoint_0002.pth.tar" if resumed else "holds another run"
    assert f"--exp-dir {exp_dir} {told}" in capsys.readouterr().err
    assert files_below(exp_dir) == files_below(finished)
    assert (exp_dir / "log.jsonl").read_bytes() == (finished / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("place", "options", "epoch", "step", "advice"),
    [
        ("train", "", 2, 3, "at learning rate 0.0075; lower --lr, and start again"),
        ("train", "", 1, 1, "before this run has changed a weight: look for the cause in a small --temperature; raise it"),
        ("train", "--resume c.pth", 1, 1, "before this run has changed a weight: look for the cause in the weights in c.pth;"),
        ("black", "", 2, 3, "since the images are all the same"),
    ],
)
def test_the_advice_about_numbers_that_are_not_finite_fits_the_cause(
    image_folder, tmp_path, place, options, epoch, step, advice
):
    (tmp_path / "black").mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40)).save(tmp_path / "black" / f"{number}.png")
    args = main_pcl.get_parser().parse_args(["DIR", *TINY.split(), "--exp-dir", str(tmp_path), *options.split()])
    images = (tmp_path if place == "black" else image_folder) / place
    plan = Plan(images=images, epoch=1, step=0, resume=args.resume or "")
    assert report.remedy(args, plan, epoch, step).startswith(advice)


@pytest.mark.slow
def test_clusters_are_kept_between_e_steps_and_by_a_run_that_is_resumed_there(image_folder, tmp_path):
    long = ["--epochs", 6, "--save-freq", 1, "--kmeans-every", 3, *MONITOR]
    run(image_folder, "--exp-dir", tmp_path / "whole", *long)
    assert [r["epoch"] for r in records_of(tmp_path / "whole") if "kmeans_seconds" in r] == [1, 4]
    assert all("loss_prototype" in r for r in records_of(tmp_path / "whole") if r.get("epoch", 0) > 0 and "seconds" in r)
    # The third epoch is over: the fourth has the clusters of the second, the fifth gets new ones.
    shutil.copytree(
        tmp_path / "whole", tmp_path / "part", ignore=lambda *_: ["checkpoint_0003.pth.tar", "checkpoint_0004.pth.tar"]
    )
    (tmp_path / "part" / "checkpoint_0005.pth.tar").unlink()
    (tmp_path / "part" / "log.jsonl").unlink()
    run(image_folder, "--exp-dir", tmp_path / "part", *long, "--resume", "auto")
    assert [r["epoch"] for r in records_of(tmp_path / "part") if "kmeans_seconds" in r] == [4]
    name = "clusters_3/changed"
    whole, part = ([r[name] for r in records_of(tmp_path / exp_dir) if name in r] for exp_dir in ("whole", "part"))
    assert len(whole) == 1
    assert whole == part
    for epoch in (3, 5):
        assert_same(weights(tmp_path / "part", epoch), weights(tmp_path / "whole", epoch))
    # With an E-step at each epoch again, the kept clusters do not count.
    run(image_folder, "--exp-dir", tmp_path / "other", *long, "--kmeans-every", 1, "--resume",
        tmp_path / "whole" / "checkpoint_0002.pth.tar")  # fmt: skip
    assert [r["epoch"] for r in records_of(tmp_path / "other") if "kmeans_seconds" in r] == [3, 4, 5]


@pytest.mark.slow
def test_a_run_with_all_that_small_data_needs_comes_to_its_end(image_folder, finished, tmp_path):
    small = "-a resnet18 --image-size 16 --epochs 2"
    options = "--small-stem --bn-splits 2 --mask-duplicates --kmeans-every 2 --proto-weight 0.5"
    run(image_folder, "--exp-dir", tmp_path, *small.split(), *options.split())
    assert weights(tmp_path, 1)["state_dict"]["module.encoder_k.conv1.weight"].shape == (64, 3, 3, 3)
    last = [r for r in records_of(tmp_path) if "seconds" in r][-1]
    assert last["loss"] == pytest.approx(last["loss_instance"] + 0.5 * last["loss_prototype"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2], ids=["after its E-step", "in the middle of its M-step"])
def test_a_run_cut_off_in_an_epoch_goes_on_to_the_bit(image_folder, finished, tmp_path, monkeypatch, steps):
    class Cut(Exception):  # noqa: N818
        pass

    saved, save = [], main_pcl.checkpoint.save

    def cut_after_a_save(path, state):
        save(path, state)
        saved.append((path.name, state["epoch"], state.get("steps", 0)) if "epoch" in state and "steps" in state else path.name)
        if saved[-1] == (LAST, 1, steps):
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(main_pcl.checkpoint, "save", cut_after_a_save)
        with pytest.raises(Cut):
            run(image_folder, "--exp-dir", tmp_path, "--save-steps", 1, "--resume", "auto")
    expected = [(LAST, 0, 1), (LAST, 0, 2), LAST, (LAST, 1, 0), (LAST, 1, 1), (LAST, 1, 2)]
    assert [s for s in saved if s != "e_step.pth.tar"] == expected[: 4 + steps]
    shutil.copy(tmp_path / LAST, tmp_path / "checkpoint_0000.pth.tar")  # which is to be removed
    run(image_folder, "--exp-dir", tmp_path, "--save-freq", 1, "--keep", 1, "--keep-every", 2, "--resume", "auto")
    assert [r["epoch"] for r in records_of(tmp_path) if "kmeans_seconds" in r] == [1, 2]  # the second epoch's not again
    assert_same(weights(tmp_path), weights(finished))
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == [f"checkpoint_000{i}.pth.tar" for i in (1, 2)]
    ours, whole = (next(r for r in records_of(f) if "seconds" in r and r["epoch"] == 1) for f in (tmp_path, finished))
    assert ours["loss"] == pytest.approx(whole["loss"])  # of all steps, also those before the cut


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_epoch_saves_also_without_save_steps(image_folder, finished, tmp_path, monkeypatch):
    votes = iter([False, True])
    monkeypatch.setattr(launch.Watch, "stop_voted", lambda watch: next(votes, False))
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", tmp_path, "--save-steps", 0)
    assert stop.value.code == PREEMPTED
    assert (load(tmp_path / LAST)["epoch"], load(tmp_path / LAST)["steps"]) == (0, 2)
    monkeypatch.setattr(report, "draw_pictures", lambda _: None)
    run(image_folder, "--exp-dir", tmp_path, "--resume", "auto", *MONITOR)
    assert_same(weights(tmp_path), weights(finished))
    looks = [r["epoch"] for r in records_of(tmp_path) if "monitor_seconds" in r]
    assert looks == [1, 2]  # in the middle of an epoch it is too late to measure before it


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_an_epoch_ends_the_run_unless_that_is_over(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.Watch, "stop_voted", lambda watch: False)
    monkeypatch.setattr(launch.Watch, "last_vote", lambda watch: True)
    run(image_folder, "--exp-dir", tmp_path / "over", "--epochs", 1)
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", tmp_path / "run")
    assert stop.value.code == PREEMPTED
    assert load(tmp_path / "run" / LAST)["epoch"] == 1


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_named(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "train" / "a" / "07.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "images", "--exp-dir", tmp_path / "new", "-j", 2)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err == (
        f"main_pcl.py: error: cannot read the image {tmp_path}/images/train/a/07.png: "
        "it is empty, or not an image of a known format; repair or remove the file, "
        "or leave such files out with --skip-unreadable\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_a_run_without_its_unreadable_images_is_a_run_that_never_had_them(image_folder, tmp_path, capsys, processes):
    for name in ("without", "broken"):
        shutil.copytree(image_folder, tmp_path / name)
    spoilt = ["train/a/07.png", "train/b/00.png", "val/b/01.png"]
    for name in spoilt:
        (tmp_path / "without" / name).unlink()
    (tmp_path / "broken" / spoilt[0]).write_bytes(b"")
    content = (tmp_path / "broken" / spoilt[1]).read_bytes()
    (tmp_path / "broken" / spoilt[1]).write_bytes(content[: len(content) // 2])
    (tmp_path / "broken" / spoilt[2]).unlink()
    (tmp_path / "broken" / spoilt[2]).symlink_to("nowhere")
    options = ["--nproc", processes, "--epochs", 2, "--save-freq", 1, *MONITOR]
    run(tmp_path / "without", "--exp-dir", tmp_path / "expected", *options)
    capsys.readouterr()
    run(tmp_path / "broken", "--exp-dir", tmp_path / "run", *options, "--skip-unreadable", "--augment-on", "workers")
    first, *lines = capsys.readouterr().out.splitlines()[:4]
    assert first == "unreadable and left out: 3 of 31 images"
    assert [line.split(": ")[0] for line in lines] == [f"  {tmp_path / 'broken' / name}" for name in spoilt]
    assert_same(weights(tmp_path / "run", 1), weights(tmp_path / "expected", 1))
    text = (tmp_path / "run" / "unreadable.txt").read_text()
    assert [line.split("\t")[0] for line in text.splitlines()] == [str(tmp_path / "broken" / name) for name in spoilt]
    # The E-step saw the center of each image, by the key encoder and statistics that were saved before it.
    network, _ = load_momentum_encoder(tmp_path / "run" / "checkpoint_0000.pth.tar")
    images = IndexedFolder(tmp_path / "without" / "train", center_view(32))
    with torch.no_grad():
        expected = F.normalize(network(normalize(torch.stack([images[i][0] for i in range(23)]))), dim=1)
    torch.testing.assert_close(load(tmp_path / "run" / "e_step.pth.tar")["features"], expected)
    # The pictures show the same images.
    pictures = [(tmp_path / name / "figures" / "prototypes_5.png").read_bytes() for name in ("run", "expected")]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_names_of_any_alphabet_and_links_make_no_difference(image_folder, tmp_path, capsys):
    root = tmp_path / "my photos"
    for folder, name in (("a", "Käse 猫"), ("b", "caf\udce9")):  # the second is no UTF-8
        (root / name).mkdir(parents=True)
        for path in (image_folder / "train" / folder).iterdir():
            (root / name / f"né {path.name}").symlink_to(path)
    (root / "caf\udce9").rename(root / "éa\udce9")  # to come last, as b does
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "Käse 猫" / "._né 00.png").write_bytes(b"\0")
    run(root, "--exp-dir", tmp_path / "run", "--epochs", 2, *MONITOR)
    run(image_folder / "train", "--exp-dir", tmp_path / "plain", "--epochs", 2)
    assert_same(weights(tmp_path / "run", 1), weights(tmp_path / "plain", 1))
    out = capsys.readouterr().out
    assert f"25 images in 2 folders of {root}," in out
    assert "pictures could not be drawn" not in out
    assert load(tmp_path / "run" / "e_step.pth.tar")["classes"] == ["Käse 猫", "éa\udce9"]


@pytest.mark.slow
def test_labels_that_may_be_meant_otherwise_are_told(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder / "train", tmp_path / "train" / "group")
    run(tmp_path, "--exp-dir", tmp_path / "run", "--epochs", 1)
    note = f"note: the classes are the folders of {tmp_path}/train (1); all images lie deeper, in folders below them"
    assert note in capsys.readouterr().out.splitlines()


@pytest.mark.slow
@pytest.mark.dist
def test_of_two_processes_the_one_that_fails_tells_why(image_folder, tmp_path, capfd):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "train" / "a" / "07.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "images", "--exp-dir", tmp_path / "new", "--nproc", 2)
    assert stop.value.code == 1
    err = capfd.readouterr().err
    assert "a/07.png" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "-b 24 --pcl-r 24 --wd 1e30"], ids=["in an epoch", "by its last step"])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(image_folder, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", tmp_path, "--lr", "1e30", "--save-freq", 1, *options.split())
    assert stop.value.code == 1
    err = capsys.readouterr().err
    pattern = (
        r"main_pcl.py: error: (the loss is|weights are) not .*finite number.* at learning rate 1e\+30; lower --lr, and .*\n"
    )
    assert re.fullmatch(pattern, err)
    for path in tmp_path.glob("checkpoint_*"):
        assert all(value.isfinite().all() for value in load(path)["state_dict"].values())


@pytest.mark.slow
def test_features_that_are_no_numbers_end_the_run_before_they_are_clustered(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_pcl, "extract_own", lambda network, loader, count, device: torch.full((count, 16), torch.nan))
    with pytest.raises(SystemExit) as stop:
        run(image_folder, "--exp-dir", tmp_path)
    assert stop.value.code == 1
    assert "error: E-step 2/3: features of images are not finite numbers, at learning rate 0.0225;" in capsys.readouterr().err


@pytest.mark.slow
def test_collapsed_features_are_warned_of(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_pcl, "extract_own", lambda network, loader, count, device: torch.eye(16)[:1].repeat(count, 1))
    run(image_folder, "--exp-dir", tmp_path, "--epochs", 2)
    out = capsys.readouterr().out
    assert out.count("warning: the features of all images are almost the same") == 1


def test_a_val_without_labels_tells_the_monitor_nothing(tmp_path):
    for name in ("val/1.png", "val/2.png", "train/a/3.png", "train/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    args = main_pcl.get_parser().parse_args([str(tmp_path), "--image-size", "8"])
    plan = Plan(images=tmp_path / "train", num_images=800)
    assert len(monitor.val_folder(args, plan)) == 2
    assert monitor.val_loader(args, plan) is None


@pytest.mark.slow
def test_the_published_command_runs_on_the_cpu(image_folder, tmp_path, capsys):
    address = f"tcp://localhost:{free_port()}"  # the README's 10001 may be taken
    options = f"--multiprocessing-distributed --world-size 1 --rank 0 --dist-url {address} --epochs 1"
    run(image_folder, "--exp-dir", tmp_path / "new", *options.split())
    out = capsys.readouterr().out
    assert "no GPU; 1 process\n" in out
    assert "25 images in 2 folders" in out
    assert "batch: 8 images, 8 in each process" in out
    assert (tmp_path / "new" / "checkpoint_0000.pth.tar").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_alike_spawned_on_two_nodes_or_under_torchrun(image_folder, tmp_path):
    """The three ways to the same two ranks give the same weights to the bit."""

    def start(name, *options, launcher=()):
        command = [sys.executable, *launcher, str(ROOT / "main_pcl.py"), str(image_folder), *TINY.split()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += ["--exp-dir", str(tmp_path / name), "--epochs", "2", *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(*processes):
        for process in processes:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out

    finish(start("spawned", "--nproc", "2"))
    nodes = ["-b", "4", "--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--rank"]
    finish(*(start("nodes", *nodes, str(rank)) for rank in range(2)))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    finish(start("torchrun", launcher=torchrun))
    for name in ("nodes", "torchrun"):
        assert_same(weights(tmp_path / name, 1), weights(tmp_path / "spawned", 1))


WRONG = {
    "no such folder": ("nowhere", "", "nowhere: no such folder"),
    "no train": ("{images}/..", "", "no folder train/, but"),
    "a class without images": ("{hollow}", "", "no image in {hollow}/<class>/"),
    "no images": ("{empty}", "", "no image in {empty}/train/<class>/"),
    "no epoch left": ("{images}", "--start-epoch 3", "--start-epoch 3: the epochs of --epochs 3 are 0 to 2"),
    "fewer images than a batch": ("{images}", "-b 26 --pcl-r 30", "--batch-size: 26 images in a step"),
    "batch and processes": (
        "{images}",
        "-b 9 --nproc 2",
        "--batch-size 9: it is not divisible by the 2 processes of this node; try 8",
    ),
    "short queue": ("{images}", "--pcl-r 7", "--pcl-r 7: the queue is shorter than one batch; raise it to 8"),
    "option misspelled": ("{images}", "--warmup-epochs 3", "--warmup-epochs 3; did you mean --warmup-epoch?"),
    "option of another program": ("{images}", "--moco-dim=3", "unrecognized arguments: --moco-dim=3; --help lists the options"),
    "granularity no integer": ("{images}", "--num-cluster 3,x", "--num-cluster: 'x' is not an integer"),
    "granularity twice": ("{images}", "--num-cluster 3,3", "--num-cluster: 3,3: a number is listed twice"),
    "granularity too large": ("{images}", "--num-cluster 3,26", "--num-cluster 26: more clusters than the 25 images"),
    "unknown architecture": ("{images}", "-a vgg16", "argument -a/--arch: invalid choice: 'vgg16'"),
    "no checkpoint": ("{images}", "--resume nothing.pth", "--resume: nothing.pth: no such file"),
    "another model": ("{images}", "--resume {checkpoint} --low-dim 8", "--resume: {checkpoint} does not fit the options"),
    "another architecture": ("{images}", "--resume {checkpoint} -a resnet18", "give --arch shufflenet_v2_x0_5"),
    "weights that are no numbers": ("{images}", "--resume {nan}", "not all numbers of encoder_q.conv1.0.weight are finite"),
    "a damaged checkpoint": ("{images}", "--resume {flipped}", "--resume: {flipped} is not a checkpoint that can be opened"),
    "one image in a step": ("{images}", "-b 1", "--batch-size 1: BatchNorm needs more than one image in a process's step"),
    "one image of each process": (
        "{images}",
        "-b 2 --nproc 2",
        "--batch-size 2: BatchNorm needs more than one image in a process's step; give -b 4 or more",
    ),
    "nothing left to do": ("{images}", "--resume {checkpoint}", "raise --epochs"),
    "pruning too few dimensions": ("{images}", "--kmeans super", "--kmeans super: it needs --low-dim 32 or more, not 16"),
    "an option of another k-means": ("{images}", "--kmeans-tf32", "it is an option of --kmeans sharded"),
    "pictures among the images": ("{flat}", "--exp-dir {flat}/run", "lies among the images"),
    "no stem to replace": ("{images}", "--small-stem", "--small-stem: shufflenet_v2_x0_5 does not begin with"),
    "groups that do not divide a batch": ("{images}", "--bn-splits 3", "--bn-splits 3: a process's batch has 8 images"),
    "groups of one image": ("{images}", "--bn-splits 4 --nproc 2", "--bn-splits 4: a process's batch has 4 images"),
    "pictures among the classes": ("{images}/train", "--exp-dir {images}/train/run", "lies among the images"),
    "fewer readable images than a batch": ("{broken}", "--skip-unreadable -b 10", "10 images in a step, but {broken} holds 9"),
    "fewer readable images than clusters": ("{broken}", "--skip-unreadable --num-cluster 10", "than the 9 images"),
    "two schedules": ("{images}", "--schedule 1 2", "--cos and --schedule exclude each other"),
    "an older checkpoint": (
        "{images}",
        "--exp-dir {run} --resume {older} --epochs 9",
        "--exp-dir {run} holds a newer checkpoint, checkpoint_0002.pth.tar; move it away",
    ),
    "a run's folder in place of a checkpoint": ("{images}", "--exp-dir {run} --resume {run}", "this is a folder; name a file"),
    "another run's folder": ("{images}", "--exp-dir {run} --resume {copy} --epochs 9", "holds a newer checkpoint"),
    "damaged checkpoints": ("{images}", "--exp-dir {damaged} --resume auto", "no checkpoint of {damaged} can be opened"),
    "another run": ("{images}", "--exp-dir {run}", "{run} holds another run"),
    "a file for a folder": ("{images}", "--exp-dir {checkpoint}", "is not a folder; name another"),
    "nodes without an address": ("{images}", "--world-size 2", "--dist-url tcp://HOST:PORT"),
    "node out of range": ("{images}", "--rank 1", "--rank 1: the nodes of --world-size 1 are 0 to 0"),
    "no such address": ("{images}", "--dist-url localhost:10001", "--dist-url localhost:10001: give tcp://"),
    "no such GPU": ("{images}", "--gpu 0", "--gpu 0: this machine shows 0 GPUs"),
    "two beginnings": ("{images}", "--init {checkpoint} --resume {checkpoint}", "--init begins a new run, --resume goes on"),
    "weights of another network": (
        "{images}",
        "--init {checkpoint} -a resnet18",
        "--init: {checkpoint} holds a shufflenet_v2_x0_5",
    ),
    "no weights to begin with": ("{images}", "--init nothing.pth", "--init: nothing.pth: no such file"),
    "a misspelt option": ("{images}", "--aug_plus", "--aug_plus"),
}


@pytest.fixture(scope="module")
def places(image_folder, finished, tmp_path_factory):
    """What the names in WRONG stand for."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty" / "train" / "a").mkdir(parents=True)
    shutil.copytree(image_folder / "train" / "a", root / "flat")
    shutil.copytree(root / "flat", root / "broken")
    (root / "broken" / "00.png").write_bytes(b"")
    (root / "hollow" / "class").mkdir(parents=True)
    (root / "damaged").mkdir()
    (root / "damaged" / "checkpoint_0001.pth.tar").write_bytes(b"PK half of a file")
    places = {name: root / name for name in ("empty", "flat", "broken", "hollow", "damaged")}
    places |= {"root": root, "images": image_folder, "run": finished, "checkpoint": finished / "checkpoint_0002.pth.tar"}
    places |= {"nan": root / "nan.pth", "flipped": root / "flipped.pth", "older": root / "checkpoint_0000.pth.tar"}
    places["copy"] = shutil.copy(places["checkpoint"], root / "checkpoint_0002.pth.tar")
    state = load(places["checkpoint"])
    torch.save(state | {"epoch": 1}, places["older"])
    state["state_dict"]["module.encoder_q.conv1.0.weight"][0] = float("nan")
    torch.save(state, places["nan"])
    content = bytearray(places["checkpoint"].read_bytes())
    content[len(content) // 2] ^= 1
    places["flipped"].write_bytes(content)
    return places


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_is_one_line_with_its_remedy(wrong, places, tmp_path, capsys, monkeypatch):
    data, options, message = wrong
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("processes were started"))
    before = files_below(places["root"]), files_below(places["run"])
    with pytest.raises(SystemExit) as stop:
        run("--exp-dir", tmp_path / "new", data.format(**places), *options.format(**places).split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    if "--skip-unreadable" in options:
        assert out.startswith("unreadable and left out: 1 of 10 images\n")
    else:
        assert out == ""
    assert err.count("\n") == 1
    assert message.format(**places) in err
    assert (files_below(places["root"]), files_below(places["run"])) == before
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("seconds", "workers", "options", "expected"),
    [
        (0.5, 8, [], "computing takes 95% of the time"),
        (4, 3, [], "waiting for data takes 40% of the time; what would help: more loader processes (-j is 3, the cores are 8)"),
        (4, 8, [], "--augment-on device"),
        (4, 8, ["--augment-on", "device"], "faster storage"),
    ],
)
def test_a_run_says_what_limits_it(monkeypatch, capsys, seconds, workers, options, expected):
    monkeypatch.setattr(rendezvous, "available_cores", lambda: 8)
    args = main_pcl.get_parser().parse_args(["DIR", *options])
    report.advise({"data_seconds": seconds, "seconds": 10}, args, Plan(workers=workers))
    out = capsys.readouterr().out
    assert expected in out
    assert out.count("\n") == 1


def test_moco_alone_needs_no_clusters(image_folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "launch", lambda worker, args, plan: started.append(args))
    run("--exp-dir", tmp_path / "new", image_folder, "--warmup-epoch", "3", "--num-cluster", "25000")
    assert started[0].warmup_epoch == 3


def test_one_image_in_a_step_is_enough_where_it_is_large(image_folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "launch", lambda worker, args, plan: started.append(args))
    run("--exp-dir", tmp_path / "new", image_folder, "-b", 1, "--image-size", 64)
    assert started[0].batch_size == 1
    most = "--bn-splits 4 --pcl-r 8 --num-cluster 3,25"
    run("--exp-dir", tmp_path / "new", image_folder, *most.split())
    assert started[1].bn_splits == 4


def test_the_defaults_are_the_published_ones():
    args = vars(main_pcl.get_parser().parse_args(["DIR"]))
    expected = {
        "arch": "resnet50", "epochs": 200, "start_epoch": 0, "batch_size": 256, "lr": 0.03, "schedule": [120, 160],
        "momentum": 0.9, "wd": 1e-4, "print_freq": 100, "low_dim": 128, "pcl_r": 16384, "moco_m": 0.999,
        "temperature": 0.2, "mlp": False, "aug_plus": False, "cos": False, "num_cluster": [25000, 50000, 100000],
        "warmup_epoch": 20, "image_size": 224, "small_stem": False, "bn_splits": 1, "mask_duplicates": False,
        "kmeans_every": 1, "proto_weight": 1.0,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert str(args["exp_dir"]) == "experiment_pcl"


class WatchedLoader:
    """Forbids the host to wait for the GPU from the third step on; DistributedDataParallel sets itself up in the first two."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for number, batch in enumerate(self.loader):
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
            yield batch
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "--augment-on device --amp bf16 --channels-last"])
def test_a_training_step_never_waits_for_the_gpu(image_folder, tmp_path, monkeypatch, options):
    step = main_pcl.m_step
    monkeypatch.setattr(main_pcl, "m_step", lambda model, loader, *rest: step(model, WatchedLoader(loader), *rest))
    try:
        run(image_folder, "--exp-dir", tmp_path, "-p", "99", "-b", "4", "--nproc", "1", *options.split())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.gpu
def test_reduced_precision_gives_almost_the_same_losses(image_folder, tmp_path):
    losses = []
    for options in ([], ["--amp", "bf16", "--channels-last"], ["--kmeans", "sharded"]):
        run(image_folder, "--exp-dir", tmp_path / str(len(losses)), "--nproc", "1", *options)
        losses.append([r["loss"] for r in records_of(tmp_path / str(len(losses))) if "seconds" in r])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.1)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


def encoders(path):
    state = load(path)["state_dict"]
    prefixes = ("module.encoder_q.", "module.encoder_k.")
    return [{n.removeprefix(p): v for n, v in state.items() if n.startswith(p)} for p in prefixes]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["another size of the head", "a checkpoint", "a state dict", "its query encoder"])
def test_a_run_may_begin_with_weights_of_another(image_folder, finished, tmp_path, capsys, source):
    path, given = tmp_path / "given.pth", load(finished / "checkpoint_0002.pth.tar")
    query, key = encoders(finished / "checkpoint_0002.pth.tar")
    if source == "a state dict":
        torch.save(query, path)
    else:
        kept = {n: v for n, v in given["state_dict"].items() if source != "its query encoder" or ".encoder_q." in n}
        torch.save(given | {"state_dict": kept}, path)
    options = ["--low-dim", 8] if source == "another size of the head" else []
    # Without a learning rate the query encoder keeps its weights, and a key encoder that equals it too.
    run(image_folder, "--exp-dir", tmp_path / "run", "--init", path, "--epochs", 1, "--lr", 1e-30, "--wd", 0, *options)
    assert (f"note: --init {path}: its head does not fit" in capsys.readouterr().out) == bool(options)
    state = load(tmp_path / "run" / "checkpoint_0000.pth.tar")
    assert state["epoch"] == 1
    assert not torch.equal(state["state_dict"]["module.queue"][:, :8], given["state_dict"]["module.queue"][:8, :8])
    found_query, found_key = encoders(tmp_path / "run" / "checkpoint_0000.pth.tar")
    names = [n for n, _ in torchvision.models.shufflenet_v2_x0_5().named_parameters() if not n.startswith("fc.")]
    head = [n for n in query if n.startswith("fc.")]
    for name in names + ([] if options else head):
        assert torch.equal(found_query[name], query[name]), name
        expected = key[name] if source in ("a checkpoint", "another size of the head") else query[name]
        torch.testing.assert_close(found_key[name], 0.9**3 * expected + (1 - 0.9**3) * query[name])


@pytest.mark.slow
def test_a_fixed_phi_is_the_temperature(image_folder, tmp_path):
    run(image_folder, "--exp-dir", tmp_path, "--epochs", 2, "--fixed-phi", "--temperature", 0.3)
    for granularity in load(tmp_path / "e_step.pth.tar")["granularities"]:
        assert granularity["concentration"].unique().tolist() == pytest.approx([0.3])
