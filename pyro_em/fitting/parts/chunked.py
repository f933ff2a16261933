"""A fit to chunks: each chunk is read as the model with these rows, in every pass anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.fitting.parts.chunk_by_chunk import HOW, at_rows, with_rows_beside
from pyro_em.fitting.parts.rows_alone import (
    refuse_rows_that_differ_where_alone,
    refuse_rows_that_see_others,
)
from pyro_em.fitting.session import Session
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.progress import bar_of_rows
from pyro_em.graph.all_data import AllData
from pyro_em.plan.other_rows import OtherRows
from pyro_em.plan.over_all import require_partable
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.reduction.over_parts import OverParts
from pyro_em.sources.chunks import Chunks
from pyro_em.sources.source import Chunk

# Parts of so few data are read once: with their tables they are some hundred MB at most.
_KEPT_BYTES = 2**23


def chunks_in(args: tuple) -> Chunks | None:
    """The chunks that stand for a model's first arguments, if there are any."""
    return args[0] if args and isinstance(args[0], Chunks) else None


def first_arguments(args: tuple) -> tuple:
    """The model's positional arguments, with those of the first chunk."""
    chunks = chunks_in(args)
    if chunks is None:
        return args
    return (*next(chunks.read()).args, *args[1:])


def chunked(
    session: Session,
    lead: Program,
    chunks: Chunks,
    rest: tuple,
    kwargs: dict[str, Any],
    progress: bool | None,
    keeps: bool = True,
    is_online: bool = False,
) -> Parted:
    """The parts of a fit to chunks.

    Args:
        session: Reads the model.
        lead: The model with the first chunk.
        chunks: The data.
        rest: The model's other positional arguments.
        kwargs: Its keyword arguments.
        progress: Whether a bar of each pass is shown.
        keeps: Whether few data are read once.
        is_online: Whether a step is made of a chunk, which sees by itself what rows share.

    Raises:
        PyroEMError: If a chunk cannot be used.
    """
    passes = Passes(session, chunks, rest, kwargs, progress=progress, keeps=keeps)
    require_partable(lead, HOW, adds=not is_online)
    beside = with_rows_beside(session, lead, chunks, rest, kwargs)
    refuse_rows_that_see_others(session.planner, beside, HOW, len(lead.args) - len(rest))
    if not is_online:
        refuse_rows_that_differ_where_alone(lead, beside)
    data = Parted.of(OverParts(passes), Part(noted(lead)), HOW)
    if data.is_quick:
        passes.all_data = data.all_data
    return data


def noted(lead: Program) -> Program:
    """The program of the first chunk, which says what it stands for."""
    return lead.noting(
        "the data are read in chunks in each pass; initial values that the model computes from its "
        "data, and starts, are those of the first chunk."
    )


class Passes:
    """Gives the parts of one pass: of few data those of the first pass, of many data new ones.

    Args:
        session: Reads the model.
        chunks: The data.
        rest: The model's other positional arguments.
        kwargs: Its keyword arguments.
        is_first: Whether what is outside the rows counts with the first chunk.
        begin: The number of the first row of the chunks among all.
        progress: Whether a bar of each pass is shown, where that reads.
        keeps: Whether few data are read once.

    Attributes:
        all_data: What is known of all data, where steps are on sums: the thread that reads then makes
            the kernel of a chunk as well.
    """

    def __init__(
        self,
        session: Session,
        chunks: Chunks,
        rest: tuple,
        kwargs: dict[str, Any],
        is_first: bool = True,
        begin: int = 0,
        progress: bool | None = False,
        keeps: bool = True,
    ) -> None:
        self._keeps = keeps
        self._is_first, self._begin, self._progress = is_first, begin, progress
        self._session, self._chunks, self._rest, self._kwargs = session, chunks, rest, kwargs
        self._kept: list[Part] | None = None
        self._rows = OtherRows(self._look)
        self.all_data: AllData | None = None

    def __call__(self) -> Iterable[Part]:
        """The parts of a pass."""
        return self._shown() if self._kept is None else self._kept

    def _shown(self) -> Iterator[Part]:
        """The parts of a pass that reads, and how far it is."""
        bar = bar_of_rows(self._progress, self._chunks.total)
        try:
            for part in self._read():
                rows = part.rows
                yield part
                del part
                bar.update(rows)
        finally:
            bar.close()

    def _read(self) -> Iterator[Part]:
        kept: list[Part] | None = [] if self._keeps else None
        size = 0
        for number, (chunk, ahead) in enumerate(self._chunks.made_ahead(self._ahead)):
            size += sum(a.nbytes for a in chunk.args if isinstance(a, Tensor))
            is_kept = kept is not None and size <= _KEPT_BYTES
            begin = self._begin + chunk.begin
            with at_rows(begin):
                found = ahead or self._rows.program(self._arguments(chunk), self._kwargs)
            part = Part(found, self._is_first and number == 0, begin, is_kept)
            if kept is not None and is_kept:
                kept.append(part)
            else:
                kept = None
            yield part
            del part, found, ahead, chunk
        self._kept = kept
        self._rows.end_of_pass()

    def _arguments(self, chunk: Chunk) -> tuple:
        return (*chunk.args, *self._rest)

    def _ahead(self, chunk: Chunk) -> tuple[Chunk, Program | None]:
        """A chunk, with its program and kernel where they are made without running the model."""
        if self.all_data is None:
            return chunk, None
        program = self._rows.without_a_run(self._arguments(chunk), self._kwargs)
        if program is None:
            return chunk, None
        program = program.on(replace(program.graph, all_data=self.all_data))
        with torch.no_grad():
            _ = program.kernel
        return chunk, program

    def _look(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        # Steps run without gradients, and what is read of a model is read off its gradients.
        with torch.inference_mode(False), torch.enable_grad():
            found = self._session.planner.look(args, kwargs)
        assert isinstance(found, Program)
        return found
