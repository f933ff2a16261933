"""Whole calls beside their peers: processor time, reading the model included, in a warm process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from pyro_em import ExactPosteriorEM
from tests.benchmarks import models
from tests.benchmarks.cases import blobs, chain_start, digits, factor_data
from tests.benchmarks.series import by_numpy, e_step, local_level_fit

Run = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """One row of the table.

    Attributes:
        name: The call.
        peer: What it is set against.
        at_most: What ours may take, in times of the peer's.
        make: Builds (ours, theirs).
        rounds: Interleaved rounds; the least time of each side counts.
    """

    name: str
    peer: str
    at_most: float
    make: Callable[[], tuple[Run, Run]]
    rounds: int = 7


@dataclass(frozen=True)
class Taken:
    """Processor seconds of a call and of its peer, in each round."""

    call: Call
    ours: tuple[float, ...] = field(default=())
    theirs: tuple[float, ...] = field(default=())
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Ours over theirs, of the quickest rounds."""
        return min(self.ours) / min(self.theirs)

    @property
    def middle(self) -> float:
        """The same of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


def seconds(run: Run) -> float:
    """Processor seconds."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(call: Call, rounds: int | None = None) -> Taken:
    """Both sides in turn; what is not there is a failure with its reason."""
    try:
        with pyro.validation_enabled(True):  # as a user finds it
            ours, theirs = call.make()
            ours(), theirs()
            both = [(seconds(ours), seconds(theirs)) for _ in range(rounds or call.rounds)]
    except Exception as error:  # the table goes on, and says so
        return Taken(call, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return Taken(call, *zip(*both, strict=True))


HEAD = "| whole call | against | at most | ratio | of medians | ours, theirs | note |"


def line(taken: Taken) -> str:
    """One row of the table in Markdown."""
    c = taken.call
    if taken.failure:
        return f"| {c.name} | {c.peer} | {c.at_most:.3g} | - | - | - | {taken.failure} |"
    times = f"{1e3 * min(taken.ours):.3g} ms, {1e3 * min(taken.theirs):.3g} ms"
    note = "" if taken.ratio <= c.at_most else "above target"
    shown = f"**{taken.ratio:.2f}** | {taken.middle:.2f}"
    return f"| {c.name} | {c.peer} | {c.at_most:.3g} | {shown} | {times} | {note} |"


def fit(model: Callable[..., None], *args: Any, steps: int) -> Run:
    """A fit by somebody who has not fitted this model before."""

    def run() -> None:
        pyro.clear_param_store()
        ExactPosteriorEM(model).fit(*args, max_steps=steps, tol=0, progress=False)

    return run


def again(model: Callable[..., None], *args: Any, steps: int) -> Run:
    """The same fit again."""
    em = ExactPosteriorEM(model)

    def run() -> None:
        pyro.clear_param_store()
        em.fit(*args, max_steps=steps, tol=0, progress=False)

    return run


def trace(model: Callable[..., None], *args: Any) -> Run:
    """One plain run of a model in Pyro."""
    return lambda: poutine.trace(model).get_trace(*args)


def gaussian(N: int, D: int, K: int, ours: Callable[..., Run] = fit) -> Callable[[], Any]:
    """Five steps against scikit-learn's five, its start included."""

    def make() -> tuple[Run, Run]:
        from sklearn.mixture import GaussianMixture

        x = blobs(N, D, K)
        X = x.numpy()

        def theirs() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                GaussianMixture(K, tol=0, max_iter=5, random_state=0).fit(X)

        return ours(models.mixture, x, K, steps=5), theirs

    return make


def score() -> tuple[Run, Run]:
    """New rows of a form that was seen."""
    x = blobs(400, 2, 2)
    em = ExactPosteriorEM(models.mixture)
    pyro.clear_param_store()
    em.fit(x[:200], 2, max_steps=5, tol=0, progress=False)
    shift = iter(range(10**9))
    return (
        lambda: em.score(x[200:] + 1e-3 * next(shift), 2),
        lambda: poutine.trace(models.mixture).get_trace(x[200:] + 1e-3 * next(shift), 2),
    )


def symbols(T: int, K: int = 10, S: int = 16) -> tuple[Any, ...]:
    """Data and starts of a chain with categorical emissions."""
    x = torch.randint(0, S, (T,), generator=torch.Generator().manual_seed(0))
    return x, K, S, chain_start(K, S)


def loop(T: int, what: str) -> Callable[[], Any]:
    """A chain written as a loop against one plain run of its model."""

    def make() -> tuple[Run, Run]:
        args, model = symbols(T), models.symbols_chain
        if what == "fit":
            ours = fit(model, *args, steps=10)
        elif what == "fit again":
            ours = again(model, *args, steps=10)
        else:
            pyro.clear_param_store()
            em = ExactPosteriorEM(model)
            ours = lambda: getattr(em, what)(*args)  # noqa: E731
        return ours, trace(model, *args)

    return make


def without_loop(T: int) -> Callable[[], Any]:
    """Twenty steps on a chain without a loop against hmmlearn's twenty."""

    def make() -> tuple[Run, Run]:
        from hmmlearn.hmm import CategoricalHMM

        x, K, S, start = symbols(T)

        def theirs() -> None:
            model = CategoricalHMM(
                K, n_iter=20, tol=-np.inf, init_params="", implementation="scaling"
            )
            model.n_features = S
            model.startprob_, model.transmat_ = start["pi"].numpy(), start["A"].numpy()
            model.emissionprob_ = start["E"].numpy()
            model.fit(x.numpy().reshape(-1, 1))

        return fit(models.vectorized_symbols, x, K, S, start, steps=20), theirs

    return make


def planned(T: int, few: int) -> Callable[[], Any]:
    """Planning a long chain without a loop against planning a short one."""

    def plan(T: int) -> Run:
        args = symbols(T)
        return lambda: ExactPosteriorEM(models.vectorized_symbols).plan(*args)

    return lambda: (plan(T), plan(few))


_FIRST = """
import time, pyro, torch
torch.set_num_threads(1)
import pyro_em
from tests.benchmarks import calls, models
from tests.benchmarks.cases import blobs
pyro.enable_validation(True)
args = {args}
for _ in range(2):
    pyro.clear_param_store()
    begin = time.process_time()
    pyro_em.ExactPosteriorEM(models.{model}).fit(*args, max_steps=5, tol=0, progress=False)
    print(time.process_time() - begin)
"""

FIRST = {
    "GMM, N=200 D=2 K=2": _FIRST.format(model="mixture", args="(blobs(200, 2, 2), 2)"),
    "loop chain, T=100 K=10": _FIRST.format(model="symbols_chain", args="calls.symbols(100)"),
}


def first_calls() -> Iterator[str]:
    """What the first fit of a fresh process takes above the second."""
    for name, script in FIRST.items():
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        first, second = map(float, done.stdout.split())
        yield f"* {name}: {first:.3f} s, then {second:.3f} s; {first - second:.2f} of at most 0.5 s"


def factors(data: Callable[[], torch.Tensor], q: int, steps: int) -> Callable[[], Any]:
    """As many steps of factor analysis as scikit-learn takes, by exact singular values.

    Args:
        data: Makes the rows.
        q: How many factors there are.
        steps: How many steps are taken; as many as it takes by default where that is zero.
    """

    def make() -> tuple[Run, Run]:
        from sklearn.decomposition import FactorAnalysis

        x = data()
        X = x.numpy()
        how = {"tol": 0, "max_iter": steps} if steps else {}

        def theirs() -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = FactorAnalysis(q, svd_method="lapack", **how)
                return int(peer.fit(X).n_iter_)

        return fit(models.factors, x, q, steps=theirs()), theirs

    return make


CALLS = (
    Call("GMM fit, N=200 D=2 K=2", "scikit-learn", 3.0, gaussian(200, 2, 2), 30),
    Call("the same again", "scikit-learn", 3.0, gaussian(200, 2, 2, again), 30),
    Call("GMM fit, N=1,000 D=5 K=5", "scikit-learn", 2.0, gaussian(1000, 5, 5), 20),
    Call("GMM fit, N=10,000 D=8 K=8", "scikit-learn", 1.0, gaussian(10_000, 8, 8)),
    Call("GMM fit, N=100k D=16 K=32", "scikit-learn", 0.15, gaussian(100_000, 16, 32), 2),
    Call("factor analysis fit, digits q=10", "scikit-learn", 0.2, factors(digits, 10, 0), 10),
    Call(
        "factor analysis fit, 20k x 64 q=10, 50 steps",
        "scikit-learn",
        0.2,
        factors(lambda: factor_data(20_000, 64, 10), 10, 50),
        2,
    ),
    Call("score of 200 new rows", "one trace", 2.0, score, 30),
    Call("loop chain fit, T=1,000 K=10", "one trace", 5.0, loop(1000, "fit"), 3),
    Call("the same again", "one trace", 5.0, loop(1000, "fit again"), 3),
    Call("loop chain plan, T=1,000 K=10", "one trace", 5.0, loop(1000, "plan"), 3),
    Call("loop chain posterior, T=1,000 K=10", "one trace", 2.0, loop(1000, "posterior"), 3),
    Call("chain without a loop, fit, T=1,000 K=10", "hmmlearn", 3.0, without_loop(1000), 7),
    Call("chain without a loop, fit, T=100k K=10", "hmmlearn", 0.5, without_loop(100_000), 2),
    Call("chain without a loop, plan, T=100k", "itself at T=100", 1.5, planned(100_000, 100)),
    Call("local level, 20 steps, T=1,000", "statsmodels", 1.0, local_level_fit(1000, 20), 5),
    Call("Kalman E-step, T=1,000 n=4 D=4", "statsmodels", 0.05, e_step(1000, 4, 4), 10),
    Call("the same without numba", "statsmodels", 0.2, by_numpy(e_step(1000, 4, 4)), 10),
    Call("Kalman E-step, T=10,000 n=4 D=4", "statsmodels", 0.05, e_step(10_000, 4, 4), 5),
    Call("Kalman E-step, T=1,000 n=10 D=20", "statsmodels", 1 / 15, e_step(1000, 10, 20), 10),
    Call("Kalman E-step, 1,000 series of 50", "statsmodels", 0.02, e_step(50, 4, 4, 1000), 3),
)
