import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_same, run_script, save_result, without_gpu
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_cls_imagenet
from eval_cls_imagenet import validate
from pcl.augment import center_view, crop_view, normalize
from pcl.checkpoint import load, load_backbone, load_probe
from pcl.distributed import seed_everything
from pcl.errors import RunError
from pcl.features import extract_features
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank
from pcl.networks import backbone
from pcl.run import launch
from pcl.run.logs import TensorBoard, claim
from pcl.run.probe import Probe, first_difference, open_probe
from pcl.run.probe_checks import label_subset, names_in

ARCH = "shufflenet_v2_x0_5"
TINY = "--schedule 2 --image-size 32 -b 8 -j 0 -p 100 --lr 0.1 --epochs 3"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def script(*options):
    run_script(eval_cls_imagenet, *TINY.split(), *options)


@pytest.mark.slow
def test_a_probe_from_end_to_end(six_classes, pretrained, tmp_path, capsys):
    script(six_classes, "--pretrained", pretrained, "--id", "x", "--seed", 1, "--output", "o.json")
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "o.json").read_text())
    last, best = result["last"], result["best"]
    assert [figures["lr"] for figures in result["epochs"]] == pytest.approx([0.1, 0.1, 0.01])
    assert f"top-1 {last['test_acc']:.2f} %, top-5 {last['test_acc5']:.2f} %; best top-1 {best['test_acc']:.2f} %" in out

    # TensorBoard's own reader sees a point for each epoch.
    board = EventAccumulator(str(tmp_path / "Linear_eval" / "x_tensorboard")).Reload()
    names = ["train_loss", "train_acc", "lr", "test_acc", "test_acc5"]
    assert sorted(board.Tags()["scalars"]) == sorted(names)
    for name in names:
        points = board.Scalars(name)
        assert [point.step for point in points] == [0, 1, 2]
        assert [point.value for point in points] == pytest.approx([f[name] for f in result["epochs"]], rel=1e-6)

    # The file is a whole classifier: torchvision's network, run on every image, has the accuracies that were told.
    state = load(tmp_path / "Linear_eval" / "x" / "checkpoint.pth.tar")
    assert (state["seed"], state["deterministic"]) == (1, True)
    network = torchvision.models.get_model(ARCH, weights=None, num_classes=6).eval()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    val = IndexedFolder(six_classes / "val", center_view(32))
    with torch.no_grad():
        logits = torch.cat([network(normalize(val[i][0][None])) for i in range(len(val))])
    truth = torch.from_numpy(val.labels)
    assert last["test_acc"] == pytest.approx(100 * float((logits.argmax(1) == truth).float().mean()))
    assert last["test_acc5"] == pytest.approx(100 * float((logits.topk(5).indices == truth[:, None]).any(1).float().mean()))

    # Its backbone is the checkpoint's, to the bit.
    given = load(pretrained)["state_dict"]
    for name, value in state["state_dict"].items():
        if not name.startswith("module.fc."):
            assert torch.equal(value, given[name.replace("module.", "module.encoder_q.")]), name

    best_file = tmp_path / "Linear_eval" / "x" / "model_best.pth.tar"
    script(six_classes, "--resume", best_file, "--evaluate", "--output", "e.json")
    evaluated = json.loads((tmp_path / "e.json").read_text())["last"]
    assert evaluated == {"test_acc": best["test_acc"], "test_acc5": best["test_acc5"]}


@pytest.mark.slow
def test_a_resumed_probe_equals_the_uninterrupted_one_to_the_bit(six_classes, pretrained, tmp_path):
    common = [six_classes, "--pretrained", pretrained]
    script(*common, "--id", "whole", "--seed", 1)
    script(*common, "--id", "part", "--seed", 1, "--epochs", 2, "--resume", "auto")  # there is nothing to go on with
    (tmp_path / "Linear_eval" / "part" / "model_best.pth.tar").unlink()  # it goes on from the last, not from the best
    script(*common, "--id", "part", "--resume", "auto", "-j", 2)
    whole, part = (load(tmp_path / "Linear_eval" / name / "checkpoint.pth.tar") for name in ("whole", "part"))
    for name in ("state_dict", "optimizer"):
        assert repr(whole[name]) == repr(part[name])
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, part["state_dict"][name]), name
    assert whole["history"] == part["history"]
    assert whole["best_acc1"] == part["best_acc1"]
    script(six_classes, "--id", "part", "--resume", "auto", "--output", "done.json")  # nothing is left but to score it
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["epochs"] == whole["history"]
    assert done["best"]["test_acc"] == whole["best_acc1"]
    assert (tmp_path / "Linear_eval" / "part" / "log.jsonl").read_text().count('"command"') == 2


@pytest.mark.slow
def test_loss_and_accuracy_of_training_are_means_over_its_images(six_classes, pretrained, tmp_path):
    script(six_classes, "--pretrained", pretrained, "--id", "x", "--seed", 1, "--epochs", 1, "--lr", 1e-30)  # it stays as it is
    state = load(tmp_path / "Linear_eval" / "x" / "checkpoint.pth.tar")
    network = torchvision.models.get_model(ARCH, weights=None, num_classes=6).eval()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    train = IndexedFolder(six_classes / "train", crop_view(32), seed=1)
    with torch.no_grad():
        logits = network(normalize(torch.stack([train[i][0] for i in range(len(train))])))
    truth, (figures,) = torch.from_numpy(train.labels), state["history"]
    assert figures["train_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)))
    assert figures["train_acc"] == pytest.approx(100 * float((logits.argmax(1) == truth).float().mean()))


@pytest.mark.slow
def test_random_weights_are_the_same_on_every_rank(six_classes, tmp_path, monkeypatch):
    states = []
    for rank in range(2):
        monkeypatch.setattr(eval_cls_imagenet, "get_rank", lambda rank=rank: rank)
        script(six_classes, "--random-init", "-a", ARCH, "--seed", 1, "--epochs", 1, "--id", f"{rank}")
        states.append(load(tmp_path / "Linear_eval" / f"{rank}" / "checkpoint.pth.tar")["state_dict"])
    assert torch.equal(*(state["module.conv1.0.weight"] for state in states))


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 2])
def test_nodes_that_go_on_from_different_checkpoints_are_stopped(six_classes, tmp_path, monkeypatch, capsys, which):
    answers = iter([True] * (which - 1))
    monkeypatch.setattr("pcl.run.inputs.equal_on_all_ranks", lambda number: next(answers, False))
    with pytest.raises(SystemExit) as stop:
        script(six_classes, "--random-init", "--id", "x")
    assert stop.value.code == 1
    told = "the processes go on from different checkpoints; Linear_eval/x must be one folder for all nodes\n"
    assert told in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone_and_together(six_classes, pretrained, tmp_path_factory):
    """A folder with probes "0.03" and "3", each of one learning rate, and "both" of both."""
    folder = tmp_path_factory.mktemp("rates")
    with without_gpu() as patch:
        patch.chdir(folder)
        for name, lr in (("0.03", "0.03"), ("3", "3"), ("both", "0.03,3")):
            options = ["--seed", 1, "--id", name, "--lr", lr, "--output", f"{name}.json"]
            script(six_classes, "--pretrained", pretrained, *options)
    return folder


def assert_same_probes(a, b, but=("id", "output", "resume", "epochs")):
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        states = [load(folder / name) for folder in (a, b)]
        for state in states:
            state["args"] = {name: value for name, value in state["args"].items() if name not in but}
        assert_same(*states)


@pytest.mark.slow
def test_of_several_learning_rates_each_head_is_that_of_its_own_run(alone_and_together):
    folder = alone_and_together / "Linear_eval"
    for lr in ("0.03", "3"):
        assert_same_probes(folder / lr, folder / "both" / f"lr_{lr}")
    assert not (folder / "both" / "checkpoint.pth.tar").exists()
    both = json.loads((alone_and_together / "both.json").read_text())
    board = EventAccumulator(str(folder / "both_tensorboard")).Reload()
    for lr, results in both["rates"].items():
        alone = json.loads((alone_and_together / f"{lr}.json").read_text())
        assert results == {name: alone[name] for name in ("last", "best", "epochs")}
        assert [p.value for p in board.Scalars(f"test_acc_{lr}")] == pytest.approx([e["test_acc"] for e in alone["epochs"]])
    records = [json.loads(line) for line in (folder / "both" / "log.jsonl").read_text().splitlines()]
    assert any({"loss_0.03", "acc_0.03", "lr_0.03", "loss_3", "acc_3", "lr_3"} <= record.keys() for record in records)


@pytest.mark.slow
def test_several_learning_rates_go_on_where_each_was_stopped(alone_and_together, six_classes, pretrained, tmp_path, capsys):
    common = [six_classes, "--pretrained", pretrained, "--lr", "0.03,3", "--id", "both"]
    script(*common, "--seed", 1, "--epochs", 1, "--lr", "0.03")
    (tmp_path / "Linear_eval" / "both" / "lr_0.03").mkdir()
    for path in (tmp_path / "Linear_eval" / "both").glob("*.pth.tar"):  # one rate has done an epoch, the other none
        path.rename(path.parent / "lr_0.03" / path.name)
    script(*common, "--seed", 1, "--resume", "auto", "--epochs", 2)
    script(*common, "--resume", "auto")
    for lr in ("lr_0.03", "lr_3"):
        assert_same_probes(tmp_path / "Linear_eval" / "both" / lr, alone_and_together / "Linear_eval" / "both" / lr)
    capsys.readouterr()
    script(*common, "--resume", "auto", "--evaluate")
    told = [line for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    assert [line.split(": ")[0] for line in told] == ["lr 0.03", "lr 3"]
    with pytest.raises(SystemExit):  # the head of another rate would be one for a ResNet-50
        script(six_classes, "--random-init", "--lr", "0.03,3,1", "--id", "both", "--resume", "auto")
    assert "lr_0.03/checkpoint.pth.tar holds a shufflenet_v2_x0_5, not a resnet50; give --arch" in capsys.readouterr().err
    for more in (["--lr", "3"], ["--lr", "3", "--evaluate"]):
        with pytest.raises(SystemExit) as stop:
            script(*common, "--resume", "auto", *more)
        assert stop.value.code == 2
        assert "--lr: Linear_eval/both holds a probe of several learning rates; give --lr as before" in capsys.readouterr().err


@pytest.mark.slow
def test_a_learning_rate_that_diverges_ends_alone(six_classes, pretrained, tmp_path, capsys):
    options = ["--pretrained", pretrained, "--id", "x", "--seed", 1, "--lr", "1e-7,9e29", "--wd", "1e6"]
    script(six_classes, *options, "--epochs", 1)
    warning = "warning: the loss of epoch 1 is not a finite number, at learning rate 9e+29; its training ends here\n"
    assert warning in capsys.readouterr().out
    script(six_classes, *options, "--epochs", 2, "--resume", "auto")
    out = capsys.readouterr().out
    assert warning in out
    assert "epoch 1/2  test_acc" not in out  # the other had finished that epoch
    assert "epoch 2/2  test_acc_1e-07 " in out
    assert "lr 9e+29: no epoch with a finite loss\n" in out


def plain_finetuning(folder, pretrained, names, epochs, schedule, first, gamma, wd, batch, seed):
    """A loop of plain PyTorch: the network's losses by epoch, and the accuracies on the validation images."""
    seed_everything(seed)
    network, _ = load_backbone(pretrained)
    network.fc = torch.nn.Linear(1024, 6)
    torch.nn.init.normal_(network.fc.weight, std=0.01)
    torch.nn.init.zeros_(network.fc.bias)
    images, val = IndexedFolder(folder / "train", crop_view(32), seed), IndexedFolder(folder / "val", center_view(32))
    images = images.subset(np.array([i for i in range(len(images)) if images.path(i).partition("train/")[2] in names]))
    body = {"params": [v for n, v in network.named_parameters() if not n.startswith("fc.")], "name": "backbone"}
    head = {"params": [*network.fc.parameters()], "name": "head"}
    optimizer = torch.optim.SGD([body, head], lr=1.0, momentum=0.9, weight_decay=wd)
    losses, accuracies, sampler = [], [], EpochSampler(images, seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order, total = list(sampler), []
        network.train()
        for start in range(0, len(order) - 1, batch):  # BatchNorm cannot take a last batch of one
            chosen = [images[key] for key in order[start : start + batch]]
            logits = network(normalize(torch.stack([image for image, _ in chosen])))
            target = torch.tensor([images.labels[i] for _, i in chosen])
            loss = torch.nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = first[group["name"]] * gamma ** sum(epoch >= milestone for milestone in schedule)
            optimizer.step()
            total.append(float(loss.detach()))
        losses.append(np.mean(total))
        network.eval()
        with torch.no_grad():
            guess = network(normalize(torch.stack([val[i][0] for i in range(len(val))]))).topk(5).indices
        right = guess == torch.from_numpy(val.labels)[:, None]
        accuracies.append((100 * float(right[:, 0].float().mean()), 100 * float(right.any(1).float().mean())))
    return network.state_dict(), losses, accuracies


@pytest.mark.slow
def test_fine_tuning_is_that_of_a_plain_loop_and_resumes_to_the_bit(six_classes, pretrained, tmp_path, capsys):
    names = [f"class {c}/{i}.png" for c in range(6) for i in range(3)][1:]  # 17: a last batch of one image, without spread
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names), "utf-8-sig")  # as Windows saves it
    options = ["--finetune", "--subset", tmp_path / "list.txt", "--lr-backbone", 0.02, "--schedule", 1]
    common = [six_classes, "--pretrained", pretrained, *options]
    script(*common, "--id", "whole", "--seed", 1)
    state = load(tmp_path / "Linear_eval" / "whole" / "checkpoint.pth.tar")
    first = {"head": 0.1, "backbone": 0.02}
    plain_names = set(names)
    expected, losses, accuracies = plain_finetuning(
        six_classes, pretrained, plain_names, 3, [1], first, gamma=0.2, wd=5e-4, batch=8, seed=1
    )
    assert [epoch["train_loss"] for epoch in state["history"]] == pytest.approx(losses)
    for i, name in enumerate(("test_acc", "test_acc5")):
        assert [epoch[name] for epoch in state["history"]] == pytest.approx([pair[i] for pair in accuracies])
    for name, value in expected.items():
        torch.testing.assert_close(state["state_dict"][f"module.{name}"], value)
    given = load(pretrained)["state_dict"]["module.encoder_q.conv1.0.weight"]
    assert not torch.equal(state["state_dict"]["module.conv1.0.weight"], given)
    assert [epoch["lr"] for epoch in state["history"]] == pytest.approx([0.1, 0.02, 0.02])

    script(*common, "--id", "part", "--seed", 1, "--epochs", 2)
    script(*common, "--id", "part", "--resume", "auto")
    assert_same_probes(tmp_path / "Linear_eval" / "whole", tmp_path / "Linear_eval" / "part")
    capsys.readouterr()
    for more in ([], ["--finetune"]):
        script(six_classes, "--resume", tmp_path / "Linear_eval" / "part" / "checkpoint.pth.tar", "--evaluate", *more)
        last = state["history"][-1]
        assert f"top-1 {last['test_acc']:.2f} %, top-5 {last['test_acc5']:.2f} %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script(six_classes, "--resume", tmp_path / "Linear_eval" / "part" / "checkpoint.pth.tar", "--epochs", 4)
    assert "holds a fine-tuned network; give --finetune" in capsys.readouterr().err


@pytest.mark.slow
def test_a_probe_without_unreadable_images_is_one_that_never_had_them(six_classes, pretrained, tmp_path, capsys):
    spoilt = ["train/class 0/2.png", "val/class 5/0.png"]
    for name in ("without", "broken"):
        shutil.copytree(six_classes, tmp_path / name)
    for name in spoilt:
        (tmp_path / "without" / name).unlink()
        content = (tmp_path / "broken" / name).read_bytes()
        (tmp_path / "broken" / name).write_bytes(content[: len(content) // 2])
    options = ["--pretrained", pretrained, "--seed", 1, "--epochs", 1]
    with pytest.raises(SystemExit) as stop:
        script(tmp_path / "broken", *options, "--id", "x")
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(", or leave such files out with --skip-unreadable\n")

    script(tmp_path / "without", *options, "--id", "without")
    script(tmp_path / "broken", *options, "--id", "broken", "--skip-unreadable")
    assert "unreadable and left out: 2 of 55 images\n" in capsys.readouterr().out
    histories = [load(tmp_path / "Linear_eval" / name / "checkpoint.pth.tar")["history"] for name in ("without", "broken")]
    assert histories[0] == histories[1]
    told = (tmp_path / "Linear_eval" / "broken" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in told] == [str(tmp_path / "broken" / name) for name in spoilt]

    resume = ["--resume", tmp_path / "Linear_eval" / "broken" / "checkpoint.pth.tar", "--evaluate"]
    script(tmp_path / "broken", *resume, "--skip-unreadable")
    out = capsys.readouterr().out
    assert "unreadable and left out: 1 of 18 images\n" in out  # training images are not looked at
    assert f"top-1 {histories[0][-1]['test_acc']:.2f} %" in out


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_probe_before_it_is_saved(six_classes, pretrained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script(six_classes, "--pretrained", pretrained, "--id", "x", "--seed", 1, "--lr", "9e29", "--wd", "9e29")
    assert stop.value.code == 1
    assert re.fullmatch(
        r"eval_cls_imagenet.py: error: the loss of epoch \d is not a finite number, at learning rate .*; lower --lr\n",
        capsys.readouterr().err,
    )
    for path in (tmp_path / "Linear_eval" / "x").glob("*.pth.tar"):
        assert all(value.isfinite().all() for value in load(path)["state_dict"].values())


@pytest.mark.slow
def test_a_probe_that_goes_on_with_other_options_says_so_and_does(six_classes, finished, tmp_path, capsys, monkeypatch):
    changed = "--epochs 4 --momentum 0.5 --wd 0.01 --percent 50 -b 4 --lr 0.2 --image-size 24 --seed 2"
    used, make = [], eval_cls_imagenet.EpochSampler
    monkeypatch.setattr(eval_cls_imagenet, "EpochSampler", lambda of, seed: used.append(of.names()) or make(of, seed))
    script(six_classes, "--resume", finished, "--id", "y", *changed.split())
    images = IndexedFolder(six_classes / "train", None)
    assert used == [images.subset(label_subset(images.labels, 50, seed=2)).names()]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: --image-size 24, before 32",
        "note: --epochs 4, before 3",
        "note: --batch-size 4, before 8",
        "note: --lr 0.2, before 0.1",
        "note: --momentum 0.5, before 0.9",
        "note: --wd 0.01, before 0.0",
        "note: --seed 2, before 1",
        "note: --percent 50.0, before 100.0",
    ]
    group = load(tmp_path / "Linear_eval" / "y" / "checkpoint.pth.tar")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    script(six_classes, "--resume", finished, "--evaluate", *changed.split())
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: --image-size 24, before 32"]


@pytest.mark.slow
def test_another_list_of_images_is_noticed(six_classes, pretrained, tmp_path, capsys):
    options = [six_classes, "--pretrained", pretrained, "--subset", "list.txt", "--id", "few"]
    (tmp_path / "list.txt").write_text("class 0/0.png\nclass 1/0.png\n")
    script(*options, "--epochs", 1)
    assert "labels: those of 2 training images\n" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("class 0/0.png\nclass 2/0.png\n")
    script(*options, "--resume", "auto")
    assert "note: files 2 images" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_probes_into_one_folder_the_second_writes_nothing(six_classes, finished, tmp_path, monkeypatch, capsys):
    def claim_late(folder):
        shutil.copytree(finished.parent, folder, dirs_exist_ok=True)  # meanwhile the first has come and gone
        return claim(folder)

    monkeypatch.setattr("pcl.run.logs.claim", claim_late)
    with pytest.raises(SystemExit) as stop:
        script(six_classes, "--random-init", "-a", ARCH, "--id", "y")
    assert stop.value.code == 1
    assert "--id y: Linear_eval/y holds another run" in capsys.readouterr().err
    for path in finished.parent.iterdir():
        assert path.read_bytes() == (tmp_path / "Linear_eval" / "y" / path.name).read_bytes()


@pytest.mark.slow
def test_features_that_are_no_numbers_end_the_probe(six_classes, pretrained, tmp_path, capsys):
    state = load(pretrained)
    state["state_dict"]["module.encoder_q.conv1.0.weight"] *= 1e38
    state["state_dict"]["module.encoder_q.conv1.1.weight"] *= 1e38
    torch.save(state, tmp_path / "huge.pth")
    with pytest.raises(SystemExit) as stop:
        script(six_classes, "--pretrained", tmp_path / "huge.pth")
    assert stop.value.code == 1
    assert "features of images are not finite numbers: the weights are damaged, or of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tampered_backbone_is_caught(six_classes, pretrained, monkeypatch):
    train_heads = eval_cls_imagenet.train_heads

    def tamper(network, *rest):
        network.stage2[0].branch1[1].running_mean[3] += 1e-6
        return train_heads(network, *rest)

    monkeypatch.setattr(eval_cls_imagenet, "train_heads", tamper)
    with pytest.raises(RuntimeError, match=r"the frozen backbone has changed: stage2\.0\.branch1\.1\.running_mean differs"):
        script(six_classes, "--pretrained", pretrained)


def test_the_difference_is_to_the_bit():
    network = backbone(ARCH)
    same = {name: value.clone() for name, value in network.state_dict().items()}
    assert first_difference(network, same) is None
    weight = next(network.parameters()).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(math.inf))
    assert first_difference(network, same) == "conv1.0.weight differs"


def finetune_together(device, args, plan):
    found, extract = [], eval_cls_imagenet.extract_features
    eval_cls_imagenet.extract_features = lambda *arguments: found.append(extract(*arguments)) or found[-1]
    eval_cls_imagenet.probe(device, args, replace(plan, batch=4, workers=0))
    save_result(args, features=found[-1])


@pytest.mark.slow
@pytest.mark.dist
def test_of_two_ranks_that_fine_tune_a_network_both_score_the_one_that_is_saved(six_classes, pretrained, tmp_path, two_ranks):
    options = ["--finetune", "--pretrained", str(pretrained), str(six_classes)]
    args = vars(eval_cls_imagenet.get_parser().parse_args([*TINY.split(), "--lr", "0.001", "--lr-backbone", "0.001", *options]))
    fixed = {"nproc", "gpu", "world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "seed"}
    results = two_ranks(finetune_together, **{name: value for name, value in args.items() if name not in fixed})
    network, _ = load_probe(tmp_path / "Linear_eval" / "linear" / "checkpoint.pth.tar")
    network.fc = torch.nn.Identity()
    val = IndexedFolder(six_classes / "val", center_view(32))
    with torch.no_grad():
        expected = network(normalize(torch.stack([val[i][0] for i in range(len(val))])))
    for result in results:
        torch.testing.assert_close(result["features"], expected, rtol=1e-4, atol=1e-4)


def probe_together(device, args, plan):
    eval_cls_imagenet.probe(device, args, replace(plan, batch=4, workers=0))
    val = IndexedFolder(args.data / "val", center_view(32)).subset(np.arange(17))  # two ranks do not divide them
    torch.manual_seed(0)
    network = backbone(ARCH)
    loader = [(val[i][0][None], i) for i in indices_of_rank(len(val))]
    features = extract_features(network, loader, len(val), device)
    head = torch.nn.Linear(1024, 6)
    save_result(args, features=features, **validate(head, features, torch.from_numpy(val.labels)))


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_validate_exactly_each_image_once(six_classes, pretrained, tmp_path, two_ranks):
    options = ["--pretrained", str(pretrained), "--output", str(tmp_path / "o.json"), str(six_classes)]
    args = vars(eval_cls_imagenet.get_parser().parse_args([*TINY.split(), *options]))
    fixed = {"nproc", "gpu", "world_size", "rank", "dist_url", "dist_backend", "dist_timeout", "seed"}
    results = two_ranks(probe_together, **{name: value for name, value in args.items() if name not in fixed})
    val = IndexedFolder(six_classes / "val", center_view(32))
    torch.manual_seed(0)
    network = backbone(ARCH)
    with torch.no_grad():
        expected = torch.cat([network(normalize(val[i][0][None])) for i in range(17)])
        head = torch.nn.Linear(1024, 6)
        hits = (head(expected).argmax(1) == torch.from_numpy(val.labels[:17])).sum()
    for result in results:
        torch.testing.assert_close(result["features"], expected)
        assert result["test_acc"] == pytest.approx(100 * float(hits) / 17)
    assert len(json.loads((tmp_path / "o.json").read_text())["epochs"]) == 3


@pytest.mark.parametrize(("percent", "each"), [(100, 10), (50, 5), (1, 1), (34, 3)])
def test_few_labels_are_a_seeded_share_of_each_class(percent, each):
    labels = np.repeat(np.arange(4), 10)
    chosen = label_subset(labels, percent, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [each] * 4
    assert len(set(chosen)) == len(chosen)
    np.testing.assert_array_equal(chosen, label_subset(labels, percent, seed=1))
    if percent == 50:
        assert not np.array_equal(chosen, label_subset(labels, percent, seed=2))


def test_two_event_files_of_the_same_second_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    boards = [TensorBoard(tmp_path / "b") for _ in range(2)]
    for number, board in enumerate(boards):
        board.write(0, figure=number)
    files = list((tmp_path / "b").iterdir())
    assert len(files) == 2
    values = [EventAccumulator(str(file)).Reload().Scalars("figure")[0].value for file in files]
    assert sorted(values) == [0, 1]


def test_the_head_starts_as_published(pretrained):
    options = ["--pretrained", str(pretrained), "--image-size", "64", "--start-epoch", "7"]
    args = eval_cls_imagenet.get_parser().parse_args([*options, "DIR"])
    probe = open_probe(args, [str(c) for c in range(1000)])
    assert isinstance(probe, Probe)
    (head,) = probe.heads
    assert float(head.layer.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not head.layer.bias.any()
    assert head.epoch == 7
    assert not probe.backbone.training


def test_the_pixels_are_a_backbone(six_classes, tmp_path):
    script(six_classes, "--pixels", "--epochs", 1, "--lr", 0.001, "--id", "p", "--output", "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["checkpoint"] == {"arch": "pixels", "weights": "none"}
    assert load(tmp_path / "Linear_eval" / "p" / "checkpoint.pth.tar")["state_dict"]["module.fc.weight"].shape == (
        6,
        3 * 32 * 32,
    )


@pytest.mark.slow
def test_the_best_epoch_is_the_first_of_equal_ones_in_the_file_too(six_classes, pretrained, tmp_path):
    script(six_classes, "--pretrained", pretrained, "--lr", "1e-9", "--id", "still", "--output", "o.json")
    told = json.loads((tmp_path / "o.json").read_text())
    assert len({metrics["test_acc"] for metrics in told["epochs"]}) == 1
    (best,) = load(tmp_path / "Linear_eval/still/model_best.pth.tar")["history"]
    assert best == told["best"] == told["epochs"][0]


@pytest.mark.slow
def test_what_a_probe_has_saved_it_has_recorded(six_classes, pretrained, tmp_path):
    saved, save = [], eval_cls_imagenet.save

    def stop_at_the_second(model, head, *rest):
        if saved:
            raise RunError("stopped")
        saved.append(head.mark)
        save(model, head, *rest)

    options = [six_classes, "--pretrained", pretrained, "--lr", "0.03,3", "--epochs", 1, "--id", "stopped"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_cls_imagenet, "save", stop_at_the_second)
        with pytest.raises(SystemExit):
            script(*options)
    script(*options, "--resume", "auto")
    records = (tmp_path / "Linear_eval/stopped/log.jsonl").read_text()
    assert saved == ["_0.03"]
    assert (records.count('"test_acc_0.03"'), records.count('"test_acc_3"')) == (1, 2)


@pytest.mark.slow
def test_fewer_than_five_classes_have_no_top_5(image_folder, pretrained, tmp_path, capsys):
    script(image_folder, "--pretrained", pretrained, "--epochs", 1, "--id", "two", "--output", "o.json")
    script(image_folder, "--resume", "Linear_eval/two/model_best.pth.tar", "--evaluate")
    assert "top-5" not in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["last"].keys() >= {"train_acc", "test_acc"}
    everything = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "test_acc" in everything
    assert "acc5" not in everything


def test_two_images_of_each_process_are_enough_to_fine_tune(six_classes, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "launch", lambda worker, args, plan: started.append(plan.place.world))
    few = [six_classes, "--random-init", "-a", ARCH, "--percent", 1, "-b", 6]  # six images
    script(*few, "--finetune", "--nproc", 3)
    script(*few, "--nproc", 6)
    assert started == [3, 6]


def remove_class(root):
    shutil.rmtree(root / "val" / "class 3")


def rename_class(root):
    (root / "val" / "class 3").rename(root / "val" / "zebra")


def empty_class(root):
    for file in (root / "train" / "class 2").iterdir():
        file.unlink()


def keep_one(root):
    for split in ("train", "val"):
        for label in range(1, 6):
            shutil.rmtree(root / split / f"class {label}")


def keep_five(root):
    for split in ("train", "val"):
        shutil.rmtree(root / split / "class 5")


def break_class(root):
    for file in (root / "val" / "class 2").iterdir():
        file.write_bytes(b"")


WRONG = {
    "a class that val lacks": (remove_class, "{weights}", "only one of them has class 3"),
    "a class that train lacks": (rename_class, "{weights}", "only one of them has class 3"),
    "an empty class": (empty_class, "{weights}", "no image in {root}/train/class 2"),
    "a class that cannot be read": (
        break_class,
        "{weights} --skip-unreadable",
        "no image that can be read in {root}/val/class 2",
    ),
    "one class": (keep_one, "{weights}", "train/ and val/ hold one class; folders of two or more are needed"),
    "other classes than the head's": (keep_five, "--resume {probe}", "was trained on other classes"),
    "a finished probe": (None, "--resume {probe}", "has 3 epochs; raise --epochs above that to go on"),
    "another architecture": (None, "--resume {probe} -a resnet18", "holds a shufflenet_v2_x0_5, not a resnet18"),
    "another backbone": (
        None,
        "--resume {probe} --pretrained {other}",
        "a different backbone from --pretrained: conv1.0.weight",
    ),
    "not a probe": (None, "--resume {checkpoint}", "is not a checkpoint of a linear probe: it has no classes"),
    "weights that are no numbers": (None, "--pretrained {nan}", "--pretrained: {nan}: not all numbers of conv1.0.weight"),
    "a head that is no numbers": (None, "--resume {nan_probe}", "--resume: {nan_probe}: not all numbers of fc.bias"),
    "no weights": (None, "", "--pretrained: give exactly one of"),
    "pixels to go on with": (None, "--pixels --resume auto", "--resume: a probe of --pixels cannot be resumed; leave it out"),
    "nothing to evaluate, and no weights": (None, "-e", "--evaluate: name the finished probe with --resume"),
    "nothing to evaluate": (None, "{weights} -e", "--evaluate: name the finished probe with --resume"),
    "another run": (None, "{weights} --id taken", "--id taken: Linear_eval/taken holds another run"),
    "another run of pixels": (None, "--pixels --id taken", "Linear_eval/taken holds another run; name another\n"),
    "the folder as output": (
        None,
        "{weights} --output Linear_eval/linear",
        "--output Linear_eval/linear is what the run itself",
    ),
    "the best as output": (
        None,
        "{weights} --lr 1,2 --output Linear_eval/linear/lr_2/model_best.pth.tar",
        "lr_2/model_best.pth.tar is what the run itself writes",
    ),
    "a percentage of 0": (None, "{weights} --percent 0", "--percent: '0' is not a number above 0, at most 100"),
    "two learning rates to fine-tune": (None, "{weights} --finetune --lr 1,2", "--lr: --finetune trains one network"),
    "pixels to fine-tune": (None, "--pixels --finetune", "--finetune: --pixels has no weights to train"),
    "one image to fine-tune with": (None, "{weights} --finetune -b 1", "--batch-size: BatchNorm needs two images"),
    "a backbone's learning rate": (None, "{weights} --lr-backbone 1", "--lr-backbone is an option of --finetune"),
    "a probe to fine-tune": (None, "--resume {probe} --finetune", "holds a linear probe; leave --finetune out"),
    "a learning rate twice": (None, "{weights} --lr 1,1.0", "--lr: 1,1.0: a number is listed twice"),
    "a learning rate of 0": (None, "{weights} --lr 1,0", "--lr: '0' is not a number above 0"),
    "two learning rates of one file": (None, "--resume {probe} --lr 1,2", "holds one classifier; give one rate"),
    "a subset and a percentage": (None, "{weights} --subset {list} --percent 1", "--percent: --subset has chosen"),
    "no subset": (None, "{weights} --subset nowhere", "--subset nowhere: it cannot be read (No such file or directory)"),
    "a name of no image": (None, "{weights} --subset {list}", "/train has no image n01440764_10026.JPEG (1 such names)"),
    "a name of several images": (None, "{weights} --subset {short}", "several images are called 0.png; write <class>/0.png"),
    "an empty subset": (None, "{weights} --finetune --subset {empty}", "--subset {empty}: fewer than two images"),
    "batch and processes": (None, "{weights} --nproc 3", "--batch-size 8: it is not divisible by the 3 processes"),
}


@pytest.fixture(scope="module")
def finished(six_classes, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with without_gpu() as patch:
        patch.chdir(folder)
        script(six_classes, "--pretrained", pretrained, "--id", "x", "--seed", 1)
    return folder / "Linear_eval" / "x" / "checkpoint.pth.tar"


@pytest.fixture(scope="module")
def places(pretrained, finished, tmp_path_factory):
    """What the names in WRONG stand for."""
    folder = tmp_path_factory.mktemp("wrong")
    places = {name: folder / name for name in ("list", "short", "empty", "other", "nan", "nan_probe")}
    for name, text in {"list": "n01440764_10026.JPEG\n", "short": "0.png\n", "empty": "\n"}.items():
        places[name].write_text(text)
    for name, path, weight in (("nan", pretrained, "encoder_q.conv1.0.weight"), ("nan_probe", finished, "fc.bias")):
        state = load(path)
        state["state_dict"][f"module.{weight}"][0] = math.nan
        torch.save(state, places[name])
    other = load(pretrained)
    other["state_dict"]["module.encoder_q.conv1.0.weight"] += 1
    torch.save(other, places["other"])
    return places | {"probe": finished, "checkpoint": pretrained, "weights": f"--pretrained {pretrained}"}


@pytest.mark.parametrize(("spoil", "options", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(spoil, options, message, six_classes, places, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("processes were started"))
    root = shutil.copytree(six_classes, tmp_path / "six") if spoil else six_classes
    if spoil:
        spoil(root)
    (tmp_path / "Linear_eval" / "taken" / "old").mkdir(parents=True)
    places = places | {"root": root}
    with pytest.raises(SystemExit) as stop:
        script(root, *options.format(**places).split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" or out.startswith("unreadable and left out: 3 of 55 images\n")
    assert err.count("\n") == 1
    assert message.format(**places) in err
    assert [path.name for path in (tmp_path / "Linear_eval").iterdir()] == ["taken"]


def test_the_defaults_are_the_published_ones():
    args = vars(eval_cls_imagenet.get_parser().parse_args(["DIR"]))
    expected = {
        "lr": [5.0],
        "gamma": 0.1,
        "batch_size": 256,
        "epochs": 100,
        "schedule": [60, 80],
        "momentum": 0.9,
        "wd": 0.0,
        "print_freq": 10,
    }
    assert {name: args[name] for name in expected} == expected
    assert args["image_size"] == 224


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_names_may_be_saved_by_windows(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("a/1.png\r\n\r\nä/2.png \r\n".encode(encoding))
    assert names_in(tmp_path / "list.txt") == {"a/1.png", "ä/2.png"}


@pytest.mark.parametrize(("options", "lr"), [("", 0.1), ("--percent 10", 0.1), ("--percent 1", 1), ("--subset list", 1)])
def test_fine_tuning_has_the_papers_settings_where_none_is_given(options, lr, tmp_path, monkeypatch):
    (tmp_path / "train" / "a" / "deeper").mkdir(parents=True)
    for i in range(100):
        (tmp_path / "train" / "a" / "deeper" / f"{i}.png").touch()
    (tmp_path / "list").write_text("1.png\n")
    parser = eval_cls_imagenet.get_parser()
    monkeypatch.setattr("sys.argv", ["x", "--finetune", *options.split(), "."])
    args = vars(eval_cls_imagenet.parse(parser))
    expected = {
        "lr": [lr],
        "lr_backbone": 0.01,
        "gamma": 0.2,
        "schedule": [12, 16],
        "epochs": 20,
        "wd": 5e-4,
        "batch_size": 256,
    }
    assert {name: args[name] for name in expected} == expected
    monkeypatch.setattr("sys.argv", ["x", "--finetune", "--lr", "3", "--wd", "0", "--gamma", "0.5", "."])
    args = vars(eval_cls_imagenet.parse(eval_cls_imagenet.get_parser()))
    assert (args["lr"], args["wd"], args["gamma"]) == ([3], 0, 0.5)


@pytest.mark.slow
def test_a_converged_head_is_that_of_logistic_regression(six_classes, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_cls_imagenet, "crop_view", center_view)  # the same features at every epoch
    save = eval_cls_imagenet.save  # which takes two thirds of the time
    monkeypatch.setattr(eval_cls_imagenet, "save", lambda model, head, *rest: head.epoch < 60 or save(model, head, *rest))
    options = ["--epochs", "60", "--schedule", "50", "-b", "64", "--lr", "0.05,0.2", "--wd", "0.1", "--seed", "1", "--id", "x"]
    script(six_classes, "--pretrained", pretrained, *options)
    network, _ = load_backbone(pretrained)
    train = IndexedFolder(six_classes / "train", center_view(32))
    with torch.no_grad():
        features = network(normalize(torch.stack([train[i][0] for i in range(len(train))]))).numpy()
    known = np.column_stack([features, np.ones(len(train))])  # weight decay is of the bias too
    slow = LogisticRegression(C=1 / (0.1 * len(train)), fit_intercept=False, tol=1e-8, max_iter=5000).fit(known, train.labels)
    for lr in ("0.05", "0.2"):
        state = load(tmp_path / "Linear_eval" / "x" / f"lr_{lr}" / "checkpoint.pth.tar")["state_dict"]
        np.testing.assert_allclose(state["module.fc.weight"].numpy(), slow.coef_[:, :-1], atol=0.02)
        np.testing.assert_allclose(state["module.fc.bias"].numpy(), slow.coef_[:, -1], atol=0.02)
