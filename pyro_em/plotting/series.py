"""Series: the path of a latent with its band, the fan of a forecast, errors of one-step predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_em.analysis.forecast import Forecast
from pyro_em.arguments import a_level, shown
from pyro_em.errors import UsageError, message
from pyro_em.globs import matching
from pyro_em.plotting.axes import colour, or_new
from pyro_em.plotting.latents import require_shape
from pyro_em.posteriors.answers.data_steps import number_of
from pyro_em.posteriors.answers.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Times: TypeAlias = Tensor | Sequence[float] | None


def path(
    source: Any,
    ax: Axes | None = None,
    *,
    site: str | None = None,
    data: Tensor | None = None,
    times: Times = None,
    level: float = 0.95,
    label: str | None = None,
    **style: Any,
) -> Axes:
    """Draw the posterior mean of a series of Gaussian latents with the band of its interval.

    Args:
        source: A posterior, whose smoothed path is drawn; or a distribution over the steps with a mean
            and a variance, such as ``posterior.filtered("h_*")``. # (T,), of vectors (T, D)
        ax: Axes to draw on; new ones by default.
        site: Of a posterior, which latents: a glob of steps such as ``"h_*"``.
        data: What was observed, drawn as points. # (T,) or (T, D)
        times: Where the steps lie; 0, 1, … by default. # (T,)
        level: The probability of the band at each step by itself; mean ± z sd.
        label: What the path is called in a legend; entries of vectors are numbered.
        **style: Passed to ``Axes.plot`` for the path.

    Returns:
        The axes; time and value axes are the caller's to name.

    Raises:
        UsageError: If the latents are not those of one series, or the lengths disagree.
    """
    z = _normal_quantile(a_level("path", level))
    if isinstance(source, Posterior):
        source = source.marginal(_named("path", site))
    if not hasattr(source, "mean") or not hasattr(source, "variance"):
        what = (
            f"{shown(source)} is neither a posterior nor a distribution with a mean and a variance."
        )
        raise UsageError(message("path", what, fixes=["pass em.posterior(y), and site='h_*'"]))
    mean, half = source.mean.detach(), z * source.variance.detach().clamp(min=0).sqrt()
    columns = mean.unsqueeze(-1) if mean.dim() == 1 else mean
    require_shape("path", "mean", columns, "T, D")
    half = half.reshape(columns.shape)
    at = _times(times, np.arange(len(mean)))
    _same_length("path", steps=len(mean), times=len(at))
    ax = or_new(ax, (9, 3))
    if data is not None:
        _same_length("path", steps=len(mean), data=len(data))
        _points(ax, at, data)
    for d in range(columns.shape[1]):
        look = {"color": colour(d), "linewidth": 1.6, **style}
        name = label if columns.shape[1] == 1 or label is None else f"{label} {d + 1}"
        middle, spread = _array(columns[:, d]), _array(half[:, d])
        ax.plot(at, middle, label=name, **look)
        ax.fill_between(
            at, middle - spread, middle + spread, color=look["color"], alpha=0.2, linewidth=0
        )
    ax.set_xlabel("time")
    return ax


def forecast(
    forecast: Forecast,
    ax: Axes | None = None,
    *,
    site: str,
    data: Tensor | None = None,
    times: Times = None,
    levels: Sequence[float] = (0.5, 0.8),
    entry: int | None = None,
    **style: Any,
) -> Axes:
    """Draw a forecast as a fan: its mean and its interval, and inner bands from the draws.

    Args:
        forecast: What ``em.forecast(...)`` returned.
        ax: Axes to draw on; new ones by default.
        site: The predicted steps, by glob, such as ``"y_*"``.
        data: The longer series, NaN where it is predicted, drawn as points. # (T,) or (T, D)
        times: Where its steps lie; 0, 1, … by default. # (T,)
        levels: Probabilities of the inner bands, which are quantiles of the draws.
        entry: Of vectors, or of series in a plate, which entry.
        **style: Passed to ``Axes.plot`` for the mean.

    Returns:
        The axes; time and value axes are the caller's to name.

    Raises:
        UsageError: If there are no such steps, or one series is not singled out.
    """
    if not isinstance(forecast, Forecast):
        what = f"{shown(forecast)} is no forecast."
        raise UsageError(message("forecast", what, fixes=["pass em.forecast(longer)"]))
    mean, lower, upper, draws = (
        part[site] for part in (forecast.means, forecast.lower, forecast.upper, forecast.draws)
    )
    if entry is not None:
        mean, lower, upper, draws = (t[..., entry] for t in (mean, lower, upper, draws))
        data = data if data is None or data.dim() == 1 else data[:, entry]
    require_shape("forecast", "mean", mean, "H")
    names = matching(site, forecast.means)
    numbers = [number_of(n) for n in names]
    steps = np.array([h if k is None else k for h, k in enumerate(numbers)])
    ax = or_new(ax, (9, 3))
    every = np.arange(int(steps.max()) + 1 if data is None else len(data))
    at = _times(times, every)
    if len(at) <= steps.max():
        _same_length("forecast", steps=int(steps.max()) + 1, times=len(at))
    if data is not None:
        _same_length("forecast", times=len(at), data=len(data))
        _points(ax, at, data)
    look = {"color": colour(0), "linewidth": 1.6, "label": "forecast", **style}
    bands = [(_array(lower), _array(upper))]
    for inner in sorted(levels, reverse=True):
        tail = (1 - a_level("forecast", inner)) / 2
        ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=draws.device)
        low, high = draws.to(torch.float64).quantile(ends, 1)
        bands.append((_array(low), _array(high)))
    # A fan for each run of steps: no band is drawn across steps that were seen.
    for run in np.split(np.arange(len(steps)), np.nonzero(np.diff(steps) > 1)[0] + 1):
        for low, high in bands:
            ax.fill_between(
                at[steps[run]], low[run], high[run], color=look["color"], alpha=0.2, linewidth=0
            )
        marker = {"marker": "o", "markersize": 3} if len(run) == 1 else {}
        ax.plot(at[steps[run]], _array(mean)[run], **{**marker, **look})
        look["label"] = None
    ax.set_xlabel("time")
    return ax


def prediction_errors(
    source: Tensor | Posterior,
    ax: Axes | None = None,
    *,
    site: str | None = None,
    times: Times = None,
    level: float = 0.95,
    **style: Any,
) -> Axes:
    """Draw standardised one-step prediction errors, with the lines that few should pass.

    Args:
        source: ``posterior.prediction_errors("y_*")`` # (T,), or a posterior.
        ax: Axes to draw on; new ones by default.
        site: Of a posterior, which observed steps, by glob.
        times: Where the steps lie; 0, 1, … by default. # (T,)
        level: The probability with which an error of the model lies between the lines.
        **style: Passed to ``Axes.vlines``.

    Returns:
        The axes.

    Raises:
        UsageError: If the errors are not those of one series, or the lengths disagree.
    """
    z = _normal_quantile(a_level("prediction_errors", level))
    if isinstance(source, Posterior):
        source = source.prediction_errors(_named("prediction_errors", site))
    if not isinstance(source, Tensor):
        what = f"{shown(source)} is neither a tensor of errors nor a posterior."
        call = "pass posterior.prediction_errors('y_*')"
        raise UsageError(message("prediction_errors", what, fixes=[call]))
    require_shape("prediction_errors", "errors", source, "T")
    errors, at = _array(source), _times(times, np.arange(len(source)))
    _same_length("prediction_errors", steps=len(errors), times=len(at))
    ax = or_new(ax, (9, 2.4))
    look = {"color": colour(0), "linewidth": 1.2, **style}
    there = ~np.isnan(errors)
    ax.vlines(at[there], 0, errors[there], **look)
    ax.plot(at[there], errors[there], "o", markersize=3, color=look["color"])
    for line in (-z, z):
        ax.axhline(line, color="0.4", linewidth=0.8, linestyle="--")
    ax.axhline(0.0, color="0.4", linewidth=0.8)
    ax.set_xlabel("time")
    ax.set_ylabel("standardised error")
    return ax


def _points(ax: Axes, at: np.ndarray, data: Tensor) -> None:
    columns = data.detach().reshape(len(data), -1)
    for d in range(columns.shape[1]):
        shade = "0.45" if columns.shape[1] == 1 else colour(d)
        ax.plot(at, _array(columns[:, d]), "o", markersize=3, color=shade, zorder=1)


def _normal_quantile(level: float) -> float:
    return float(torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)))


def _named(where: str, site: str | None) -> str:
    if site is None:
        raise UsageError(
            message(
                where,
                "a posterior does not say which series is to be drawn.",
                fixes=["name its steps by glob: site='h_*'"],
            )
        )
    return site


def _times(times: Times, default: np.ndarray) -> np.ndarray:
    return default if times is None else _array(torch.as_tensor(times))


def _array(v: Tensor) -> np.ndarray:
    return v.detach().cpu().numpy()


def _same_length(where: str, **lengths: int) -> None:
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise UsageError(
            message(where, f"the lengths disagree: {words}.", fixes=["pass one of each per step"])
        )
