"""Exact fits that processes make together: the steps of one process with all rows."""

from __future__ import annotations

import signal
from typing import Any

import pyro
import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from pyro_em import Chunks, ExactPosteriorEM
from tests.fitting.group_models import (
    EXACT,
    GUIDES,
    REFUSED,
    are_equal,
    largest_difference,
    numbers_of,
    shard_of,
    table,
)
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow


def fit(name: str, x: Any, **how: Any) -> dict[str, Any]:
    pyro.clear_param_store()
    em = ExactPosteriorEM(
        (EXACT | REFUSED)[name], GUIDES.get(name), missing=how.pop("missing", None)
    )
    result = em.fit(x, **({"max_steps": 3, "tol": 0.0, "progress": False} | how))
    numbers = {
        "evidence": result.log_evidence,
        "bic": result.bic,
        "free": result.num_free_parameters,
        "kernel": result.plan.kernel,
    }
    return numbers_of(result) | numbers


def each_on_shards(sizes: list[int]) -> dict[str, dict[str, Any]]:
    own = shard_of(table(), sizes)
    return {name: fit(name, own, process_group=torch_dist.group.WORLD) for name in EXACT}


def test_steps_are_those_of_one_process() -> None:
    alone = {name: fit(name, table()) for name in EXACT}
    outs = on_ranks(3, each_on_shards, [9, 1, 14])
    for name, one in alone.items():
        for out in (o[name] for o in outs):
            assert are_equal(out, outs[0][name]), name  # bit by bit on all ranks
            assert largest_difference(out, one) < 1e-11, name
            assert out["kernel"] == one["kernel"] and out["free"] == one["free"]
            assert out["rows"] == one["rows"] == 24
            for number in ("evidence", "bic", "elbo"):
                assert out[number] == pytest.approx(one[number], rel=1e-11), name


def varied() -> dict[str, Any]:
    """Fits of two shards of 9 and 15 rows, and what becomes of errors."""
    own, rank = shard_of(table(), [9, 15]), torch_dist.get_rank()
    together = {"process_group": torch_dist.group.WORLD}
    out: dict[str, Any] = {}
    bad = own.clone()
    bad[3, 1] = torch.nan if rank else own[3, 1]
    out["missing"] = fit("lines", bad, missing="nan", **together)
    out["chunks"] = fit("lines", Chunks(own, rows=4 + rank), **together)
    out["labels"] = fit("mixture", own, init={"z": (own[:, 0] > 1).long()}, **together)
    squarem = {"acceleration": "squarem", "max_steps": 40, "tol": 1e-6}
    out["squarem"] = fit("mixture", own, **squarem, **together)
    torch.manual_seed(rank)  # random starts are those of one rank
    out["restarts"] = fit("lines", own, num_restarts=2, max_steps=5, **together)
    out["kmeans"] = fit("mixture", own, init="kmeans", **together)

    def stops(step: Any) -> bool:
        return rank == 0 and step.index == 1

    watched = {"callbacks": stops} if rank == 0 else {}
    out["stopped"] = fit("mixture", own, max_steps=9, **watched, **together)

    def interrupts(step: Any) -> None:
        if rank == 1 and step.index == 1:
            signal.raise_signal(signal.SIGINT)

    out["interrupted"] = fit("mixture", own, max_steps=9, callbacks=interrupts, **together)
    out["errors of"] = caught("mixture", own, callbacks=lambda _: own.add_(rank), **together)
    out["nan"] = caught("mixture", bad, **together)
    out["centred"] = caught("centred", own, **together)
    out["centred in chunks"] = caught("centred", Chunks(own, rows=4), **together)
    out["nan in chunks"] = caught("lines", Chunks(bad, rows=2), **together)
    return out


def caught(*args: Any, **how: Any) -> str:
    try:
        fit(*args, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_whatever_a_fit_does_all_processes_do() -> None:
    x = table()
    bad = x.clone()
    bad[12, 1] = torch.nan
    alone = {
        "missing": fit("lines", bad, missing="nan"),
        "chunks": fit("lines", x),
        "labels": fit("mixture", x, init={"z": (x[:, 0] > 1).long()}),
        "squarem": fit("mixture", x, acceleration="squarem", max_steps=40, tol=1e-6),
    }
    first, second = on_ranks(2, varied)
    for name, one in first.items():
        if isinstance(one, dict):
            assert are_equal(one, second[name]), name
    for name, one in alone.items():
        assert largest_difference(first[name], one) < 1e-9, name
        assert first[name]["evidence"] == pytest.approx(one["evidence"], rel=1e-11)
        assert first[name]["free"] == one["free"] and first[name]["steps"] == one["steps"]
    assert first["stopped"]["status"] == "STOPPED" and first["stopped"]["steps"] == 2
    assert first["interrupted"]["status"] == "INTERRUPTED"
    for name in ("nan", "nan in chunks"):
        assert "row 12 of all data" in first[name] and "row 12 of all data" in second[name]
        assert first[name].startswith("DataError: rank 1 of 2") and "rank 1" not in second[name]
        assert first[name].count("of all data.") == 1
    assert "data were changed during a fit" in first["errors of"]
    for name in ("centred", "centred in chunks"):
        assert "a row depends on the rows beside it" in first[name]
        assert "a row depends on the rows beside it" in second[name]


def errors_of_shards() -> dict[str, Any]:
    own = shard_of(table(), [10, 0, 14])
    return {name: errors(name, own, process_group=torch_dist.group.WORLD) for name in _CURVED}


def errors(name: str, x: Tensor, **how: Any) -> dict[str, Tensor]:
    pyro.clear_param_store()
    em = ExactPosteriorEM(EXACT[name], GUIDES.get(name))
    result = em.fit(x, max_steps=8, progress=False, **how)
    return dict(result.standard_errors())


_CURVED = ("lines", "factors", "outside")


def test_standard_errors_are_those_of_all_rows() -> None:
    alone = {name: errors(name, table()) for name in _CURVED}
    for out in on_ranks(3, errors_of_shards):
        for name, one in alone.items():
            for p in one:
                assert torch.allclose(out[name][p], one[p], rtol=1e-8, equal_nan=True), (name, p)
