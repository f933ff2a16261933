"""Whether each row says the same whichever rows are beside it.

Sums over parts of the data are sums over all of them only then:

    log p(A ∪ B) = log p(A) + log p(B),    what is outside the rows counted once.

A model that centres its data, or weighs a prior by their number, does it anew in every part; nothing in
its reading of one part shows that. So a few rows are read twice: together, and in two parts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import numpy
import torch
from torch import Tensor

from pyro_em.errors import PyroEMError, UsageError, message
from pyro_em.plan.part import Part, plate_of_rows
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.reduction.trees import added
from pyro_em.tracing.randomness import same_random_state

logger = logging.getLogger("pyro_em")

_MOST = 8  # rows of each of the two parts


def refuse_rows_that_see_others(
    planner: Planner, program: Program, how: str, in_chunks: int | None = None
) -> None:
    """Refuse a model in which what is said of a row depends on the rows beside it.

    Args:
        planner: Reads the model.
        program: The model with one part of the data, whose rows `require_partable` found independent.
        how: How the data are parted, in words.
        in_chunks: How many of the first arguments hold rows; where None, those with as many as the
            outermost plate has elements.

    Raises:
        UsageError: If it does.
    """
    plate = plate_of_rows(program.structure)
    assert plate is not None
    size = program.structure.plates[plate].size
    if in_chunks is None:
        rows = size
    else:
        rows = next((n for a in program.args[:in_chunks] if (n := _length(a)) is not None), 0)
    half = min(_MOST, rows // 2)
    if not half:
        return
    head, tail = [*range(half)], [*range(rows - half, rows)]

    def part_of(chosen: list[int], is_first: bool) -> Part:
        def of(value: Any, may: bool) -> Any:
            return _taken(value, chosen) if may and _length(value) == rows else value

        args = tuple(of(a, in_chunks is None or i < in_chunks) for i, a in enumerate(program.args))
        kwargs = {name: of(a, in_chunks is None) for name, a in program.kwargs.items()}
        found = planner.look(args, kwargs, look_only=True)
        assert isinstance(found, Program)
        return Part(found, is_first)

    def said_by(*parts: Part) -> list[tuple[float, float]]:
        each = [part.naturals() for part in parts]
        totals = reduce(added, each) if each[0] else None
        found = [part.summary(0, None, totals) for part in parts]
        return [(s.bound, s.log_evidence) for s in found]

    with same_random_state(), torch.inference_mode(False), torch.enable_grad():
        try:
            (together,) = said_by(part_of([*head, *tail], True))
            rest_part = part_of(tail, False)
            once, rest = said_by(part_of(head, True), rest_part)
            again, _ = said_by(part_of(head, True), rest_part)
        except (PyroEMError, AssertionError) as error:
            # Of so few rows a model may have nothing to say.
            logger.info("a few rows could not be read by themselves: %s", error)
            return
    if once != again:  # it draws random numbers, and its plan says so
        return
    noise = 1e-9 if all(_is_double(t) for t in _numbers(program)) else 1e-4
    for whole, a, b in zip(together, once, rest, strict=True):
        if not math.isclose(whole, a + b, rel_tol=0.0, abs_tol=noise * (1 + abs(a) + abs(b))):
            raise UsageError(
                message(
                    f"plate '{plate}'",
                    f"what the model says of a row depends on the rows beside it, and the data are "
                    f"given {how}.",
                    "the model would see those of one part only: where it centres or scales the data "
                    "(x - x.mean()) or uses their number (len(x)), it would do so in each part anew",
                    [
                        "compute what belongs to all rows before, and pass the result as an argument",
                        "pass all data at once: em.fit(data)",
                    ],
                )
            )


def refuse_rows_that_differ_where_alone(lead: Program, beside: Program) -> None:
    """Refuse chunks of a single row where rows differ in what a single one seems to share.

    A row's own exposure is a number like any other where no second row is beside it, and sums over
    such rows would be those of another model.

    Args:
        lead: The model with the first chunk.
        beside: The model with several rows; the same where the first chunk has several.

    Raises:
        UsageError: If an argument of a site has a value for each row.
    """
    if beside is lead:
        return
    # What reads integrated latents has sums of its own, of one row as of many.
    nested = [g.nested for g in lead.graph.groups if g.nested is not None]
    integrated = {site for latents in nested for g in latents.groups for site in g.members}
    single = {g.members: g for g in for_updates(lead.graph).groups}
    for group in for_updates(beside.graph).groups:
        alone = single.get(group.members)
        if alone is None or group.members[0] in integrated:
            continue
        for name, argument in group.arguments.items():
            own = alone.arguments.get(name)
            # Predictors of data, and what no form is known of, are a row's own in one row as in many.
            binding = alone.bindings.get(name)
            is_own = binding is not None and binding.how in ("affine", "bilinear", "opaque")
            if is_own and group.observed:
                continue
            plates = slice(1, 1 + group.n_plates)
            if own is not None and own.shape[plates] != argument.shape[plates]:
                raise UsageError(
                    message(
                        f"site '{group.members[0]}'",
                        f"its {name} has a value for each row, and the data are given in chunks of a "
                        "single row.",
                        "beside no other row that value looks like one that all rows share",
                        ["give two rows at least to each chunk: Chunks(..., rows=1000)"],
                    )
                )


def _numbers(program: Program) -> Iterator[Tensor]:
    for group in program.graph.groups:
        yield group.value
        yield from group.arguments.values()


def _is_double(t: Tensor) -> bool:
    return not t.is_floating_point() or t.dtype == torch.float64


def _length(value: Any) -> int | None:
    if isinstance(value, Mapping):
        lengths = {_length(v) for v in value.values()}
        return lengths.pop() if len(lengths) == 1 else None
    if isinstance(value, (Tensor, numpy.ndarray)):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _taken(value: Any, rows: list[int]) -> Any:
    if isinstance(value, (Tensor, numpy.ndarray)):
        return value[rows]
    if isinstance(value, Mapping):
        return {k: _taken(v, rows) for k, v in value.items()}
    return type(value)([value[i] for i in rows])
