"""The M-step of Gaussian components whose mean and spread are parameters of nothing else.

With moments m = Σ r d and M = Σ r d dᵀ about a point c_k, and w = Σ r,

    μ_k = c_k + m / w,      Σ_k = M / w − (m / w)(m / w)ᵀ,

summed over k first where all share one spread. What is solved is what the next E-step reads, so that
nothing is computed twice. Everything else about a Gaussian is solved by
`pyro_em.updates.closed_forms.closed_form`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.densities.gaussian import Gaussian, Prepared
from pyro_em.densities.natural import formed
from pyro_em.densities.small_components import SmallComponents, Solved
from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.families.family import Family, expected_log_density
from pyro_em.graph.bindings.binding import PRODUCT, whole_matrices, whole_parameter
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.expectations.scatter import data_magnitude
from pyro_em.updates.update import ClosedForm, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Components:
    """Gaussian components as the E-step reads them.

    Attributes:
        mu: μ − c. # (K, D)
        root: Standard deviations, or Cholesky factors. # (K or 1, D) or (K or 1, D, D)
        spread: The parameter's own form of it: a covariance, or ``root``.
        prepared: Coefficients of the features.
    """

    mu: Tensor
    root: Tensor
    spread: Tensor
    prepared: Prepared


@dataclass(frozen=True, eq=False)
class OwnedForm:
    """Which parameters one Gaussian group has, whatever its data are.

    Attributes:
        family: Its record.
        loc: Name of the parameter that is the mean.
        spread: Name of the parameter that is the spread.
        shapes: Shapes of the two.
        dtypes: Dtypes of the two.
        shared: Whether all components have one spread.
        floor: The smallest eigenvalue of a matrix that the user asked for; 0 for none.
        is_factor: Whether the spread's parameter is a factor A of covariances A Aᵀ.
    """

    family: Family
    loc: str
    spread: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]
    shared: bool
    floor: float
    is_factor: bool

    def on(
        self,
        rule: Gaussian,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        values: Values,
    ) -> Owned:
        """The parameters of the group on some data.

        Args:
            rule: Its rows.
            graph: The collapsed graph.
            updates: Collapsed updates.
            values: Parameter values, for their shapes.
        """
        update = updates[self.spread]
        assert isinstance(update.update, ClosedForm)
        magnitude = data_magnitude(update, graph, values[self.spread]).to(torch.float64)
        if rule.diagonal:
            spreads = 1 if self.shared else rule.K
            least = (1e-6 * magnitude).square().reshape(spreads, rule.x.shape[0])
        else:
            least = 1e-12 * magnitude.square()
        return Owned(
            self.family,
            self.loc,
            self.spread,
            self.shapes,
            self.dtypes,
            self.shared,
            self.floor,
            self.is_factor,
            rule,
            least.clamp(min=update.update.floor),
        )


@dataclass(frozen=True, eq=False)
class Owned(OwnedForm):
    """The parameters of one Gaussian group.

    Attributes:
        rule: The group's rows.
        least: The smallest clear variance. # (K or 1, D) or (D,)
    """

    rule: Gaussian
    least: Tensor

    @property
    def form(self) -> OwnedForm:
        """The same without its data."""
        return OwnedForm(**{f.name: getattr(self, f.name) for f in fields(OwnedForm)})

    @property
    def params(self) -> tuple[str, str]:
        """The parameters that are held."""
        return self.loc, self.spread

    def enter(self, values: Values) -> Components:
        """The components at parameter values."""
        D = self.rule.x.shape[0]
        mu = values[self.loc].reshape(-1, D).to(torch.float64) - self.rule.centre
        value = values[self.spread].to(torch.float64)
        if self.is_factor:
            value = PRODUCT.forward(value)
        if self.rule.diagonal:
            root = spread = value.reshape(-1, D)
        else:
            spread = value.reshape(-1, D, D)
            found = None if self._small is None else self._small.at(mu, spread)
            if found is not None:
                return _of_numbers(found)
            is_root = self.rule.spread == "scale_tril"
            root = spread if is_root else torch.linalg.cholesky(spread)
        return Components(mu, root, spread, self.rule.prepare_at(mu, root))

    def values(self, components: Components) -> dict[str, Tensor]:
        """The parameters at components."""
        mean = formed(components.mu + self.rule.centre, self.shapes[0], self.dtypes[0])
        spread = components.root if self.is_factor else components.spread
        return {self.loc: mean, self.spread: formed(spread, self.shapes[1], self.dtypes[1])}

    def m_step(
        self, components: Components, moments: Tensor, mass: Tensor
    ) -> tuple[Components, Tensor | float]:
        """The maximisers, and by how much they raise the expected log joint, in nats.

        Args:
            components: At the E-step.
            moments: Σ r d and Σ r d dᵀ, about zero or the E-step's means. # (K, P)
            mass: Σ r. # (K,)

        Raises:
            Handover: If a component is empty or near a collapse.
        """
        before = components.prepared.wide
        if self._small is not None and before is not None:
            found = self._small.m_step(moments, mass, *before)
            if found is not None:
                return _of_numbers(found), found.gain
        D = self.rule.x.shape[0]
        each = mass.unsqueeze(-1)
        means = moments / each
        step = means[:, :D]
        white = components.prepared.white
        about = None if white is None else white.point
        mu = step if about is None else step + about.to(step.dtype)
        if self.dtypes[0] != torch.float64:
            rounded = (mu + self.rule.centre).to(self.dtypes[0])
            mu = rounded.to(torch.float64) - self.rule.centre
        if self.rule.diagonal:
            variance = self._pooled(torch.addcmul(means[:, D:], step, step, value=-1), each)
            root = spread = self._rounded(variance.clamp(min=0).sqrt())
            clear = (root * root - self.least).amin()
            few = 1.6
        else:
            squares = means[:, D:].index_select(1, self.rule.full).view(-1, D, D)
            own = torch.addcmul(squares, step.unsqueeze(-1), step.unsqueeze(-2), value=-1)
            spread = self._rounded(self._pooled(own, each.unsqueeze(-1)))
            root = torch.linalg.cholesky(spread)
            # A squared pivot over its variance is 1 − R² of a feature on those before it.
            pivots = root.diagonal(dim1=-2, dim2=-1)
            variances = spread.diagonal(dim1=-2, dim2=-1)
            clear = torch.addcmul(self.minus_least, pivots, pivots)
            clear = clear.sub_(variances, alpha=1e-7).amin()
            few = D + 1.1
            if self.floor > 0 and not _is_above(root, self.floor):
                raise Handover
            if self.rule.spread == "scale_tril":
                spread = root = self._rounded(root)
        if not (float(clear) > 0 and float(mass.sum() if self.shared else mass.amin()) > few):
            raise Handover
        after = Components(mu, root, spread, self.rule.prepare_at(mu, root))
        return after, self._gain(components, after, moments, mass)

    @cached_property
    def _small(self) -> SmallComponents | None:
        """The same in Python's numbers, where that is quicker."""
        rule, wide = self.rule, torch.float64
        if rule.spread != "covariance_matrix" or self.shared or self.is_factor or self.floor > 0:
            return None
        if self.dtypes != (wide, wide) or rule.x.dtype != wide:
            return None
        return SmallComponents.of(rule, self.least)

    @cached_property
    def minus_least(self) -> Tensor:
        """The negative of ``least``."""
        return -self.least

    def _pooled(self, spread: Tensor, mass: Tensor) -> Tensor:
        """The spread per component, or the one of all: their mean, by mass."""
        if self.shared:
            return (spread * mass).sum(0, keepdim=True) / mass.sum(0, keepdim=True)
        return spread

    def _rounded(self, spread: Tensor) -> Tensor:
        dtype = self.dtypes[1]
        return spread if dtype == torch.float64 else spread.to(dtype).to(torch.float64)

    def _gain(self, before: Components, after: Components, moments: Tensor, mass: Tensor) -> Tensor:
        old, new = before.prepared, after.prepared
        if old.wide is not None and new.wide is not None:
            slope = (moments * (new.wide[0] - old.wide[0])).sum()
            return slope + (mass * (new.wide[1] - old.wide[1]).squeeze(-1)).sum()
        arguments = [self._arguments(c) for c in (before, after)]
        statistics = {
            **self.rule.statistics(old, moments, mass, arguments[0]),
            **{f"reference:{n}": a for n, a in arguments[0].items()},
        }
        first, second = (expected_log_density(self.family, statistics, a) for a in arguments)
        return second - first

    def _arguments(self, components: Components) -> dict[str, Tensor]:
        """The distribution's arguments, of the shape of the group's."""
        lead = (1,) * self.rule.lead
        loc, spread = components.mu + self.rule.centre, components.spread
        if self.rule.scalar:
            loc, spread = loc.squeeze(-1), spread.reshape(-1)
        return {
            "loc": loc.reshape(*lead, *loc.shape),
            self.rule.spread: spread.reshape(*lead, *spread.shape),
        }


def _of_numbers(found: Solved) -> Components:
    coefficients = (found.linear, found.constant)
    prepared = Prepared(*coefficients, wide=coefficients, size=found.size)
    return Components(found.mu, found.root, found.spread, prepared)


def _is_above(root: Tensor, floor: float) -> bool:
    """Whether all eigenvalues of A Aᵀ are above a floor: cheaply where they clearly are.

    The smallest one is not below 1 / tr (A Aᵀ)⁻¹.

    Args:
        root: Cholesky factors. # (K, D, D)
        floor: The floor.

    Example:
        >>> _is_above(torch.eye(2), 0.9), _is_above(torch.eye(2), 0.4), _is_above(torch.eye(2), 1.1)
        (True, True, False)
    """
    trace = torch.cholesky_inverse(root).diagonal(dim1=-2, dim2=-1).sum(-1)
    if float(trace.amax()) * floor < 1:
        return True
    return float(torch.linalg.eigvalsh(root @ root.mT).amin()) > floor


def owned(
    g: int,
    rule: Gaussian,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> Owned | None:
    """The M-step of a Gaussian group whose parameters are its own, or None.

    Args:
        g: The group.
        rule: Its rows.
        graph: The collapsed graph.
        updates: Collapsed updates.
        values: Parameter values, for their shapes.
    """
    group = graph.groups[g]
    names = []
    spread_of, is_factor = whole_matrices(group.bindings[rule.spread], values)
    is_factor = is_factor and rule.spread == "covariance_matrix"
    for name in (whole_parameter(group.bindings["loc"], values), spread_of):
        if name is None or sum(name in other.params for other in graph.groups) > 1:
            return None
        names.append(name)
    loc, spread = names
    exact = [updates[n].update for n in names]
    if loc == spread or not all(isinstance(u, ClosedForm) for u in exact):
        return None
    D, K = rule.x.shape[0], rule.K
    means, spreads = (tuple(group.arguments[n].shape[rule.lead :]) for n in ("loc", rule.spread))
    vector = () if rule.scalar else (D,)
    square = vector if rule.diagonal else (D, D)
    if means != (K, *vector) or spreads not in ((1, *square), (K, *square)):
        return None
    interval = bounds(graph.parameters[spread].constraint)
    if bounds(graph.parameters[loc].constraint) != (-float("inf"), float("inf")):
        return None
    if rule.diagonal and (interval is None or interval[0] > 0 or interval[1] < float("inf")):
        return None
    update = exact[1]
    assert isinstance(update, ClosedForm) and group.family is not None
    form = OwnedForm(
        group.family,
        loc,
        spread,
        (tuple(values[loc].shape), tuple(values[spread].shape)),
        (values[loc].dtype, values[spread].dtype),
        spreads[0] == 1,
        0.0 if rule.diagonal else update.floor,
        is_factor,
    )
    return form.on(rule, graph, updates, values)
