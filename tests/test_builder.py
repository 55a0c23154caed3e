import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import GOLDEN, save_result
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pcl import builder
from pcl.augment import normalize
from pcl.builder import MoCo, SplitBatchNorm2d, split_batch_norm
from pcl.clustering import Clustering
from pcl.distributed import broadcast, gather, get_rank, get_world_size
from pcl.features import extract_features
from pcl.loader import indices_of_rank
from pcl.losses import instance_logits, prototype_logits
from pcl.run.launch import parallel


class Tiny(nn.Module):
    """The backbone of the golden vectors."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def follow_golden(name, wrap=lambda model: model, own_statistics=False):
    """Three training steps from the golden file's start; everything that it holds must come out.

    The published wrapper gives each rank rank 0's BatchNorm statistics before a step, which reads none. With `own_statistics`
    they are not looked at.
    """
    golden = np.load(GOLDEN / f"{name}_rank{get_rank()}of{get_world_size()}.npz")

    def value(key):
        return torch.from_numpy(golden[key]) if golden[key].ndim else golden[key].item()

    def same(ours, key):
        np.testing.assert_allclose(np.asarray(ours), golden[key], rtol=1e-5, atol=1e-5, err_msg=key)

    model = MoCo(Tiny, value("cfg/dim"), value("cfg/r"), value("cfg/m"), value("cfg/mlp"))
    start = {key.removeprefix("init/"): value(key) for key in golden if key.startswith("init/")}
    model.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in start.items()})
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), value("cfg/lr"), momentum=0.9, weight_decay=1e-4)
    granularities = sum(key.startswith("cluster/im2cluster/") for key in golden)
    clusterings = [
        Clustering(*(value(f"cluster/{part}/{j}") for part in ("im2cluster", "centroids", "density")))
        for j in range(granularities)
    ]
    for step in range(3):
        at = f"step{step}"
        builder.torch.randperm = lambda n, device, at=at: value(f"{at}/shuffle").clone()
        q, k, queue = wrapped(value(f"{at}/im_q"), value(f"{at}/im_k"))
        logits, target = instance_logits(q, k, queue, value("cfg/T"))
        same(logits.detach(), f"{at}/logits")
        same(target, f"{at}/targets")
        loss = F.cross_entropy(logits, target)
        same(loss.detach(), f"{at}/loss_info")
        terms = []
        for j, clustering in enumerate(clusterings):
            positive = clustering.im2cluster[value(f"{at}/index")]
            logits, target = prototype_logits(q, positive, value(f"{at}/neg_ids/{j}"), clustering)
            same(logits.detach(), f"{at}/proto_logits/{j}")
            same(target, f"{at}/proto_targets/{j}")
            terms.append(F.cross_entropy(logits, target))
        if terms:
            same(torch.stack(terms).mean().detach(), f"{at}/loss_proto")
            loss = loss + torch.stack(terms).mean()
        same(loss.detach(), f"{at}/loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = [key for key in golden if key.startswith(f"{at}/after/")]
        assert len(after) == len(model.state_dict())
        for key in after:
            if own_statistics and "running" in key:
                continue
            same(model.state_dict()[key.removeprefix(f"{at}/after/")], key)
    model.eval()
    if not own_statistics:
        same(model(value("step0/im_q")), "eval/momentum_embedding")
    return True


@pytest.mark.parametrize("name", ["moco_v1_warmup", "moco_v1_proto", "moco_v2_warmup"])
def test_training_steps_are_the_published_ones(name, monkeypatch):
    monkeypatch.setattr(builder.torch, "randperm", torch.randperm)  # put back at the end
    assert follow_golden(name)


def work_together(device, args, plan):
    """All that two ranks must show: golden steps, gather, shuffling, equal queues, equal features of the E-step."""
    randperm = torch.randperm
    for name in ("moco_v2_warmup", "moco_v2_proto"):
        assert follow_golden(name, DistributedDataParallel)
        assert follow_golden(name, lambda model: parallel(model, device), own_statistics=get_rank() > 0)
    torch.randperm = randperm

    gathered = gather(torch.full((2, 3), float(get_rank())))
    shared = broadcast(torch.tensor([get_rank() + 5]))

    torch.manual_seed(get_rank())  # different weights and queues, until `parallel` shares rank 0's
    model = MoCo(Tiny, dim=4, r=10)
    wrapped = parallel(model, device)
    im = torch.randn(3, 3, 16, 16)
    q, k, queue = wrapped(im, im)
    (q * k).sum().backward()
    model.eval()
    model.broadcast_buffers()
    # In eval mode, with the same statistics, a key does not depend on the others: put back, it is its image's.
    with torch.no_grad():
        keys = model._encode_keys(im)
        own = model(im)
    rest = keys[3 * get_rank() : 3 * get_rank() + 3]

    images = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    model.encoder_k.bn.running_mean.add_(get_rank())  # statistics differ; the E-step must not
    model.broadcast_buffers()
    loader = [(images[i : i + 1], torch.tensor([i])) for i in indices_of_rank(7)]
    features = extract_features(model, loader, 7, device)
    with torch.no_grad():
        direct = model(normalize(images))
    save_result(args, gathered=gathered, shared=shared, queue=model.queue, before=queue, k=k.detach(), own=own,
                rest=rest, features=features, direct=direct, pointer=model.queue_ptr)  # fmt: skip


@pytest.mark.dist
def test_two_ranks_work_as_one(two_ranks):
    zero, one = two_ranks(work_together)
    for result in (zero, one):
        assert result["gathered"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert result["shared"].tolist() == [5]
        torch.testing.assert_close(result["rest"], result["own"])
        torch.testing.assert_close(result["features"], result["direct"], rtol=0, atol=1e-6)
        assert result["pointer"].tolist() == [6]
    assert not torch.equal(zero["own"], one["own"])
    for name in ("queue", "before", "features"):
        torch.testing.assert_close(zero[name], one[name], rtol=0, atol=0)
    torch.testing.assert_close(zero["queue"][:, :6].T, torch.cat([zero["k"], one["k"]]))
    torch.testing.assert_close(zero["queue"][:, 6:], zero["before"][:, 6:])


def test_keys_wrap_around_the_end_of_the_queue():
    model = MoCo(Tiny, dim=4, r=7)
    expected, pointer = model.queue.clone(), 0
    for _ in range(5):
        _, k, before = model(torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8))
        torch.testing.assert_close(before, expected, rtol=0, atol=0)
        for key in k:  # one by one
            expected[:, pointer] = key
            pointer = (pointer + 1) % 7
        torch.testing.assert_close(model.queue, expected, rtol=0, atol=0)
        assert int(model.queue_ptr) == pointer


def test_the_key_encoder_follows_slowly_and_without_gradient():
    model = MoCo(Tiny, dim=4, r=8, m=0.9, mlp=True)
    for parameter in model.encoder_q.parameters():
        parameter.data.add_(1)
    old = [p.clone() for p in model.encoder_k.parameters()]
    q, k, _ = model(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    for before, key, query in zip(old, model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(key, 0.9 * before + 0.1 * query.detach())
    assert q.requires_grad
    assert not k.requires_grad
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(k.norm(dim=1), torch.ones(4))


def trained_batch_norm():
    """Of 5 channels, its weights and statistics no longer those of the start."""
    plain = nn.BatchNorm2d(5)
    plain.weight.data.uniform_()
    plain.bias.data.uniform_()
    plain(torch.randn(4, 5, 3, 3) + 1)
    return plain


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_is_each_group_through_a_plain_one(memory_format):
    plain = trained_batch_norm()
    network = nn.Sequential(nn.Identity(), nn.Sequential(copy.deepcopy(plain)))
    split_batch_norm(network, 3)
    split = network[1][0]
    assert type(split) is SplitBatchNorm2d
    assert network.state_dict().keys() == nn.Sequential(nn.Identity(), nn.Sequential(plain)).state_dict().keys()
    x = (2 * torch.randn(12, 5, 4, 4) - 3).contiguous(memory_format=memory_format).requires_grad_()
    alone = [copy.deepcopy(plain) for _ in range(3)]
    expected = torch.cat([norm(group) for norm, group in zip(alone, x.split(4), strict=True)])
    weight = torch.randn_like(x)
    slopes = torch.autograd.grad((expected * weight).sum(), x)[0]

    out = split(x)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), [x, split.weight])[0], slopes)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in alone]).mean(dim=0)
        torch.testing.assert_close(getattr(split, name), mean)
        assert not torch.equal(mean, getattr(plain, name))
    assert split.num_batches_tracked == plain.num_batches_tracked + 1 == 2

    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x))
    with pytest.raises(RuntimeError):
        split.train()(x[:10])


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_batch_norm_without_weights_or_statistics_gets_none(options):
    network = nn.Sequential(nn.BatchNorm2d(3, **options))
    before = network.state_dict().keys()
    split_batch_norm(network, 2)
    assert network.state_dict().keys() == before


def test_with_split_batch_norm_keys_are_grouped_otherwise_than_queries(monkeypatch):
    model = MoCo(Tiny, dim=4, r=8, m=1.0)  # both encoders keep the same weights
    split_batch_norm(model, 2)
    im = torch.randn(6, 3, 16, 16)
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    monkeypatch.setattr(builder.torch, "randperm", lambda n, device: order)
    q, k, _ = model(im, im)
    q.sum().backward()
    assert [parameter.requires_grad for parameter in model.encoder_k.parameters()] == [False] * 5
    encoder = copy.deepcopy(model.encoder_k)
    for group in order.view(2, 3):  # a plain BatchNorm on each half of the shuffled batch
        hidden = F.batch_norm(encoder.conv(im[group]), None, None, encoder.bn.weight, encoder.bn.bias, training=True)
        alone = F.normalize(encoder.fc(F.relu(hidden).mean((2, 3))), dim=1)
        torch.testing.assert_close(k[group], alone)


@pytest.mark.gpu
def test_a_training_step_s_forward_does_not_wait_for_the_gpu():
    model = MoCo(Tiny, dim=4, r=8).cuda()
    split_batch_norm(model, 2)
    im = torch.randn(4, 3, 16, 16, device="cuda")
    model(im, im)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(im, im)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", "meta"])  # of the queue: the weights stay, but take the way of a GPU's
def test_the_momentum_update_is_the_plain_one_to_the_bit(device):
    model = MoCo(torchvision.models.shufflenet_v2_x0_5, dim=4, r=10, m=0.999)
    model.queue = model.queue.to(device)
    for parameter in model.encoder_q.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    expected = [
        k.detach() * 0.999 + q.detach() * (1.0 - 0.999)
        for k, q in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True)
    ]
    places = [parameter.data_ptr() for parameter in model.encoder_k.parameters()]
    model._update_key_encoder()
    for parameter, value, place in zip(model.encoder_k.parameters(), expected, places, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == place


def test_a_model_in_double_precision_trains():
    model = MoCo(torchvision.models.shufflenet_v2_x0_5, dim=8, r=16).double()
    q, k, queue = model(*torch.rand(2, 4, 3, 32, 32, dtype=torch.float64))
    assert (q.shape, k.shape, queue.dtype) == ((4, 8), (4, 8), torch.float64)
