import errno
import functools
import math
import os
import pickle
import resource
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_same, run_script

from pcl import export
from pcl.builder import MoCo
from pcl.checkpoint import CheckpointError, load, load_backbone, load_for_resume, load_init, load_optimizer, load_probe, save
from pcl.errors import RunError
from pcl.networks import architectures, backbone, new_network, takes_small_stem, without_numbers
from pcl.run.kept import newest, prune

ARCH = "shufflenet_v2_x0_5"


def moco(mlp=False, **options):
    return MoCo(torchvision.models.get_model_builder(ARCH), dim=8, r=16, mlp=mlp, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def published(model, prefix="module."):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    return {"epoch": 3, "arch": ARCH, "state_dict": weights, "optimizer": sgd(model.parameters()).state_dict()}


def test_a_disk_that_is_full_leaves_the_old_file_whole_and_no_other(tmp_path):
    path, state = tmp_path / "checkpoint_0000.pth.tar", {"epoch": 2, "x": torch.zeros(100_000)}
    save(path, {"epoch": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(RunError, match=r"checkpoint_0000\.pth\.tar cannot be written: File too large"):
            save(path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == [path.name]
    save(path, state)
    assert load(path)["epoch"] == 2
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_is_read_only_is_one_error_and_the_old_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0000.pth.tar"
    save(path, {"epoch": 1})

    def read_only(self, mode="r", *rest):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))  # as root, a test may write everywhere

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        with pytest.raises(
            RunError, match=r"checkpoint_0000\.pth\.tar cannot be written: Read-only file system; earlier files are intact"
        ):
            save(path, {"epoch": 2})
    assert load(path) == {"epoch": 1}


def test_the_newest_checkpoint_is_that_from_which_least_is_to_be_done(tmp_path):
    told = []
    assert newest(tmp_path, told.append) is None
    for name, state in (("0004", {"epoch": 5}), ("0009", {"epoch": 10}), ("last", {"epoch": 10, "steps": 3})):
        save(tmp_path / f"checkpoint_{name}.pth.tar", state)
    save(tmp_path / "e_step.pth.tar", {"epoch": 99})
    save(tmp_path / "checkpoint_0019.pth.tar", {"epoch": "20"})
    (tmp_path / "checkpoint_0000.pth.tar").write_bytes(b"damaged, but nobody has to open it")
    (tmp_path / ".checkpoint_last.pth.tar.part").write_bytes(b"half")
    assert newest(tmp_path, told.append) == tmp_path / "checkpoint_last.pth.tar"
    assert told == []
    whole = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    (tmp_path / "checkpoint_last.pth.tar").write_bytes(whole[: len(whole) // 2])
    assert newest(tmp_path, told.append) == tmp_path / "checkpoint_0009.pth.tar"
    assert len(told) == 1
    assert told[0].startswith(f"skipped: {tmp_path / 'checkpoint_last.pth.tar'} is not a checkpoint")


def flip_a_bit(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def test_a_single_bit_that_has_flipped_is_found(tmp_path):
    told, weights = [], {"weight": torch.zeros(50_000)}
    for name in ("0004", "0009", "last"):
        save(tmp_path / f"checkpoint_{name}.pth.tar", {"epoch": 1 if name == "last" else int(name) + 1, "state_dict": weights})
    flip_a_bit(tmp_path / "checkpoint_0009.pth.tar")
    with pytest.raises(CheckpointError, match=r"0009\.pth\.tar .* safely: it is damaged in .*/data/0$"):
        load(tmp_path / "checkpoint_0009.pth.tar")
    assert newest(tmp_path, told.append) == tmp_path / "checkpoint_0004.pth.tar"
    assert len(told) == 1
    assert "it is damaged" in told[0]


def test_what_is_larger_than_its_file_is_not_opened(tmp_path):
    path, packed = tmp_path / "c.pt", tmp_path / "packed.pt"
    torch.save({"weight": torch.zeros(50_000)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for record in archive.infolist():
            out.writestr(record.filename, archive.read(record))
    told = r"safely: it is an archive that torch\.save did not write, or that was packed anew"
    with pytest.raises(CheckpointError, match=told):
        load(packed)
    content = path.read_bytes()
    size = (200_000).to_bytes(4, "little")
    path.write_bytes(content[:-5_000] + content[-5_000:].replace(size, (300_000).to_bytes(4, "little")))
    with pytest.raises(CheckpointError, match="safely: "):
        load(path)


def test_files_without_checksums_open_as_before(tmp_path):
    state = {"epoch": 1, "weight": torch.randn(5)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)  # torch before 1.6
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "new.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pt", "new.pt"):
        assert_same(load(tmp_path / name), state)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(0, 0, [4, 9, 14, 19, 24]), (2, 0, [19, 24]), (1, 10, [9, 19, 24]), (9, 0, [4, 9, 14, 19, 24]), (1, 7, [24])],
)
def test_the_newest_checkpoints_and_those_of_every_nth_epoch_are_kept(tmp_path, keep, keep_every, left):
    names = [*(f"checkpoint_{epoch:04d}.pth.tar" for epoch in (4, 9, 14, 19, 24)), "checkpoint_last.pth.tar", "log.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    prune(tmp_path, keep, keep_every)
    assert sorted(os.listdir(tmp_path)) == [*(f"checkpoint_{epoch:04d}.pth.tar" for epoch in left), *names[-2:]]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"state_dict": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=r"safely: Unsupported (global: GLOBAL _?io\.open|operand)") as error:
            load(tmp_path / name)
        assert "False" not in str(error.value)  # torch's advice to open it unsafely
        assert ("state dict alone" in str(error.value)) == (name == "a.pt")
        with pytest.raises(CheckpointError, match="safely"):
            load_backbone(tmp_path / name, ARCH)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint_are_errors(tmp_path):
    (tmp_path / "text").write_text("\n<html>")
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\x89PNG\0")
    torch.save([1, 2], tmp_path / "list")
    np.savez(tmp_path / "numpy", a=1)
    (tmp_path / "numpy.npz").rename(tmp_path / "zip")
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.add(tmp_path / "text", "c.pth.tar")
    told = r"safely: it is empty, a text \(a web page, a pointer of Git LFS\) or an archive; give the file itself"
    for name, message in (
        ("absent", "no such file"), ("text", told), ("empty", told), ("bytes", told),
        ("tar", told), ("zip", "safely: it is an archive that torch.save did not write"), ("list", "holds a list"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)
    for weights in ([1], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(published(moco()) | {"state_dict": weights}, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="neither"):
            load_backbone(tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="neither"):
            load_for_resume(tmp_path / "c.pt", moco(), ARCH)


@pytest.mark.parametrize("mlp", [False, True], ids=["v1 head", "v2 head"])
@pytest.mark.parametrize("prefix", ["module.", "", "module._orig_mod.", "module.module."])
def test_the_backbone_of_a_published_checkpoint(tmp_path, mlp, prefix):
    model = moco(mlp)
    for parameter in model.encoder_k.parameters():
        parameter.data.add_(1)  # so that the key encoder would be noticed
    torch.save(published(model, prefix), tmp_path / "c.pt")
    network, arch = load_backbone(tmp_path / "c.pt")
    assert arch == ARCH
    assert not network.training
    x = torch.randn(2, 3, 32, 32)
    model.encoder_q.fc = torch.nn.Identity()
    assert torch.equal(network(x), model.encoder_q.eval()(x))


@pytest.mark.parametrize("named", [None, "of my own"])
def test_a_run_begins_from_a_file_that_names_no_known_architecture(tmp_path, named):
    torch.save(published(moco()) | {"arch": named}, tmp_path / "c.pt")
    assert load_init(tmp_path / "c.pt", moco(), ARCH)


def test_the_backbone_of_a_torchvision_state_dict(tmp_path):
    original = torchvision.models.get_model(ARCH, weights=None)
    torch.save(original.state_dict(), tmp_path / "c.pt")
    network, _ = load_backbone(tmp_path / "c.pt", ARCH)
    original.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), original.eval()(x))
    with pytest.raises(CheckpointError, match="name it with --arch"):
        load_backbone(tmp_path / "c.pt")


TAKEN = {
    "of an old BatchNorm": lambda name, value: None if name.endswith("tracked") else value,
    "of one number as a list": lambda name, value: value[None] if name.endswith("tracked") else value,
    "of half precision": lambda name, value: value.half() if value.is_floating_point() else value,
    "of double precision": lambda name, value: value.double() if value.is_floating_point() else value,
    "of parameters": lambda name, value: torch.nn.Parameter(value) if value.is_floating_point() else value,
    "of another layout": lambda name, v: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v,
}


@pytest.mark.parametrize("changed", TAKEN.values(), ids=TAKEN)
def test_a_state_dict_is_taken_as_torch_takes_it(tmp_path, changed):
    original = new_network(ARCH)
    weights = {name: changed(name, value) for name, value in original.state_dict().items()}
    weights = OrderedDict((name, value) for name, value in weights.items() if value is not None)
    reference = new_network(ARCH)
    reference.load_state_dict(weights)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "c.pt")
    network, _ = load_backbone(tmp_path / "c.pt", ARCH)
    reference.fc = torch.nn.Identity()
    assert_same(dict(network.state_dict()), dict(reference.state_dict()))


@pytest.fixture(scope="module")
def healthy():
    return published(moco())


@pytest.mark.parametrize("wrong", ["encoder_q.conv5.0.weight", "encoder_q.conv1.1.running_var", "queue", "momentum"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(healthy, tmp_path, wrong, value):
    state = healthy | {"state_dict": dict(healthy["state_dict"]), "optimizer": dict(healthy["optimizer"])}
    if wrong == "momentum":
        shape = state["state_dict"]["module.encoder_q.conv1.0.weight"].shape
        state["optimizer"]["state"] = {0: {"momentum_buffer": torch.full(shape, value, dtype=torch.float64)}}
    else:
        bad = state["state_dict"][f"module.{wrong}"].double()
        bad.view(-1)[-1] = value
        state["state_dict"][f"module.{wrong}"] = bad
    torch.save(state, tmp_path / "c.pt")
    with without_numbers():
        model = moco()
    message = rf"c\.pt: not all numbers of {wrong}.* are finite"
    with pytest.raises(CheckpointError, match=message):
        load_for_resume(tmp_path / "c.pt", model, ARCH)
    if wrong.startswith("encoder_q"):
        with pytest.raises(CheckpointError, match=message.replace("encoder_q.", "")):
            load_backbone(tmp_path / "c.pt")


def test_a_backbone_with_other_keys_is_an_error_that_names_them(tmp_path):
    state = published(moco())
    del state["state_dict"]["module.encoder_q.conv1.0.weight"]
    state["state_dict"]["module.encoder_q.extra"] = torch.zeros(1)
    state["state_dict"]["module.encoder_q.conv5.0.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"missing conv1\.0\.weight; unexpected extra; of another shape conv5\.0\.weight"):
        load_backbone(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=f"c.pt holds a {ARCH}, not a resnet18: leave --arch out"):
        load_backbone(tmp_path / "c.pt", "resnet18")
    torch.save(state["state_dict"], tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="does not fit resnet18"):
        load_backbone(tmp_path / "plain.pt", "resnet18")
    state = published(moco())
    del state["state_dict"]["module.encoder_q.conv5.1.running_var"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"does not fit shufflenet_v2_x0_5: missing conv5\.1\.running_var$"):
        load_backbone(tmp_path / "c.pt")


@pytest.mark.slow
def test_resuming_asks_for_the_same_model(tmp_path):
    path = tmp_path / "c.pt"
    torch.save(published(moco()), path)
    assert load_for_resume(path, moco(), ARCH)["epoch"] == 3
    with without_numbers():
        hollow = moco()
    assert load_for_resume(path, hollow, ARCH)["epoch"] == 3
    assert all(value.is_meta for value in hollow.parameters())
    with pytest.raises(CheckpointError, match=f"give --arch {ARCH}"):
        load_for_resume(path, moco(), "resnet18")
    with pytest.raises(CheckpointError, match=r"missing encoder_k\.fc\.0\.bias.*; unexpected encoder_k\.fc\.bias"):
        load_for_resume(path, moco(mlp=True), ARCH)
    torch.save(backbone(ARCH).state_dict(), path)
    with pytest.raises(CheckpointError, match="it has no epoch, arch, state_dict, optimizer"):
        load_for_resume(path, moco(), ARCH)


@pytest.mark.slow
def test_the_optimizer_of_a_resumed_run_is_that_of_its_weights(tmp_path):
    model, path = moco(), tmp_path / "c.pt"
    optimizer = sgd(model.parameters())
    for parameter in model.encoder_q.parameters():  # the key encoder has no gradient, so no momentum
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    good = optimizer.state_dict()
    old = {name: value for name, value in good["param_groups"][0].items() if name not in ("foreach", "maximize", "fused")}
    for group in (good["param_groups"][0], old):  # an older torch wrote fewer options
        torch.save(published(model) | {"optimizer": good | {"param_groups": [group]}}, path)
        assert load_for_resume(path, moco(), ARCH)["seed"] is None
    momentum = {0: {"momentum_buffer": torch.zeros(24, 3, 3)}}
    for wrong in ({}, {"param_groups": []}, {"state": momentum}, {"param_groups": [{"params": [0]}]}, {"state": {0: 3}}):
        torch.save(published(model) | {"optimizer": wrong and good | wrong}, path)
        with pytest.raises(CheckpointError, match="its optimizer is not one of SGD over this model's weights"):
            load_for_resume(path, moco(), ARCH)


def test_an_optimizer_goes_on_by_the_options_with_the_momentum_of_the_file():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    first = torch.optim.SGD([parameter], 0.1, momentum=0.9, weight_decay=1e-4)
    first.step()
    saved = first.state_dict()
    saved["param_groups"][0] |= {"maximize": True, "nesterov": True, "dampening": 0.5, "foreach": False}
    second = torch.optim.SGD([parameter], 0.2, momentum=0.5, weight_decay=0.3)
    options = dict(second.param_groups[0])
    load_optimizer(second, saved)
    assert dict(second.param_groups[0]) == options
    assert torch.equal(second.state[parameter]["momentum_buffer"], first.state[parameter]["momentum_buffer"])


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_goes_on_in_another_order_of_memory(before, after):
    def layer(order, gradient):
        made = torch.nn.Conv2d(3, 4, 3).to(memory_format=order)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(1)
                parameter.grad = torch.empty_like(parameter).copy_(gradient[: parameter.numel()].view(parameter.shape))
        return made, torch.optim.SGD(made.parameters(), 0.1, momentum=0.9, fused=True)

    gradients = torch.rand(2, 4 * 3 * 3 * 3)
    (expected, whole), (_, first), (ours, second) = (layer(order, gradients[0]) for order in (after, before, after))
    first.step()
    load_optimizer(second, first.state_dict())
    whole.step()
    for network, optimizer in ((ours, second), (expected, whole)):
        for parameter, given in zip(network.parameters(), layer(after, gradients[1])[0].parameters(), strict=True):
            parameter.data.fill_(1)
            parameter.grad = given.grad
        optimizer.step()
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_regnet_is_resumed(tmp_path):
    """torchvision computes its widths by tensors, also where the network is to be built without numbers."""
    build = functools.partial(MoCo, functools.partial(new_network, "regnet_y_400mf"), dim=8, r=16)
    torch.save(published(build()) | {"arch": "regnet_y_400mf"}, tmp_path / "c.pt")
    with without_numbers():
        model = build()
    assert load_for_resume(tmp_path / "c.pt", model, "regnet_y_400mf")["epoch"] == 3
    assert load_backbone(tmp_path / "c.pt")[1] == "regnet_y_400mf"


@pytest.mark.slow
def test_the_architectures_are_torchvision_s_classifiers_with_a_single_fc_head():
    offered = []
    for name in torchvision.models.list_models(module=torchvision.models):
        # One family cannot be built without memory; a small member stands for all.
        swin = name.startswith("swin")
        with nullcontext() if swin else without_numbers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = smallest("swin_t") if swin else torchvision.models.get_model(name, weights=None)
        if isinstance(getattr(network, "fc", None), torch.nn.Linear) and not getattr(network, "aux_logits", False):
            offered.append(name)
    assert architectures() == offered


@pytest.mark.slow
def test_the_small_stem_goes_with_a_convolution_and_a_max_pool_alone():
    for name in architectures():
        with without_numbers():
            network = torchvision.models.get_model(name)
        conv1, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
        assert takes_small_stem(name) == (isinstance(conv1, torch.nn.Conv2d) and isinstance(pool, torch.nn.MaxPool2d)), name
    with pytest.raises(ValueError, match="regnet_y_400mf does not begin with a convolution and a max-pool"):
        new_network("regnet_y_400mf", small_stem=True)


def test_the_small_stem_halves_nothing_and_begins_like_torchvision_s():
    plain, small = (new_network("resnet18", stem, num_classes=3) for stem in (False, True))
    x = torch.randn(2, 3, 32, 32)
    shapes = []
    for network in (plain, small):
        network.layer1.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
        assert network(x).shape == (2, 3)
    assert shapes == [(2, 64, 8, 8), (2, 64, 32, 32)]
    # Kaiming's normal distribution for the fan out: variance 2 / (64 * 3 * 3), whose estimate from 1,728 is 3.4 % wide.
    assert small.conv1.weight.var().item() == pytest.approx(2 / (64 * 3 * 3), rel=0.2)


@pytest.mark.slow
def test_a_small_stem_is_read_off_the_weights(tmp_path, capsys):
    model = MoCo(functools.partial(new_network, "resnet18", True), dim=8, r=16)
    state = published(model) | {"arch": "resnet18"}
    torch.save(state, tmp_path / "c.pt")
    network, _ = load_backbone(tmp_path / "c.pt")
    x = torch.randn(2, 3, 16, 16)
    model.encoder_q.fc = torch.nn.Identity()
    assert torch.equal(network(x), model.encoder_q.eval()(x))

    probe = new_network("resnet18", True, num_classes=5).eval()
    optimizer = torch.optim.SGD(probe.fc.parameters(), 0.1).state_dict()
    head = {"classes": list("abcde"), "optimizer": optimizer, "source": {}, "history": [], "seed": 0, "deterministic": False}
    torch.save(published(probe) | {"arch": "resnet18"} | head, tmp_path / "probe.pt")
    assert torch.equal(load_probe(tmp_path / "probe.pt")[0](x), probe(x))

    run_script(export, "export", tmp_path / "c.pt", tmp_path / "backbone.pth")
    told = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    names = {"torch": torch, "torchvision": torchvision}
    exec("\n".join(told), names)
    names["network"].fc = torch.nn.Identity()
    assert torch.equal(names["network"].eval()(x), network(x))

    with pytest.raises(CheckpointError, match=r"--small-stem\?\): .*conv1.weight: \(64, 3, 3, 3\) in the file"):
        load_for_resume(tmp_path / "c.pt", MoCo(functools.partial(new_network, "resnet18"), dim=8, r=16), "resnet18")


@functools.cache
def smallest(name):
    return torchvision.models.get_model(name, weights=None)


def test_an_exported_backbone_loads_into_torchvision(tmp_path, capsys):
    model = moco(mlp=True)
    torch.save(published(model), tmp_path / "c.pth.tar")
    run_script(export, "export", tmp_path / "c.pth.tar", tmp_path / "backbone.pth")
    network = torchvision.models.get_model(ARCH)
    assert ARCH in capsys.readouterr().out
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"fc.weight", "fc.bias"}, [])
    for name, value in weights.items():
        assert torch.equal(value, model.encoder_q.state_dict()[name])


@pytest.mark.parametrize("wrong", ["missing", "there already", "no checkpoint"])
def test_an_export_that_cannot_be_is_one_line(tmp_path, capsys, wrong):
    out, source = tmp_path / "out.pth", tmp_path / "c.pth.tar"
    if wrong == "there already":
        out.write_text("precious")
    if wrong != "missing":
        torch.save({"epoch": 1} if wrong == "no checkpoint" else published(moco()), source)
    with pytest.raises(SystemExit) as stop:
        run_script(export, "export", source, out)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists() or out.read_text() == "precious"
