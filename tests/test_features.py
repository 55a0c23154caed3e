import csv
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run_script, without_gpu
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedKFold

from pcl import evaluation, features
from pcl.augment import center_view, normalize
from pcl.builder import MoCo
from pcl.checkpoint import CheckpointError, load_backbone
from pcl.clustering import cluster
from pcl.errors import RunError
from pcl.images import read_image
from pcl.loader import IndexedFolder

ARCH = "shufflenet_v2_x0_5"
SMALL = ("--image-size", 32, "-j", 0, "--batch-size", 7)


def passed_one_by_one(network, folder, names, size=32):
    """Features of each file, one image at a time."""
    view = center_view(size)
    with torch.no_grad():
        return torch.cat([network(normalize(view(read_image(folder / name))[None])) for name in names]).numpy()


def slow_vote(known, known_label, query, k, out=()):
    """The label that a weighted vote of the k nearest gives one query."""
    unit = known / np.linalg.norm(known, axis=1, keepdims=True)
    cosine = unit @ (query / np.linalg.norm(query))
    votes = dict.fromkeys(known_label.tolist(), 0.0)
    for i in [i for i in np.argsort(-cosine) if i not in out][:k]:
        votes[int(known_label[i])] += np.exp(cosine[i] / 0.1)
    return max(votes, key=votes.get)


def read(out):
    return json.loads((out / "results.json").read_text())


def error_of(capsys, *words, code=2):
    with pytest.raises(SystemExit) as ended:
        run_script(features, *words)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m pcl.features: error: ")
    return line


@pytest.fixture(scope="module")
def whole(six_classes, pretrained, tmp_path_factory):
    """The folder of a run with everything."""
    out = tmp_path_factory.mktemp("whole") / "deep" / "out"
    with without_gpu():
        run_script(features, pretrained, six_classes, "--out", out, "--num-cluster", "6,9", "--logistic", *SMALL)
    return out


@pytest.mark.slow
def test_features_and_names_are_those_of_the_files_in_order(whole, six_classes, pretrained):
    network, _ = load_backbone(pretrained)
    for split, count in (("train", 37), ("val", 18)):
        names = (whole / f"{split}.txt").read_text().splitlines()
        images = IndexedFolder(six_classes / split, lambda image: image)
        assert [str(six_classes / name) for name in names] == [images.path(i) for i in range(count)]
        found = np.load(whole / f"{split}.npy")
        assert (found.dtype, len(found)) == (np.float32, count)
        np.testing.assert_allclose(found, passed_one_by_one(network, six_classes, names), rtol=1e-4, atol=1e-5)
        labels = np.load(whole / f"{split}_labels.npy")
        classes = read(whole)["classes"]
        assert [classes[label] for label in labels] == [name.split("/")[1] for name in names]


def test_knn_is_the_vote_of_the_nearest(six_classes, tmp_path):
    # Random features: those of a network with random weights are all but equal, and rounding decides who is nearest.
    splits = features.open_splits(six_classes, center_view(32))
    label, truth = splits["train"].labels, splits["val"].labels
    centers = torch.randn(6, 8)
    rows = {name: centers[images.labels] + torch.randn(len(images), 8) for name, images in splits.items()}
    train, val = rows["train"].numpy(), rows["val"].numpy()
    made = {"features": "backbone"}
    evaluation.evaluate(tmp_path, made, rows, splits, six_classes)
    found = read(tmp_path)["knn"]
    slow = {k: [slow_vote(train, label, query, k) for query in val] == truth for k in (20, 200)}
    assert {int(k): f["accuracy"] for k, f in found.items()} == pytest.approx({k: v.mean() for k, v in slow.items()})
    assert 0.2 < found["20"]["accuracy"] < 1
    assert {f["how"] for f in found.values()} == {"val against train"}
    evaluation.evaluate(tmp_path, made, rows, {"train": splits["train"]}, six_classes)
    found = read(tmp_path)["knn"]
    slow = {k: [slow_vote(train, label, row, k, out=[i]) for i, row in enumerate(train)] == label for k in (20, 200)}
    assert {int(k): f["accuracy"] for k, f in found.items()} == pytest.approx({k: v.mean() for k, v in slow.items()})
    assert {f["how"] for f in found.values()} == {"each image left out in turn"}


def test_clusters_are_the_e_steps_and_agreement_is_scikit_learns(whole):
    train, label = np.load(whole / "train.npy"), np.load(whole / "train_labels.npy")
    names, results = (whole / "train.txt").read_text().splitlines(), read(whole)
    for seed, k in enumerate((6, 9)):
        with (whole / f"clusters_{k}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["file"] for row in rows] == names
        assert [row["label"] for row in rows] == [results["classes"][i] for i in label]
        im2cluster = np.array([int(row["cluster"]) for row in rows])
        expected = cluster(F.normalize(torch.from_numpy(train), dim=1), k, 0.1, seed=seed).im2cluster
        np.testing.assert_array_equal(im2cluster, expected)
        found = results["clusters"][str(k)]
        assert found["ami"] == pytest.approx(adjusted_mutual_info_score(label, im2cluster))
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(label, im2cluster))
        commonest = sum(np.bincount(label[im2cluster == c]).max() for c in set(im2cluster.tolist()))
        assert found["purity"] == pytest.approx(commonest / len(label))


@pytest.mark.slow
def test_logistic_regression_is_scikit_learns_and_chooses_without_val(whole):
    train, val = np.load(whole / "train.npy"), np.load(whole / "val.npy")
    label, truth = np.load(whole / "train_labels.npy"), np.load(whole / "val_labels.npy")
    found = read(whole)["logistic"]
    mean, std = train.mean(axis=0), train.std(axis=0)
    std[std < 1e-12] = 1
    fit = LogisticRegression(C=found["C"], max_iter=1000).fit((train - mean) / std, label)
    assert found["accuracy"] == pytest.approx((fit.predict((val - mean) / std) == truth).mean())
    other = {"train": torch.from_numpy(train), "val": torch.from_numpy(val).flip(0)}
    labels = {"train": torch.from_numpy(label), "val": torch.from_numpy(truth)}
    changed = evaluation.logistic_regression(other, labels)
    assert (changed["C"], changed["cross_validation"]) == (found["C"], found["cross_validation"])
    assert changed["accuracy"] != found["accuracy"]


@pytest.mark.parametrize(("fewest", "folds"), [(20, 5), (3, 3)])
def test_the_strength_is_the_best_in_cross_validation(fewest, folds):
    generator = np.random.default_rng(0)
    label = np.append(np.arange(3 * fewest) % 3, np.arange(40 - 2 * fewest) % 2)
    rows = (generator.normal(size=(len(label), 20)) + label[:, None] * (np.arange(20) < 2)).astype(np.float32)
    tensors = {"train": torch.from_numpy(rows), "val": torch.from_numpy(rows)}
    found = evaluation.logistic_regression(tensors, dict.fromkeys(("train", "val"), torch.from_numpy(label)))
    quality = {}
    for strength in evaluation.STRENGTHS:
        scores = []
        for known, held_out in StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, label):
            mean, std = rows[known].mean(axis=0), rows[known].std(axis=0)
            fit = LogisticRegression(C=strength, max_iter=1000).fit((rows[known] - mean) / std, label[known])
            scores.append((fit.predict((rows[held_out] - mean) / std) == label[held_out]).mean())
        quality[strength] = np.mean(scores)
    assert len(set(quality.values())) > 1  # there is something to choose
    assert found["cross_validation"] == pytest.approx(max(quality.values()))
    assert quality[found["C"]] == pytest.approx(max(quality.values()))


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def two_encoders(request, tmp_path):
    """A checkpoint whose key encoder differs from its query encoder, and the model."""
    torch.manual_seed(1)
    model = MoCo(torchvision.models.get_model_builder(ARCH), dim=8, r=16, mlp=request.param).eval()
    for parameter in model.encoder_k.parameters():
        parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "arch": ARCH, "state_dict": state, "args": {"image_size": "32"}}, tmp_path / "c.pth.tar")
    return tmp_path / "c.pth.tar", model


def test_momentum_features_are_the_e_steps_at_the_size_of_the_checkpoint(two_encoders, six_classes, tmp_path, capsys):
    path, model = two_encoders
    out = tmp_path / "out"
    run_script(features, path, six_classes / "train", "--momentum", "--out", out, "-j", 0)
    told = capsys.readouterr().out
    assert "(momentum features, each image left out in turn, as in the paper)" in told
    assert "as is usual" not in told
    found, results = np.load(out / "train.npy"), read(out)
    assert (results["features"], results["image_size"]) == ("momentum", 32)
    assert not (out / "val.npy").exists()
    names = (out / "train.txt").read_text().splitlines()
    assert names[0] == "class 0/0.png"  # DIR/<class>/ does as well
    expected = passed_one_by_one(model, six_classes / "train", names)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_images_without_labels_give_features_and_a_table(pretrained, tmp_path, capsys):
    data = tmp_path / "photos"
    (data / "below").mkdir(parents=True)
    for name in ("b, c.png", "a.png", "below/ä.png"):
        Image.new("RGB", (20, 20), (len(name) * 20, 0, 99)).save(data / name)
    (data / "c.heic").touch()
    run_script(features, pretrained, data, "--out", tmp_path / "out", "--num-cluster", 2, *SMALL)
    told = capsys.readouterr().out
    assert "no labels" in told
    assert f"data: left out of {data}: 1 .heic\n" in told
    written = ["clusters_2.csv", "results.json", "train.npy", "train.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    with (tmp_path / "out" / "clusters_2.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "cluster"]
    assert [row[0] for row in rows] == ["a.png", "b, c.png", "below/ä.png"]


def test_earlier_results_are_replaced_with_a_word_and_other_files_never(whole, pretrained, six_classes, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for path in whole.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    run_script(features, pretrained, six_classes / "train", "--out", out, *SMALL)
    assert f"the earlier results in {out} will be replaced" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "train.npy", "train.txt", "train_labels.npy"]
    (out / "thesis.txt").write_text("mine")
    assert "holds other files (thesis.txt); name another" in error_of(capsys, pretrained, six_classes, "--out", out, *SMALL)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "train.npy").write_bytes(b"mine")  # a name of ours, and not our file
    error_of(capsys, pretrained, six_classes, "--out", tmp_path / "arrays", *SMALL)
    assert (tmp_path / "arrays" / "train.npy").read_bytes() == b"mine"
    assert "name another" in error_of(capsys, pretrained, six_classes, "--out", pretrained, *SMALL)


def test_results_are_not_a_class_of_the_next_run(pretrained, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(photos / name / "0.png")
    monkeypatch.chdir(photos)
    told = error_of(capsys, pretrained, ".", *SMALL)
    assert told.endswith("--out features lies among the classes of . and would be one; name another")
    assert sorted(path.name for path in photos.iterdir()) == ["a", "b"]


def test_a_folder_of_a_killed_run_is_its_own(pretrained, six_classes, tmp_path, monkeypatch):
    def killed(path):
        os.remove(path)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    run_script(features, pretrained, six_classes, "--out", out, *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(Path, "iterdir", lambda folder: [folder / "results.json", folder / "train.npy"])
        with pytest.raises(KeyboardInterrupt):
            run_script(features, pretrained, six_classes, "--out", out, *SMALL)
    with evaluation.claim(out):
        pass


def test_two_runs_into_one_folder_exclude_each_other(pretrained, six_classes, tmp_path, capsys):
    with evaluation.claim(tmp_path / "out"):
        told = error_of(capsys, pretrained, six_classes, "--out", tmp_path / "out", *SMALL)
    assert told.endswith(f"--out {tmp_path / 'out'}: another run is writing into it; name another folder")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-cluster", "38"], "--num-cluster 38: more clusters than the 37 images; lower it"),
        (["--num-cluster", "3,3"], "is listed twice"),
        (["--num-cluster", "3,x"], "'x' is not an integer from 1"),
        (["--image-size", "0"], "'0' is not an integer from 1"),
        (["--image-size", "8192", "-b", "1000000"], "--image-size 8192: no memory holds 1000000 such images; lower it"),
        (["--batch-size", "-1"], "'-1' is not an integer"),
        (["-a", "resnet18"], "not a resnet18: leave --arch out"),
        (["-a", "vgg"], "invalid choice"),
    ],
)
def test_an_option_that_cannot_work_is_one_line(words, told, pretrained, six_classes, tmp_path, capsys):
    assert told in error_of(capsys, pretrained, six_classes, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_data_that_cannot_work_are_one_line(pretrained, six_classes, tmp_path, capsys):
    def told(data, *words):
        return error_of(capsys, pretrained, data, "--out", tmp_path / "out", *words, *SMALL)

    evaluation.check({"train": IndexedFolder(six_classes / "train", None)}, [37], logistic=False)  # a cluster for each can
    assert "no such folder" in told(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no image in" in told(tmp_path / "empty")
    assert "--logistic needs labels" in told(six_classes / "train" / "class 0", "--logistic")
    assert "put some into DIR/val/<class>/" in told(six_classes / "train", "--logistic")
    data = tmp_path / "data"
    for folder in ("val/a", "val/b"):
        (data / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(data / folder / "0.png")
    assert f"name {data / 'val'}" in told(data)
    for folder in ("train/a", "train/c"):
        (data / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(data / folder / "0.png")
    assert "the same class folders" in told(data)
    (data / "train" / "c").rename(data / "train" / "b")
    assert "class a has one training image" in told(data, "--logistic")
    (data / "train" / "b" / "0.png").rename(data / "train" / "b" / "0\n1.png")
    assert "contains a line break; rename it" in told(data)
    assert not (tmp_path / "out").exists()


def test_a_loader_of_other_images_is_told():
    batches = [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2))]
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"num_images: the loader has 2 images for this process, not {number}"):
            features.extract_features(torch.nn.Flatten(), batches, number, torch.device("cpu"))


def test_every_rank_needs_an_image(monkeypatch):
    monkeypatch.setattr(features, "get_world_size", lambda: 3)
    with pytest.raises(RunError, match=r"2 images for 3 processes; start fewer \(--nproc\)"):
        features.extract_features(pytest.fail, [], 2, torch.device("cpu"))


def test_a_disk_that_fills_up_within_an_array_is_told_as_such(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"train\.npy cannot be written: File too large"):
            evaluation._write(tmp_path / "train.npy", np.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    evaluation._write(tmp_path / "train.npy", np.arange(9.0).reshape(3, 3).T)
    np.testing.assert_array_equal(np.load(tmp_path / "train.npy"), np.arange(9.0).reshape(3, 3).T)


def test_an_unreadable_image_is_one_line_during_the_work(pretrained, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "a" / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    line = error_of(capsys, pretrained, data, "--out", tmp_path / "out", *SMALL, code=1)
    assert line.endswith("repair or remove the file")  # and no option that is not here
    assert str(data / "a" / "broken.jpg") in line


def test_a_checkpoint_without_momentum_encoder_is_one_line(two_encoders, six_classes, tmp_path, capsys):
    path, model = two_encoders
    torch.save({"arch": ARCH, "state_dict": load_backbone(path)[0].state_dict()}, tmp_path / "plain.pth")
    line = error_of(capsys, tmp_path / "plain.pth", six_classes, "--momentum", *SMALL)
    assert line.endswith("has no momentum encoder, as pre-training saves it; leave out --momentum")
    state = model.state_dict()
    del state["encoder_k.conv1.0.weight"]
    torch.save({"arch": ARCH, "state_dict": state}, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"conv1.0.weight.*leave out --momentum"):
        features.load_momentum_encoder(tmp_path / "lacking.pth")
    state = model.state_dict()
    state["encoder_k.conv1.0.weight"][0] = torch.nan
    torch.save({"arch": ARCH, "state_dict": state}, tmp_path / "failed.pth")
    with pytest.raises(CheckpointError, match=r"conv1.0.weight are finite"):
        features.load_momentum_encoder(tmp_path / "failed.pth")
