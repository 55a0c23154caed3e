"""Tensors that only say they are on a GPU: those of two devices may not meet, and where the host waits is noted.

What is private to torch is here alone. Kernels, layouts that cuDNN chooses, NCCL and memory cannot be seen in this way.
"""

import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
GPU = torch.device("cuda:0")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_consecutive", "unique_dim"}
WAITS |= {"masked_select", "bincount", "histc", "allclose"}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
try:
    FAKE = torch._C._TorchDispatchModeKey.FAKE  # a mode that has this key is asked before torch looks for a driver
    DRIVERLESS = (torch._C._ensureCUDADeviceGuardSet, torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401
except (AttributeError, ImportError) as error:
    pytest.skip(f"torch {torch.__version__} pretends no GPU: {error}", allow_module_level=True)


class Witness(TorchDispatchMode):
    """Raises where tensors of two devices meet; notes in `waits` where the host waits for `device`, counts its operations."""

    def __init__(self, device):
        super().__init__()
        self.device, self.waits, self.operations = torch.device(device), [], 0

    def on_gpu(self, tensor):
        return tensor.device.type == self.device.type

    def note(self, what):
        frame = sys._getframe(1)
        while (name := frame.f_code.co_filename) == __file__ or "site-packages" in name or str(ROOT) not in name:
            frame = frame.f_back
        self.waits.append(f"{what} in {name}:{frame.f_lineno}")

    def look(self, func, args, kwargs):
        packet, tensors = func.overloadpacket, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if self.on_gpu(t)]
        self.operations += bool(here) and not func.is_view
        if packet in (aten._to_copy, aten.copy_):
            target, source = (None, args[0]) if packet is aten._to_copy else args[:2]
            to = torch.device(kwargs.get("device") or source.device) if target is None else target.device
            free = kwargs.get("non_blocking") or (target is not None and len(args) > 2 and args[2])
            if to.type != source.device.type and not (free and getattr(source, "pinned", False)):
                self.note(f"{func} from {source.device} to {to}, {tuple(source.shape)}")
            return
        if packet in INDEXED:
            on_host = [i for i in args[1] if i is not None and not self.on_gpu(i)]
            if self.on_gpu(args[0]):
                for index in on_host:
                    self.note(f"{func} by {tuple(index.shape)} on the host")
                if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                    self.note(f"{func} by a mask")
            here = here if not self.on_gpu(args[0]) or len(args) > 2 else []
            tensors = [args[0], *args[2:3]] if self.on_gpu(args[0]) else tensors
        if here and any(t.dim() > 0 and not self.on_gpu(t) for t in tensors):
            raise RuntimeError(f"{func}: tensors on {self.device} and on the CPU")
        if here and packet.__name__ in WAITS:
            self.note(str(func))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.look(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class Pretended(torch.Tensor):
    """A tensor on no GPU, which computes on the CPU, without gradients."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": GPU}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout)
        made.held = held
        return made

    def __repr__(self):
        return f"Pretended({self.held})"

    def numpy(self, *_, **__):
        raise TypeError("a tensor on a GPU is no NumPy array; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        Pretending.now[-1].note("tolist")
        return self.held.tolist()

    def __reduce_ex__(self, protocol):  # torch.save fetches it
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Pretending.now[-1]:
            return func(*args, **(kwargs or {}))


class Pretending(Witness):
    """A witness that gives `Pretended` tensors to who asks for a GPU."""

    now: list = []  # noqa: RUF012 - the innermost last

    def __init__(self):
        super().__init__(GPU)
        self._mode_key = FAKE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.look(func, args, kwargs)
        flat, spec = tree_flatten((args, kwargs))
        here = [t for t in flat if isinstance(t, Pretended)]
        to_gpu = isinstance(args[0], Pretended) if func.overloadpacket in {aten.copy_, *INDEXED} else bool(here)
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
        args, inner = tree_unflatten([t.held if isinstance(t, Pretended) else t for t in flat], spec)
        if to_gpu and "device" in inner:
            inner["device"] = torch.device("cpu")
        inner.pop("pin_memory", None)
        out = func(*args, **inner)
        same = {id(t.held): t for t in here}
        return tree_map_only(torch.Tensor, lambda t: same[id(t)] if id(t) in same else Pretended(t), out) if to_gpu else out


def pinned(tensor, *_):
    """The tensor, noted as one from which a GPU fetches by itself."""
    tensor.pinned = True
    return tensor


@contextmanager
def witnessed(device):
    """Inside, tensors on `device` are watched: on "meta" with gradients but without numbers, on "cuda" with numbers alone."""
    ensure_guard, lifts, set_lifts = DRIVERLESS
    ensure_guard()  # one that does nothing where there is no driver
    before = lifts()
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False):
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.Tensor, "is_meta", False)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type != "cpu"))
        witness = Pretending() if device == "cuda" else Witness(device)
        Pretending.now.append(witness)
        set_lifts(device == "cuda" or before)
        try:
            with witness:
                yield witness
        finally:
            Pretending.now.pop()
            set_lifts(before)
