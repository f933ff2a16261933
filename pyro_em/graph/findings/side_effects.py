"""What a model does beside its sites: writing to its data makes every run one of other data.

Buffers of a module (running means) and counters are written by right; only what makes the same site
differ from one run to the next is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Finding, ModelError, message
from pyro_em.graph.coupling import Sites, differs, parts_of
from pyro_em.graph.failing.blame import given_tensors
from pyro_em.tracing.allocation import NumbersNeeded
from pyro_em.tracing.runs import Model, Run, held_run
from pyro_em.tracing.sites import latents_in

_SAMPLED = 1024  # numbers of a tensor that are compared where a count of writes may not show any


class Watched:
    """The tensors that a model is given, as they are before it runs.

    Args:
        model: The model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self.before = {where: _Mark(t) for where, t in self._given().items()}
        self.written: dict[str, Tensor] = {}
        self.held: dict[str, tuple[Tensor, int]] = {}

    def _given(self) -> dict[str, Tensor]:
        """The data by name as they are now: an entry of a dict may have been replaced."""
        given = given_tensors(self._model, self._args, self._kwargs, arrays=True)
        return {where: t for where, t in given.items() if _is_data(t)}

    def after_one_run(self, sites: Sites) -> None:
        """Keep what this run has written, and the tensors that its sites hold."""
        self.written = {
            where: t.detach().clone()
            for where, t in self._given().items()
            if where in self.before and self.before[where].is_written(t)
        }
        self.held = {
            f"site '{name}'": (site["value"], site["value"]._version)
            for name, site in sites.items()
            if site["is_observed"] and isinstance(site["value"], Tensor) and _is_data(site["value"])
        }

    def written_again(self) -> list[str]:
        """What another run has changed: names in words, those that the user gave first."""
        now = self._given() if self.written else {}
        found = [w for w, t in self.written.items() if w in now and not torch.equal(t, now[w])]
        return found + [where for where, (t, version) in self.held.items() if t._version != version]

    def notes(self) -> tuple[str, ...]:
        """Warnings about arguments that the first run changed, and later ones leave alone."""
        now = self._given() if self.written else {}
        return tuple(
            message(
                where,
                "the model's first run changed it in place.",
                "the fit is one of the changed data, and so is whatever else reads them",
                ["write to a copy: x = x.clone()", "prepare the data before the model is called"],
            )
            for where in self.written
            if where.startswith("argument")
            and where in now
            and self.before[where].is_changed(now[where])
        )


class _Mark:
    """How often a tensor was written to, and some of its numbers."""

    def __init__(self, t: Tensor) -> None:
        self.version, self.sample = t._version, _sample(t)

    def is_written(self, t: Tensor) -> bool:
        """Whether it was written to since; what is written without a count shows in the sample."""
        return t._version != self.version or self.is_changed(t)

    def is_changed(self, t: Tensor) -> bool:
        """Whether its numbers are others."""
        now = _sample(t)
        if now.shape != self.sample.shape or now.dtype != self.sample.dtype:
            return True
        return not bool(torch.isclose(now, self.sample, rtol=0, atol=0, equal_nan=True).all())


def _sample(t: Tensor) -> Tensor:
    flat = t.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)].clone()


def _is_data(t: Tensor) -> bool:
    plain = t.layout is torch.strided and not t.is_meta and not t.is_inference()
    return plain and not t.requires_grad and not isinstance(t, torch.nn.Parameter)


def writing_problems(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    watched: Watched,
    plain: Run,
    names: Collection[str],
) -> list[Finding]:
    """Findings about data that the model changes, and that make its sites differ.

    Args:
        model: The model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        watched: What it was given, looked at after its first run.
        plain: A plain run of it.
        names: Its sites with a density.

    Raises:
        NumbersNeeded: If a run without numbers cannot tell.
    """
    changed = watched.written_again()
    if not changed:
        return []
    if plain.shadows is not None:
        raise NumbersNeeded
    held = {n: s["value"] for n, s in latents_in(plain.sites).items()}
    run = held_run(model, args, kwargs, held)
    first = {n: [(w, t.clone(), e) for w, t, e in parts_of(run[n])] for n in names if n in run}
    second = held_run(model, args, kwargs, held)
    moved = [
        name
        for name, parts in first.items()
        if any(
            t.shape != other.shape or differs(t, other, event_dim) is not None
            for (_, t, event_dim), (_, other, _) in zip(parts, parts_of(second[name]), strict=False)
        )
    ]
    if not moved:
        return []
    where = changed[0]
    site = f"site '{moved[0]}'"
    if where == site:
        what = "the model writes to its observed value while it runs, and it differs"
    else:
        what = f"the model writes to it while it runs, and {site} differs"
    return [
        Finding(
            where,
            f"{what} from one run to the next.",
            "a model is run several times in one fit: each run would be one of other data",
            (
                "compute a new tensor: x = x * 1.01 instead of x.mul_(1.01) or x *= 1.01",
                "write to a copy: x = x.clone() where the model begins",
                "prepare the data before the model is called",
            ),
        )
    ]


def refused_clearing(where: str) -> ModelError:
    """The refusal of a model or guide that empties the param store."""
    return ModelError(
        message(
            where,
            "it clears the param store while it runs (pyro.clear_param_store()).",
            "every run would begin with new parameters: nothing could be learned",
            [
                "clear the store before the model is passed here, not in it",
                "for a store of its own: with pyro.get_param_store().scope(): around the fit",
            ],
        )
    )
