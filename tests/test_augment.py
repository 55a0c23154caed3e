from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import ColorJitter, functional

from pcl.augment import (
    MEAN,
    PARAMETERS,
    STD,
    Augmentation,
    DeferredView,
    TwoViews,
    apply_deferred,
    center_view,
    normalize,
    pixel_statistics,
    random_view,
)
from pcl.images import read_image, read_tensor
from pcl.loader import IndexedFolder, make_loader


def photos(count=24, side=64):
    """Smooth colored images of every hue, with some noise."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.random((count, 3, 5, 5), dtype=np.float32))
    large = torch.nn.functional.interpolate(small, size=side, mode="bilinear")
    noise = torch.from_numpy(rng.normal(0, 0.05, large.shape)).float()
    return ((large + noise).clamp(0, 1) * 255).byte()


def by_torchvision(image, recipe, aug_plus, pil):
    """(3, H, W) floats in 0..1: the same recipe, one step after the other; PIL rounds to bytes at each."""
    entry = dict(zip(PARAMETERS, recipe.tolist(), strict=True))
    image = functional.to_pil_image(image) if pil else image.float() / 255
    grayscale = partial(functional.to_grayscale if pil else functional.rgb_to_grayscale, num_output_channels=3)
    change = [
        lambda x: functional.adjust_brightness(x, entry["brightness"]),
        lambda x: functional.adjust_contrast(x, entry["contrast"]),
        lambda x: functional.adjust_saturation(x, entry["saturation"]),
        lambda x: functional.adjust_hue(x, entry["hue"]),
    ]
    if entry["grayscale"] and not aug_plus:
        image = grayscale(image)
    for position in ("first", "second", "third", "fourth"):
        image = change[int(entry[position])](image)
    if entry["grayscale"] and aug_plus:
        image = grayscale(image)
    if entry["radius"]:
        image = functional.gaussian_blur(image, 13, entry["radius"])
    return functional.to_tensor(image) if pil else image


def levels_apart(images, recipe, aug_plus, pil):
    """The mean difference from torchvision's pixels, of 255 levels."""
    expected = torch.stack([by_torchvision(image, r, aug_plus, pil) for image, r in zip(images, recipe, strict=True)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return float((apply_deferred(images, recipe, aug_plus) * std + mean - expected).abs().mean() * 255)


@pytest.mark.parametrize("aug_plus", [False, True], ids=["v1", "v2"])
def test_with_equal_recipes_the_pixels_are_torchvision_s(aug_plus):
    images, view = photos(), DeferredView(64, aug_plus)
    recipe = torch.tensor([view.draw() for _ in images])
    assert levels_apart(images, recipe, aug_plus, pil=False) < 0.2
    assert levels_apart(images, recipe, aug_plus, pil=True) <= 2
    assert float((apply_deferred(images, recipe, aug_plus) - normalize(images)).abs().mean()) > 0.2  # there was something to do


@pytest.mark.parametrize("number", range(4))
def test_each_change_alone_is_torchvision_s(number):
    images = photos()
    recipe = torch.tensor([[1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0]]).repeat(len(images), 1)
    recipe[:, number] = torch.linspace(-0.45, 0.45, len(images)) if number == 3 else torch.linspace(0.2, 1.8, len(images))
    assert levels_apart(images, recipe, True, pil=False) < 0.01
    assert levels_apart(images, recipe, True, pil=True) <= 2


def test_an_image_s_views_do_not_depend_on_its_batch():
    images, view = photos(), DeferredView(64, True)
    recipe = torch.tensor([view.draw() for _ in images])
    together = apply_deferred(images, recipe, True)
    alone = torch.cat([apply_deferred(images[i : i + 1], recipe[i : i + 1], True) for i in range(len(images))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_neither_a_caller_s_autocast_nor_a_memory_format_changes_a_view():
    images, blurred = photos(), torch.tensor([[1.2, 1, 1, 0.1, 0, 1, 2, 3, 0, 1.5]]).repeat(24, 1)
    expected = apply_deferred(images, blurred, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_deferred(images, blurred, True), expected)
    assert torch.equal(apply_deferred(images.contiguous(memory_format=torch.channels_last), blurred, True), expected)


@pytest.mark.parametrize("on_device", [False, True])
def test_images_that_are_no_bytes_of_three_channels_are_refused(on_device):
    views, images = Augmentation(64, True, on_device), photos()
    neutral = torch.tensor([[1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0]]).repeat(24, 1)
    for wrong, error in ((images.float() / 255, TypeError), (images[:, :1], ValueError)):
        with pytest.raises(error, match=r"^images"):
            views.apply((wrong, neutral) if on_device else wrong, torch.device("cpu"))


def test_nothing_to_do_is_normalization_to_the_bit():
    neutral = torch.tensor([[1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0]]).repeat(24, 1)
    assert torch.equal(apply_deferred(photos(), neutral, True), normalize(photos()))


@pytest.mark.slow
@pytest.mark.parametrize("aug_plus", [False, True], ids=["v1", "v2"])
def test_recipes_follow_the_published_distributions(aug_plus):
    drawn = np.array([DeferredView(32, aug_plus).draw() for _ in range(6000)])
    brightness, contrast, saturation, hue = drawn[:, :4].T
    changed = brightness != 1
    assert changed.mean() == pytest.approx(0.8 if aug_plus else 1, abs=0.02)
    for factor in (brightness, contrast, saturation):
        assert np.percentile(factor[changed], [0, 50, 100]) == pytest.approx([0.6, 1, 1.4], abs=0.02)
        assert factor[changed].std() == pytest.approx(0.8 / 12**0.5, abs=0.01)
    reach = 0.1 if aug_plus else 0.4
    assert np.percentile(hue[changed], [0, 50, 100]) == pytest.approx([-reach, 0, reach], abs=0.02)
    orders, counts = np.unique(drawn[changed, 4:8], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 0.6 * counts.mean()
    assert drawn[:, 8].mean() == pytest.approx(0.2, abs=0.02)
    radius = drawn[:, 9]
    assert (radius > 0).mean() == pytest.approx(0.5 if aug_plus else 0, abs=0.02)
    if aug_plus:
        assert np.percentile(radius[radius > 0], [0, 50, 100]) == pytest.approx([0.1, 1.05, 2.0], abs=0.05)
    assert (
        abs(
            np.corrcoef(drawn[changed][:, [0, 1, 2, 3, 8, 9] if aug_plus else [0, 1, 2, 3, 8]].T) - np.eye(6 if aug_plus else 5)
        ).max()
        < 0.06
    )


@pytest.mark.slow
def test_crops_are_those_of_the_published_view():
    """A gradient tells where a crop was taken: area and position are distributed as RandomResizedCrop's."""
    x = torch.arange(200).repeat(200, 1)
    gradient = torch.stack([x, x.T, torch.zeros_like(x)]).byte()
    view, shares, flipped = DeferredView(40, False), [], []
    for _ in range(1500):
        crop, _ = view(gradient)
        width = float(crop[0, 0, -1]) - float(crop[0, 0, 0])
        height = float(crop[1, -1, 0]) - float(crop[1, 0, 0])
        flipped.append(width < 0)
        shares.append(abs(width) * height / 200**2 * (40 / 39) ** 2)
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.05)
    assert min(shares) > 0.18
    assert np.mean(shares) == pytest.approx(0.55, abs=0.06)


def test_a_loader_gives_recipes_that_depend_on_seed_epoch_and_index_alone(image_folder):
    def batches(workers):
        folder = IndexedFolder(image_folder / "train", TwoViews(DeferredView(32, True)), 3, read_tensor)
        return [views for views, _ in make_loader(folder, range(25), 5, workers)]

    for one, other in zip(batches(0), batches(2), strict=True):
        for (crop, recipe), (crop_too, recipe_too) in zip(one, other, strict=True):
            assert (crop.shape, crop.dtype, recipe.shape) == ((5, 3, 32, 32), torch.uint8, (5, len(PARAMETERS)))
            assert torch.equal(crop, crop_too)
            assert torch.equal(recipe, recipe_too)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_views():
    images, view = photos(), DeferredView(64, True)
    recipe = torch.tensor([view.draw() for _ in images])
    torch.testing.assert_close(
        apply_deferred(images.cuda(), recipe, True).cpu(), apply_deferred(images, recipe, True), rtol=0, atol=2e-2
    )
    assert torch.equal(normalize(images.cuda()).cpu(), normalize(images))


def test_the_blur_is_almost_pillow_s():
    neutral = torch.tensor([[1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0]])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for image, radius in zip(photos(), np.linspace(0.1, 2, 24), strict=True):
        neutral[0, -1] = radius
        expected = functional.to_tensor(functional.to_pil_image(image).filter(ImageFilter.GaussianBlur(float(radius))))
        difference = (apply_deferred(image[None], neutral, True)[0] * std + mean - expected).abs() * 255
        assert float(difference.mean()) <= 2


def test_a_center_crop_of_a_tensor_is_a_level_apart_at_most():
    for image, size in zip(photos(side=90), (32, 40, 60), strict=False):
        exact = center_view(size)(functional.to_pil_image(image))
        assert int((center_view(size, tensors=True)(image).int() - exact.int()).abs().max()) <= 1


def test_sixteen_bits_and_moving_pictures_are_read_as_usual(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (20, 30), np.uint16)).save(tmp_path / "deep.png")
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "moving.gif").rename(tmp_path / "moving.jpg")
    for name in ("deep.png", "moving.jpg"):
        image = read_tensor(tmp_path / name)
        assert (image.shape, image.dtype) == ((3, 20, 30), torch.uint8)
        assert torch.equal(image, functional.pil_to_tensor(read_image(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tiff"])
def test_any_format_is_read_as_rgb(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)).save(tmp_path / name)
    image = read_tensor(tmp_path / name)
    assert (image.shape, image.dtype) == ((3, 20, 30), torch.uint8)
    with Image.open(tmp_path / name) as expected:
        assert torch.equal(image, functional.pil_to_tensor(expected.convert("RGB")))


def test_color_jitter_still_draws_in_the_order_that_is_relied_upon():
    order, *factors = ColorJitter.get_params((2, 2), (3, 3), (4, 4), (0.5, 0.5))
    assert (sorted(order.tolist()), factors) == ([0, 1, 2, 3], [2, 3, 4, 0.5])


@pytest.mark.parametrize("aug_plus", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_an_augmentation_does_what_its_parts_do(image_folder, aug_plus, on_device):
    path = IndexedFolder(image_folder / "train", np.asarray).path(0)
    views, image = Augmentation(32, aug_plus, on_device), (read_tensor if on_device else read_image)(path)
    for seed in range(20):
        torch.manual_seed(seed)
        view, _ = views.two_views(views.read(path))
        torch.manual_seed(seed)
        if on_device:
            crop, parameters = DeferredView(32, aug_plus)(image)
            expected = apply_deferred(crop[None], parameters[None], aug_plus)
            batch = tuple(part[None] for part in view)
        else:
            batch, expected = view[None], normalize(random_view(32, aug_plus)(image)[None])
        assert torch.equal(views.apply(batch, torch.device("cpu")), expected)
    assert torch.equal(views.center(image), center_view(32, tensors=on_device)(image))


def test_the_default_dtype_of_a_first_call_does_not_last():
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    expected = normalize(image)
    pixel_statistics.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        normalize(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(normalize(image), expected)
