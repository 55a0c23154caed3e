import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from PIL import Image

from pcl import figures, plots
from pcl.clustering import cluster
from pcl.loader import IndexedFolder
from pcl.run import report
from pcl.run.monitor import save_e_step


def run_folder(folder, images, num_clusters):
    """EXP_DIR with a log of three epochs and the E-step before the third."""
    features = F.normalize(torch.randn(len(images), 4), dim=1)
    clusterings = [cluster(features, k, temperature=0.2) for k in num_clusters]
    folder.mkdir()
    save_e_step(folder, 2, features, range(len(images)), clusterings, images)
    records = [{"args": {"images": str(images.root), "warmup_epoch": 2, "arch": "resnet18"}}]
    for epoch in range(3):
        records.append({"epoch": epoch, "step": 1, "loss_instance": 99.0})
        records.append({"epoch": epoch, "loss_instance": 5.0 - epoch, "acc_instance": 0.1, "lr": 0.03, "seconds": 4.0})
        records.append({"epoch": epoch, "knn_train": 0.5, **{f"clusters_{k}/ami": 0.3 for k in num_clusters}})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def result(path, arch, weights, ap):
    low_shot = {str(k): {"mean": k / 100, "std": 0.01} for k in (1, 2, 4)}
    checkpoint = {"arch": arch, "weights": weights}
    settings = {"image_size": "64"}
    ap_mean = float(np.mean(list(ap.values())))
    path.write_text(
        json.dumps({"settings": settings, "checkpoint": checkpoint, "full": {"ap": ap, "map": ap_mean}, "low_shot": low_shot})
    )


def test_results_of_one_name_are_all_drawn_and_each_once(tmp_path, monkeypatch):
    paths = [tmp_path / f"{seed}" / "svm.json" for seed in range(4)]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        result(path, "resnet18", "PCL_v2_epoch200.pth.tar", {"dog": seed / 10})
    drawn, draw = [], plots.low_shot_curves
    monkeypatch.setattr(plots, "low_shot_curves", lambda found: drawn.append(list(found)) or draw(found))
    figures.draw(paths[0].parent, [*paths, paths[0].parent / ".." / "0" / "svm.json"])
    name = "resnet18, PCL_v2_epoch200, 64 pixels"
    assert drawn[-1] == [name, *(f"{name} ({path})" for path in paths[1:])]


def test_of_accuracies_the_curves_are_drawn(tmp_path, capsys):
    made = {"settings": {"image_size": "64", "folder": "True"}, "checkpoint": {"arch": "pixels", "weights": "none"}}
    assert figures.name_of(made) == "raw pixels, 64 pixels, accuracy"
    shots = {str(k): {"mean": k / 100, "std": 0.01} for k in (1, 2, 4)}
    (tmp_path / "few.json").write_text(json.dumps(made | {"low_shot": shots}))
    (tmp_path / "all.json").write_text(json.dumps(made | {"full": {"accuracy": 0.7, "ap": {"accuracy": 0.7}}}))
    (tmp_path / "._few.json").write_bytes(b"\0\5\x16\7")  # macOS leaves one beside each file on a foreign disk
    (tmp_path / "features").mkdir()
    others = [tmp_path / "all.json", tmp_path / "features/results.json"]
    others[1].write_text('{"command": "pcl.features"}')
    run_script(figures, tmp_path, "--results", *others)
    told = [f"left out: {path}: it holds neither average precisions nor low-shot scores\n" for path in others]
    assert capsys.readouterr().out == "".join(told) + f"{tmp_path}/figures/low_shot.png\n"


def test_every_picture_is_written_and_shows_something(six_classes, tmp_path):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), [3, 12])
    result(exp_dir / "svm.json", "pixels", "none", {"dog": 0.2, "cat": 0.6})
    result(tmp_path / "other.json", "resnet18", "run/checkpoint_0002.pth.tar", {"dog": 0.3, "cat": 0.7})
    (exp_dir / "unrelated.json").write_text("[1, 2]")
    written = figures.draw(exp_dir, [tmp_path / "other.json"])
    names = ["training_curves", "seconds", "tsne", "concentration", "prototypes_3", "prototypes_12", "ap_per_class", "low_shot"]
    assert written == [exp_dir / "figures" / f"{name}.png" for name in names]
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5


def test_curves_are_those_of_the_log(six_classes, tmp_path):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), [3])
    with (exp_dir / "log.jsonl").open("a") as file:  # the run was resumed, did epoch 3 again, and was cut off
        file.write(json.dumps({"epoch": 2, "loss_instance": 2.5}) + '\n12\nnull\n{"epoch": 3, "loss_inst')
    arguments, epochs = figures.read_log(exp_dir / "log.jsonl")
    losses, _, knn, agreement, rate = figures.training_curves(epochs, arguments).axes  # nothing is known of changes
    (instance,) = [line for line in losses.lines if line.get_label() == "InfoNCE"]
    assert instance.get_xydata().tolist() == [[1, 5], [2, 4], [3, 2.5]]
    (accuracy,) = [line for line in knn.lines if line.get_label() == "training images, momentum features"]
    assert accuracy.get_xydata().tolist() == [[0, 50], [1, 50], [2, 50]]  # measured before the epoch
    assert rate.get_title() == "Learning rate"
    assert "K = 3" in [line.get_label() for line in agreement.lines]


def test_an_e_step_that_was_kept_before_it_held_names_is_drawn(six_classes, tmp_path):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), [3])
    last = figures.checkpoint.load(exp_dir / "e_step.pth.tar")
    del last["files"]
    torch.save(last, exp_dir / "e_step.pth.tar")
    assert {"tsne.png", "concentration.png", "prototypes_3.png"} <= {path.name for path in figures.draw(exp_dir)}


def test_prototypes_of_other_images_are_not_drawn(six_classes, tmp_path, capsys):
    root = shutil.copytree(six_classes / "train", tmp_path / "train")
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(root, None), [3])
    first, last = (sorted((root / name).iterdir())[0] for name in ("class 0", "class 5"))
    first.rename(last.with_name("another.png"))  # as many images as before
    assert not [path for path in figures.draw(exp_dir) if "prototypes" in path.name]
    assert f"the images of {root} are no longer those of the run" in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "ticks"), [(range(7, 8), [7, 8, 9]), (range(1000), None)])
def test_the_time_of_each_epoch_is_drawn_without_gaps(epochs, ticks):
    values = {"seconds": 3.0, "compute_seconds": 2.0, "data_seconds": 1.0}
    (axes,) = plots.seconds(dict.fromkeys(epochs, values)).axes
    computing, waiting, *_ = axes.patches
    assert len(axes.patches) == 5
    assert computing.get_data().values.tolist() == [2.0] * len(epochs)
    assert waiting.get_data().values.tolist() == [3.0] * len(epochs)
    assert waiting.get_data().edges.tolist() == [epoch + 0.5 for epoch in (*epochs, epochs.stop)]
    if ticks:
        assert axes.get_xticks().tolist() == ticks


@pytest.mark.parametrize("num_clusters", [[3], [3, 5, 8]])
def test_the_title_of_the_concentrations_is_whole(six_classes, tmp_path, num_clusters):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), num_clusters)
    figure = plots.concentration_against_size(figures.checkpoint.load(exp_dir / "e_step.pth.tar"))
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 > 0
    assert title.x1 < figure.bbox.x1


def test_long_names_that_differ_at_either_end_stay_apart():
    names = [f"{a}{'x' * 40}{b}" for a in "12" for b in "12"]
    assert len({plots.plain(name) for name in names}) == 4
    assert plots.plain("short") == "short"


def test_a_row_holds_the_nearest_images_of_a_prototype(six_classes, tmp_path):
    images = IndexedFolder(six_classes / "train", None)
    exp_dir = run_folder(tmp_path / "run", images, [5])
    last = figures.checkpoint.load(exp_dir / "e_step.pth.tar")
    (granularity,) = last["granularities"]
    picture = figures.nearest_images(granularity, last, images)
    assert f"prototypes before epoch {last['epoch'] + 1}, " in picture.get_suptitle()
    (axes,) = picture.axes
    texts = [label.get_text() for label in axes.get_yticklabels()]
    shown, row = axes.images[0].get_array(), 0
    for prototype in granularity["concentration"].argsort(stable=True):
        members = [i for i in range(len(images)) if granularity["im2cluster"][i] == prototype]
        if len(members) > 1:
            (label, most), *_ = Counter(images.labels[members].tolist()).most_common()
            phi, share = granularity["concentration"][prototype], f"{100 * most / len(members):.0f} %"
            told = f"$\\phi$ = {phi:.3f}\n{len(members)} images\n{share} "
            assert texts[row].startswith(told)
            if sorted(Counter(images.labels[members].tolist()).values())[-2:-1] != [most]:  # one class alone is the commonest
                assert texts[row] == f"{told}{images.classes[label]}"
            members = sorted(members, key=lambda i: -granularity["cosine"][i])[:10]
            for column, i in enumerate(members):
                tile = np.asarray(Image.open(images.path(i)).resize((96, 96), Image.Resampling.NEAREST))
                np.testing.assert_array_equal(shown[100 * row : 100 * row + 96, 100 * column : 100 * column + 96], tile)
            assert (shown[100 * row : 100 * row + 100, 100 * len(members) :] == 255).all()
            row += 1
    assert len(shown) == 100 * row
    assert len(axes.get_yticklabels()) == row


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_images_without_labels_are_enough(tmp_path, count):
    (tmp_path / "images").mkdir()
    for i in range(count):
        Image.new("RGB", (20, 30), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(tmp_path / "images", None), [1, count])
    assert {path.stem for path in figures.draw(exp_dir)} >= {"tsne", "concentration", "prototypes_1", f"prototypes_{count}"}


@pytest.mark.filterwarnings("error::UserWarning", "ignore::DeprecationWarning")  # matplotlib's of letters, not its parser's
def test_odd_names_and_many_classes_are_shown_as_they_are(tmp_path):
    names = ["_hidden", "$a$b$", "x" * 200, "z\udce9 no UTF-8", *(f"class {i:02d}" for i in range(20))]
    for i, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (10 * i, 0, 0)).save(tmp_path / "images" / name / "0.png")
    images = IndexedFolder(tmp_path / "images", None)
    exp_dir = run_folder(tmp_path / "run", images, [4])
    figures.draw(exp_dir)
    (axes,) = figures.tsne(figures.checkpoint.load(exp_dir / "e_step.pth.tar")).axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == "14 other classes"
    assert len(legend) == 11
    assert "z? no UTF-8" in legend


def test_a_thin_image_is_a_line_in_its_tile(tmp_path):
    Image.new("RGB", (20000, 1)).save(tmp_path / "a.png")
    tile = np.asarray(figures.tile(tmp_path / "a.png"))
    assert tile.shape == (96, 96, 3)
    assert (tile == 0).all(axis=(1, 2)).sum() == 1
    assert (tile == 255).all(axis=(1, 2)).sum() == 95


def test_images_that_have_gone_leave_the_other_pictures(six_classes, tmp_path, capsys):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), [3])
    arguments, _ = figures.read_log(exp_dir / "log.jsonl")
    (exp_dir / "log.jsonl").write_text(json.dumps({"args": {**arguments, "images": str(tmp_path / "moved")}}) + "\n")
    assert [path.stem for path in figures.draw(exp_dir)] == ["tsne", "concentration"]
    assert "no longer" in capsys.readouterr().out


def test_a_folder_with_nothing_to_draw_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(figures, tmp_path)
    assert stop.value.code == 2
    assert "holds no log.jsonl" in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_folder(path):
    path.unlink()
    path.mkdir()


def other_values(**values):
    return lambda path: torch.save({**figures.checkpoint.load(path), **values}, path)


@pytest.mark.parametrize("rc", [b"text.usetex: True\n", b"\xff\xfe no text"])
def test_no_setting_of_matplotlib_keeps_pictures_from_being_drawn(tmp_path, rc):
    (tmp_path / "matplotlibrc").write_bytes(rc)
    result(tmp_path / "svm.json", "pixels", "none", {"dog": 0.2, "cat": 0.6})
    environment = {**os.environ, "MPLBACKEND": "module://of_a_notebook", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "pcl.figures", "."], cwd=tmp_path, env=environment, check=True)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"ap_per_class.png", "low_shot.png"}


def test_a_finished_run_stays_finished_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pcl.figures", None)
    report.draw_pictures(tmp_path)
    assert "pictures could not be drawn" in capsys.readouterr().out


FOREIGN = [
    lambda path: path.write_bytes(b""),
    cut,
    lambda path: path.write_bytes(bytes(range(256)) * 9),
    as_folder,
    lambda path: path.write_text('{"checkpoint": 1, "epoch": 0, "seconds": "x", "args": 3}'),
    lambda path: path.write_text("[1, 2]"),
    lambda path: path.write_text("[" * 100_000),
]
OTHER_NUMBERS = [
    lambda path: path.write_text(re.sub(r"[0-9.]+[,}]", lambda match: "NaN" + match[0][-1], path.read_text())),
    lambda path: path.write_text(re.sub(r"([0-9.]+)([,}])", r'"\1"\2', path.read_text())),
]
DAMAGE = {
    "log.jsonl": [*FOREIGN, *OTHER_NUMBERS],
    "svm.json": [*FOREIGN, *OTHER_NUMBERS],
    "e_step.pth.tar": [
        *FOREIGN,
        other_values(features=torch.full((37, 4), torch.nan)),
        other_values(labels=None),
        other_values(granularities=7),
        other_values(granularities=[{}]),
        other_values(epoch="x"),
        other_values(sample=torch.full((37,), 10**6)),
    ],
}


@pytest.fixture(scope="module")
def whole(six_classes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    exp_dir = run_folder(folder / "run", IndexedFolder(six_classes / "train", None), [3])
    result(exp_dir / "svm.json", "pixels", "none", {"dog": 0.2, "cat": 0.6})
    return exp_dir


@pytest.mark.parametrize("name", ["log.jsonl", "e_step.pth.tar", "svm.json"])
def test_of_damaged_and_foreign_files_the_pictures_are_left_out_with_a_line(name, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 20)
    for number, damage in enumerate(DAMAGE[name]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        shutil.copy(whole / name, folder)
        damage(folder / name)
        with suppress(SystemExit):
            run_script(figures, folder)
        out, err = capsys.readouterr()
        told = [line for line in (out + err).splitlines() if not line.endswith((".png", "no picture of the prototypes"))]
        assert len(told) == 1 if err else len(told) <= 1
        assert all(str(folder) in line for line in told)


def test_a_damaged_file_leaves_the_pictures_of_the_others(whole, tmp_path, capsys):
    exp_dir = shutil.copytree(whole, tmp_path / "run")
    cut(exp_dir / "e_step.pth.tar")
    (tmp_path / "odd.json").write_text((exp_dir / "svm.json").read_text().replace("0.6", '"0.6"'))
    run_script(figures, exp_dir, "--results", tmp_path / "odd.json", tmp_path / "missing.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:3]] == [
        str(path) for path in (exp_dir / "e_step.pth.tar", tmp_path / "odd.json", f"{tmp_path / 'missing.json'}:")
    ]
    assert [Path(line).stem for line in lines[3:]] == ["training_curves", "seconds", "ap_per_class", "low_shot"]


def test_a_folder_with_damaged_files_alone_is_one_line(tmp_path, capsys):
    for name in ("log.jsonl", "e_step.pth.tar", "svm.json"):
        (tmp_path / name).write_bytes(b"\0\xff")
    with pytest.raises(SystemExit) as stop:
        run_script(figures, tmp_path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "e_step.pth.tar is not a checkpoint" in error


def test_a_run_in_its_first_epoch_has_no_curves_yet(six_classes, tmp_path):
    exp_dir = run_folder(tmp_path / "run", IndexedFolder(six_classes / "train", None), [3])
    arguments, _ = figures.read_log(exp_dir / "log.jsonl")
    records = [{"args": arguments}, {"epoch": 0, "features_seconds": 1.0, "kmeans_seconds": 0.1}]
    (exp_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert {path.stem for path in figures.draw(exp_dir)} == {"tsne", "concentration", "prototypes_3"}


def points_of(last):
    return {points.get_label(): len(points.get_offsets()) for points in figures.tsne(last).axes[0].collections}


def test_points_have_the_color_of_their_image_s_class_or_cluster():
    last = {"features": torch.randn(6, 4), "sample": torch.arange(6, 12), "labels": torch.arange(12) // 6, "epoch": 0}
    assert points_of({**last, "classes": ["a", "b"], "granularities": []}) == {"a": 0, "b": 6}
    coarse, fine = torch.arange(30).sub(18).clamp(min=0), torch.arange(30) % 13  # 19, 1, 1, .. images, and 2 or 3
    granularities = [{"im2cluster": c, "prototypes": torch.zeros(int(c.max()) + 1, 4)} for c in (fine, coarse)]
    last |= {"features": torch.randn(30, 4), "sample": torch.arange(30), "labels": torch.zeros(30), "classes": []}
    found = points_of({**last, "granularities": granularities})
    assert (found["cluster of 19 images"], found["2 other clusters"]) == (19, 2)


@pytest.mark.parametrize("features", [torch.ones(40, 4), torch.randn(40, 1)], ids=["collapsed", "one feature"])
def test_features_without_two_directions_are_drawn(features):
    last = {"features": features, "labels": torch.zeros(40, dtype=torch.long), "sample": torch.arange(40)}
    figure = figures.tsne({**last, "classes": [], "granularities": [], "epoch": 0})
    assert np.isfinite(figure.axes[0].collections[0].get_offsets()).all()
