"""select: a grid of models, fitted to the same data with the same starts, as one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro_em.arguments import by_name, seed_of
from pyro_em.errors import UsageError, message
from pyro_em.fitting.from_arrays import read_for
from pyro_em.fitting.parts.chunked import chunks_in
from pyro_em.plan.fit_wishes import FIT_KEYWORDS, fit_wishes
from pyro_em.resampling.tasks import run_all
from pyro_em.selection.candidates import Grid, Key
from pyro_em.selection.criteria import criterion_of
from pyro_em.selection.fits import Fits, Outcome, folded, total
from pyro_em.selection.selection import Selection, row_of
from pyro_em.sources.given import Given, hold_arrays
from pyro_em.tracing.turns import alone


@alone("select")
def select(
    build: Callable[..., Any],
    *data: Any,
    criterion: str | None = None,
    folds: int | None = None,
    num_restarts: int | None = None,
    max_steps: int = 1000,
    tol: float = 1e-3,
    fit: Mapping[str, Any] | None = None,
    processes: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **grid: Any,
) -> Selection:
    """Fit a model for each combination of some keywords, and choose one.

    Each is made by ``build(**keywords)`` and fitted with the same seeds in a param scope of its own:
    Pyro's param store and random state are as before. One that fails is a row with the reason.

    Args:
        build: Makes a model, a function of ``data``, or an `ExactPosteriorEM`.
        *data: The model's arguments.
        criterion: By what the best is chosen: ``"bic"``, ``"aic"``, ``"icl"``, ``"held_out"``,
            ``"log_evidence"`` or ``"elbo"``. By default ``"held_out"`` where there are folds, else
            ``"bic"``; ``"elbo"`` where a guide draws.
        folds: Hold rows (elements of the outermost plate: sequences) out, each once, in so many parts:
            every candidate is also fitted to all rows outside each part, and the log evidence of the
            part is added up. Every argument that has a value for each row is parted.
        num_restarts: Starts of each fit, as in ``em.fit``; by default 10 where discrete latents are
            summed, 2 where latents are integrated, and one where a guide draws or there are none. A
            mixture of one component is fitted once: its starts are all alike.
        max_steps: Steps of each start at most.
        tol: Estimated remaining gain in nats at which to stop.
        fit: Other keywords of ``em.fit``: ``{"init": "kmeans"}``, ``{"num_epochs": 20}``.
        processes: How many processes, forked from this one; None for this one alone. The numbers are
            the same to the bit. Each fit uses one thread.
        seed: Seed of all starts, of what ``build`` draws, and of the folds.
        progress: Whether to show a bar; by default where the output is a terminal.
        **grid: Keywords of ``build``: several values of those that vary, one of those that do not.

    Returns:
        A table with a row per combination, its fits, and the best of them.

    Raises:
        UsageError: If ``build`` makes no models, rows cannot be held out, or every fit failed.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> def build(K):
        ...     def model(x):
        ...         w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
        ...         mu = pyro.param("mu", torch.linspace(-1.0, 1.0, K))
        ...         with pyro.plate("rows", len(x)):
        ...             z = pyro.sample("z", dist.Categorical(w))
        ...             pyro.sample("x", dist.Normal(mu[z], 0.5), obs=x)
        ...     return model
        >>> x = torch.tensor([-2.0, -1.5, -1.8, 2.0, 2.5, 2.2])
        >>> found = select(build, x, K=[1, 2], num_restarts=2, progress=False)
        >>> found.best_row.key, found.best.num_free_parameters, len(pyro.get_param_store())
        ((2,), 3, 0)
    """
    own_seed = seed_of("select", seed) or 0
    made = Grid.of(build, grid, own_seed)
    if criterion is not None:
        criterion_of(criterion)
    wishes = _wishes(fit, max_steps, tol)
    fit_wishes(**wishes, seed=seed, progress=progress, num_restarts=num_restarts or 1)
    if chunks_in(data) is not None:
        raise UsageError(
            message(
                "select",
                "the data come in chunks.",
                "each candidate goes through all of them",
                [
                    "fit each by itself: em.fit(chunks), and compare result.bic",
                ],
            )
        )
    keys = made.keys
    fits = Fits(made, _as_tensors(made, keys, data), wishes, num_restarts, own_seed)
    if folds is not None:
        fits = folded(fits, folds, keys)
    parts: list[int | None] = [None, *range(len(fits.folds))]
    tasks = [(key, fold) for key in keys for fold in parts]
    outcomes = run_all(
        lambda i: fits.outcome(*tasks[i]), len(tasks), processes, progress, "fit", "select"
    )
    by_key = {key: outcomes[i * len(parts) : (i + 1) * len(parts)] for i, key in enumerate(keys)}
    return _selection(fits, by_key, criterion)


def _as_tensors(grid: Grid, keys: list[Key], data: tuple) -> tuple:
    """The data with arrays and tables as tensors, for the first candidate that can be made."""
    for key in keys if hold_arrays(data) else ():
        try:
            model = grid.made(key).model
        except Exception:  # a row of the table says so
            continue
        return read_for(Given(), model, data, {})[0]
    return data


def _wishes(fit: Any, max_steps: Any, tol: Any) -> dict[str, Any]:
    wishes = by_name(
        "select",
        {} if fit is None else fit,
        "dict from keywords of em.fit to their values",
        ["pass fit={'init': 'kmeans'}"],
    )
    own = ("max_steps", "tol", "num_restarts", "seed", "progress", "checkpoint", "process_group")
    for name in wishes:
        if name in own or name not in FIT_KEYWORDS:
            raise UsageError(
                message(
                    "select",
                    f"fit={{'{name}': ...}} cannot be passed on to em.fit.",
                    "select has a keyword of its own, or the fits cannot share it"
                    if name in own
                    else "em.fit has no such keyword",
                )
            )
    return {"max_steps": max_steps, "tol": tol, **wishes}


def _selection(
    fits: Fits, by_key: Mapping[tuple, list[Outcome]], criterion: str | None
) -> Selection:
    rows, results, states = [], {}, {}
    for key, (whole, *parts) in by_key.items():
        note = whole.failure
        failed = [p.failure for p in parts if p.failure]
        if failed and not note:
            note = f"{len(failed)} of {len(parts)} folds failed: {failed[0]}"
        held_out = total([p.held_out for p in parts])
        rows.append(row_of(key, whole.result, whole.entropy, held_out, note))
        if whole.result is not None and whole.state is not None:
            results[key], states[key] = whole.result, whole.state
    if not results:
        why = next(iter(by_key.values()))[0]
        raise UsageError(
            f"select: none of {len(rows)} models could be fitted. Of the first one:\n{why.error}"
        )
    first = next(iter(results.values()))
    if criterion is None:
        has_evidence = any(r.log_evidence is not None for r in results.values())
        criterion = "held_out" if fits.folds else "bic" if has_evidence else "elbo"
    n = f"{first.num_rows:g}, {first.counted}"
    return Selection(fits.grid.names, tuple(rows), criterion, n, results, states, fits)
