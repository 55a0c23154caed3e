import json
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_script

from pcl import export
from pcl.builder import MoCo
from pcl.errors import RunError

ARCH = "resnet18"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's checkpoint with its query encoder's weights, without fc, under torchvision's names."""
    model = MoCo(torchvision.models.get_model_builder(ARCH), dim=8, r=16)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "c.pth.tar"
    torch.save({"epoch": 1, "arch": ARCH, "state_dict": state, "args": {"image_size": "64"}}, path)
    return path, {name: value for name, value in model.encoder_q.state_dict().items() if not name.startswith("fc.")}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_are_read_by_their_library(checkpoint, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    path, weights = checkpoint
    run_script(export, "export", path, tmp_path / 'b".safetensors')
    run_script(export, "export", tmp_path / 'b".safetensors', tmp_path / "again", "--arch", ARCH)
    assert json.loads((tmp_path / "again/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 224, 224]
    call = re.search(r"safetensors\.torch\.load_file\(.*?\)", capsys.readouterr().out)[0]
    assert_equal(eval(call, {"safetensors": safetensors}), weights)


def test_safetensors_hold_every_number_where_the_header_says(checkpoint, tmp_path):
    path, weights = checkpoint
    export.export(path, tmp_path / "b.safetensors")
    content = (tmp_path / "b.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    dtypes = {"F32": torch.float32, "I64": torch.int64}
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = torch.frombuffer(bytearray(content[start + first : start + last]), dtype=dtypes[entry["dtype"]])
        found[name] = numbers.view(entry["shape"])
    assert_equal(found, weights)
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - start


@pytest.mark.slow
def test_a_folder_is_read_by_timm(checkpoint, tmp_path):
    timm = pytest.importorskip("timm")
    path, weights = checkpoint
    export.export(path, tmp_path / "out")
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_equal(dict(network.state_dict()), weights)
    assert network.pretrained_cfg["input_size"] == [3, 64, 64]
    reference = torchvision.models.get_model(ARCH)
    reference.load_state_dict(weights, strict=False)
    reference.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(x), reference.eval()(x))


def test_a_folder_says_what_it_holds(checkpoint, tmp_path):
    path, _ = checkpoint
    export.export(path, tmp_path / "out")
    export.export(path, tmp_path / "b.safetensors")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (ARCH, 0, 512)
    found = [config["pretrained_cfg"][name] for name in ("mean", "std", "crop_pct", "interpolation")]
    assert found == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 224 / 256, "bilinear"]


def test_a_pickle_has_detectron2_s_names(checkpoint, tmp_path):
    path, weights = checkpoint
    told = export.export(path, tmp_path / "b.pkl")[-1]
    pixels = [[float(number) / 255 for number in numbers.split(",")] for numbers in re.findall(r"\[(.+?)\]", told)]
    np.testing.assert_allclose(pixels, [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert "MODEL.RESNETS.DEPTH 18" in told
    assert "MODEL.RESNETS.RES2_OUT_CHANNELS 64" in told  # detectron2's defaults are a ResNet-50's
    content = pickle.loads((tmp_path / "b.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    found = content["model"]
    assert len(found) == sum(not name.endswith("num_batches_tracked") for name in weights)
    names = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res2.1.conv2.norm.bias": "layer1.1.bn2.bias",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res5.0.shortcut.norm.running_mean": "layer4.0.downsample.1.running_mean",
    }
    for name, ours in names.items():
        assert torch.equal(torch.from_numpy(found[name]), weights[ours])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_is_written_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch, name):
    def full(path, write, whole=export.write_whole):
        if path.name == name:
            raise RunError("no space")
        whole(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_whole", full)
        with pytest.raises(RunError, match="no space"):
            export.export(checkpoint[0], tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    (tmp_path / ".out.part").mkdir()  # a command was killed
    export.export(checkpoint[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("b.onnx", r"b\.onnx: give a name with the extension \.pth, \.safetensors or \.pkl"),
        ("b.pth.tar", "give a name with the extension"),
        (".pth", "give a name with the extension"),  # of an unset variable: $NAME.pth
        ("b.pkl", "have no shufflenet_v2_x0_5"),
        ("b", "have no shufflenet_v2_x0_5"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, capsys, pretrained, out, told):
    with pytest.raises(SystemExit) as stop:
        run_script(export, "export", pretrained, tmp_path / out)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(told, error)
    assert not list(tmp_path.iterdir())
