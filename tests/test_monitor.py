import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pcl.augment import center_view, normalize
from pcl.builder import MoCo
from pcl.checkpoint import LAST_E_STEP, load
from pcl.clustering import Clustering
from pcl.loader import IndexedFolder, make_loader
from pcl.metrics import leave_one_out_accuracy
from pcl.run import monitor
from pcl.run.logs import RunLog
from pcl.run.monitor import Monitor, save_e_step


def clustering_of(im2cluster, num_cluster):
    prototypes = F.normalize(torch.randn(num_cluster, 4), dim=1)
    return Clustering(torch.tensor(im2cluster), prototypes, torch.linspace(0.1, 0.3, num_cluster))


@pytest.fixture
def images(six_classes):
    return IndexedFolder(six_classes / "train", center_view(32))


@pytest.fixture
def record(tmp_path):
    return RunLog(tmp_path, {}, tmp_path / "tensorboard")


def last_record(tmp_path):
    return json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])


def test_it_tells_of_clusters_what_can_be_counted_by_hand(images, record, tmp_path, capsys):
    # 6, 6, 6, 6, 6, 7 images of six classes; 12 in cluster 0 (two classes), 18 in 1 (three), none in 2, the last class in 3.
    first = [0] * 12 + [1] * 18 + [3] * 7
    second = [2] * 12 + [0] * 10 + [1] * 8 + [3] * 7  # eight of cluster 1 have left the ten others
    monitor = Monitor(images, None, 1, record)
    features = F.normalize(torch.randn(37, 4), dim=1)
    monitor.measure(4, None, features, range(37), [clustering_of(first, 4)])
    figures = last_record(tmp_path)
    assert figures["epoch"] == 4
    assert figures["clusters_4/empty"] == 1
    assert figures["clusters_4/purity"] == pytest.approx((6 + 6 + 7) / 37)
    quartiles = [figures[f"clusters_4/size_quartile_{i}"] for i in (1, 2, 3)]
    assert quartiles == [5.25, 9.5, 13.5]  # of 0, 7, 12, 18
    assert figures["clusters_4/concentration_quartile_2"] == pytest.approx(0.2)
    assert figures["knn_train"] == leave_one_out_accuracy(features, torch.from_numpy(images.labels))
    assert "clusters_4/changed" not in figures

    monitor.measure(5, None, features, range(37), [clustering_of(second, 4)])
    assert last_record(tmp_path)["clusters_4/changed"] == pytest.approx(8 / 37)
    monitor.measure(6, None, features, range(37), [clustering_of(second, 4)])
    assert last_record(tmp_path)["clusters_4/changed"] == pytest.approx(0)
    assert last_record(tmp_path)["clusters_4/ami_previous"] == pytest.approx(1)
    assert "changed 22 %" in capsys.readouterr().out

    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in board.Scalars("clusters_4/changed")] == [5, 6]
    histogram = board.Histograms("clusters_4/size")[0].histogram_value
    assert (histogram.num, histogram.max, histogram.sum) == (4, 18, 37)


def test_the_backbone_is_seen_on_the_validation_images(images, six_classes, record, tmp_path):
    val = IndexedFolder(six_classes / "val", center_view(32))
    model = MoCo(torchvision.models.shufflenet_v2_x0_5, dim=4, r=8).eval()
    Monitor(images, make_loader(val, range(len(val)), 7, 0), 1, record).measure(0, model, torch.randn(37, 4), range(37), [])
    backbone = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    backbone.load_state_dict(model.encoder_q.state_dict())
    backbone.fc = torch.nn.Identity()
    with torch.no_grad():
        features = backbone.eval()(normalize(torch.stack([image for image, _ in (val[i] for i in range(len(val)))])))
    assert last_record(tmp_path)["knn_val"] == leave_one_out_accuracy(features, torch.from_numpy(val.labels))
    assert isinstance(model.encoder_q.fc, torch.nn.Linear)  # the head is back


def test_without_labels_it_tells_of_clusters_alone(six_classes, record, tmp_path):
    images = IndexedFolder(six_classes / "train" / "class 0", center_view(32))
    monitor = Monitor(images, None, 1, record)
    assert not monitor.is_due(0)
    monitor.measure(0, None, torch.randn(6, 4), range(6), [clustering_of([0, 0, 1, 1, 2, 2], 3)])
    figures = last_record(tmp_path)
    assert figures["clusters_3/empty"] == 0
    assert not {"knn_train", "knn_val", "clusters_3/ami"} & figures.keys()


def test_it_is_due_in_warm_up_every_so_often(images, record, tmp_path):
    assert [epoch for epoch in range(9) if Monitor(images, None, 4, record).is_due(epoch)] == [0, 4, 8]
    off = Monitor(images, None, 0, record)
    assert not any(off.is_due(epoch) for epoch in range(9))
    before = (tmp_path / "log.jsonl").read_text()
    off.measure(0, None, torch.randn(37, 4), range(37), [clustering_of([0] * 37, 1)])
    assert (tmp_path / "log.jsonl").read_text() == before


def test_the_last_e_step_is_kept(images, tmp_path, monkeypatch):
    features = F.normalize(torch.randn(37, 4), dim=1)
    clustering = clustering_of(np.arange(37) % 3, 3)
    save_e_step(tmp_path, 7, features, range(37), [clustering], images)
    state = load(tmp_path / LAST_E_STEP)
    assert (state["epoch"], state["classes"]) == (7, images.classes)
    assert [str(images.root / name) for name in state["files"]] == [images.path(i) for i in range(37)]
    assert torch.equal(state["features"], features)
    monkeypatch.setattr(monitor, "SAMPLE", 5)  # of very many images, a few at random
    save_e_step(tmp_path, 7, features, range(37), [clustering], images)
    few = load(tmp_path / LAST_E_STEP)
    assert torch.equal(few["features"], features[few["sample"]])
    assert few["sample"].tolist() == sorted(set(few["sample"].tolist()))
    assert few["sample"].tolist() != list(range(5))
    (granularity,) = state["granularities"]
    slow = [float(f @ clustering.prototypes[c]) for f, c in zip(features, clustering.im2cluster, strict=True)]
    np.testing.assert_allclose(granularity["cosine"], slow, rtol=1e-5)


def test_with_sharded_features_the_main_process_looks_at_its_own(images, record, tmp_path, monkeypatch):
    features = F.normalize(torch.randn(37, 4), dim=1)
    clustering = clustering_of(np.arange(37) % 3, 3)
    seen = range(1, 37, 2)
    Monitor(images, None, 1, record).measure(0, None, features[1::2], seen, [clustering])
    assert last_record(tmp_path)["knn_train"] == leave_one_out_accuracy(features[1::2], torch.from_numpy(images.labels[1::2]))
    save_e_step(tmp_path, 0, features[1::2], seen, [clustering], images)
    state = load(tmp_path / LAST_E_STEP)
    assert state["seen"].tolist() == list(seen)
    assert torch.equal(state["features"], features[state["sample"]])
    monkeypatch.setattr(monitor, "KNN_POOL", 12)
    Monitor(images, None, 1, record).measure(0, None, features[1::2], seen, [clustering])
    few = features[1::2][:12], torch.from_numpy(images.labels[1::2][:12])
    assert last_record(tmp_path)["knn_train"] == leave_one_out_accuracy(*few)
    whole = (features * clustering.prototypes[clustering.im2cluster]).sum(dim=1)
    torch.testing.assert_close(state["granularities"][0]["cosine"], whole[1::2])


def test_a_rank_with_one_image_measures_no_knn(images, record, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "get_world_size", lambda: 37)
    Monitor(images, None, 1, record).measure(0, None, torch.ones(1, 4), range(0, 37, 37), [clustering_of([0] * 37, 1)])
    assert "clusters_1/purity" in last_record(tmp_path)
    assert "knn_train" not in last_record(tmp_path)


@pytest.mark.gpu
def test_features_on_a_gpu_give_the_same_figures(images, record, tmp_path):
    features = F.normalize(torch.randn(37, 4), dim=1)
    clustering = clustering_of(np.arange(37) % 3, 3)
    for device in ("cpu", "cuda"):
        Monitor(images, None, 1, record).measure(0, None, features.to(device), range(37), [clustering.to(device)])
        save_e_step(tmp_path, 0, features.to(device), range(37), [clustering.to(device)], images)
    *_, on_cpu, on_gpu = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {k: v for k, v in on_gpu.items() if "time" not in k and "seconds" not in k} == pytest.approx(
        {k: v for k, v in on_cpu.items() if "time" not in k and "seconds" not in k}
    )
