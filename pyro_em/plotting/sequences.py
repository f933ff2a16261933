"""A chain of hidden states over time: the decoded path, and the posterior marginals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plotting.axes import colour, or_new
from pyro_em.plotting.latents import probs_of, require_shape, states_of
from pyro_em.posteriors.answers.protocol import AnyPosterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def state_sequence(
    x: Tensor,
    states: Tensor | Mapping[str, Tensor] | AnyPosterior,
    ax: Axes | None = None,
    *,
    site: str | None = None,
    times: Tensor | Sequence[float] | None = None,
    means: Tensor | None = None,
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw a series whose points have the colour of the state they are decoded to.

    Args:
        x: The series. # (T,)
        states: A state per step, as in ``posterior.mode()["z_*"]`` # (T,); or a posterior, whose most
            probable path is drawn, or values by site.
        ax: Axes to draw on; new ones by default.
        site: Of a posterior or of values by site, which: a glob of steps such as ``"z_*"``.
        times: Where the steps lie; 0, 1, … by default. # (T,)
        means: What each state emits on average, drawn as a step line. # (K,)
        labels: A name per state; "state 1", … by default.

    Returns:
        The axes; time and value axes are the caller's to name.

    Raises:
        UsageError: If the lengths disagree, or states are not those of one sequence.
    """
    states = states_of("state_sequence", states, site)
    require_shape("state_sequence", "states", states, "T")
    moments, series, path = _times(times, len(x)), _array(x), _array(states.long())
    _check_lengths("state_sequence", steps=len(x), states=len(states), times=len(moments))
    ax = or_new(ax, (9, 3))
    ax.plot(moments, series, color="0.75", linewidth=1, zorder=1)
    for k in range(int(path.max()) + 1 if means is None else len(means)):
        in_state = path == k
        label = f"state {k + 1}" if labels is None else labels[k]
        ax.scatter(
            moments[in_state], series[in_state], s=16, color=colour(k), label=label, zorder=2
        )
    if means is not None:
        level = _array(means)[path]
        ax.step(
            moments, level, where="mid", color="black", linewidth=1.4, label="mean of the state"
        )
    ax.set_xlabel("time")
    return ax


def state_probs(
    probs: Tensor | AnyPosterior,
    ax: Axes | None = None,
    *,
    site: str | None = None,
    times: Tensor | Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw the posterior marginals of a chain as areas that fill the height at every time.

    Args:
        probs: Probabilities that sum to one over the states # (T, K), or a posterior.
        ax: Axes to draw on; new ones by default.
        site: Of a posterior, which latents: a glob of steps such as ``"z_*"``.
        times: Where the steps lie; 0, 1, … by default. # (T,)
        labels: A name per state; "state 1", … by default.

    Returns:
        The axes.

    Raises:
        UsageError: If the lengths disagree, or the probabilities are not those of one sequence.
    """
    probs = probs_of("state_probs", probs, site)
    require_shape("state_probs", "probs", probs, "T, K")
    T, K = probs.shape
    moments = _times(times, T)
    _check_lengths("state_probs", steps=T, times=len(moments))
    ax = or_new(ax, (9, 2.2))
    names = [f"state {k + 1}" for k in range(K)] if labels is None else labels
    colours = [colour(k) for k in range(K)]
    ax.stackplot(moments, _array(probs).T, labels=names, colors=colours, alpha=0.75, linewidth=0)
    ax.set_xlim(float(moments[0]), float(moments[-1]))
    ax.set_ylim(0, 1)
    ax.set_xlabel("time")
    ax.set_ylabel("posterior probability")
    return ax


def _times(times: Tensor | Sequence[float] | None, T: int) -> np.ndarray:
    return np.arange(T) if times is None else _array(torch.as_tensor(times))


def _array(v: Tensor) -> np.ndarray:
    return v.detach().cpu().numpy()


def _check_lengths(where: str, **lengths: int) -> None:
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise UsageError(
            message(where, f"the lengths disagree: {shown}.", fixes=["pass one of each per step"])
        )
