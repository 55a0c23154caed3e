"""Arguments of the public functions: numbers of any type that can work, or an error that names the argument.

Letters: N rows, C features.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**16  # rows that are held in double precision at once


def integer(name: str, value: Any, least: float = 0, most: float = math.inf) -> int:
    """An integer of any type, such as `labels.max() + 1`.

    Raises:
        TypeError, ValueError: no integer, or not in least..most.
    """
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
    """A number above 0, as float; ValueError for others."""
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, not {value!r:.60}")
    return number


def tensors(**arguments: tuple[Any, str]) -> list[Tensor]:
    """Arrays of any kind as tensors of fitting shapes, all on the first one's device; no tensor that fits is copied.

    Args:
        arguments: the value and the shape of each by its name: `tensors(x=(x, "N C"), label=(label, "int N"))`. A letter
            stands for the same size in all of them, a capital one for at least 1.

    Returns:
        with "int" int64, otherwise floating point, all of the widest dtype among them.

    Raises:
        TypeError, ValueError: no array of numbers, not integers, or another shape.
    """
    result: list[Tensor] = []
    sizes: dict[str, int] = {}
    for name, (value, form) in arguments.items():
        tensor = _tensor(name, value)
        letters = form.removeprefix("int ").split()
        fits = tensor.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size and (size or letter.islower())
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            known = "".join(f", {letter} = {sizes[letter] or 'at least 1'}" for letter in letters if letter in sizes)
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be ({' x '.join(letters)}){known}")
        if form == " ".join(letters):
            tensor = tensor if tensor.is_floating_point() else tensor.double()
        elif tensor.is_floating_point():
            raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
        else:
            tensor = tensor.long()
        result.append(tensor.to(result[0].device) if result else tensor)
    floats = [tensor.dtype for tensor in result if tensor.is_floating_point()]
    return [tensor.to(reduce(torch.promote_types, floats)) if tensor.is_floating_point() else tensor for tensor in result]


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_complex() or value.is_quantized or value.is_meta:
            raise TypeError(f"{name} must be a dense tensor of real numbers")
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    # torch takes neither negative strides nor bytes in another order nor more than 64 bits.
    dtype = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an array that is read-only: nothing here writes into it
        return torch.from_numpy(np.require(array, dtype, "C"))


def below(name: str, ids: Tensor, count: int) -> None:
    """ValueError if not all ids are 0..count-1. A GPU is not waited for."""
    if ids.numel() and not ids.is_cuda and (ids.min() < 0 or ids.max() >= count):
        raise ValueError(f"{name} must hold numbers from 0 to {count - 1}; it holds {int(ids.min())} to {int(ids.max())}")


def held_by_float32(
    features: Tensor, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move and divide rows (N, C) if float32 would not hold their distances; returns them, the mean (C,) and the size.

    The clusters depend on neither, but faiss's distances are differences of squares, of which a common part far larger than
    the spread leaves nothing. Other rows, such as PCL's of unit length, stay as they are; then the mean is None.

    Args:
        features: all rows, or those of this rank.
        add_up: sums float64 tensors over the ranks.
    """
    dim = features.shape[1]
    sums = features.new_zeros(dim + 3, dtype=torch.float64)  # sum of rows, of their squares; rows not of unit length; rows
    for rows in features.split(CHUNK):
        rows = rows.double()
        square = rows.square().sum(dim=1)
        others = ((square - 1).abs() > 0.02).sum()
        sums += torch.cat([rows.sum(dim=0), torch.stack([square.sum(), others, others.new_tensor(len(rows))])])
    sums = add_up(sums)
    if not sums.isfinite().all():
        raise ValueError("features are not finite, or too large to be squared")
    mean, (square, others, count) = sums[:dim] / sums[-1], sums[dim:]
    square, one = square / count, torch.ones_like(count)
    if not others or (mean.square().sum() < 0.99 * square and 1e-20 < square < 1e20):
        return features, None, one
    features = features.double() - mean
    size = (add_up(features.square().sum()) / count).sqrt()
    size = torch.where(size > 0, size, one)  # of identical rows
    return (features / size).float(), mean, size
