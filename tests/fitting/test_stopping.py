"""When a run stops, on paths that are known: Aitken's estimate, rounding, and runs that only creep."""

import math
from itertools import accumulate

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.stopping import crawls, should_stop

EPS = 2.2e-16


def path_of(gains: list[float]) -> list[float]:
    return list(accumulate(gains, initial=-100.0))


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_a_geometric_path_stops_where_what_is_left_is_below_the_tolerance(rate: float) -> None:
    gains = [rate**i for i in range(4000)]
    path = path_of(gains)
    first = next(i for i in range(1, len(path)) if should_stop(path[: i + 1], 1e-3, EPS))
    # Left after the gain rateⁱ⁻¹: rateⁱ / (1 − rate), the sum of the rest.
    expected = math.floor(math.log(1e-3 * (1 - rate)) / math.log(rate)) + 1
    assert abs(first - expected) <= 1
    assert should_stop(path[: first + 1], 1e-3, EPS) is EMStatus.CONVERGED


def test_gains_that_grow_or_change_sign_do_not_stop_a_run() -> None:
    assert should_stop(path_of([1e-5, 2e-5, 1e-5, 2e-5, 1e-5, 2e-5, 1e-5]), 1e-3, EPS) is None
    assert should_stop(path_of([1e-5, -1e-6, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9]), 1e-3, EPS) is None
    assert should_stop(path_of([0.0] * 8), 1e-3, EPS) is EMStatus.ROUNDING
    assert should_stop(path_of([0.0] * 8), 0.0, EPS) is None


def test_a_run_crawls_once_six_gains_are_below_the_tolerance_whatever_their_ratios() -> None:
    assert crawls(path_of([1.0, *[1e-5, 2e-5] * 3]), 1e-3)
    assert not crawls(path_of([1.0, *[1e-5, 2e-5] * 2, 1e-5]), 1e-3)  # one of the six is 1
    assert not crawls(path_of([1e-5, 2e-5] * 2), 1e-3)
    assert not crawls(path_of([1e-5, 2e-5, 1e-2, 1e-5, 2e-5, 1e-5, 1e-5]), 1e-3)
    assert not crawls(path_of([0.0] * 8), 0.0)


def test_gains_in_succession_are_no_rounding_though_its_worst_case_hides_them() -> None:
    """A float32 objective of -1,720 nats, whose worst case is 1.6e-3: the sum of the rest counts."""
    eps = 2.0**-23
    gains = [1.5e-3 * 0.99**i for i in range(1000)]
    path = [g - 1720.0 for g in path_of(gains)]
    first = next(i for i in range(7, len(path)) if should_stop(path[: i + 1], 1e-3, eps))
    assert sum(gains[first:]) < 1e-3
    assert should_stop(path[: first + 1], 1e-3, eps) is EMStatus.CONVERGED


def test_factor_analysis_of_float32_data_climbs_as_far_as_of_float64() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=g) @ torch.randn(2, 5, generator=g)
    x = x + 0.5 * torch.randn(300, 5, generator=g)

    def model(x: Tensor) -> None:
        W = pyro.param("W", torch.linspace(-0.5, 1, 10).reshape(5, 2).to(x))
        s = pyro.param("s", x.new_ones(5), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ W.T, s).to_event(1), obs=x)

    found = []
    for dtype in (torch.float64, torch.float32):
        pyro.clear_param_store()
        found.append(ExactPosteriorEM(model).fit(x.to(dtype), max_steps=150))
    assert found[1].num_steps == found[0].num_steps
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, abs=2e-3)
