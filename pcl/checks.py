"""Check the arguments of public functions: values of any type that can work, or an error that names the argument."""

import math
import operator
import warnings
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor


def integer(name: str, value: Any, least: float = 0, most: float = math.inf) -> int:
    """Take an integer of any type, such as `labels.max() + 1`. TypeError: no integer. ValueError: not in least..most."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r:.60}")
    if not least <= number <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise ValueError(f"{name} must be an integer {limits}, not {number}")
    return number


def above_zero(name: str, value: Any) -> float:
    """Take a finite number above 0. ValueError: anything else."""
    try:
        number = float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value!r:.60}")
    return number


def tensors(**arguments: tuple[Any, str]) -> list[Tensor]:
    """Take arrays of fitting shapes: `tensors(x=(x, "N C"), label=(label, "int N"))`. No tensor that fits is copied.

    Args:
        arguments: each value with its shape. A letter is the same size everywhere; a capital letter is at least 1.

    Returns:
        tensors on the first one's device: int64 where the shape begins with "int", else of the widest floating-point dtype.

    Raises:
        TypeError, ValueError: no array of real numbers, not integers, or another shape.
    """
    result: list[Tensor] = []
    sizes: dict[str, int] = {}
    for name, (value, form) in arguments.items():
        tensor, letters = _tensor(name, value), form.removeprefix("int ").split()
        fits = tensor.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size and (size or letter.islower())
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            known = "".join(f", {letter} = {sizes[letter] or 'at least 1'}" for letter in letters if letter in sizes)
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be ({' x '.join(letters)}){known}")
        integers = form.startswith("int ")
        if integers and tensor.is_floating_point():
            raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
        if integers or not tensor.is_floating_point():
            tensor = tensor.to(torch.int64 if integers else torch.float64)
        result.append(tensor.to(result[0].device) if result else tensor)
    floats = [tensor.dtype for tensor in result if tensor.is_floating_point()]
    return [tensor.to(reduce(torch.promote_types, floats)) if tensor.is_floating_point() else tensor for tensor in result]


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_complex() or value.is_quantized or value.is_meta:
            raise TypeError(f"{name} must be a dense tensor of real numbers")
        return value
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is not an array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    # torch takes no negative strides, no foreign byte order and no more than 64 bits.
    dtype = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of read-only arrays, such as a file in memory: nothing here writes into them
        return torch.from_numpy(np.require(array, dtype, "C"))


def below(name: str, ids: Tensor, count: int) -> None:
    """ValueError if not all ids are in 0..count-1. Ids on a GPU are not looked at: that would wait for it."""
    if ids.numel() and not ids.is_cuda and (ids.min() < 0 or ids.max() >= count):
        raise ValueError(f"{name} must hold numbers from 0 to {count - 1}; it holds {int(ids.min())} to {int(ids.max())}")
