"""The training step and the E-step on tensors that only say they are on a GPU (see pretended_gpu.py)."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same
from pretended_gpu import GPU, FakeStore, pinned, witnessed
from torch import nn

import main_pcl
from pcl import augment, builder, clustering, loader
from pcl.run import launch, logs, monitor, report
from pcl.run.preflight import Plan
from pcl.run.progress import Progress

FORMATS = (torch.contiguous_format, torch.channels_last)


class Batches:
    """A loader's two batches; what the host waits for in the first is forgotten."""

    sampler, batch_size = SimpleNamespace(skip=0, set_epoch=lambda epoch: None), 4

    def __init__(self, args, witness):
        self.args, self.witness = args, witness

    def __len__(self):
        return 3  # so that the second is not the last

    def __iter__(self):
        for _ in range(2):
            views = [pinned(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)) for _ in range(2)]
            if self.args.augment_on == "device":
                view = augment.DeferredView(32, self.args.aug_plus)
                views = [(crops, torch.tensor([view.draw() for _ in crops])) for crops in views]
            self.witness.waits.clear()
            self.witness.operations = 0
            yield views, pinned(torch.arange(4))


def clusterings_on(device):
    """More prototypes and fewer than the queue is long."""
    for k in (200, 30):
        rows = torch.arange(500) % k, torch.rand(k, 8), torch.rand(k) + 0.1
        made = clustering.Clustering(*(part.to(device) for part in rows))
        made.__dict__["num_used"] = k  # once an E-step
        yield made


def two_steps(options, device, monkeypatch):
    """`main_pcl.m_step` with all but its last figures; gives the model and the witness of the second step."""
    args = main_pcl.get_parser().parse_args(["DIR", "--low-dim", "8", "--pcl-r", "64", "--seed", "0", *options.split()])
    for owner, name in ((logs.EpochLog, "step"), (logs.EpochLog, "close"), (report, "check_loss")):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)  # they fetch figures now and then
    augment.pixel_statistics.cache_clear()
    with witnessed(device) as witness:
        with torch.device(device):
            model = main_pcl.make_model(args).to(memory_format=FORMATS[args.channels_last])
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
        progress = Progress(0, clusterings=list(clusterings_on(device)))
        main_pcl.m_step(launch.SingleProcess(model), Batches(args, witness), optimizer, progress, args, Plan(seed=0), None)
    augment.pixel_statistics.cache_clear()
    assert {figure.device.type for _, step in progress.meters._waiting for figure in step.values()} == {device}
    return model, witness


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "-a resnet18 --augment-on device --mlp --aug-plus",
        "-a resnet50 --bn-splits 2 --mask-duplicates",
        "-a shufflenet_v2_x0_5 --augment-on device --channels-last",
    ],
)
def test_a_training_step_keeps_to_its_device_and_never_waits(options, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: nullcontext())  # which knows no "meta"
    model, witness = two_steps(options, "meta", monkeypatch)
    assert witness.waits == []
    assert witness.operations < 4000
    assert all(weight.grad is not None for weight in model.encoder_q.parameters())
    assert all(weight.grad is None for weight in model.encoder_k.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("-a resnet18 --amp bf16 --channels-last --augment-on device --aug-plus", 1),
        ("-a shufflenet_v2_x0_5 --amp bf16 --bn-splits 2", 8),
    ],
)
def test_a_step_s_forward_keeps_to_the_gpu_and_never_waits(options, ranks, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    if ranks > 1:
        dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    try:
        with torch.no_grad():
            _, witness = two_steps(options, "cuda", monkeypatch)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    assert witness.waits == []


FAULTS = {
    "fetch": lambda q: q.cpu(),
    "number": lambda q: q.sum().item(),
    "condition": lambda q: bool(q.sum() > 0),
    "mask": lambda q: q[q > 0],
    "index": lambda q: q[torch.tensor([0])],
    "new": lambda q: torch.zeros(4, device="cpu").to(q.device),
    "host": lambda q: q + torch.zeros(q.shape),
}


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(fault, device):
    with witnessed(device) as witness:
        q = torch.ones(4, 8, device=device)
        try:
            fault(q)
        except (RuntimeError, NotImplementedError):  # where tensors without numbers cannot go on, or those of two devices meet
            return
    assert witness.waits


class Linear(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("kmeans", ["faiss", "sharded"])
def test_an_e_step_with_features_on_a_gpu(kmeans, image_folder, tmp_path):
    args = main_pcl.get_parser().parse_args(["DIR", "--kmeans", kmeans, "--num-cluster", "3,5", "--exp-dir", str(tmp_path)])
    with witnessed("cuda"), torch.no_grad():
        with torch.device(GPU):
            model = builder.MoCo(Linear, 8, 16)
        images = loader.IndexedFolder(image_folder / "train", augment.center_view(32))
        val = loader.IndexedFolder(image_folder / "val", augment.center_view(32))
        record = logs.RunLog(tmp_path, {}, tmp_path / "board")
        look = monitor.Monitor(images, loader.make_loader(val, range(len(val)), 4, 0), 1, record)
        center = loader.make_loader(images, range(len(images)), 10, 0)
        for epoch in (1, 2):  # the second compares with the first
            found = main_pcl.e_step(model, center, epoch, args, Plan(), record, look)
    assert {t.device for c in found for t in (c.im2cluster, c.prototypes, c.concentration)} == {GPU}
    augment.pixel_statistics.cache_clear()


@pytest.mark.slow
def test_compiled_encoders_are_one_graph_each_and_give_the_same_to_the_bit(monkeypatch):
    options = "-a resnet18 --bn-splits 2 --low-dim 8 --pcl-r 16 --mlp"
    args = main_pcl.get_parser().parse_args(["DIR", *options.split()])
    compiled, compile_module, states = [], nn.Module.compile, []

    def without_new_kernels(encoder, **options):  # those of "inductor" take minutes to make, and round otherwise
        compiled.append(encoder)
        compile_module(encoder, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", without_new_kernels)
    for args.compile in (False, True):
        torch.manual_seed(0)
        model = main_pcl.start_model(args, Plan())
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            q, k, queue = model(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
            optimizer.zero_grad()
            ((q - k).square().sum() + (q @ queue).logsumexp(dim=1).sum()).backward()
            optimizer.step()
        states.append({**model.state_dict(), "features": model.eval()(torch.randn(3, 3, 32, 32))})
    assert compiled == [model.encoder_q, model.encoder_k]
    assert_same(*states)
