import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script, write_voc_shaped
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

import eval_svm_voc
from eval_svm_voc import Features, Job, choose_cost, precisions, run, spread
from pcl.augment import normalize
from pcl.loader import IndexedFolder
from pcl.metrics import average_precision
from pcl.run import inputs

ARCH = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory):
    return write_voc_shaped(tmp_path_factory.mktemp("voc"))


def args_of(*options):
    return eval_svm_voc.get_parser().parse_args(["DIR", *options])


@pytest.fixture(scope="module")
def features():
    """Two classes that the features tell apart, roughly; the third image in ten is difficult."""
    rng = np.random.default_rng(0)
    labels = [rng.choice([1, -1, 0], (n, 2), p=[0.4, 0.5, 0.1]) for n in (60, 50)]
    x = [(0.7 * (y > 0) @ np.ones((2, 4)) + rng.normal(size=(len(y), 4))).astype(np.float32) for y in labels]
    return Features(x[0], labels[0], x[1], labels[1], ["dog", "train"])


@pytest.mark.slow
def test_the_script_from_end_to_end(voc_root, pretrained, tmp_path, monkeypatch, capsys):
    options = [voc_root, "--pretrained", pretrained, "--image-size", 32, "--num-workers", 0]
    run_script(eval_svm_voc, *options, "--output", tmp_path / "new" / "full.json")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "full.json").read_text())
    assert result["classes"] == ["dog", "train"]
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert result["checkpoint"] == {"arch": ARCH, "weights": str(pretrained), "sha256": digest}
    full = result["full"]
    assert full["map"] == pytest.approx(np.mean(list(full["ap"].values())))
    assert full["by_cost"].keys() == {"0.5"}
    assert f"mAP {100 * full['map']:.1f}" in printed
    assert "SVMs" in printed

    monkeypatch.setattr(eval_svm_voc, "SHOTS", (1, 2))
    run_script(eval_svm_voc, *options, "--low-shot", "--output", tmp_path / "low.json")
    printed = capsys.readouterr().out
    low = json.loads((tmp_path / "low.json").read_text())["low_shot"]
    assert low.keys() == {"1", "2"}
    for k, figures in low.items():
        maps = [draw["map"] for draw in figures["by_cost"]["0.5"]["draws"]]
        assert len(maps) == 5
        assert figures["mean"] == pytest.approx(np.mean(maps))
        assert figures["std"] == pytest.approx(np.std(maps))
        assert f"{k:>3s}  {100 * figures['mean']:5.1f}  {100 * figures['std']:5.1f}" in printed


def test_an_unreadable_image_is_named_without_an_option_that_is_not_here(voc_root, tmp_path, capsys):
    root = shutil.copytree(voc_root, tmp_path / "voc")
    (root / "VOCdevkit/VOC2007/JPEGImages/000001.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run_script(eval_svm_voc, root, "--pixels", "--image-size", 8, "--num-workers", 0)
    assert stop.value.code == 1
    told = "000001.jpg: it is empty, or not an image of a known format; repair or remove the file\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_loader_processes_means_none_for_the_svms_too(features, monkeypatch, workers):
    made, make = [], eval_svm_voc.make_loader
    monkeypatch.setattr(eval_svm_voc, "make_loader", lambda *args, **more: made.append(args[3]) or make(*args, **more))
    monkeypatch.setattr(eval_svm_voc, "available_cores", lambda: 2)
    run(features, [Job(np.arange(60), label, 0.5) for label in (0, 1, 0)], args_of("--num-workers", str(workers)))
    assert made == [2 if workers else 0]


def test_the_svms_are_the_published_ones_and_parallel_makes_no_difference(features):
    rows = np.array([0, 5, 5, *range(10, 40)])
    args = args_of("--seed", "3")
    jobs = [Job(rows, label, cost) for label in (0, 1) for cost in (0.5, 2.0)]
    for job, scores in zip(jobs, run(features, jobs, args), strict=True):
        svm = LinearSVC(C=job.cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=3)
        svm.fit(features.train[rows], np.where(features.train_labels[rows, job.label] == 1, 1, -1))
        np.testing.assert_array_equal(scores, svm.decision_function(features.test))


def test_an_svm_that_saw_only_images_of_its_class_scores_all_alike(features):
    rows = np.flatnonzero(features.train_labels[:, 0] > 0)
    assert not run(features, [Job(rows, 0, 0.5)], args_of())[0].any()
    ap = precisions(features, [rows], 0.5, args_of())[0]["dog"]
    assert ap == pytest.approx((features.test_labels[:, 0] > 0).mean())  # what chance gives


def test_difficult_images_count_as_negative_or_not_at_all(features):
    rows = np.arange(60)
    counted, left_out = (precisions(features, [rows], 0.5, args_of(*o))[0] for o in ([], ["--ignore-difficult"]))
    for label, name in enumerate(features.classes):
        scores = run(features, [Job(rows, label, 0.5)], args_of())[0]
        truth = features.test_labels[:, label]
        assert (truth == 0).any()
        assert counted[name] == average_precision(np.where(truth > 0, 1, -1), scores)
        assert left_out[name] == average_precision(truth[truth != 0], scores[truth != 0])


def test_what_is_reported_is_of_the_cost_that_all_draws_chose(features, monkeypatch, capsys):
    args, asked = args_of("--cost", "0.0001,5"), []
    monkeypatch.setattr(eval_svm_voc, "choose_cost", lambda _, draws, args: asked.append(len(draws)) or args.cost[1])
    full, low = eval_svm_voc.full(features, args), eval_svm_voc.low_shot(features, args)
    assert asked == [1, *[eval_svm_voc.DRAWS] * 5]
    printed = capsys.readouterr().out
    for result in (full, *low.values()):
        assert result["cost"] == 5
        chosen, other = result["by_cost"]["5.0"], result["by_cost"]["0.0001"]
        assert chosen != other
        assert all(result[name] == chosen[name] for name in result.keys() & {"map", "ap", "mean", "std"})
    for label, ap in full["ap"].items():
        assert f"  {label:20s} AP {100 * ap:5.1f}\n" in printed
    for cost, told in (("0.0001", ""), ("5.0", " (chosen)")):
        assert f"cost {float(cost):g}{told}: mAP {100 * full['by_cost'][cost]['map']:.1f}\n" in printed


def test_random_weights_are_those_of_the_seed(voc_root):
    parser = eval_svm_voc.get_parser()

    def weights(seed):
        words = [str(voc_root), "--random-init", "-a", ARCH, "--image-size", "32", "--seed", seed]
        network, *_ = eval_svm_voc.open_all(parser, parser.parse_args(words))
        return torch.cat([value.flatten() for value in network.parameters()])

    first = weights("1")
    assert torch.equal(first, weights("1"))
    assert not torch.equal(first, weights("2"))


def slow_folds(features, rows, label, cost):
    """Average precision of a class in each of three folds of training images, written out, with seed 3."""
    y, aps = np.where(features.train_labels[rows, label] > 0, 1, -1), []
    for fit, held in StratifiedKFold(3, shuffle=True, random_state=3).split(rows, y):
        svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=3)
        svm.fit(features.train[rows[fit]], y[fit])
        aps.append(average_precision(y[held], svm.decision_function(features.train[rows[held]])))
    return aps


def slow_choice(features, rows, costs):
    """By mean average precision over classes and folds of the distinct images."""
    quality = [np.mean([slow_folds(features, np.unique(rows), label, cost) for label in (0, 1)]) for cost in costs]
    assert len(set(quality)) == len(costs)
    return costs[int(np.argmax(quality))]


@pytest.mark.slow
def test_of_several_costs_the_best_in_cross_validation_on_the_training_images_is_chosen(features, capsys):
    rows = np.append(np.arange(60), np.arange(20))  # images drawn twice must not stand on both sides of a fold
    unseen = Features(features.train, features.train_labels, features.test * np.nan, features.test_labels, features.classes)
    choices = set()
    for costs in ("0.0001,0.05,100", "100,0.05,0.0001", "0.05,0.5"):
        args = args_of("--cost", costs, "--seed", "3")
        choice = choose_cost(unseen, [rows], args)
        assert choice == slow_choice(features, rows, args.cost)
        choices.add(choice != args.cost[0])
    assert choices == {True, False}
    rows = np.arange(60)
    aps = run(unseen, [Job(rows, 1, 0.05, cross_validated=True)], args)[0]
    np.testing.assert_allclose(aps, slow_folds(features, rows, 1, 0.05))
    note = "note: too few images for cross-validation; the first of --cost, 3, is taken"
    shown, not_shown = (np.flatnonzero((features.train_labels == value).all(axis=1)) for value in (1, -1))
    for positive, negative in ((2, 4), (4, 2), (3, 3)):
        few = np.append(shown[:positive], not_shown[:negative])
        choice = choose_cost(features, [few], args_of("--cost", "3,4"))
        assert (note in capsys.readouterr().out) == (positive != negative)
        assert choice == 3 or positive == negative
    assert choose_cost(features, [rows], args_of("--cost", "7")) == 7


def test_an_image_drawn_for_two_classes_is_learnt_from_twice():
    labels = np.array([[1, 1], [-1, -1]])
    assert [rows.tolist() for rows in eval_svm_voc.draws_of(labels, 1, args_of())] == [[0, 0]] * eval_svm_voc.DRAWS


def test_spread_is_that_of_the_draws():
    assert spread([{"a": 0.1, "b": 0.3}, {"a": 0.5, "b": 0.3}]) == pytest.approx({"mean": 0.3, "std": 0.1})


def test_features_are_divided_by_their_length(voc_root, pretrained):
    args = args_of("--pretrained", str(pretrained), "--image-size", "32", "--num-workers", "0")
    network, _ = inputs.open_backbone(args)
    images = eval_svm_voc.voc.VOCSplit(voc_root, "test", eval_svm_voc.center_view(32))
    ours = eval_svm_voc.features_of(network, images, args)
    with torch.no_grad():
        raw = network(normalize(torch.stack([images[i][0] for i in range(20)])))
    torch.testing.assert_close(torch.from_numpy(ours), raw / (raw.norm(dim=1, keepdim=True) + 1e-5))


def spoil_nothing(root):
    pass


def remove_positives(root):
    path = root / "VOCdevkit/VOC2007/ImageSets/Main/dog_test.txt"
    path.write_text(path.read_text().replace("  1", " -1"))


def spoil_list(root):
    (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_bytes(b"\xff\xfe\x00")


def break_image(root):
    (root / "VOCdevkit/VOC2007/JPEGImages/000003.jpg").write_bytes(b"no image")


WRONG = {
    "no folder": ("nowhere --random-init", spoil_nothing, "DIR nowhere: no such folder; --download makes it"),
    "not a VOC folder": ("{empty} --random-init", spoil_nothing, "no such file; --download fetches VOC2007"),
    "no weights named": ("{root}", spoil_nothing, "--random-init"),
    "both": ("{root} --random-init --pretrained {checkpoint}", spoil_nothing, "--random-init"),
    "no such checkpoint": ("{root} --pretrained nowhere.pth", spoil_nothing, "nowhere.pth: no such file"),
    "another network": ("{root} --pretrained {checkpoint} -a resnet18", spoil_nothing, "not a resnet18: leave --arch out"),
    "no positive": ("{root} --random-init -a resnet18", remove_positives, "class dog has 0 positive images in test"),
    "k too large": ("{root} --random-init -a resnet18 --low-shot", spoil_nothing, "positive images in trainval; 30 are needed"),
    "unreadable image": ("{root} --random-init -a resnet18 --num-workers 2", break_image, "cannot read the image"),
    "a text file for a list": ("{root} --random-init", spoil_list, "test.txt is not a text file in UTF-8"),
    "a seed too large": ("{root} --random-init --seed 5000000000", spoil_nothing, "--seed: '5000000000' is not"),
    "a folder for a file": ("{root} --random-init --output {root}", spoil_nothing, "is a folder; name a file"),
    "a cost of 0": ("{root} --random-init --cost 0.5,0", spoil_nothing, "--cost: '0' is not a number above 0"),
}


@pytest.mark.parametrize(("options", "spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(options, spoil, message, voc_root, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_svm_voc, "SHOTS", (1, 30))
    root = shutil.copytree(voc_root, tmp_path / "voc")
    spoil(root)
    (tmp_path / "1/2/3/empty").mkdir(parents=True)
    places = {"root": root, "empty": tmp_path / "1/2/3/empty", "checkpoint": pretrained}
    with pytest.raises(SystemExit) as stop:
        run_script(eval_svm_voc, "--image-size", 32, "--output", tmp_path / "o.json", *options.format(**places).split())
    assert stop.value.code == (1 if spoil is break_image else 2)  # which is found as the features are extracted
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o.json").exists()


def test_the_defaults_are_the_published_ones():
    args = args_of()
    assert (args.cost, args.seed, args.batch_size, args.num_workers, args.low_shot) == ([0.5], 0, 128, 8, False)
    assert (eval_svm_voc.SHOTS, eval_svm_voc.DRAWS) == ((1, 2, 4, 8, 16), 5)


@pytest.mark.slow
def test_single_label_folders_are_scored_by_accuracy(six_classes, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_svm_voc, "SHOTS", (1, 2))
    monkeypatch.setattr(IndexedFolder, "layout_notes", lambda images: [f"a note on {images.root.name}"])
    options = [six_classes, "--folder", "--pretrained", pretrained, "--image-size", 32, "--num-workers", 0]
    run_script(eval_svm_voc, *options, "--output", tmp_path / "full.json", "--cost", "0.5,2")
    run_script(eval_svm_voc, *options, "--output", tmp_path / "low.json", "--low-shot")
    full = json.loads((tmp_path / "full.json").read_text())["full"]
    low = json.loads((tmp_path / "low.json").read_text())["low_shot"]
    told = capsys.readouterr().out
    assert f"accuracy {100 * full['accuracy']:.1f}" in told
    assert told.count("a note on train\na note on val\n") == 2

    args = args_of("--pretrained", str(pretrained), "--image-size", "32", "--num-workers", "0")
    network, _ = inputs.open_backbone(args)
    folders = [IndexedFolder(six_classes / split, eval_svm_voc.center_view(32)) for split in ("train", "val")]
    x, q = (eval_svm_voc.features_of(network, images, args) for images in folders)
    y, truth = (images.labels for images in folders)

    def accuracy(rows, cost):
        scores = []
        for label in range(6):
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)
            scores.append(svm.fit(x[rows], np.where(y[rows] == label, 1, -1)).decision_function(q))
        return (np.argmax(scores, axis=0) == truth).mean()

    assert full["by_cost"]["2.0"]["accuracy"] == pytest.approx(accuracy(np.arange(len(y)), 2.0))
    draws = [eval_svm_voc.voc.draw_low_shot(np.where(y[:, None] == np.arange(6), 1, -1), 2, 0, draw) for draw in range(5)]
    assert all(np.bincount(y[rows]).tolist() == [2] * 6 for rows in draws)
    assert [draw["accuracy"] for draw in low["2"]["by_cost"]["0.5"]["draws"]] == [accuracy(rows, 0.5) for rows in draws]
