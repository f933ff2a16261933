"""compare: methods of inference on one model, from one start, with every cost counted.

EM, gradient ascent on the exact evidence, gradient ascent on a guide's bound and L-BFGS all raise

    log p(x; θ) = ELBO(q, θ) + KL(q ‖ p(z | x; θ)),

so that the exact evidence at each one's parameters, where it can be summed, is a fair measure of
all. Every contender runs in a parameter scope of its own and begins at equal model parameters. A
method with a learning rate gets a sweep of rates and several seeds: its best rate is shown, and the
seconds of the sweep are reported beside those of the shown run. Clocks stand still while the
evidence is evaluated.

Source: Xu and Jordan (1996), "On convergence properties of the EM algorithm for Gaussian mixtures":
EM is fast where components overlap little and slow where they overlap much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import pyro
from tqdm.auto import tqdm

from pyro_em.arguments import number, whole
from pyro_em.comparison.contenders import (
    Contender,
    check_contenders,
    models_of,
    standard_contenders,
)
from pyro_em.comparison.contest import Contest, Limits, Method
from pyro_em.comparison.curves import Curve
from pyro_em.comparison.sweep import Sweep, best_rate, run_sweep
from pyro_em.comparison.table import Comparison, Row
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.fitting.from_arrays import read_for
from pyro_em.fitting.preconditions import refuse_a_loader
from pyro_em.plan.wishes import check_call, check_collisions
from pyro_em.sources.given import Given
from pyro_em.tracing.scopes import Keeper, common_start, store_state
from pyro_em.tracing.turns import alone

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)

SEEDS = (0, 1, 2, 3, 4)

KEYWORDS = (
    "max_steps",
    "svi_steps",
    "seconds",
    "tol",
    "tolerance",
    "learning_rates",
    "seeds",
    "progress",
)


@alone("compare")
def compare(
    contenders: Mapping[str, Contender] | ExactPosteriorEM,
    *args: Any,
    max_steps: int = 1000,
    svi_steps: int = 1000,
    seconds: float | None = None,
    tol: float = 1e-6,
    tolerance: float = 0.01,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = SEEDS,
    progress: bool | None = None,
    **kwargs: Any,
) -> Comparison:
    """Run several methods of inference on one model from the same start.

    The start is what a fit would begin with: values in the param store and in modules, else those
    in the model. Parameters of guides begin anew from each seed; a guide that is a module which
    holds parameters already begins with these. Afterwards the param store, modules and the random
    state are as before.

    A method with an optimiser runs once per learning rate and seed; where the best rate is at an
    edge of the sweep, up to two rates beyond it are tried. Where two seeds give the same path to
    the bit, one run stands for all of them.

    Args:
        contenders: From labels to `ExactPosteriorEM`, ``pyro.infer.SVI`` or `Direct`; or one
            `ExactPosteriorEM` with an exact posterior, for which `standard_contenders` are made.
        *args: The model's arguments.
        max_steps: Steps of EM and evaluations of L-BFGS at most.
        svi_steps: Steps of each run of a method with a learning rate.
        seconds: Wall-clock limit of each run; a run ends with the step that passes it.
        tol: Where EM stops: estimated remaining gain in nats, as in ``fit``.
        tolerance: Nats per datum within which a run has reached the best.
        learning_rates: Of the sweep; a contender's own learning rate is added.
        seeds: One run each, for methods with random numbers.
        progress: Whether to show a bar; by default where the output is a terminal.
        **kwargs: The model's keyword arguments.

    Returns:
        A table with a row per contender, the curves, and a plot. A contender that fails is a row
        with the reason.

    Raises:
        UsageError: If something is no contender, contenders have different models, or a single one
            has no exact posterior.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_em import Direct
        >>> def model(x):
        ...     mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        ...     with pyro.plate("n", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...         pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
        >>> x = torch.tensor([-2.0, -1.5, 2.0, 2.5], dtype=torch.float64)
        >>> pair = {"exact EM": ExactPosteriorEM(model), "L-BFGS": Direct()}
        >>> found = compare(pair, x, progress=False)
        >>> [row.contender for row in found.table], len(pyro.get_param_store())
        (['exact EM', 'L-BFGS'], 0)
        >>> abs(found["exact EM"].final_evidence - found["L-BFGS"].final_evidence) < 1e-4
        True
    """
    alone = contenders if isinstance(contenders, ExactPosteriorEM) else None
    if isinstance(contenders, ExactPosteriorEM):
        contenders = standard_contenders(contenders)
    rates, seeds = _listed("learning_rates", learning_rates), _listed("seeds", seeds)
    rates = tuple(number("compare", "learning_rates", r) for r in rates)
    seeds = tuple(whole("compare", "seeds", s, None) for s in seeds)
    limits = Limits(
        whole("compare", "max_steps", max_steps, None),
        whole("compare", "svi_steps", svi_steps, None),
        None if seconds is None else number("compare", "seconds", seconds),
        number("compare", "tol", tol),
    )
    tolerance = number("compare", "tolerance", tolerance)
    check_contenders(contenders)
    refuse_a_loader(args, kwargs)
    _check_numbers(limits, tolerance, rates, seeds)
    models = models_of(contenders)
    args, kwargs = read_for(Given(), next(iter(models.values())), args, kwargs)
    for model in models.values():
        check_collisions(model, args, KEYWORDS, "compare")
        check_call(model, args, kwargs, "compare")
    origin, random_state = store_state(), pyro.util.get_rng_state()
    keeper = Keeper([*contenders.values(), *origin["params"].values()])
    try:
        start, copies = common_start(models, args, kwargs, origin)
        keeper.add(copies)
        contest = Contest(keeper, start, next(iter(models.values())), args, kwargs, limits)
        contest.look(contenders.values())
        if alone is not None and contest.is_stochastic(alone):
            raise UsageError(_no_standard_contenders())
        methods = [contest.method(n, c, models[n], rates, seeds) for n, c in contenders.items()]
        total = sum(len(m.rates) * len(m.seeds) for m in methods)
        disable = None if progress is None else not progress
        with tqdm(total=total, disable=disable, desc="compare", unit="run") as bar:
            sweeps = {m.label: run_sweep(contest, m, bar) for m in methods}
    finally:
        keeper.restore()
        pyro.util.set_rng_state(random_state)
    return _comparison(methods, sweeps, contest, tolerance)


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    """Several numbers; one by itself is one of them."""
    if (
        isinstance(value, Iterable)
        and not isinstance(value, str)
        and bool(getattr(value, "ndim", True))
    ):
        return tuple(value)
    return (value,)


def _no_standard_contenders() -> str:
    return message(
        "compare",
        "the guide draws latents of this model, so that there is no exact EM to compare with.",
        "the standard contenders raise or need an exact evidence",
        [
            "pass a mapping: {'sums inside': em, 'guide for all': ExactPosteriorEM(model, guide, "
            "strategy='guide')}",
        ],
    )


def _check_numbers(
    limits: Limits, tolerance: float, rates: tuple[float, ...], seeds: tuple[int, ...]
) -> None:
    max_steps, svi_steps, seconds = limits.max_steps, limits.svi_steps, limits.seconds
    if min(max_steps, svi_steps) < 1 or not tolerance > 0:
        what = f"max_steps={max_steps}, svi_steps={svi_steps}, tolerance={tolerance}."
        raise UsageError(message("compare", what, "all of them are positive"))
    if seconds is not None and not seconds > 0:
        raise UsageError(message("compare", f"seconds={seconds}.", "no step could be made"))
    if not rates or not seeds or any(not r > 0 for r in rates) or len(set(seeds)) < len(seeds):
        raise UsageError(
            message(
                "compare",
                f"learning_rates={rates}, seeds={seeds}.",
                "a sweep needs positive learning rates and different seeds",
            )
        )


def _comparison(
    methods: Sequence[Method], sweeps: Mapping[str, Sweep], contest: Contest, tolerance: float
) -> Comparison:
    """Choose the learning rates, find the best, fill the table."""
    by_evidence = contest.has_evidence
    top = _top(sweeps, by_evidence)
    best = math.nan if top == -math.inf else top
    target = best - tolerance * contest.num_rows
    shown, rows = {}, []
    for method in methods:
        sweep = sweeps[method.label]
        rate = best_rate(sweep, by_evidence)
        # Where one run stands for all seeds, its twin only proved that.
        curves = sweep[rate][:1] if len(sweep[rate][0].seeds) > 1 else sweep[rate]
        shown[method.label] = curves
        rows.append(_row(method, rate, curves, sweep, target, by_evidence))
    return Comparison(
        tuple(rows),
        shown,
        sweeps,
        best,
        "evidence" if by_evidence else "bound",
        contest.num_rows,
        tolerance,
    )


def _top(sweeps: Mapping[str, Sweep], by_evidence: bool) -> float:
    """The best of all runs; where bounds are drawn, of the ends of runs, as medians over seeds.

    The maximum over many noisy values would be above every bound, and above the evidence.
    """
    at_each_rate = [curves for sweep in sweeps.values() for curves in sweep.values()]
    ends = max(median(run.final(False) for run in curves) for curves in at_each_rate)
    if by_evidence or ends == -math.inf:
        return max(run.top(by_evidence) for curves in at_each_rate for run in curves)
    return ends


def _row(
    method: Method,
    rate: float | None,
    shown: Sequence[Curve],
    sweep: Sweep,
    target: float,
    by_evidence: bool,
) -> Row:
    sound = [c for c in shown if not c.failure]
    usable = sound or shown
    arrived = [a for c in shown if (a := c.reaches(target, by_evidence)) is not None]
    often = 2 * len(arrived) > len(shown)
    top = max(c.top(True) for c in shown)
    return Row(
        method.label,
        _median([_last_bound(c, method.drawn) for c in usable]),
        _median([c.final(True) for c in sound]),
        None if top == -math.inf else top,
        round(median(c.steps[-1] for c in usable)),
        median(c.seconds[-1] for c in usable),
        round(median(a[0] for a in arrived)) if often else None,
        median(a[1] for a in arrived) if often else None,
        rate if sound else None,
        len(method.seeds),
        sum(c.seconds[-1] for curves in sweep.values() for c in curves),
        "; ".join(_notes(method, rate, shown, sweep)),
    )


def _notes(method: Method, rate: float | None, shown: Sequence[Curve], sweep: Sweep) -> list[str]:
    notes = [method.note] if method.note else []
    failed = [c.failure for c in shown if c.failure]
    if failed:
        notes.append(f"{len(failed)} of {len(shown)} runs failed: {failed[0]}")
    if len(shown) == 1 and len(shown[0].seeds) > 1:
        notes.append("two seeds gave the same path to the bit; one run stands for all")
    rates = [r for r in sweep if r is not None]
    if len(rates) > 1 and len(failed) < len(shown) and rate in (min(rates), max(rates)):
        notes.append("its best learning rate is at the edge of the sweep")
    return notes


def _last_bound(curve: Curve, drawn: bool) -> float:
    if not drawn:
        return curve.bound[-1]
    values = curve.measure(False)[1]
    return float(values[-1]) if len(values) else math.nan


def _median(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return median(finite) if finite else None
