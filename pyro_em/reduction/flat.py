"""A tree as one vector of float64, and back: what travels between processes.

Whole numbers and truth values are exact below 2⁵³; beyond that they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.reduction.trees import mapped

T = TypeVar("T")

EXACT = 2**53  # whole numbers below are exact in float64


def form(leaves: Sequence[Any]) -> tuple[str, ...]:
    """What each leaf is, in words: two trees whose leaves read alike can be added.

    Example:
        >>> form([torch.zeros(2, 3, dtype=torch.float32), 1.0, True])
        ('float32 (2, 3)', 'float', 'int')
    """
    return tuple(_kind(leaf) for leaf in leaves)


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return "float" if isinstance(leaf, float) else "int"  # a sum of truth values is their number


def flat(leaves: Sequence[Any], device: torch.device) -> Tensor:
    """All numbers of some leaves, one after the other, in float64.

    Args:
        leaves: Tensors and numbers.
        device: Where the vector is wanted.

    Raises:
        UsageError: If a whole number is not exact in float64, or a tensor is of complex numbers.

    Example:
        >>> flat([torch.eye(2), 3, True], torch.device("cpu")).tolist()
        [1.0, 0.0, 0.0, 1.0, 3.0, 1.0]
    """
    parts = [_flat(leaf).to(device) for leaf in leaves]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)


def _flat(leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        if not isinstance(leaf, float) and abs(leaf) >= EXACT:
            raise _too_large()
        return torch.tensor([float(leaf)], dtype=torch.float64)
    if leaf.is_complex():
        raise UsageError("complex numbers are not added over processes")
    if _is_whole(leaf) and leaf.numel() and int(leaf.abs().max()) >= EXACT:
        raise _too_large()
    return leaf.detach().to(torch.float64).reshape(-1)


def _is_whole(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() and leaf.dtype is not torch.bool


def _too_large() -> UsageError:
    return UsageError(
        message(
            "sum over processes",
            "a whole number is 2**53 or more.",
            "sums over processes are made in float64, where it is not exact",
            ["count in float64"],
        )
    )


def unflat(tree: T, vector: Tensor) -> T:
    """The tree with its numbers replaced by those of a vector, each as what it was.

    Args:
        tree: Its form is taken.
        vector: As many numbers as the tree has, in float64.

    Raises:
        UsageError: If a whole number is not exact any more.

    Example:
        >>> unflat({"a": 0, "b": torch.zeros(2)}, torch.tensor([7.0, 1.0, 2.0]))
        {'a': 7, 'b': tensor([1., 2.])}
    """
    return mapped(tree, reader(vector))


def reader(vector: Tensor) -> Callable[[Any], Any]:
    """Gives each leaf, in their order, the next numbers of a vector."""
    here = vector.cpu()
    begin = 0

    def read(leaf: Any) -> Any:
        nonlocal begin
        size = leaf.numel() if isinstance(leaf, Tensor) else 1
        own, begin = here[begin : begin + size], begin + size
        if not isinstance(leaf, Tensor):
            number = float(own[0])
            if isinstance(leaf, float):
                return number
            return _whole(number)
        if _is_whole(leaf) and size and float(own.abs().max()) >= EXACT:
            raise _too_large()
        return own.to(dtype=leaf.dtype, device=leaf.device, copy=True).reshape(leaf.shape)

    return read


def _whole(number: float) -> int:
    if abs(number) >= EXACT:
        raise _too_large()
    return int(number)
