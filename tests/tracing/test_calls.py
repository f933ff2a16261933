"""What a run asks of torch, written down: equal notes say as much as equal operations."""

import gc
import weakref
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.distribution import COERCIONS
from torch.overrides import _push_mode
from torch.utils._device import DeviceContext

from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.operations import OperationLog, OutputTooLarge
from pyro_em.tracing.whole import LeftWhole

X = torch.tensor([1.0, -2.0, 3.0])
W = torch.tensor([0.5, 0.25, 1.0])
V = np.array([0.5, 0.25, 1.0])
I = torch.tensor([2, 0, 1])
ONE, TWO = torch.tensor(1), torch.tensor(2)


def notes(run, limit=2**20, beneath=False, **given):
    log = CallLog(given.items(), None, OperationLog(given.items()) if beneath else None)
    with log.noting(limit):
        run(**given)
    return log.finished(), log.is_complete, log.beneath and log.beneath.finished()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.sum(-1), lambda x: x.sum(0)),
        (lambda x: x * 1, lambda x: x * 1.0),
        (lambda x: x * 1.0, lambda x: x * True),
        (lambda x: x[0] + x[1], lambda x: x[0] + x[2]),
        (lambda x: x[1:] + 1, lambda x: x[:2] + 1),
        (lambda x: x[None][[0, 0]], lambda x: x[None][0, 0]),
        (lambda x: (x + 1) * (x + 2), lambda x: (x + 2) * (x + 1)),
        (lambda x: x.exp() - x.abs(), lambda x: x.exp() - x.exp()),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0]), lambda x: x * torch.tensor([1.0, 2.0, 4.0])),
        (lambda x: x * W, lambda x: x * W.flip(0).clone()),
        (lambda x: x[I], lambda x: x[I.flip(0)]),
        (lambda x: x.roll(ONE), lambda x: x.roll(TWO)),
        (lambda x: x[:ONE] * 2, lambda x: x[:TWO] * 2),
        (lambda x: x.double(), lambda x: x.float()),
        (lambda x: x.mul(2).add_(1), lambda x: x.mul(2).add(1)),
        (lambda x: x.reshape(3, 1) + x, lambda x: x.reshape(1, 3) + x),
        (lambda x: x.max() > 1 and x.exp(), lambda x: x.max() < 1 or x.exp()),
        (lambda x: torch.einsum("i,j->ij", x, x), lambda x: torch.einsum("i,j->ji", x, x)),
        (lambda x: torch.as_tensor(V) * x, lambda x: torch.as_tensor(2 * V) * x),
        (lambda x: x.T + x.exp(), lambda x: x.T.exp() + x),
        (lambda x: torch.stack([x, x.exp()]), lambda x: torch.stack([x.exp(), x])),
        (lambda x: sum(x.unbind()), lambda x: sum(x.exp().unbind())),
        (lambda x: torch.var_mean(x)[0] + 1, lambda x: torch.var_mean(x)[1] + 1),
        (lambda x: x * dist.Normal(x, x.exp()).loc, lambda x: x * dist.Normal(x, x.exp()).scale),
        (lambda x: dist.Normal(x, x.exp()), lambda x: dist.Normal(x.exp(), x.exp())),
        (lambda x: dist.Normal(x, 1.0), lambda x: dist.Normal(x, 2.0)),
        (lambda x: dist.Normal(x, x.exp()), lambda x: dist.Laplace(x, x.exp())),
        (lambda x: dist.Normal(x, scale=W), lambda x: dist.Normal(x, scale=2 * W)),
        (lambda x: dist.Categorical(x.exp()), lambda x: dist.Categorical(logits=x.exp())),
        (
            lambda x: dist.StudentT(x.exp(), x)._chi2.df + 1,
            lambda x: dist.StudentT(x.exp(), x).loc + 1,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_runs_that_differ(one, other):
    assert notes(one, x=X)[0] == notes(one, x=X)[0]
    assert notes(one, x=X)[0] != notes(other, x=X)[0]


class Own(dist.Normal):
    """A user's own, which asks torch for more."""

    def __init__(self, loc, scale):
        super().__init__(loc * 2, scale)


def test_a_distribution_is_one_note_where_its_constructor_is_no_users():
    def number(run, **given):
        return len(notes(run, x=X, **given)[0])

    assert number(lambda x: dist.Categorical(x.exp().expand(2, 3))) == 4  # one for what it holds
    assert number(lambda x: Own(x, x.exp())) > 3
    assert notes(lambda x: Own(x, W), x=X) != notes(lambda x: dist.Normal(x, W), x=X)


def test_distributions_are_made_by_those_who_asked_last():
    made, plain = [], notes(lambda x: dist.Normal(x, W), x=X)

    def another(cls, args, kwargs):
        made.append(cls)

    def within(x):
        COERCIONS.append(another)
        try:
            dist.Normal(x, W)
        finally:
            COERCIONS.remove(another)

    seen = notes(within, x=X)
    assert made == [dist.Normal]
    assert COERCIONS == []
    assert seen != plain
    assert seen[1]


def test_a_log_is_freed_with_the_last_who_holds_it():
    log = CallLog([], None, None)
    with log.noting(2**20):
        dist.Normal(X, W)
    gone = weakref.ref(log)
    gc.disable()
    try:
        del log
        assert gone() is None
    finally:
        gc.enable()


def test_numbers_in_arguments_are_no_difference_but_numbers_that_leave_torch_are():
    def differ(run):
        return notes(run, x=X) != notes(run, x=2 * X)

    assert not differ(lambda x: x.exp().sum() * torch.ones(len(x)).cumsum(0))
    assert not differ(lambda x: torch.cov(torch.stack([x, x.square()])).repeat(2, 1, 1) + x.mean())
    assert not differ(lambda x: bool(x.sum() > 0))
    assert differ(lambda x: x.sum().item())
    assert differ(lambda x: float(x[0]))
    assert differ(lambda x: x.tolist())
    assert differ(lambda x: f"{x[0]:.3f}")


def test_what_is_made_where_nobody_looks_is_known_by_its_content():
    """`torch.from_numpy` is no call of a function that can be watched, nor is what numpy does."""

    def through(x, by):
        return torch.from_numpy(by * V) * x

    same = [notes(lambda x: through(x, 2.0), x=X)[0] for _ in range(2)]
    assert same[0] == same[1] != notes(lambda x: through(x, 3.0), x=X)[0]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.clone().numpy(),
        lambda x: x.clone().resize_(2),
        lambda x: x.clone().apply_(abs),
        lambda x: x.clone().requires_grad_().sum().backward(),
        lambda x: torch.autograd.grad((y := x.clone().requires_grad_()).sum(), y),
        lambda x: x.clone().requires_grad_().register_hook(print),
        lambda x: torch.vmap(lambda r: r * 2)(x),
        lambda x: x.clone().untyped_storage(),
        lambda x: [x + 1 for _ in range(5000)],
    ],
)
def test_what_nobody_sees_shows_nothing(run):
    assert not notes(run, x=X)[1]


def test_memory_stays_alive_until_the_run_is_over_and_no_longer():
    """No address stands for two tensors, whatever becomes of the first."""
    log, at = CallLog([("x", X)]), set()
    with log.noting(2**20):
        for n in range(50):
            made = X * n
            with log.aside():
                at.add(made.untyped_storage().data_ptr())
            made.set_(X) if n % 2 else setattr(made, "data", X)
    assert len(at) == 50
    held = len(log._alive)
    log.add_sites({})
    assert held > 50 and not log._alive


def test_an_output_above_the_limit_is_refused():
    with pytest.raises(OutputTooLarge):
        notes(lambda x: x[:, None] * torch.ones(1000), limit=2000, x=X)
    notes(lambda x: x[:, None].expand(3, 1000), limit=2000, x=X)


def test_both_logs_see_one_run_and_what_is_aside_is_in_neither():
    def run(x):
        made = x * 2
        return made + torch.cov(torch.stack([x, made]))[0, 0]

    log, elsewhere = CallLog([("x", X)], None, OperationLog([("x", X)])), DeviceContext("cpu")
    with log.noting(2**20):
        run(X)
        with log.aside():
            X.exp()
        with elsewhere, log.aside():
            X.exp()
    calls, complete, operations = notes(run, beneath=True, x=X)
    assert complete and log.finished() == calls == notes(run, x=X)[0]
    assert log.beneath.finished() == operations
    assert len(operations) > 2 * len(calls)


def test_a_mode_that_an_interrupt_left_behind_is_taken_off():
    with pytest.raises(KeyboardInterrupt), LeftWhole():
        _push_mode(DeviceContext("cpu"))
        raise KeyboardInterrupt
    assert not torch._C._len_torch_function_stack()


def test_sites_are_told_apart_by_the_calls_that_made_their_tensors():
    def noted(first, second):
        log = CallLog([("x", X)])
        with log.noting(2**20):
            made = [X * 2, X * 3, X.T * 4]
        site = {"mask": None, "scale": 1.0, "is_observed": True, "cond_indep_stack": ()}
        log.add_sites({"a": {**site, "fn": dist.Normal(made[first], 1.0), "value": made[second]}})
        return log.finished()

    assert noted(0, 1) == noted(0, 1)
    assert len({str(noted(i, j)) for i in range(3) for j in range(3)}) == 9


@pytest.mark.slow
def test_what_is_compiled_is_seen_and_the_noting_is_not_compiled(recwarn):
    import torch._dynamo

    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    shifts = [False]
    compiled = torch.compile(
        lambda x: x.roll(1) * 2 if shifts[0] else x.sin() * 2, backend="aot_eager"
    )
    found = []
    for shifts[0] in (False, False, True, False):
        log = CallLog([("x", X)])
        with log.noting(2**20):
            compiled(X)
        assert log.is_complete
        found.append(log.finished())
    assert found[0] == found[1] == found[3] != found[2]
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] <= 8, "the noting is traced too"


class Hiding(torch.Tensor):
    """A tensor that refuses to be looked at, as the steps of a loop together do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"'{func}' was called on it")


def test_tensors_of_other_classes_are_not_looked_at_and_nothing_is_shown() -> None:
    log = CallLog([])
    hiding = torch.ones(3).as_subclass(Hiding)
    assert log.origin(hiding) != log.origin(hiding)
    assert not log.is_complete
