"""Two functions of torch without what they import: sympy, a quarter of a second at the first call.

Both ask it about sizes that are symbols, which only a compiler has. Sizes here are whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

_of_torch = torch.broadcast_shapes


def broadcast_shapes(*shapes: Any) -> torch.Size:
    """The shape of several shapes together; whatever is no tuple of whole numbers is torch's.

    Raises:
        RuntimeError: If they do not broadcast.

    Example:
        >>> broadcast_shapes((2,), (3, 1), ())
        torch.Size([3, 2])
    """
    if torch.jit.is_tracing():
        return _of_torch(*shapes)
    out: list[int] = []
    for shape in shapes:
        if not isinstance(shape, (tuple, list)):
            return _of_torch(*shapes)
        out[:0] = [1] * (len(shape) - len(out))
        for i in range(1, len(shape) + 1):
            n = shape[-i]
            if n.__class__ is not int or n < 0 or (n != 1 != out[-i] != n):
                return _of_torch(*shapes)  # which says what is wrong
            if n != 1:
                out[-i] = n
    return torch.Size(out)


class PlainShapes:
    """A block in which ``torch.broadcast_shapes`` is the one of this module.

    Distributions call it whenever one is made (``MultivariateNormal``, ``LowRank…``).

    Example:
        >>> with PlainShapes():
        ...     torch.broadcast_shapes((2, 1), (3,))
        torch.Size([2, 3])
    """

    def __enter__(self) -> PlainShapes:
        self._before = torch.broadcast_shapes
        torch.broadcast_shapes = broadcast_shapes
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.broadcast_shapes = self._before


def pull_back(
    output: Tensor | GradientEdge,
    source: Tensor | GradientEdge,
    cotangent: Tensor,
    *,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> Tensor | None:
    """The product of a cotangent with a Jacobian, by ``torch.autograd``; the graph is kept.

    Args:
        output: Where the cotangent is given.
        source: With respect to what.
        cotangent: # shape of the output
        create_graph: Whether the result can be differentiated.
        allow_unused: Whether None is returned where the output does not depend on the source.

    Raises:
        RuntimeError: If the output does not depend on the source.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> pull_back(x * x, x, torch.ones(2))
        tensor([2., 4.])
    """
    return pull_back_all(
        (output,), (source,), (cotangent,), create_graph=create_graph, allow_unused=allow_unused
    )[0]


def pull_back_all(
    outputs: Sequence[Tensor | GradientEdge],
    sources: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> Sequence[Tensor | None]:
    """As `pull_back`, summed over outputs, for several sources at once.

    Args:
        outputs: Where cotangents are given.
        sources: With respect to what.
        cotangents: One for each output, of its shape.
        create_graph: Whether the results can be differentiated.
        allow_unused: Whether None is returned where no output depends on a source.

    Raises:
        RuntimeError: If no output depends on a source.

    Example:
        >>> x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> pull_back_all([2 * x, x * y], [x, y], [torch.ones(1), torch.ones(1)])
        (tensor([3.]), tensor([1.]))
    """
    found: Sequence[Tensor | None] = _engine_run_backward(
        tuple(outputs),
        tuple(cotangents),
        True,
        create_graph,
        tuple(sources),
        allow_unused,
        accumulate_grad=False,
    )
    return found
