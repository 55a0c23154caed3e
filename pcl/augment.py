"""The views of an image: random ones for training, center crops, normalization.

By default the loader's workers make a random view. With `--augment-on device` they only decode, crop and flip, and draw the
parameters of the rest from the same distributions; colors and blur follow on whole batches, on their device. The result is
the same up to rounding and the blur (Pillow approximates a Gaussian by boxes). kornia's color jitter is not used: it has one
order of the four changes for a whole batch, not one for each image.

Letters: B batch, H and W sides of an image.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from pcl.distributed import on_device
from pcl.images import read_image, read_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1
CROP_SCALE = (0.2, 1.0)  # fraction of an image's area that a random view shows, as published
# Of a `DeferredView`. "first" to "fourth" are the order of the changes: 0 brightness, 1 contrast, 2 saturation, 3 hue.
PARAMETERS = ("brightness", "contrast", "saturation", "hue", "first", "second", "third", "fourth", "grayscale", "radius")
LUMA = (0.2989, 0.587, 0.114)  # torchvision's
TAPS = 6  # pixels of the blur's kernel on each side: three times the largest standard deviation, 2


class Augmentation:
    """The views of pre-training: `read` a path, make `two_views` of the image, or its `center`; `apply` to a batch of views.

    `on_device`, the workers only decode, crop and flip; `apply` does the rest on whole batches.
    """

    def __init__(self, size: int, aug_plus: bool, on_device: bool) -> None:
        self.on_device, self.aug_plus = on_device, aug_plus
        self.read: Callable[[str], Any] = read_tensor if on_device else read_image
        self.two_views = TwoViews((DeferredView if on_device else random_view)(size, aug_plus))
        self.center = center_view(size, tensors=on_device)

    def apply(self, view: Any, device: torch.device, channels_last: bool = False) -> Tensor:
        """A loader's batch of views, (B, 3, size, size) uint8 -> the same shape, float32, normalized, on the device.

        `on_device`, a batch is a pair: the views and their parameters, (B, 10).
        """
        if self.on_device:
            crops, parameters = view
            images = apply_deferred(crops.to(device, non_blocking=True), parameters, self.aug_plus)
        else:
            images = normalize(view.to(device, non_blocking=True))
        return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def normalize(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32, less the mean of ImageNet's pixels and divided by their standard deviation.

    The result equals that of torchvision's ToTensor and Normalize to the bit. Move the uint8 images to the device first: they
    have a quarter of the bytes. TypeError: images of another dtype, which may be normalized already.
    """
    x = _fractions(images)
    _, mean, std = pixel_statistics(x.device)
    return x.sub_(mean).div_(std)


def _fractions(images: Tensor) -> Tensor:
    """The checked images in 0..1."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images are {getattr(images, 'dtype', type(images))}; a tensor of uint8 in 0..255 is needed")
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; it must be (..., 3, H, W)")
    return images.float().div_(pixel_statistics(images.device)[0])


@cache
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255 as a tensor, since a GPU divides by a plain number less exactly; mean and standard deviation, each (3, 1, 1)."""
    white, mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (255, MEAN, STD))
    return white, mean[:, None, None], std[:, None, None]


class TwoViews:
    """Two random views of an image: the query's and the key's."""

    def __init__(self, view: Callable[[Any], Any]) -> None:
        self.view = view

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.view(image), self.view(image)


def random_view(size: int, aug_plus: bool) -> Callable[[Image.Image], Tensor]:
    """A random view, (3, size, size) uint8: MoCo v1's augmentation, or with `aug_plus` MoCo v2's."""
    crop, grayscale = transforms.RandomResizedCrop(size, scale=CROP_SCALE), transforms.RandomGrayscale(p=0.2)
    color = [grayscale, transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    if aug_plus:
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        color = [jitter, grayscale, transforms.RandomApply([GaussianBlur()], p=0.5)]
    return transforms.Compose([crop, *color, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def crop_view(size: int) -> Callable[[Image.Image], Tensor]:
    """A random crop, flipped or not, (3, size, size) uint8: what the linear probe trains on."""
    return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


class GaussianBlur:
    """Pillow's Gaussian blur of a radius drawn from 0.1 to 2 pixels, as published (torchvision's differs in the pixels)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(0.1, 2.0))))


def center_view(size: int, tensors: bool = False) -> Callable[[Any], Tensor]:
    """The middle of an image whose shorter side is scaled to 8/7 of size (256 for 224): (3, size, size) uint8.

    With `tensors`, the image is one from `read_tensor`; it takes less than half the time and differs by a level at most.
    """
    side = round(size * 8 / 7)
    kind: Any = v2 if tensors else transforms
    crop = [MiddleOfThin(side, size), kind.Resize(side), kind.CenterCrop(size)]
    return kind.Compose(crop if tensors else [*crop, transforms.PILToTensor()])


class MiddleOfThin:
    """Replace an image more than 16 times as long as wide by the middle of what torchvision's Resize(side) would make of it.

    The middle is as long as `side`, cut so that a CenterCrop(size) shows the same.
    """

    def __init__(self, side: int, size: int) -> None:
        self.side, self.size = side, size

    def __call__(self, image: Any) -> Any:
        """A PIL image, or (3, H, W) uint8."""
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        if max(height, width) <= 16 * min(height, width):
            return image
        if isinstance(image, Tensor):
            return pil_to_tensor(self(to_pil_image(image)))
        if height > width:
            return self(image.transpose(Image.Transpose.TRANSPOSE)).transpose(Image.Transpose.TRANSPOSE)
        scaled = int(self.side * width / height)  # as Resize rounds
        first = round((scaled - self.size) / 2) - round((self.side - self.size) / 2)
        left, right = (place * width / scaled for place in (first, first + self.side))
        # Pillow takes the box as 32-bit floats, so count from nearby; its filter reads a little beyond it.
        margin = 2 + height // self.side
        start, end = max(0, int(left) - margin), min(width, int(right) + margin)
        box = (left - start, 0, right - start, height)
        return image.crop((start, 0, end, height)).resize((self.side, self.side), Image.Resampling.BILINEAR, box)


class DeferredView:
    """On a worker: an image's random crop, flipped or not, and the parameters of the rest. Arguments as for `random_view`."""

    def __init__(self, size: int, aug_plus: bool) -> None:
        self.aug_plus = aug_plus
        self.crop = v2.Compose([v2.RandomResizedCrop(size, CROP_SCALE), v2.RandomHorizontalFlip()])

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 -> (3, size, size) uint8 and (10,) float32, whose entries `PARAMETERS` names."""
        return self.crop(image), torch.tensor(self.draw(), dtype=torch.float32)

    def draw(self) -> list[float]:
        """Draw the parameters; factors of 1, a hue of 0 and a radius of 0 leave the image as it is."""
        hue = 0.1 if self.aug_plus else 0.4
        factors, order = [1.0, 1.0, 1.0, 0.0], [0, 1, 2, 3]
        if not self.aug_plus or float(torch.rand(())) < 0.8:
            chosen, *factors = transforms.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-hue, hue))
            order = chosen.tolist()
        grayscale = float(torch.rand(()) < 0.2)
        radius = float(torch.empty(()).uniform_(0.1, 2.0)) if self.aug_plus and float(torch.rand(())) < 0.5 else 0.0
        return [*factors, *order, grayscale, radius]


def apply_deferred(images: Tensor, parameters: Tensor, aug_plus: bool) -> Tensor:
    """Change colors, blur and normalize: (B, 3, H, W) uint8 on any device, (B, 10) on the CPU -> (B, 3, H, W) float32.

    The host never waits for a GPU, since it knows the parameters.
    """
    x = _fractions(images)
    _, mean, std = pixel_statistics(x.device)
    changes = ordered_changes(parameters, aug_plus)
    lengths = [len(rows) for _, rows, _ in changes]
    rows = on_device(torch.cat([rows for _, rows, _ in changes]), x.device).split(lengths)  # all in one transfer
    factors = on_device(torch.cat([factors for *_, factors in changes]), x.device).split(lengths)
    for (change, *_), row, factor in zip(changes, rows, factors, strict=True):
        if len(row):
            x[row] = change(x[row], factor[:, None, None, None])
    return x.sub_(mean).div_(std)


def ordered_changes(parameters: Tensor, aug_plus: bool) -> list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]]:
    """(B, 10) on the CPU -> the changes in order, each with the indices of its images, int64, and their factors."""
    brightness, contrast, saturation, hue, *order, grayscale, radius = parameters.T  # (B,) each
    colors = [(_brightness, brightness, 1), (_contrast, contrast, 1), (_saturation, saturation, 1), (_hue, hue, 0)]
    changes = [
        (change, factor, (place == number) & (factor != neutral))
        for place in order
        for number, (change, factor, neutral) in enumerate(colors)
    ]
    # As published, v1 makes an image gray before its colors change, v2 after it.
    changes.insert(len(changes) if aug_plus else 0, (_grayscale, grayscale, grayscale > 0))
    changes.append((_blur, radius, radius > 0))
    return [(change, chosen.nonzero()[:, 0], factor[chosen]) for change, factor, chosen in changes]


def _grayscale(x: Tensor, _: Tensor | None = None) -> Tensor:
    return sum(weight * x[:, i : i + 1] for i, weight in enumerate(LUMA)).expand_as(x)  # type: ignore[union-attr]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grayscale(x), x, factor).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue, a sixth of the circle being the way from red to yellow."""
    r, g, b = x.unbind(1)  # (B, H, W)
    high, low = x.amax(dim=1), x.amin(dim=1)
    delta = high - low
    safe = delta.clamp(min=1e-8)  # gray has no hue, and delta takes it out below
    sixths = torch.where(high == r, (g - b) / safe, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sixths = sixths + 6 * turn[:, 0]
    k = torch.stack([(n + sixths) % 6 for n in (5, 3, 1)], dim=1)  # red, green, blue
    return high[:, None] - delta[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur(x: Tensor, radius: Tensor) -> Tensor:
    """A Gaussian of this standard deviation in pixels; edges are extended."""
    count, channels, height, width = x.shape
    place = torch.arange(-TAPS, TAPS + 1, device=x.device)
    weight = torch.exp(-0.5 * (place / radius) ** 2)  # (B, 1, 1, taps)
    weight = (weight / weight.sum(dim=-1, keepdim=True)).repeat_interleave(channels, dim=0)  # (3 B, 1, 1, taps)
    flat = F.pad(x, (TAPS, TAPS, TAPS, TAPS), mode="replicate").reshape(1, count * channels, height + 2 * TAPS, -1)
    with torch.autocast(x.device.type, enabled=False):  # a caller's would round to 16 bits
        flat = F.conv2d(flat, weight, groups=count * channels)
        flat = F.conv2d(flat, weight.transpose(2, 3), groups=count * channels)
    return flat.view(count, channels, height, width)
