"""New data from a model at its parameters: p(z, x; θ), latents and observations drawn in order.

    z ~ p(z; θ),    x ~ p(x | z; θ)

What a model observes is drawn where it observes it, and written into the argument that it came from:
a loop that reads the value before (an autoregression) reads what was drawn. Of a model that reads its
observations before it draws them this would be wrong, which a second run shows: its densities at the
new data have to be those that were drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_em.analysis.predictive import under_user_names
from pyro_em.analysis.resized import resized
from pyro_em.analysis.rows import Rows, Sites, named, plates_of_rows, run
from pyro_em.analysis.uses import Uses, is_unit, refuse_weights, uses_of
from pyro_em.distributions import unwrap
from pyro_em.errors import Finding, UsageError, raise_findings
from pyro_em.globs import Values
from pyro_em.plan.program import Program
from pyro_em.tracing.draws import drawn_run
from pyro_em.tracing.handlers import GiveValues, KeepValues, SampleMessenger
from pyro_em.tracing.leaves import Path, leaves_of, replaced
from pyro_em.tracing.randomness import same_random_state, seeded
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role, is_factor, role_of, signature_of
from pyro_em.tracing.whole import LeftWhole
from pyro_em.variational.bound import Variational

Call: TypeAlias = tuple[tuple, dict[str, Any]]

Points: TypeAlias = Callable[[Call, Call], Mapping[str, Tensor]]
"""Values of latents at point estimates, from the arguments as given and as they are used."""


@dataclass(frozen=True, eq=False)
class Generated:
    """New data.

    Attributes:
        values: Per site what was drawn; deterministic sites too. # (*plates, *event)
        args: The model's positional arguments with the new data in place of what it observes.
        kwargs: Its keyword arguments.
        unwritten: Observed sites whose values are in no argument.
    """

    values: Values
    args: tuple
    kwargs: dict[str, Any]
    unwritten: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A model with arguments of the right size, from which data are drawn as often as wanted.

    Attributes:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        fixed: Latents that stay at point estimates.
        again: Leaves of the arguments that are observed and also read.
        rows: Which arguments were brought to another size; None where none was.
        uses: What the model does with its arguments, where that can be seen.
        where: The public method, for messages.
    """

    model: Model
    args: tuple
    kwargs: dict[str, Any]
    fixed: Mapping[str, Tensor]
    again: frozenset[Path]
    rows: Rows | None
    uses: Uses | None
    where: str

    @classmethod
    def of(
        cls,
        model: Model,
        n: int | None,
        args: tuple,
        kwargs: dict[str, Any],
        points: Points,
        where: str,
    ) -> Self:
        """The source of data of ``n`` rows; see `ExactPosteriorEM.generate`.

        Args:
            model: The user's model; its parameters have been initialised.
            n: How many rows; as many as there are where None.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            points: Gives, for arguments, the values of latents that have point estimates.
            where: The public method, for messages.
        """
        _refuse_arrays(model, args, kwargs, where)
        kwargs = {**_default_counts(model, args), **kwargs}
        sites, rows, given = None, None, (args, kwargs)
        if n is not None:
            sites, rows, args, kwargs = resized(model, n, args, kwargs, where)
        if sites is None:
            sites = run(model, args, kwargs)
        uses = uses_of(model, args, kwargs, sites)
        outermost = next((p for p, _ in plates_of_rows(sites)), None)
        plate = outermost if rows is None else rows.plate
        at = points(given, (args, kwargs))
        fixed = {k: v for k, v in at.items() if not _is_inside(sites.get(k), plate)}
        refuse_weights(model, args, kwargs, sites, fixed, where)
        tensors = {p for p, v in leaves_of(args, kwargs).items() if isinstance(v, Tensor)}
        again = tensors if uses is None else tensors & uses.observed & uses.read.keys()
        return cls(model, args, kwargs, fixed, frozenset(again), rows, uses, where)

    def drawn(self, seed: int | None) -> Generated:
        """New data.

        Args:
            seed: Seed of the draws; torch's global state where None.
        """
        data = (self.args, self.kwargs)
        return _drawn(self.model, *data, self.fixed, self.again, self.rows, seed, self.where)

    def drawn_whole(self, seed: int) -> Generated:
        """The same with all that can be put back into the arguments there."""
        new = self.drawn(seed)
        return new if self.uses is None else put_back(self.model, new, self.uses)


def _default_counts(model: Model, args: tuple) -> dict[str, Any]:
    """Whole numbers that arguments have by default: one of them may be the number of rows."""
    return {
        p.name: p.default
        for p in signature_of(model)[len(args) :]
        if isinstance(p.default, int) and not isinstance(p.default, bool)
    }


def _refuse_arrays(model: Model, args: tuple, kwargs: dict[str, Any], where: str) -> None:
    """Refuse what carries no tag, so that nobody sees whether densities read it."""
    arrays = [p for p, v in leaves_of(args, kwargs).items() if isinstance(v, np.ndarray)]
    if arrays:
        raise_findings(
            [
                Finding(
                    where,
                    f"{named(model, arrays)}: an array of numpy.",
                    "what a model does with an array cannot be followed",
                    ("pass a tensor: torch.as_tensor(x)",),
                    UsageError,
                )
            ]
        )


def _is_inside(site: Mapping[str, Any] | None, plate: str | None) -> bool:
    return site is None or any(f.name == plate for f in site["cond_indep_stack"])


def no_points(*_: Call) -> dict[str, Tensor]:
    """The points of a model without a guide."""
    return {}


def points_of(
    found: Program | Variational, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Values of latents at point estimates.

    Args:
        found: The model with its guide.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
    """
    model = found.pair if isinstance(found, Variational) else found.model
    with same_random_state():
        sites = drawn_run(model, args, kwargs)
    return {
        name: sites.sites[name]["value"].detach()
        for name, role in sites.roles.items()
        if role is Role.POINT
    }


# ---------------------------------------------------------------------- drawing


class _DrawInto(SampleMessenger):
    """Draw what the model observes, and write it to where the observed value came from.

    Args:
        buffers: Tensors of our own among the arguments.
        weigh: Whether log densities of what was drawn are kept.

    Attributes:
        log_probs: Of what was drawn, before it was written.
        written: Per buffer where something was written.
        unwritten: Observed sites whose values are in no buffer.
    """

    def __init__(self, buffers: Mapping[Path, Tensor], weigh: bool) -> None:
        super().__init__()
        self.weigh = weigh
        self.log_probs: dict[str, Tensor] = {}
        self.written = {p: torch.zeros_like(b, dtype=torch.bool) for p, b in buffers.items()}
        self.unwritten: list[str] = []
        self._buffers = {b.untyped_storage().data_ptr(): p for p, b in buffers.items()}
        self._given: dict[str, Any] = {}

    @property
    def drawn(self) -> Collection[str]:
        """The observed sites."""
        return self._given.keys()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_drawn(msg):
            self._given[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, value = msg["name"], msg["value"]
        if self.weigh and is_factor(msg) and not is_unit(msg):
            self.log_probs[name] = unwrap(msg["fn"])[0].log_prob(value)
        if name not in self._given:
            return
        given = self._given[name]
        path = None
        if isinstance(given, Tensor) and given.shape == value.shape:
            path = self._buffers.get(given.untyped_storage().data_ptr())
        if path is None:
            self.unwritten.append(name)
            return
        there = self.written[path].as_strided(given.shape, given.stride(), given.storage_offset())
        given.copy_(value)
        there.fill_(True)


def is_drawn(site: Mapping[str, Any]) -> bool:
    """Whether a site holds data, of which new ones can be drawn."""
    return is_factor(site) and role_of(site) is Role.DATA and not is_unit(site)


def _drawn(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    fixed: Mapping[str, Tensor],
    again: Collection[Path],
    rows: Rows | None,
    seed: int | None,
    where: str,
) -> Generated:
    """One run that draws everything, into copies of the arguments; ``again``: observed and read."""
    leaves = {p: v for p, v in leaves_of(args, kwargs).items() if isinstance(v, Tensor)}
    buffers = {
        p: v.detach().clone(memory_format=torch.contiguous_format) for p, v in leaves.items()
    }
    args, kwargs = replaced(args, kwargs, buffers)
    into = _DrawInto(buffers, weigh=bool(again))
    with (
        LeftWhole(),
        seeded(seed),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.trace() as tracer,
        into,
        GiveValues(fixed, dict.fromkeys(fixed, Role.POINT), {}),
    ):
        model(*args, **kwargs)
    sites = {
        n: s
        for n, s in tracer.trace.nodes.items()
        if s["type"] == "sample" and not site_is_subsample(s) and not is_unit(s)
    }
    if again:
        _check_again(model, args, kwargs, sites, into, again, where)
        _refuse_made_up(model, rows, {p: into.written[p] for p in again}, where)
    values = Values(under_user_names({n: s["value"] for n, s in sites.items()}))
    return Generated(values, args, kwargs, tuple(into.unwritten))


def _check_again(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    drawn: Sites,
    into: _DrawInto,
    again: Collection[Path],
    where: str,
) -> None:
    """Refuse a model that reads its observations otherwise than in the order in which they are drawn.

    Its densities on the new data have to be those from which these were drawn.
    """
    latents = {n: s["value"] for n, s in drawn.items() if n not in into.drawn}
    sites = run(model, args, kwargs, KeepValues(latents))
    for name, before in into.log_probs.items():
        value = drawn[name]["value"]
        now = unwrap(sites[name]["fn"])[0].log_prob(value) if name in sites else None
        same = now is not None and torch.allclose(now, before, rtol=1e-4, atol=1e-6, equal_nan=True)
        if same and (name in into.unwritten or sites[name]["value"].equal(value)):
            continue
        raise_findings(
            [
                Finding(
                    where,
                    f"site '{name}' has another density at the new data than where they were drawn.",
                    f"{named(model, again)} is observed, and densities read it before it is drawn, or "
                    "through a copy",
                    (
                        "observe step by step in a loop, each a part of the argument: obs=x[t]",
                        "read what pyro.sample returns instead of the argument",
                        "compute what is fixed of the data before, and pass it as an argument",
                    ),
                    UsageError,
                )
            ]
        )


def _refuse_made_up(
    model: Model, rows: Rows | None, written: Mapping[Path, Tensor], where: str
) -> None:
    """Refuse new rows that read values which nothing draws, as the first ones of an autoregression."""
    for path, there in written.items():
        dim = None if rows is None else rows.dims.get(path)
        if rows is None or dim is None or there.shape[dim] <= rows.size + rows.lag:
            continue
        given = rows.size + rows.lag
        if not bool(there.narrow(dim, given, there.shape[dim] - given).all()):
            name = named(model, [path])
            raise_findings(
                [
                    Finding(
                        where,
                        f"{name} is read where nothing of it is observed, and has {given} rows.",
                        "what new rows begin with is not drawn by the model",
                        (f"pass {name} with {there.shape[dim]} rows, of which that is read",),
                        UsageError,
                    )
                ]
            )


def put_back(model: Model, new: Generated, uses: Uses) -> Generated:
    """The same with values in the arguments that are observed in another dtype (``obs=x.float()``).

    Args:
        model: The user's model.
        new: New data, some of which are in no argument.
        uses: What the model does with its arguments.
    """
    leaves = leaves_of(new.args, new.kwargs)
    back: dict[Path, Tensor] = {}
    for name in new.unwritten:
        value, paths = new.values.get(name), uses.observed_by.get(name, frozenset())
        path = next(iter(paths), None)
        if path is None or len(paths) > 1 or path in back or not isinstance(value, Tensor):
            continue
        if leaves[path].shape == value.shape:
            back[path] = value.to(leaves[path].dtype)
    if not back:
        return new
    args, kwargs = replaced(new.args, new.kwargs, back)
    latents = {n: v for n, v in new.values.items() if n not in uses.observed_by}
    sites = run(model, args, kwargs, KeepValues(latents))
    left = [n for n in new.unwritten if not sites[n]["value"].equal(new.values[n])]
    return replace(new, args=args, kwargs=kwargs, unwritten=tuple(left))
