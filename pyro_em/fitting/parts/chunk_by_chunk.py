"""Questions to a model whose data are chunks: parts for what adds up, answers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError, UsageError, message, of_rows
from pyro_em.fitting.parts.rows_alone import refuse_rows_that_see_others
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.session import Session
from pyro_em.plan.over_all import require_partable
from pyro_em.plan.part import Part, plate_of_rows
from pyro_em.plan.program import Program
from pyro_em.posteriors.conjugates.shared_conjugates import OutsideRows, shared_blocks
from pyro_em.reduction.trees import added
from pyro_em.sources.chunks import Chunks

HOW = "in chunks"

_FEW = 4  # chunks of a single row that are looked at together

T = TypeVar("T")


def parts_of(
    session: Session, chunks: Chunks, rest: tuple, kwargs: dict[str, Any], method: str
) -> Iterator[Part]:
    """One pass over the parts, for a question at the current parameters.

    Args:
        session: Reads the model.
        chunks: The data.
        rest: The model's other positional arguments.
        kwargs: Its keyword arguments.
        method: What was called.

    Raises:
        PyroEMError: If a chunk cannot be used, or the rows are not independent.
    """
    for chunk in chunks.read():
        with at_rows(chunk.begin):
            found = session.look((*chunk.args, *rest), kwargs, look_only=True)
            program = refuse_a_guide(found, method, _OF_CHUNKS)
            require_partable(program, HOW, adds=method == "score")
            if not chunk.begin:
                beside = with_rows_beside(session, program, chunks, rest, kwargs)
                refuse_rows_that_see_others(session.planner, beside, HOW, len(chunk.args))
        yield Part(program, not chunk.begin, chunk.begin)


class SharedByChunks:
    """What all chunks say of conjugate latents outside the rows, for questions chunk by chunk.

    Args:
        session: Reads the model.
        chunks: The data.
        rest: The model's other positional arguments.
        kwargs: Its keyword arguments.
    """

    def __init__(
        self, session: Session, chunks: Chunks, rest: tuple, kwargs: dict[str, Any]
    ) -> None:
        self._session, self._chunks, self._rest, self._kwargs = session, chunks, rest, kwargs
        self._is_first, self._totals = True, dict[str, Tensor]()

    def of_next(self, program: Program) -> OutsideRows | None:
        """What the next chunk is told; None where no such latent is.

        Args:
            program: The model with that chunk.
        """
        plate, is_first = plate_of_rows(program.structure), self._is_first
        self._is_first = False
        if plate is None or not shared_blocks(program.graph, plate):
            return None
        if is_first:
            for chunk in self._chunks.read():
                with at_rows(chunk.begin):
                    args = (*chunk.args, *self._rest)
                    found = self._session.look(args, self._kwargs, look_only=True)
                    assert isinstance(found, Program)
                    own = found.naturals(plate, not chunk.begin)
                self._totals = added(self._totals, own) if self._totals else own
        return OutsideRows(plate, is_first, self._totals)


def with_rows_beside(
    session: Session, program: Program, chunks: Chunks, rest: tuple, kwargs: dict[str, Any]
) -> Program:
    """A program with rows to compare: that of the first chunks together where one has a single row.

    Args:
        session: Reads the model.
        program: The model with the first chunk.
        chunks: The data.
        rest: The model's other positional arguments.
        kwargs: Its keyword arguments.
    """
    first = program.args[: len(program.args) - len(rest)]
    if not all(isinstance(a, Tensor) and len(a) == 1 for a in first):
        return program
    few = [chunk.args for chunk in islice(chunks.read(), _FEW)]
    together = tuple(torch.cat(rows) for rows in zip(*few, strict=True))
    with torch.inference_mode(False), torch.enable_grad():
        try:
            found = session.planner.look((*together, *rest), kwargs, look_only=True)
        except PyroEMError:  # what is wrong with a later chunk is said when it is read
            return program
    return found if isinstance(found, Program) else program


def answers(ask: Callable[[tuple], T], chunks: Chunks, rest: tuple) -> Generator[T, None, None]:
    """What one question answers, chunk by chunk.

    Args:
        ask: From the model's positional arguments to the answer.
        chunks: The data.
        rest: The model's other positional arguments.
    """
    for chunk in chunks.read():
        with at_rows(chunk.begin):
            answer = ask((*chunk.args, *rest))
        yield answer
        del answer


@contextmanager
def at_rows(begin: int) -> Iterator[None]:
    """A block whose errors name the place of its rows among all rows, where that is not the beginning.

    Args:
        begin: The number of the first row.
    """
    try:
        yield
    except PyroEMError as error:
        if not begin:
            raise
        raise of_rows(error, begin) from error


def refuse_q_of_chunks(q: Any) -> None:
    """Refuse a distribution over the latents of all rows.

    Raises:
        UsageError: If it is given.
    """
    if q is None:
        return
    raise UsageError(
        message(
            "elbo",
            "q was given together with Chunks.",
            "q is as large as the data: it is that of the rows of one call",
            ["leave q out: it is the E-step then", "ask chunk by chunk: em.elbo(rows, q=q)"],
        )
    )


_OF_CHUNKS = (
    "draws of what all rows share would be others in each chunk",
    ["ask for rows that fit into memory, as arrays", "em.fit(DataLoader(...)) trains a guide"],
)
