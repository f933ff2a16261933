"""Fits to chunks against the fit to all rows at once, over random models of independent rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_em import Chunks, DegenerateError, ExactPosteriorEM, UsageError
from tests.posteriors.random_models import (
    RANK,
    Builder,
    RandomModel,
    determined,
    seeds,
    short_gradients,
)


class OfRows(Builder):
    """Models in which the rows of plate ``a`` are independent."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model.sizes["a"] = int(self.rng.integers(7, 12))
        inside = tuple(s for s in self.sets if "a" in s)
        self.sets = (inside[0], *inside)


def of_rows(model: RandomModel) -> tuple[Callable[..., Any], list[Tensor]]:
    """The model as a function of its data, rows first, and these."""
    axis = RANK + model.dims["a"]
    names = [n for n, (plates, _) in model.data.items() if "a" in plates]

    def run(*data: Tensor) -> None:
        held = dict(model.data)
        for name, x in zip(names, data, strict=True):
            held[name] = (model.data[name][0], x.movedim(0, axis))
        replace(model, sizes={**model.sizes, "a": len(data[0])}, data=held)()

    return run, [model.data[n][1].movedim(axis, 0) for n in names]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_em.PyroEMWarning")
@hypothesis_settings(max_examples=4)
@given(seed=seeds)
def test_chunks_give_the_sums_of_all_rows(seed: int) -> None:
    model = OfRows(seed).build()
    assume(model.parameters)
    run, data = of_rows(model)
    rows = len(data[0])
    results = []
    for chunks in (None, 3, 7):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(run)
            updates = em.plan(*data).updates
            short = short_gradients(updates)
            # At kinks rounding decides where a search ends that is cut short.
            assume(not short or "Laplace" not in repr(model))
            if short:
                em = ExactPosteriorEM(run, updates=short)
            given = data if chunks is None else [Chunks(*data, rows=math.ceil(rows / chunks))]
            try:
                result = em.fit(*given, max_steps=1, tol=0, progress=False)
            except DegenerateError:
                assume(False)
            except UsageError as error:
                assume("median" not in str(error))  # of all rows at once
                if "chunks of a single row" in str(error):  # what differs between rows is not seen
                    continue
                raise
            results.append((result, set(short), determined(updates, result.params)))
    (whole, searched, known), *others = results
    for found, _, _ in others:
        exact = (
            1e-11 if known.keys() == whole.params.keys() else 1e-9
        )  # what Newton's method leaves
        tolerance = 1e-6 if searched else exact
        after = pytest.approx(list(whole.history.after_m_step), rel=tolerance)
        assert list(found.history) == pytest.approx(list(whole.history), rel=1e-11), model
        assert list(found.history.after_m_step) == after, model
        for name in known.keys() - searched:
            torch.testing.assert_close(
                found.params[name],
                whole.params[name],
                rtol=1e-11,
                atol=1e-11,
                msg=f"{name} of {model}",
            )
