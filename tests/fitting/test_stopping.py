"""When a run stops, on paths that are known: Aitken's estimate, rounding, and runs that only creep."""

import math
from itertools import accumulate

import pytest

from pyro_em.fitting.history import EMStatus
from pyro_em.fitting.stopping import crawls, should_stop

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
