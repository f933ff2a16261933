"""One thread at a time: a second one is refused by name, and nothing is spoilt."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em import ExactPosteriorEM, PyroEMWarning, TraceExact_ELBO, UsageError, compare
from pyro_em.tracing import turns as _turns
from pyro_em.tracing.whole import forget_lost_plates

X = torch.tensor([-1.3, 0.2, 0.4, 1.9, 2.2], dtype=torch.float64)
REFUSAL = r"another thread \('.*'\) is inside fit; nothing was done"


def model(x):
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def normal(x):
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(h, 1.0), obs=x.mean())


def normal_guide(x):
    pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))


def fit(em: ExactPosteriorEM | None = None, **how: Any) -> Any:
    return (em or ExactPosteriorEM(model)).fit(
        X, **{"max_steps": 5, "tol": 0, "progress": False, **how}
    )


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    """What the process shares is after each test as it was before."""
    validation = {k: v for k, v in pyro.settings.get().items() if k.startswith("validate_")}
    assert len(validation) == 4
    yield
    assert not _PYRO_STACK and not _turns._turns
    assert {k: pyro.settings.get(k) for k in validation} == validation


class Holding:
    """A thread that stands inside a fit until the block ends."""

    def __enter__(self) -> ExactPosteriorEM:
        self.inside, self.go_on = threading.Event(), threading.Event()

        def wait(step):
            self.inside.set()
            assert self.go_on.wait(30)

        self.em = ExactPosteriorEM(model)
        self.pool = ThreadPoolExecutor(1)
        self.result = self.pool.submit(lambda: fit(self.em, callbacks=[wait]))
        assert self.inside.wait(30)
        return self.em

    def __exit__(self, *exception: Any) -> None:
        self.go_on.set()
        self.result.result(30)
        self.pool.shutdown()


def test_two_threads_at_a_barrier() -> None:
    """Each fit is right or refused by name; never anything else, and one always goes through."""
    pyro.clear_param_store()
    alone = fit().log_evidence
    for _ in range(25):
        pyro.clear_param_store()
        barrier, outcomes = threading.Barrier(4), []

        def run(barrier=barrier, outcomes=outcomes):
            em = ExactPosteriorEM(model)
            barrier.wait()
            try:
                outcomes.append(fit(em).log_evidence)
            except UsageError as error:
                assert "another thread" in str(error)
                outcomes.append(None)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 4 and any(o is not None for o in outcomes)
        assert not _PYRO_STACK
    pyro.clear_param_store()
    assert fit().log_evidence == alone


CALLS: dict[str, Callable[[ExactPosteriorEM, Any], Any]] = {
    "fit": lambda em, path: fit(em),
    "plan": lambda em, path: em.plan(X),
    "posterior": lambda em, path: em.posterior(X),
    "elbo": lambda em, path: em.elbo(X),
    "evaluate_loss": lambda em, path: em.evaluate_loss(X),
    "estimate_evidence": lambda em, path: em.estimate_evidence(X, num_particles=2),
    "predictive": lambda em, path: em.predictive(X, num_samples=2),
    "step": lambda em, path: em.step(X),
    "m_step": lambda em, path: em.m_step({"z": torch.ones(5, 2) / 2}, X),
    "steps": lambda em, path: next(em.steps(X)),
    "sort_components": lambda em, path: em.sort_components("z", "loc", X),
    "save": lambda em, path: em.save(path),
    "load": lambda em, path: em.load(path, X),
    "reset": lambda em, path: em.reset(),
    "compare": lambda em, path: compare(em, X),
    "TraceExact_ELBO": lambda em, path: TraceExact_ELBO().loss(model, lambda x: None, X),
    "SVI": lambda em, path: SVI(
        model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), TraceExact_ELBO()
    ).step(X),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_refused_while_another_thread_fits(call: str, tmp_path) -> None:
    em = ExactPosteriorEM(model)
    em.plan(X)
    with Holding():
        before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
        with pytest.raises(UsageError, match=REFUSAL):
            CALLS[call](em, tmp_path / "fit.pt")
        assert all(torch.equal(pyro.param(n), v) for n, v in before.items())
    em.save(tmp_path / "fit.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if call != "compare":
            CALLS[call](em, tmp_path / "fit.pt")


def test_results_that_run_the_model_late_wait_their_turn() -> None:
    result = fit()
    drawn = ExactPosteriorEM(normal, normal_guide, strategy="guide").posterior(X)
    late = [
        lambda: result.posterior,
        result.standard_errors,
        lambda: drawn.sample(1),
        lambda: drawn.mean("h"),
        drawn.mode,
        drawn.entropy,
    ]
    with Holding():
        for call in late:
            with pytest.raises(UsageError, match="another thread"):
                call()
        assert result.bic is not None
    for call in late:
        call()


def test_steps_hold_their_turn_only_while_they_advance() -> None:
    em = ExactPosteriorEM(model)
    path = em.steps(X)
    first = next(path)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: em.evaluate_loss(X)).result(30) < -first.elbo
    with Holding(), pytest.raises(UsageError, match="another thread"):
        next(path)
    assert next(path).index == 1  # a refusal did not end them
    path.close()
    assert list(path) == []


def test_a_callback_may_call_again_and_its_helper_thread_may_not() -> None:
    em, seen = ExactPosteriorEM(model), []
    other = ExactPosteriorEM(normal, normal_guide, strategy="guide")

    def look(step):
        seen.append(float(em.elbo(X)))
        other.step(X)
        with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match=REFUSAL):
            pool.submit(lambda: em.elbo(X)).result(30)

    result = fit(em, max_steps=2, callbacks=[look])
    assert seen[-1] == pytest.approx(result.log_evidence)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run", range(1, 8))
def test_a_model_that_raises_at_any_run_leaves_the_process_whole(kind, run: int) -> None:
    runs = 0

    def raising(x):
        nonlocal runs
        model(x)
        runs += 1
        if runs == run:
            raise kind("stop")

    em = ExactPosteriorEM(raising)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroEMWarning)
        try:
            fit(em, max_steps=2)
            em.elbo(X)
        except (Exception, KeyboardInterrupt, SystemExit):
            assert not _PYRO_STACK
    runs = run  # now it is sound
    assert fit(em, max_steps=3).num_steps == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit).result(30).num_steps == 5


@pytest.mark.parametrize("name", ["mixture", "opaque", "guide"])
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_inside_a_handler_leaves_the_process_whole(monkeypatch, at, name) -> None:
    """It comes when a plate has its dimension and is not on the stack of handlers yet."""

    def opaque(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z].sin(), 1.0), obs=x)

    def plated(x):
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(h.mean(), 1.0), obs=x.mean())

    def plated_guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    pairs = {"mixture": (model,), "opaque": (opaque,), "guide": (plated, plated_guide)}
    em = ExactPosteriorEM(*pairs[name], strategy="guide" if name == "guide" else "exact")
    allocate, calls = _DIM_ALLOCATOR.allocate, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        out = allocate(*args)
        if calls == at:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(_DIM_ALLOCATOR, "allocate", interrupted)
    with contextlib.suppress(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(em, max_steps=3)
    assert _DIM_ALLOCATOR._stack == []
    monkeypatch.undo()
    assert fit(em, max_steps=3).num_steps == 3


def test_what_an_interrupt_of_others_left_is_cleared() -> None:
    _DIM_ALLOCATOR._stack.append("rows")
    assert fit().num_steps == 5
    with pyro.plate("around", 3):
        _DIM_ALLOCATOR._stack.append("inside")  # a handler is there: nothing is ours to clear
        forget_lost_plates()
        assert _DIM_ALLOCATOR._stack == ["around", "inside"]
        _DIM_ALLOCATOR._stack.pop()


def test_a_mode_that_an_interrupt_left_is_left() -> None:
    """The operations of every later run would go through it."""

    def interrupted(x):
        TorchDispatchMode().__enter__()
        pyro.enable_validation(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(ExactPosteriorEM(interrupted))
    assert torch._C._len_torch_dispatch_stack() == 0
    assert fit().num_steps == 5


def test_what_an_interrupt_left_behind_keeps_nobody_out() -> None:
    """An interrupt can come between entering and leaving."""

    def enter() -> None:
        _turns.Alone("fit").__enter__()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(_turns._turns) == 1
    fit()


def test_a_child_of_a_process_that_fits_may_fit() -> None:
    with Holding():
        child = os.fork()
        if child == 0:
            try:
                pyro.clear_param_store()
                os._exit(0 if fit().num_steps == 5 else 1)
            except BaseException:
                os._exit(2)
        for _ in range(300):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        assert done and os.waitstatus_to_exitcode(status) == 0


def nested(x, how):
    inner = ExactPosteriorEM(model)
    if how == "inside":
        inner.posterior(x)
    else:
        with poutine.block():
            inner.posterior(x)
    normal(x)


def test_a_call_inside_a_model_is_refused_by_name() -> None:
    em = ExactPosteriorEM(nested, lambda x, how: normal_guide(x), strategy="guide")
    with pytest.raises(UsageError, match=r"^ExactPosteriorEM: it was called inside a model"):
        em.step(X, "inside")
    assert torch.isfinite(torch.tensor(em.step(X, "hidden")))
    with poutine.trace(), pytest.raises(UsageError, match=r"poutine\.block"):
        fit()


def test_warnings_point_at_the_line_that_called() -> None:
    def symmetric(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    with pytest.warns(PyroEMWarning, match="symmetric") as caught:
        fit(ExactPosteriorEM(symmetric))
    assert {w.filename for w in caught} == {__file__}
