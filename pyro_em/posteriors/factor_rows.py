"""Factor analysis on sums: loadings, means and noise of rows that are all alike, in closed form.

For x = W u + μ + noise with variances ψ, u ~ N(0, LLᵀ), and with A = W L, d = x̄ − μ, S the scatter
about μ,

    M = I + Aᵀ Ψ⁻¹ A,    β = M⁻¹ Aᵀ Ψ⁻¹,
    Σ E[ε] = n β d,    Σ E[ε εᵀ] = n M⁻¹ + β S βᵀ,    Σ x E[ε]ᵀ = S βᵀ,
    −2 log p = n (D log 2π + log det Ψ + log det M) + tr Ψ⁻¹ S − tr Aᵀ Ψ⁻¹ S βᵀ.

The M-step regresses x on (u, 1) from these sums; a free μ becomes x̄, as parameter expansion by a mean
of u gives. An iteration does not depend on the number of rows.

Source: Rubin and Thayer (1982), EM algorithms for ML factor analysis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.collapsed import are_alike
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.tracing.sites import Role
from pyro_em.updates.gaussian_rows import event_shape, is_matrix, rows_of, tril_rows
from pyro_em.updates.statistics import Expectation
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]

_COLLAPSED = 1e-8  # of a feature's variance: the step through tables judges such a noise


@dataclass(frozen=True, eq=False)
class Part:
    """One of loadings, means and noise: a parameter, or known numbers.

    Attributes:
        param: The parameter; None where the numbers are known.
        index: The parameter's element behind each number. # (D, q) or (D,)
        known: The numbers, where they are.
    """

    param: str | None
    index: Tensor
    known: Tensor

    def at(self, values: Values) -> Tensor:
        """The numbers at parameter values, in float64."""
        if self.param is None:
            return self.known
        return values[self.param].reshape(-1).to(torch.float64)[self.index]

    def into(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The parameter, for numbers of which each of its elements has one."""
        flat = numbers.new_empty(like.numel())
        flat[self.index.reshape(-1)] = numbers.reshape(-1)
        return flat.reshape(like.shape).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Factors:
    """Loadings, means and noise.

    Attributes:
        W: # (D, q)
        mu: # (D,)
        psi: Variances of the noise. # (D,)
    """

    W: Tensor
    mu: Tensor
    psi: Tensor


@dataclass(frozen=True, eq=False)
class Sums(Expectation):
    """The evidence with the sums of an E-step.

    Attributes:
        phi_phi: Σ E[φ φᵀ] for φ = (ε, 1). # (q + 1, q + 1)
        d_phi: Σ (x − μ) E[φ]ᵀ. # (D, q + 1)
        d_d: Σ (x − μ)². # (D,)
    """

    phi_phi: Tensor | None = None
    d_phi: Tensor | None = None
    d_d: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FactorTheta:
    """The parameters of factor analysis and their M-step.

    Attributes:
        loadings: W.
        mean: μ.
        noise: Standard deviations.
        start: All parameters when the kernel was made, for shapes and for what is fixed.
        scatter: About the mean of the data. # (D, D)
        centre: The mean of the data. # (D,)
        rows: How many rows there are.
        low: L. # (q, q)
    """

    loadings: Part
    mean: Part
    noise: Part
    start: Values
    scatter: Tensor
    centre: Tensor
    rows: int
    low: Tensor

    def enter(self, values: Values) -> Factors:
        """Parameter values in the form of the E-step."""
        return Factors(
            self.loadings.at(values), self.mean.at(values), self.noise.at(values).square()
        )

    def values(self, at: Factors) -> dict[str, Tensor]:
        """The parameters by name."""
        out = {name: value.clone() for name, value in self.start.items()}
        for part, numbers in (
            (self.loadings, at.W),
            (self.mean, at.mu),
            (self.noise, at.psi.sqrt()),
        ):
            if part.param is not None:
                out[part.param] = part.into(numbers, self.start[part.param])
        return out

    def log_prior(self, at: Factors) -> float:
        """No parameter has a prior."""
        return 0.0

    def e_step(self, at: Factors) -> Sums:
        """Evidence and sums.

        Raises:
            Handover: If the step through tables has to look.
        """
        n, loadings = self.rows, at.W @ self.low
        d = self.centre - at.mu
        scatter = self.scatter + n * torch.outer(d, d)
        white = loadings / at.psi.unsqueeze(-1)
        q = loadings.shape[-1]
        eye = self._eye
        chol, bad = torch.linalg.cholesky_ex(eye + loadings.mT @ white)
        if int(bad):
            raise Handover
        inverse = torch.cholesky_inverse(chol)
        beta = inverse @ white.mT
        explained = scatter @ beta.mT
        d_d = scatter.diagonal()
        log_det = at.psi.log().sum() + 2 * chol.diagonal().log().sum()
        distance = (d_d / at.psi).sum() - (white * explained).sum()
        evidence = -0.5 * float(n * (len(d) * math.log(2 * math.pi) + log_det) + distance)
        if not abs(evidence) < math.inf:
            raise Handover
        first = n * (beta @ d)
        second = n * inverse + beta @ explained
        phi_phi = torch.empty(q + 1, q + 1, dtype=second.dtype, device=second.device)
        phi_phi[:q, :q], phi_phi[:q, q], phi_phi[q, :q], phi_phi[q, q] = second, first, first, n
        d_phi = torch.cat([explained, (n * d).unsqueeze(-1)], -1)
        return Sums(evidence, {}, phi_phi=phi_phi, d_phi=d_phi, d_d=d_d)

    @cached_property
    def _eye(self) -> Tensor:
        return torch.eye(len(self.low), dtype=torch.float64, device=self.low.device)

    def m_step(self, at: Factors, e: Sums) -> tuple[Factors, float]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        assert e.phi_phi is not None and e.d_phi is not None and e.d_d is not None
        q = e.phi_phi.shape[0] - 1
        if self.mean.param is None:
            phi, cross = e.phi_phi[:q, :q], e.d_phi[:, :q]
        else:
            phi, cross = e.phi_phi, e.d_phi
        # The residuals are x − μ at the E-step: coefficients begin from zero.
        found, bad = torch.linalg.solve_ex(phi, cross.mT)
        if int(bad):
            raise Handover
        coefficients = found.mT
        loadings = torch.linalg.solve_triangular(
            self.low, coefficients[:, :q], upper=False, left=False
        )
        # A working mean of the factors goes into μ, which then is that of the data.
        mu = at.mu if self.mean.param is None else self.centre
        psi, n = at.psi, self.rows
        left = e.d_d - (coefficients * cross).sum(-1)
        if self.noise.param is not None:
            psi = self._tied(left / n)
            if bool((psi <= _COLLAPSED * self._variances).any()):
                raise Handover
        old = at.W @ self.low
        before = (
            e.d_d - 2 * (old * e.d_phi[:, :q]).sum(-1) + (old @ e.phi_phi[:q, :q] * old).sum(-1)
        )
        gain = n * (at.psi.log() - psi.log()) + before / at.psi - left / psi
        return Factors(loadings, mu, psi), 0.5 * float(gain.sum())

    @cached_property
    def _variances(self) -> Tensor:
        return self.scatter.diagonal() / self.rows

    def _tied(self, variances: Tensor) -> Tensor:
        """Averages over the features that share an element of the noise."""
        index = self.noise.index
        size = int(index.max()) + 1
        total = variances.new_zeros(size).index_add(0, index, variances)
        count = variances.new_zeros(size).index_add(0, index, torch.ones_like(variances))
        return (total / count)[index]


@dataclass(frozen=True, eq=False)
class FactorRows:
    """Factor analysis of rows that are all alike.

    Attributes:
        theta: Parameters, sums and their steps.
        latents: The factors' site.
    """

    theta: FactorTheta
    latents: tuple[str, ...]
    name: str = "factor"
    words: str = "factor analysis kernel, on sums over rows"

    def e_step(self, at: Factors) -> Sums:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def factor_rows(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> FactorRows | None:
    """The kernel of a model that is factor analysis; None where it is another.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.
    """
    if len(graph.groups) != 1:
        return None
    block = graph.groups[0].nested
    if not isinstance(block, GaussianBlock) or len(block.groups) != 2 or not are_alike(block):
        return None
    u, x = block.groups
    if u.role is not Role.GAUSSIAN or x.role is Role.GAUSSIAN or len(x.reads) != 1:
        return None
    if is_matrix(x) or any(b.how != "constant" for b in u.bindings.values()):
        return None
    if bool((u.arguments["loc"] != 0).any()):
        return None
    loadings = _part(x, x.lines[1], updates, values, LeastSquares)
    mean = _part(x, "loc", updates, values, LeastSquares)
    noise = _part(x, "scale", updates, values, ClosedForm)
    if loadings is None or mean is None or noise is None or loadings.param is None:
        return None
    of_mean = None if mean.param is None else values[mean.param]
    if not _is_whole(loadings, values[loadings.param]):
        return None
    if of_mean is not None and not _is_whole(mean, of_mean):
        return None
    used = {p.param for p in (loadings, mean, noise)}
    if any(n not in used and not isinstance(u.update, Fixed) for n, u in updates.items()):
        return None
    data = rows_of(x, x.value)[0].to(torch.float64)
    if not bool(torch.isfinite(data).all()) or len(data) <= 1:
        return None
    if is_matrix(u):
        low = tril_rows(u, u.arguments)[0, 0]
    else:
        low = rows_of(u, u.arguments["scale"])[0, 0].to(torch.float64).diag()
    if bool((low.diagonal() == 0).any()):
        return None
    centre = data.mean(0)
    centred = data - centre
    theta = FactorTheta(
        loadings,
        mean,
        noise,
        {n: v.clone() for n, v in values.items()},
        centred.mT @ centred,
        centre,
        len(data),
        low,
    )
    return FactorRows(theta, tuple(block.latents))


def _part(
    group: Group,
    argument: str,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    wanted: type,
) -> Part | None:
    """Loadings, means or noise as numbers; None where they are of another form."""
    binding = group.bindings[argument]
    tail = 1 if argument == group.lines[1] else 0
    known = rows_of(group, binding.evaluate(values), tail)[0, 0].to(torch.float64)
    if binding.how == "constant":
        return Part(None, torch.zeros_like(known, dtype=torch.long), known)
    index = _index(binding)
    if index is None or len(binding.params) != 1:
        return None
    (name,) = binding.params
    update = updates[name]
    if isinstance(update.update, Fixed):
        return Part(None, torch.zeros_like(known, dtype=torch.long), known)
    floored = isinstance(update.update, ClosedForm) and update.update.floor > 0
    if not isinstance(update.update, wanted) or update.priors or floored or len(update.uses) > 1:
        return None
    event = event_shape(group)
    shape = (
        1,
        *(1,) * group.n_plates,
        *event,
        *binding.constant.shape[binding.constant.dim() - tail :],
    )
    whole = index.expand(shape) if tail else index.expand(1, *(1,) * group.n_plates, *event)
    return Part(name, whole.reshape(known.shape), known)


def _index(binding: Binding) -> Tensor | None:
    """The parameter's element behind each element of an argument that takes them as they stand."""
    if binding.how == "selection":
        (part,) = binding.selections[:1]
        plain = len(binding.selections) == 1 and not part.maps and part.factor is None
        return part.index if plain and bool((part.index >= 0).all()) else None
    if binding.jacobians is None or len(binding.jacobians) != 1:
        return None
    (jacobian,) = binding.jacobians.values()
    ones = jacobian == 1
    single = bool((ones.sum(-1) == 1).all()) and bool(((jacobian == 0) | ones).all())
    if not single or bool((binding.constant != 0).any()):
        return None
    return ones.to(torch.uint8).argmax(-1)


def _is_whole(part: Part, value: Tensor) -> bool:
    """Whether each element of a parameter is read once."""
    flat = part.index.reshape(-1)
    return flat.numel() == value.numel() and bool(
        (flat.sort().values == torch.arange(len(flat), device=flat.device)).all()
    )
