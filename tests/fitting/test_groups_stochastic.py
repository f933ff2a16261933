"""Stochastic steps that processes make together: those of one process with all rows."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as torch_dist
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ClosedForm, ExactPosteriorEM
from tests.fitting.group_models import (
    are_equal,
    clicks,
    guide_of_clicks,
    guide_of_rates,
    largest_difference,
    numbers_of,
    rates,
    rows_of_guide,
    shard_of,
)
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

NOISE = torch.tensor(0.5, dtype=torch.float64)


def world() -> Any:
    return torch_dist.group.WORLD


def rows() -> Tensor:
    return torch.linspace(0.5, 3.0, 12, dtype=torch.float64)


def fit(model: Any, guide: Any, x: Tensor, noise: Tensor = NOISE, **how: Any) -> dict[str, Any]:
    pyro.clear_param_store()
    optim, updates = how.pop("optim", None), how.pop("updates", None)
    em = ExactPosteriorEM(model, guide, optim, updates=updates)
    how = {"max_steps": 20, "seed": 3, "progress": False, "process_group": world()} | how
    return numbers_of(em.fit(x, noise, **how))


def refused(*args: Any, **how: Any) -> str:
    try:
        fit(*args, **how)
    except Exception as error:
        return str(error)
    return ""


def switches(x: Tensor, noise: Tensor) -> None:
    """A coin per row whose two rates keep their closed form on batches."""
    p = pyro.param("p", torch.tensor([0.6, 0.5]), constraint=constraints.unit_interval)
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        coin = pyro.sample("coin", dist.Bernoulli(torch.sigmoid(bias))).long()
        pyro.sample("heads", dist.Binomial(10, p[coin]), obs=(3 * x).round())


def guide_of_switches(x: Tensor, noise: Tensor) -> None:
    pyro.sample("bias", dist.Normal(pyro.param("at", torch.tensor(0.1)), 0.2))


def all_fits(sizes: list[int]) -> dict[str, Any]:
    x, rank = rows(), torch_dist.get_rank()
    own = shard_of(x, sizes)

    def stops(step: Any) -> bool:
        return step.index == 4 and rank == len(sizes) - 1

    out: dict[str, Any] = {}
    out["stopped"] = fit(clicks, guide_of_clicks, own, callbacks=stops)
    out["closed form"] = fit(
        switches, guide_of_switches, own, updates={"p": ClosedForm()}, max_steps=4
    )
    held_out = (x[:3], NOISE)
    out["batches"] = fit(
        rates, guide_of_rates, own, batch_size=2, num_epochs=2, validation=held_out
    )
    return out


def test_processes_step_as_one_does() -> None:
    one = on_ranks(1, all_fits, [12])[0]
    outs = on_ranks(3, all_fits, [11, 0, 1])
    for out in outs:
        for name in out:
            assert are_equal(out[name], outs[0][name]), name  # bit by bit on all ranks
            assert out[name]["rows"] == 12
        # What is outside the rows is drawn from one random state, whatever their number.
        for name in ("closed form", "stopped"):
            assert largest_difference(out[name], one[name]) < 1e-10, name
            assert out[name]["elbo"] == pytest.approx(one[name]["elbo"], rel=1e-10)
        assert out["stopped"]["steps"] == 5 and out["stopped"]["status"] == "STOPPED"
        assert out["batches"]["steps"] == 2 * -(-11 // 2)


def refusals() -> dict[str, str]:
    x, rank = rows(), torch_dist.get_rank()
    own = shard_of(x, [6, 6])
    out: dict[str, str] = {}
    out["constant"] = refused(clicks, guide_of_clicks, own, NOISE + rank)
    out["keyword"] = refused(clicks, guide_of_clicks, own, max_steps=3 + rank)
    out["same data"] = refused(lambda noise, _: clicks(x, noise), guide_of_same, NOISE)
    out["rows of a guide"] = refused(rates, rows_of_guide, own)
    out["autoguide"] = refused(rates, AutoNormal, own)
    out["num_data"] = refused(clicks, guide_of_clicks, own, num_data=12)
    bad = own.clone()
    bad[2] = torch.nan if rank else own[2]
    out["nan"] = refused(clicks, guide_of_clicks, bad)

    def breaks(step: Any) -> bool:
        if rank == 1 and step.index == 3:
            raise LookupError("in a callback")
        return False

    out["callback"] = refused(clicks, guide_of_clicks, own, callbacks=breaks)
    out["after all"] = str(fit(clicks, guide_of_clicks, own, max_steps=2)["steps"])
    return out


def guide_of_same(noise: Tensor, _: Tensor) -> None:
    guide_of_clicks(noise, noise)


def test_what_cannot_be_shared_out_is_refused_on_all_ranks() -> None:
    first, second = on_ranks(2, refusals)
    for out in (first, second):
        assert "argument 'noise' differs: rank 1 has another than rank 0" in out["constant"]
        assert "fit(..., max_steps=) differs" in out["keyword"]
        assert "no argument has the 12 rows" in out["same data"]
        assert "parameter 'a': it has one element for each of the 6" in out["rows of a guide"]
        assert "another process does not fit it" in out["autoguide"]
        assert "num_data" in out["num_data"]
        assert "in a callback" in out["callback"]
        assert out["after all"] == "2"
    assert "NaN" in second["nan"] and "rank 1 of 2" in first["nan"]
