r"""compare: methods of inference on one model, from one start, with every cost counted.

EM, gradient ascent on the exact evidence, gradient ascent on a guide's bound and L-BFGS all raise

    log p(x; θ) = ELBO(q, θ) + KL(q ‖ p(z | x; θ)),

so that the exact evidence at each one's parameters, where it can be summed, is a fair measure of
all. Every contender runs in a parameter scope of its own and begins at equal model parameters. A
method with a learning rate gets a sweep of rates and several seeds: its best rate is shown, and the
seconds of the sweep are reported beside those of the shown run. Clocks stand still while the
evidence is looked at.

Source: Xu and Jordan (1996), "On convergence properties of the EM algorithm for Gaussian mixtures":
EM is fast where components overlap little and slow where they overlap much.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_em._errors import PyroEMError, UsageError, message
from pyro_em._pyro import parameters_read
from pyro_em.amortized import AutoAmortizedCategorical
from pyro_em.arguments import check_collisions
from pyro_em.em import ExactPosteriorEM
from pyro_em.m_step import Fixed
from pyro_em.plotting import PALETTE
from pyro_em.result import EMStatus, EMStep
from pyro_em.strategies import EStepStrategy
from pyro_em.svi import TraceExact_ELBO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_PER_DECADE = 12
_WINDOW = 20
_EXTENSIONS = 2


@dataclass(frozen=True)
class Direct:
    """Direct maximisation of the exact evidence over unconstrained parameters by L-BFGS.

    A step is one evaluation of the evidence and its gradient, which costs about what an E-step
    costs; evaluations of the line search count. What is shown is the best value so far.

    Attributes:
        model: The model; that of the first other contender where None.
        history_size: Pairs that L-BFGS keeps.
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need.

    Example:
        >>> Direct().history_size
        20
    """

    model: Callable[..., Any] | None = None
    history_size: int = 20
    max_plate_nesting: int | None = None
    max_enumeration: int = 2**27


Contender: TypeAlias = ExactPosteriorEM | SVI | Direct


@dataclass(frozen=True, eq=False)
class Curve:
    """One run of one contender; entry i belongs to the parameters after ``steps[i]`` steps.

    Attributes:
        seeds: The seeds that it stands for: several where no random number matters.
        learning_rate: None where the method has none, or keeps its own.
        steps: 0 at the start.
        seconds: Wall clock when these parameters were reached, looking at the evidence excluded.
        bound: What the method raises, in nats; of a drawn bound one draw.
        evidence: The exact log evidence; nan where it was not looked at or cannot be computed.
        failure: Why the run broke off, or an empty string.
    """

    seeds: tuple[int, ...]
    learning_rate: float | None
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    bound: tuple[float, ...]
    evidence: tuple[float, ...]
    failure: str = ""

    def measure(self, by_evidence: bool) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of what contenders are measured by.

        Args:
            by_evidence: The exact evidence where it was looked at; else the bound, as the mean of
                its last 20 values.
        """
        if by_evidence:
            values = np.asarray(self.evidence)
        else:
            sums = np.cumsum(np.concatenate([[0.0], self.bound]))
            after = np.arange(1, len(sums))
            before = np.maximum(after - _WINDOW, 0)
            values = (sums[after] - sums[before]) / (after - before)
        at = np.flatnonzero(np.isfinite(values))
        return at, values[at]

    def final(self, by_evidence: bool) -> float:
        """The last value of the measure; −inf for a run that broke off."""
        values = self.measure(by_evidence)[1]
        return -math.inf if self.failure or not len(values) else float(values[-1])

    def reaches(self, target: float, by_evidence: bool) -> tuple[int, float] | None:
        """Steps and seconds when the measure first is at ``target``; None if never."""
        at, values = self.measure(by_evidence)
        there = at[values >= target]
        return (self.steps[there[0]], self.seconds[there[0]]) if len(there) else None


@dataclass(frozen=True)
class Row:
    """What a comparison says of one contender; medians over seeds.

    Attributes:
        contender: Its label.
        final_bound: What it raises, at its end; the mean of the last 20 values where it is drawn.
        final_evidence: The exact log evidence at its end; None if it cannot be computed.
        best_evidence: The best that any of its shown runs saw.
        steps: Steps of the shown run.
        seconds: Of the shown run.
        steps_to_best: Steps until within the tolerance of the best of all; None if at least half
            of the seeds never are.
        seconds_to_best: Seconds until then.
        learning_rate: The best of the sweep; None where there is none.
        seeds: Number of seeds.
        total_seconds: Of all its runs: every seed and every learning rate.
        note: What a reader has to know of the run; its failure, if it failed.
    """

    contender: str
    final_bound: float | None
    final_evidence: float | None
    best_evidence: float | None
    steps: int
    seconds: float
    steps_to_best: int | None
    seconds_to_best: float | None
    learning_rate: float | None
    seeds: int
    total_seconds: float
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare` found; prints as a table.

    Attributes:
        table: A `Row` per contender.
        curves: Per contender the runs that are shown, at its best learning rate.
        sweep: Per contender and learning rate all runs.
        best: The best evidence that any run saw in nats; the best bound where no evidence can be
            computed.
        measure: ``"evidence"`` or ``"bound"``.
        num_rows: N, by which gaps are divided.
        tolerance: Nats per datum within which a run has reached the best.
    """

    table: tuple[Row, ...]
    curves: Mapping[str, tuple[Curve, ...]]
    sweep: Mapping[str, Mapping[float | None, tuple[Curve, ...]]]
    best: float
    measure: str
    num_rows: float
    tolerance: float

    def __getitem__(self, contender: str) -> Row:
        return {row.contender: row for row in self.table}[contender]

    def __repr__(self) -> str:
        return f"Comparison:\n{self}"

    def __str__(self) -> str:
        within = f"{self.tolerance:g}"
        head = (
            "contender",
            "final bound",
            "final evidence",
            "best evidence",
            "steps",
            "seconds",
            f"steps to {within}",
            f"seconds to {within}",
            "rate",
            "seeds",
            "seconds with sweep",
        )
        lines = [head]
        for r in self.table:
            lines.append(
                (
                    r.contender,
                    _shown(r.final_bound, ".6f"),
                    _shown(r.final_evidence, ".6f"),
                    _shown(r.best_evidence, ".6f"),
                    str(r.steps),
                    f"{r.seconds:.3f}",
                    _shown(r.steps_to_best, "d", "never"),
                    _shown(r.seconds_to_best, ".3f", "never"),
                    _shown(r.learning_rate, "g"),
                    str(r.seeds),
                    f"{r.total_seconds:.3f}",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        out = []
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
            out.append("  ".join(cells).rstrip())
        out.append(
            f"Best {self.measure} {self.best:.6f} nats, N = {self.num_rows:g};"
            f" 'to {within}': within {within} nats per datum of it. Medians over seeds."
        )
        out += [f"{r.contender}: {r.note}" for r in self.table if r.note]
        return "\n".join(out)

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw the gap to the best per datum against steps and against seconds.

        Lines are medians over seeds, bands reach from the worst to the best seed. Gaps below 1e-9
        are drawn there, and the start, at zero steps, has no place on a logarithmic axis.

        Args:
            axes: Two axes to draw on; new ones by default.

        Returns:
            The two axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = list(Figure(figsize=(10, 4.2), layout="constrained").subplots(1, 2, sharey=True))
        left, right = axes
        by_evidence = self.measure == "evidence"
        for c, (label, curves) in enumerate(self.curves.items()):
            sound = [curve for curve in curves if len(curve.measure(by_evidence)[0]) > 1]
            if not sound:
                continue
            at, gap, seconds = self._gaps(sound, by_evidence)
            row, colour = self[label], PALETTE[c % len(PALETTE)]
            rate = "" if row.learning_rate is None else f" (rate {row.learning_rate:g})"
            middle = np.median(gap, 0)
            for ax, x in ((left, at), (right, seconds)):
                dot = "o" if len(at) < 60 else ""
                ax.plot(x, middle, dot + "-", color=colour, label=label + rate, markersize=3)
                if len(gap) > 1:
                    ax.fill_between(x, gap.min(0), gap.max(0), color=colour, alpha=0.2, linewidth=0)
        for ax, name in ((left, "steps"), (right, "wall-clock seconds")):
            ax.axhline(self.tolerance, color="#7f7f7f", linewidth=0.8, linestyle=":")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel(name)
            ax.set_ylabel(f"gap to the best log {self.measure} (nats per datum)")
            ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
        left.legend(fontsize="small")
        return left, right

    def _gaps(
        self, curves: Sequence[Curve], by_evidence: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, gaps per datum and median seconds, where all these runs were looked at."""
        measured = [curve.measure(by_evidence) for curve in curves]
        common = functools.reduce(np.intersect1d, [at for at, _ in measured])
        common = common[common > 0]
        gaps = np.stack([v[np.isin(at, common)] for at, v in measured])
        gaps = np.maximum((self.best - gaps) / self.num_rows, 1e-9)
        seconds = np.median([np.asarray(c.seconds)[common] for c in curves], 0)
        return np.asarray(curves[0].steps)[common], gaps, seconds


def standard_contenders(
    em: ExactPosteriorEM, guide: Callable[..., Any] | None = None
) -> dict[str, Contender]:
    """The four contenders to which a single `ExactPosteriorEM` is compared by default.

    Args:
        em: The model with its settings, which stays the first of them.
        guide: The guide of "SVI, guide"; that of ``em``, else an `AutoAmortizedCategorical`.

    Returns:
        "exact EM", "SVI, exact marginal" (Adam on `TraceExact_ELBO`), "SVI, guide" (Adam on the
        guide's bound, discrete guides summed where they are small) and "L-BFGS" (`Direct`).

    Raises:
        UsageError: If ``em`` holds a parameter fixed, which the other methods would move.

    Example:
        >>> list(standard_contenders(ExactPosteriorEM(lambda x: None)))
        ['exact EM', 'SVI, exact marginal', 'SVI, guide', 'L-BFGS']
    """
    looker = em._looker
    held = [name for name, update in looker.updates.items() if isinstance(update, Fixed)]
    if held:
        raise UsageError(
            message(
                "standard_contenders",
                "updates holds " + ", ".join(f"'{n}'" for n in held) + " fixed.",
                "the other contenders would move it, and would maximise something else",
                ["make it a constant of the model", "pass a mapping of contenders to compare"],
            )
        )
    limits: dict[str, Any] = {
        "max_plate_nesting": looker.max_plate_nesting,
        "max_enumeration": looker.max_enumeration,
    }
    own = looker.guide if callable(looker.guide) else None
    chosen = guide or own or AutoAmortizedCategorical(em.model)
    empty = own if own is not None and not isinstance(own, type) else _no_guide
    adam = pyro.optim.Adam({"lr": 0.01})
    return {
        "exact EM": em,
        "SVI, exact marginal": SVI(em.model, empty, adam, TraceExact_ELBO(**limits)),
        "SVI, guide": ExactPosteriorEM(
            em.model,
            chosen,
            pyro.optim.Adam({"lr": 0.01}),
            strategy="guide",
            num_particles=em.num_particles,
            **limits,
        ),
        "L-BFGS": Direct(em.model, **limits),
    }


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
            `ExactPosteriorEM`, for which `standard_contenders` are made.
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
        UsageError: If something is no contender, or contenders have different models.

    Example:
        >>> import pyro.distributions as dist
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
    if isinstance(contenders, ExactPosteriorEM):
        contenders = standard_contenders(contenders)
    rates, seeds = tuple(learning_rates), tuple(seeds)
    _check(contenders, max_steps, svi_steps, seconds, tolerance, rates, seeds)
    models = _models(contenders)
    for model in models.values():
        check_collisions(model, args, KEYWORDS, "compare")
    store = pyro.get_param_store()
    keeper = _Keeper([*contenders.values(), *store._params.values()])
    origin, random_state = _state(store), pyro.util.get_rng_state()
    limits = _Limits(max_steps, svi_steps, seconds, tol)
    try:
        with _own_store(origin):
            start, keeper.extra = _common_start(models, args, kwargs, origin)
        arena = _Arena(keeper, start, next(iter(models.values())), args, kwargs, limits)
        arena.look(contenders)
        methods = [arena.method(n, c, models[n], rates, seeds) for n, c in contenders.items()]
        total = sum(len(m.rates) * len(m.seeds) for m in methods)
        disable = None if progress is None else not progress
        with tqdm(total=total, disable=disable, desc="compare", unit="run") as bar:
            sweep = {m.label: _sweep(arena, m, bar) for m in methods}
    finally:
        keeper.restore()
        pyro.util.set_rng_state(random_state)
    return _comparison(methods, sweep, arena, tolerance)


# ---------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class _Limits:
    max_steps: int
    svi_steps: int
    seconds: float | None
    tol: float


def _check(
    contenders: Any,
    max_steps: int,
    svi_steps: int,
    seconds: float | None,
    tolerance: float,
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
) -> None:
    if not isinstance(contenders, Mapping) or not contenders:
        what = "it is empty" if isinstance(contenders, Mapping) else type(contenders).__name__
        raise UsageError(
            message(
                "compare",
                f"contenders: {what}.",
                "methods are compared by their labels",
                ["pass {'exact EM': em, 'SVI': svi, 'L-BFGS': Direct()}", "pass one em"],
            )
        )
    for label, one in contenders.items():
        if not isinstance(one, Contender):
            shown = f"the class {one.__name__}" if isinstance(one, type) else type(one).__name__
            raise UsageError(
                message(
                    f"contender '{label}'",
                    f"{shown} is no method of inference that can be compared.",
                    "it has to start anew in a parameter scope of its own",
                    ["use an ExactPosteriorEM, a pyro.infer.SVI or Direct()"],
                )
            )
    if all(isinstance(c, Direct) and c.model is None for c in contenders.values()):
        raise UsageError(
            message(
                "compare",
                "no contender has a model.",
                "Direct() takes that of another contender",
                ["Direct(model)"],
            )
        )
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


def _models(contenders: Mapping[str, Contender]) -> dict[str, Callable[..., Any]]:
    """The model of every contender; ``Direct()`` has that of the first that has one."""
    own = {label: one.model for label, one in contenders.items()}
    first = next(model for model in own.values() if model is not None)
    return {label: model or first for label, model in own.items()}


# ---------------------------------------------------------------------- scopes


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without latents and parameters."""


def _state(store: Any) -> dict[str, dict[str, Any]]:
    return {"params": dict(store._params), "constraints": dict(store._constraints)}


def _copied(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same store with leaves of its own; a module keeps its ``nn.Parameter``s."""
    params = {
        name: leaf
        if isinstance(leaf, nn.Parameter)
        else leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for name, leaf in state["params"].items()
    }
    return {"params": params, "constraints": dict(state["constraints"])}


@contextmanager
def _own_store(state: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """A param store that holds a copy of ``state``; afterwards the one before."""
    with pyro.get_param_store().scope(_copied(state)):  # type: ignore[arg-type]
        yield


def _common_start(
    models: Mapping[str, Callable[..., Any]],
    args: tuple,
    kwargs: dict[str, Any],
    origin: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, dict[str, Any]], list[tuple[Tensor, Tensor]]]:
    """The model's parameters as a fit would begin with them, found by running every model once.

    Returns:
        A state of the param store, and module parameters with their values.

    Raises:
        UsageError: If the models read different parameters.
    """
    store = pyro.get_param_store()
    state: dict[str, dict[str, Any]] = {"params": {}, "constraints": {}}
    kept: list[tuple[Tensor, Tensor]] = []
    first: tuple[str, set[str]] | None = None
    for label, model in models.items():
        with parameters_read() as found, torch.no_grad():
            model(*args, **kwargs)
        if first is None:
            first = (label, set(found))
        if set(found) != first[1]:
            odd = sorted(set(found) ^ first[1])[0]
            raise UsageError(
                message(
                    f"contender '{label}'",
                    f"its model and that of '{first[0]}' differ: one has no parameter '{odd}'.",
                    "methods are compared on one model",
                    ["give all contenders the same model"],
                )
            )
        for name, leaf in found.items():
            if isinstance(leaf, nn.Parameter):
                kept.append((leaf, leaf.detach().clone()))
            if name in store._params:
                state["params"].setdefault(name, store._params[name])
                if name in store._constraints:
                    state["constraints"].setdefault(name, store._constraints[name])
    return _copied(state), kept


def _reachable(roots: Collection[Any], depth: int = 6) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules and module parameters that functions hold: bound, enclosed, global, as attributes."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()
    layer: list[Any] = list(roots)
    for _ in range(depth):
        following: list[Any] = []
        for one in layer:
            if id(one) in seen or isinstance(one, (type, types.ModuleType, str, int, float)):
                continue
            seen.add(id(one))
            if isinstance(one, Tensor):
                if isinstance(one, nn.Parameter):
                    tensors[id(one)] = one
                continue
            if isinstance(one, nn.Module):
                for module in one.modules():
                    modules[id(module)] = module
                    tensors.update((id(p), p) for p in module._parameters.values() if p is not None)
            following += _parts(one)
        layer = following
    return list(modules.values()), list(tensors.values())


def _parts(one: Any) -> list[Any]:
    if isinstance(one, Mapping):
        return list(one.values())
    if isinstance(one, (list, tuple, set)):
        return list(one)
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.FunctionType):
        held = [c.cell_contents for c in one.__closure__ or () if _is_filled(c)]
        named = [one.__globals__.get(n) for n in one.__code__.co_names]
        near = [
            n
            for n in named
            if not isinstance(n, types.FunctionType) or n.__module__ == one.__module__
        ]
        return [*held, *near, *(one.__defaults__ or ())]
    return list(vars(one).values()) if hasattr(one, "__dict__") else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Keeper:
    """Modules as they were: their attributes, which guides set up lazily, and their tensors."""

    def __init__(self, roots: Collection[Any]) -> None:
        modules, parameters = _reachable(roots)
        self.attributes = [
            (m, dict(vars(m)), {k: v.copy() for k, v in vars(m).items() if isinstance(v, dict)})
            for m in modules
        ]
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        self.tensors = [(t, t.detach().clone()) for t in (*parameters, *buffers)]
        self.gradients = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]
        self.extra: list[tuple[Tensor, Tensor]] = []

    def restore(self) -> None:
        """Put everything back in place."""
        for module, attributes, copies in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
            for name, saved in copies.items():
                attributes[name].clear()
                attributes[name].update(saved)
        with torch.no_grad():
            for tensor, value in (*self.extra, *self.tensors):
                tensor.copy_(value)
        for parameter, gradient in self.gradients:
            parameter.grad = None if gradient is None else gradient.clone()


# ---------------------------------------------------------------------- one run


class _Broken(Exception):
    """A run that cannot go on, with its sentence."""


class _Enough(Exception):
    """The limit of a run inside an optimiser that cannot be told to stop."""


class _Recorder:
    """The path of one run, and its clock, which stands still while the evidence is looked at."""

    def __init__(self, evidence: Callable[[], float] | None, seconds: float | None) -> None:
        self.look, self.limit = evidence, seconds
        self.seconds, self.bound = [0.0], [math.nan]
        self.evidence = [math.nan if evidence is None else evidence()]
        self.paused, self.begin = 0.0, time.perf_counter()

    def start(self) -> None:
        """Set the clock to zero."""
        self.paused, self.begin = 0.0, time.perf_counter()

    def clock(self) -> float:
        """Seconds that the method itself took."""
        return time.perf_counter() - self.begin - self.paused

    def step(self, entering: float, evidence: float | None = None, *, free: bool = False) -> bool:
        """Note one step; returns whether the time is over.

        Args:
            entering: The bound at the parameters that entered the step.
            evidence: The evidence there, where the method has it for nothing.
            free: Whether it will have it for nothing at the next step too.
        """
        now = self.clock()
        self.bound[-1] = entering
        if evidence is not None and self.look is not None:
            self.evidence[-1] = evidence
        if not math.isfinite(entering):
            raise _Broken(f"the bound was {entering} at step {len(self.bound) - 1}")
        self.seconds.append(now)
        self.bound.append(math.nan)
        self.evidence.append(math.nan)
        if not free and _is_looked_at(len(self.bound) - 1):
            self.look_now()
        return self.limit is not None and now >= self.limit

    def look_now(self) -> None:
        """The evidence at the present parameters, off the clock."""
        if self.look is None:
            return
        begin = time.perf_counter()
        self.evidence[-1] = self.look()
        self.paused += time.perf_counter() - begin

    def finish(self, bound: float) -> None:
        """Note the bound and the evidence at the parameters where the run ended."""
        self.bound[-1] = bound
        self.look_now()

    def curve(self, rate: float | None, seed: int, failure: str = "") -> Curve:
        """The path as a value; a broken run ends with its last whole step."""
        n = len(self.bound)
        while failure and n > 1 and not math.isfinite(self.bound[n - 1]):
            n -= 1
        return Curve(
            (seed,),
            rate,
            tuple(range(n)),
            tuple(self.seconds[:n]),
            tuple(self.bound[:n]),
            tuple(self.evidence[:n]),
            failure,
        )


def _is_looked_at(step: int) -> bool:
    """Whether a step is one of twelve per decade, in equal ratios."""
    k = math.ceil(_PER_DECADE * math.log10(step) - 1e-9)
    return any(round(10 ** (j / _PER_DECADE)) == step for j in (k - 1, k, k + 1))


@dataclass(frozen=True, eq=False)
class _Method:
    """A contender that is ready to run anew for each learning rate and seed."""

    label: str
    run: Callable[[float | None, _Recorder, bool], None]
    rates: tuple[float | None, ...]
    seeds: tuple[int, ...]
    drawn: bool
    note: str = ""


@dataclass(eq=False)
class _Arena:
    """The model, the data and the start that all contenders share."""

    keeper: _Keeper
    start: Mapping[str, Mapping[str, Any]]
    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    limits: _Limits
    has_evidence: bool = False
    num_rows: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The common start, whatever happened before."""
        self.keeper.restore()
        with _own_store(self.start):
            yield

    def evidence(self) -> Callable[[], float]:
        """The exact log evidence at the parameters in the store; nan where it is not finite."""
        loss = TraceExact_ELBO(**self.options)

        def value() -> float:
            try:
                return -loss.loss(self.model, _no_guide, *self.args, **self.kwargs)
            except (PyroEMError, ValueError, ArithmeticError):
                return math.nan

        return value

    def look(self, contenders: Mapping[str, Contender]) -> None:
        """Find whether the evidence can be computed, and N."""
        for one in contenders.values():  # budgets as the user gave them
            if isinstance(one, (ExactPosteriorEM, Direct)):
                source = one._looker if isinstance(one, ExactPosteriorEM) else one
                self.options = {
                    "max_plate_nesting": source.max_plate_nesting,
                    "max_enumeration": source.max_enumeration,
                }
                break
        with self.scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.num_rows = _rows_of(self.model, self.args, self.kwargs)
            try:
                em = ExactPosteriorEM(self.model, **self.options)
                fitted = em.fit(*self.args, max_steps=0, progress=False, **self.kwargs)
            except PyroEMError:
                return
            self.has_evidence = fitted.posterior.exact
            self.num_rows = fitted.num_rows or 1.0

    def method(
        self,
        label: str,
        one: Contender,
        model: Callable[..., Any],
        rates: tuple[float, ...],
        seeds: tuple[int, ...],
    ) -> _Method:
        """How to run a contender, how often, and what to say of it."""
        if isinstance(one, Direct):
            return _Method(
                label,
                lambda rate, to, short: self._direct(one, model, to, short),
                (None,),
                seeds[:1],
                False,
            )
        own: Any
        if isinstance(one, SVI):
            own, note = _own_rate(one.optim)
            drawn = not self._is_exact(one)
            return _Method(
                label,
                lambda rate, to, short: self._svi(one, rate, to, short),
                _rates(rates, own, note),
                seeds,
                drawn,
                note,
            )
        if not self._is_stochastic(one):
            random = _is_random(one._looker.strategy)
            return _Method(
                label,
                lambda rate, to, short: self._em(one, None, to, self.limits.max_steps, short),
                (None,),
                seeds if random else seeds[:1],
                random,
            )
        own, note = _own_rate(one._looker.optim)
        return _Method(
            label,
            lambda rate, to, short: self._em(one, rate, to, self.limits.svi_steps, short),
            _rates(rates, own, note),
            seeds,
            True,
            note,
        )

    def _is_exact(self, svi: SVI) -> bool:
        """Whether an SVI's loss is the exact evidence."""
        loss = getattr(svi.loss, "__self__", None)
        exact = isinstance(loss, TraceExact_ELBO) and loss.strategy == "exact"
        return exact and self.has_evidence

    def _is_stochastic(self, em: ExactPosteriorEM) -> bool:
        """Whether its guide draws or scores latents, so that gradients move everything."""
        if em._looker.guide is None:
            return False
        with self.scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _anew(em, None).plan(*self.args, **self.kwargs).stochastic
            except PyroEMError:
                return False

    # The three kinds of contenders; ``short`` asks for one step.

    def _em(
        self, em: ExactPosteriorEM, rate: float | None, to: _Recorder, steps: int, short: bool
    ) -> None:
        fresh = _anew(em, rate)
        to.start()

        def note(step: EMStep) -> bool:
            known = step.log_evidence if self.has_evidence else None
            return to.step(step.elbo, known, free=known is not None)

        result = fresh.fit(
            *self.args,
            max_steps=1 if short else steps,
            tol=self.limits.tol,
            callbacks=(note,),
            progress=False,
            **self.kwargs,
        )
        to.finish(result.elbo)
        if result.status in (EMStatus.DEGENERATE, EMStatus.FELL):
            raise _Broken(_sentence(result.message or result.status.value))

    def _svi(self, svi: SVI, rate: float | None, to: _Recorder, short: bool) -> None:
        fresh = copy.copy(svi)
        fresh.optim = _remade(svi.optim, rate)
        loss = getattr(svi.loss, "__self__", None)
        if isinstance(loss, pyro.infer.ELBO):
            loss = copy.copy(loss)
            if isinstance(loss, TraceExact_ELBO):
                loss._last = None
            fresh.loss, fresh.loss_and_grads = loss.loss, loss.loss_and_grads
        exact = self._is_exact(svi)
        to.start()
        for _ in range(1 if short else self.limits.svi_steps):
            bound = -_scalar(fresh.step(*self.args, **self.kwargs))
            if to.step(bound, bound if exact else None, free=exact):
                break
        to.finish(-_scalar(fresh.evaluate_loss(*self.args, **self.kwargs)))

    def _direct(
        self, direct: Direct, model: Callable[..., Any], to: _Recorder, short: bool
    ) -> None:
        loss = TraceExact_ELBO(
            max_plate_nesting=direct.max_plate_nesting, max_enumeration=direct.max_enumeration
        )
        to.start()
        with parameters_read() as found, torch.no_grad():
            model(*self.args, **self.kwargs)
        leaves = [leaf for leaf in dict.fromkeys(found.values()) if leaf.requires_grad]
        best, at = -math.inf, [leaf.detach().clone() for leaf in leaves]

        def closure() -> Tensor:
            nonlocal best, at
            for leaf in leaves:
                leaf.grad = None
            try:
                value = loss.differentiable_loss(model, _no_guide, *self.args, **self.kwargs)
                value.backward()
                sound = all(bool(p.grad.isfinite().all()) for p in leaves if p.grad is not None)
            except (PyroEMError, ValueError, ArithmeticError, torch.linalg.LinAlgError):
                if best == -math.inf:
                    raise
                sound = False
            if sound:
                evidence = -float(value.detach())
                if evidence > best:
                    best, at = evidence, [leaf.detach().clone() for leaf in leaves]
            else:  # too far out: a wall that sends the line search back
                if best == -math.inf:
                    raise _Broken("the gradient at the start is not finite")
                value = torch.tensor(1e3 * (1 + abs(best)) - best, dtype=torch.float64)
                for leaf in leaves:
                    leaf.grad = torch.zeros_like(leaf)
            if to.step(best, best, free=True) or short:
                raise _Enough
            return value.detach()

        steps = self.limits.max_steps
        optimizer = torch.optim.LBFGS(
            leaves,
            max_iter=steps,
            max_eval=steps,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            history_size=direct.history_size,
            line_search_fn="strong_wolfe",
        )
        try:
            optimizer.step(closure)
        except _Enough:
            pass
        finally:
            with torch.no_grad():
                for leaf, value in zip(leaves, at, strict=True):
                    leaf.copy_(value)
        to.finish(best)


def _anew(em: ExactPosteriorEM, rate: float | None) -> ExactPosteriorEM:
    """The same settings, nothing fitted, another learning rate."""
    looker = em._looker
    return ExactPosteriorEM(
        em.model,
        looker.guide,
        _remade(looker.optim, rate),
        strategy=looker.strategy,
        updates=looker.updates,
        num_particles=em.num_particles,
        max_plate_nesting=looker.max_plate_nesting,
        max_enumeration=looker.max_enumeration,
    )


def _own_rate(optim: Any) -> tuple[float | None, str]:
    """The learning rate that the user gave; why it cannot be changed, or an empty string."""
    if isinstance(optim, pyro.optim.PyroOptim):
        if not isinstance(optim.pt_optim_args, dict):
            return None, "keeps its own learning rates, which depend on the parameter: no sweep"
        rate = optim.pt_optim_args.get("lr")
        return (float(rate) if isinstance(rate, (int, float)) else None), ""
    return None, ""


def _rates(
    rates: tuple[float, ...], own: float | None, note: str
) -> tuple[float, ...] | tuple[None]:
    if note:
        return (None,)
    return tuple(sorted({*rates, *(() if own is None else (own,))}))


def _remade(optim: Any, rate: float | None) -> Any:
    """An optimiser of the same class without state, at another learning rate where one is given."""
    if isinstance(optim, pyro.optim.PyroOptim):
        fresh = copy.copy(optim)
        fresh.optim_objs, fresh.grad_clip, fresh._state_waiting_to_be_consumed = {}, {}, {}
        if rate is not None and isinstance(optim.pt_optim_args, dict):
            fresh.pt_optim_args = {**optim.pt_optim_args, "lr": rate}
        return fresh
    if rate is None:
        return optim

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if optim is None:
            return torch.optim.Adam(parameters, lr=rate)
        built = optim(parameters)
        built.defaults["lr"] = rate
        for group in built.param_groups:
            group["lr"] = rate
        return built

    return build


def _is_random(strategy: Any) -> bool:
    """Whether an E-step strategy may use random numbers."""
    several = strategy.values() if isinstance(strategy, Mapping) else (strategy,)
    return any(isinstance(one, EStepStrategy) for one in several)


def _rows_of(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> float:
    """Elements of the outermost plate that holds data."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    frames = [
        frame
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return float(min(frames, key=lambda f: f.dim).full_size or 1) if frames else 1.0


def _scalar(loss: Any) -> float:
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _sentence(text: str) -> str:
    """The first line of a message."""
    return text.strip().partition("\n")[0].rstrip()


# ---------------------------------------------------------------------- all runs


def _sweep(arena: _Arena, method: _Method, bar: tqdm) -> dict[float | None, tuple[Curve, ...]]:
    """All runs of one contender: every learning rate, every seed.

    Where the best rate is at an edge the sweep goes on beyond it, a factor of three at a time.
    """
    _once(arena, method, method.rates[0], method.seeds[0], short=True)  # what the first run pays
    out: dict[float | None, tuple[Curve, ...]] = {}
    repeats: bool | None = None
    waiting, extensions = list(method.rates), 0
    while waiting:
        rate = waiting.pop(0)
        curves: list[Curve] = []
        for seed in method.seeds:
            bar.set_description(method.label if rate is None else f"{method.label}, rate {rate:g}")
            curves.append(_once(arena, method, rate, seed))
            bar.update()
            if repeats is None and len(curves) == 2:
                repeats = _same_path(*curves)
            if repeats:
                bar.update(len(method.seeds) - len(curves))
                one = curves[0]
                whole = {**vars(one), "seeds": method.seeds}
                curves = [Curve(**whole), *curves[1:]]
                break
        out[rate] = tuple(curves)
        if not waiting and len(out) > 1 and extensions < _EXTENSIONS:
            waiting = _beyond(out, arena.has_evidence)
            extensions += len(waiting)
            bar.total += len(waiting) * len(method.seeds)
    return dict(sorted(out.items(), key=lambda item: item[0] or 0.0))


def _best_rate(
    by_rate: Mapping[float | None, tuple[Curve, ...]], by_evidence: bool
) -> float | None:
    """The learning rate with the best median over seeds; a run that broke off counts as worst."""
    score = {r: median(c.final(by_evidence) for c in cs) for r, cs in by_rate.items()}
    return max(score, key=score.__getitem__)


def _beyond(
    by_rate: Mapping[float | None, tuple[Curve, ...]], by_evidence: bool
) -> list[float | None]:
    """The next learning rate where the best so far is at an edge; empty where it is inside."""
    best, rates = _best_rate(by_rate, by_evidence), [r for r in by_rate if r is not None]
    if best is None or all(c.failure for c in by_rate[best]):
        return []
    if best == max(rates):
        return [float(f"{best * 3:.1g}")]
    return [float(f"{best / 3:.1g}")] if best == min(rates) else []


def _same_path(a: Curve, b: Curve) -> bool:
    """Whether two sound runs agree to the bit for as long as both last."""
    n = min(len(a.bound), len(b.bound)) - 1
    return not (a.failure or b.failure) and n > 1 and a.bound[:n] == b.bound[:n]


def _once(
    arena: _Arena, method: _Method, rate: float | None, seed: int, short: bool = False
) -> Curve:
    """One run in a scope of its own; what it raises becomes its sentence."""
    with arena.scope():
        to = _Recorder(arena.evidence() if arena.has_evidence else None, arena.limits.seconds)
        pyro.set_rng_seed(seed)
        try:
            method.run(rate, to, short)
        except _Broken as error:
            return to.curve(rate, seed, str(error))
        except Exception as error:
            return to.curve(rate, seed, f"{type(error).__name__}: {_sentence(str(error))}")
    return to.curve(rate, seed)


def _comparison(
    methods: Sequence[_Method],
    sweep: Mapping[str, Mapping[float | None, tuple[Curve, ...]]],
    arena: _Arena,
    tolerance: float,
) -> Comparison:
    """Choose the learning rates, find the best, fill the table."""
    by_evidence = arena.has_evidence
    runs = [c for by_rate in sweep.values() for curves in by_rate.values() for c in curves]
    seen = [float(v.max()) for c in runs for v in (c.measure(by_evidence)[1],) if len(v)]
    best = max(seen, default=math.nan)
    target = best - tolerance * arena.num_rows
    curves, rows = {}, []
    for method in methods:
        by_rate = sweep[method.label]
        rate = _best_rate(by_rate, by_evidence)
        # Where one run stands for all seeds, its twin only proved that.
        shown = by_rate[rate][:1] if len(by_rate[rate][0].seeds) > 1 else by_rate[rate]
        curves[method.label] = shown
        total = sum(c.seconds[-1] for cs in by_rate.values() for c in cs)
        rows.append(_row(method, rate, shown, by_rate, target, by_evidence, total))
    return Comparison(
        tuple(rows),
        curves,
        sweep,
        best,
        "evidence" if by_evidence else "bound",
        arena.num_rows,
        tolerance,
    )


def _row(
    method: _Method,
    rate: float | None,
    shown: tuple[Curve, ...],
    by_rate: Mapping[float | None, tuple[Curve, ...]],
    target: float,
    by_evidence: bool,
    total: float,
) -> Row:
    sound = [c for c in shown if not c.failure]
    usable = sound or list(shown)
    arrivals = [c.reaches(target, by_evidence) for c in shown]
    arrived = [a for a in arrivals if a is not None]
    often = 2 * len(arrived) > len(shown)
    bounds = [_last_bound(c, method.drawn) for c in usable]
    finals = [c.final(True) for c in sound if by_evidence]
    tops = [v.max() for c in shown for v in (c.measure(True)[1],) if len(v)]
    notes = [method.note] if method.note else []
    failed = [c.failure for c in shown if c.failure]
    if failed:
        notes.append(f"{len(failed)} of {len(shown)} runs failed: {failed[0]}")
    if len(shown) == 1 and len(shown[0].seeds) > 1:
        notes.append("two seeds gave the same path to the bit; one run stands for all")
    rates = [r for r in by_rate if r is not None]
    if len(rates) > 1 and sound and rate in (min(rates), max(rates)):
        notes.append("its best learning rate is at the edge of the sweep")
    return Row(
        method.label,
        _median(bounds),
        _median(finals),
        float(max(tops)) if tops and by_evidence else None,
        round(median(c.steps[-1] for c in usable)),
        median(c.seconds[-1] for c in usable),
        round(median(a[0] for a in arrived)) if often else None,
        median(a[1] for a in arrived) if often else None,
        rate if sound else None,
        len(method.seeds),
        total,
        "; ".join(notes),
    )


def _last_bound(curve: Curve, drawn: bool) -> float:
    if not drawn:
        return curve.bound[-1]
    values = curve.measure(False)[1]
    return float(values[-1]) if len(values) else math.nan


def _median(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return median(finite) if finite else None


def _shown(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)
