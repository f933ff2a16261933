"""Exact fits that processes make together: the steps of one process with all rows."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch.distributed as torch_dist

from pyro_em import ExactPosteriorEM
from tests.fitting.group_models import (
    EXACT,
    GUIDES,
    are_equal,
    largest_difference,
    numbers_of,
    shard_of,
    table,
)
from tests.ranks import on_ranks


def fit(name: str, x: Any, **how: Any) -> dict[str, Any]:
    pyro.clear_param_store()
    em = ExactPosteriorEM(EXACT[name], GUIDES.get(name), missing=how.pop("missing", None))
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
    outs = on_ranks(4, each_on_shards, [9, 0, 1, 14])
    for name, one in alone.items():
        for out in (o[name] for o in outs):
            assert are_equal(out, outs[0][name]), name  # bit by bit on all ranks
            assert largest_difference(out, one) < 1e-11, name
            assert out["kernel"] == one["kernel"] and out["free"] == one["free"]
            assert out["rows"] == one["rows"] == 24
            for number in ("evidence", "bic", "elbo"):
                assert out[number] == pytest.approx(one[number], rel=1e-11), name
