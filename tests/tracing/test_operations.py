"""The operations of a run, written down: what tells two runs apart, and what does not."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform, ExpTransform
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em.tracing.operations import OperationLog, Unwatched, watching

X = torch.tensor([1.0, -2.0, 3.0])
W = torch.tensor([0.5, 0.25, 1.0])


def notes(run, **given):
    log = OperationLog(given.items())
    with log.noting(2**20):
        run(**given)
    return log.finished()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.sum(-1), lambda x: x.sum(0)),
        (lambda x: x * 1, lambda x: x * 1.0),
        (lambda x: x * 1.0, lambda x: x * True),
        (lambda x: x[0] + x[1], lambda x: x[0] + x[2]),
        (lambda x: (x + 1) * (x + 2), lambda x: (x + 2) * (x + 1)),
        (lambda x: x.exp() - x.abs(), lambda x: x.exp() - x.exp()),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0]), lambda x: x * torch.tensor([1.0, 2.0, 4.0])),
        (lambda x: x * W, lambda x: x * W.flip(0).clone()),
        (lambda x: x.double(), lambda x: x.float()),
        (lambda x: x.mul(2).add_(1), lambda x: x.mul(2).add(1)),
        (lambda x: x.reshape(3, 1) + x, lambda x: x.reshape(1, 3) + x),
        (lambda x: x.max() > 1 and x.exp(), lambda x: x.max() < 1 or x.exp()),
    ],
)
def test_runs_that_differ(one, other):
    assert notes(one, x=X) == notes(one, x=X)
    assert notes(one, x=X) != notes(other, x=X)


def test_numbers_in_arguments_are_no_difference_but_numbers_that_leave_torch_are():
    assert notes(lambda x: x.exp().sum(), x=X) == notes(lambda x: x.exp().sum(), x=2 * X)
    assert notes(lambda x: x.sum().item(), x=X) != notes(lambda x: x.sum().item(), x=2 * X)
    assert notes(lambda x: bool(x.sum() > 0), x=X) == notes(lambda x: bool(x.sum() > 0), x=2 * X)


def test_arguments_are_told_apart_by_name():
    assert notes(lambda x, y: x.exp(), x=X, y=W) != notes(lambda x, y: y.exp(), x=X, y=W)
    assert notes(lambda x, y: x - y, x=X, y=W) != notes(lambda x, y: y - x, x=X, y=W)


def test_memory_that_is_given_back_and_used_again_is_known_by_what_is_in_it_now():
    log = OperationLog([])
    made = torch.tensor([1.0, 2.0])
    before = log.origin(made, is_fresh=True)
    assert log.origin(made, is_fresh=True) == before
    made.copy_(torch.tensor([3.0, 4.0]))  # as if it had been freed and made anew
    assert log.origin(made, is_fresh=True) != before


def test_layouts_that_no_memory_stands_for_equal_nothing():
    sparse = torch.eye(2).to_sparse()
    assert notes(lambda x: x * 2, x=sparse) != notes(lambda x: x * 2, x=sparse)


def test_sites_are_told_apart_by_all_that_their_distributions_hold():
    def noted(fn):
        log = OperationLog([("x", X)])
        log.add_site(
            "x",
            {
                "fn": fn,
                "value": X,
                "mask": None,
                "scale": 1.0,
                "is_observed": True,
                "cond_indep_stack": (),
            },
        )
        return log.finished()

    def moved(by):
        parts = [AffineTransform(by, 2.0), ExpTransform()]
        return dist.TransformedDistribution(dist.Normal(W, 1.0), parts)

    assert noted(moved(0.5)) == noted(moved(0.5))
    assert noted(moved(0.5)) != noted(moved(0.25))
    assert noted(moved(W)) != noted(moved(W.flip(0).clone()))
    assert noted(dist.Normal(W, 1.0).to_event(1)) != noted(dist.Normal(W, 1.0))
    assert noted(dist.Normal(W, 1.0)) != noted(dist.Laplace(W, 1.0))
    assert noted(dist.Normal(W, 1.0).mask(True)) != noted(dist.Normal(W, 1.0).mask(False))


def test_sites_are_told_apart_by_the_operations_that_made_their_tensors():
    def noted(order):
        log, sites = OperationLog([("x", X)]), {}
        with log.noting(2**20):
            made = [X * n for n in range(1, 400)]  # far apart, too
        for i, (arguments, value) in enumerate(order):
            sites[f"x_{i}"] = {
                "fn": dist.Normal(made[arguments], 1.0),
                "value": made[value],
                "mask": None,
                "scale": 1.0,
                "is_observed": True,
                "cond_indep_stack": (),
            }
        log.add_sites(sites)
        return log.finished()

    orders = [
        [(0, 1), (2, 3)],
        [(0, 1), (3, 2)],
        [(0, 1), (3, 4)],
        [(1, 0), (3, 2)],
        [(2, 3), (0, 1)],
        [(0, 398), (2, 3)],
        [(398, 0), (2, 3)],
        [(397, 0), (2, 3)],
    ]
    found = [noted(order) for order in orders]
    assert all(noted(order) == own for order, own in zip(orders, found, strict=True))
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_steps_that_are_alike_share_their_notes():
    log, sites = OperationLog([("x", X)]), {}
    with log.noting(2**20):
        for t in range(150):
            sites[f"x_{t}"] = {
                "fn": dist.Normal(X * 2, 1.0),
                "value": X * 3,
                "mask": None,
                "scale": 1.0,
                "is_observed": True,
                "cond_indep_stack": (),
            }
    log.add_sites(sites)
    own = [entry for entry in log.finished() if entry[0] in sites]
    assert len(own) == 150
    assert (
        len({id(part) for entry in own for part in entry[2:]}) <= 4
    )  # the first step's, the others'


def test_nobody_watches_what_is_of_no_interest_and_others_go_on_watching():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append("other")
            return func(*args, **(kwargs or {}))

    def noted(func, args, kwargs):
        seen.append("own")
        return func(*args, **kwargs)

    seen, x = [], torch.ones(2)
    with watching(noted):
        with pytest.raises(ZeroDivisionError), Unwatched():
            x + x
            raise ZeroDivisionError
        assert not seen
        x + x
        assert seen == ["own"]
        with Other(), Unwatched():
            x + x
        assert seen == ["own", "other", "own"]
    with Unwatched():
        x + x
    assert len(seen) == 3
