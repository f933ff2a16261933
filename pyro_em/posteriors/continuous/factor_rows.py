"""Factor analysis on sums: loadings, means and noise of rows that are all alike, in closed form.

For x = W u + μ + noise with variances ψ, u ~ N(0, LLᵀ), and with A = W L, d = x̄ − μ, S the scatter
about μ,

    M = I + Aᵀ Ψ⁻¹ A,    β = M⁻¹ Aᵀ Ψ⁻¹,
    Σ E[ε] = n β d,    Σ E[ε εᵀ] = n M⁻¹ + β S βᵀ,    Σ x E[ε]ᵀ = S βᵀ,
    −2 log p = n (D log 2π + log det Ψ + log det M) + tr Ψ⁻¹ S − tr Aᵀ Ψ⁻¹ S βᵀ.

The M-step regresses x on (u, 1) from these sums; a free μ becomes x̄, as parameter expansion by a mean
of u gives. An iteration does not depend on the number of rows.

Such matrices are small, and an operation of torch costs more than its arithmetic: steps are in numpy
and double precision, wherever the data are, and parameters become tensors when somebody asks for them.

Source: Rubin and Thayer (1982), EM algorithms for ML factor analysis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.continuous.collapsed import are_alike, vectors_of
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape, is_matrix, rows_of, tril_rows
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]
Numbers = npt.NDArray[np.float64]

_COLLAPSED = 1e-8  # of a feature's variance: the step through tables judges such a noise

_LOG_2PI = math.log(2 * math.pi)


def _total(x: Numbers) -> float:
    """Their sum, without what a method of numpy's costs in Python."""
    return float(np.add.reduce(x))


def _numbers(t: Tensor) -> Numbers:
    """A tensor in double precision, where numpy can read it; of its own memory."""
    out: Numbers = t.detach().to("cpu", torch.float64).numpy().copy()
    return out


@dataclass(frozen=True, eq=False)
class FactorArgument:
    """One of loadings, means and noise: a parameter, or known numbers.

    Attributes:
        param: The parameter; None where the numbers are known.
        index: The parameter's element behind each number. # (D, q) or (D,)
        known: The numbers, where they are.
    """

    param: str | None
    index: npt.NDArray[np.int64]
    known: Numbers

    def at(self, values: Values) -> Numbers:
        """The numbers at parameter values."""
        if self.param is None:
            return self.known
        return _numbers(values[self.param]).reshape(-1)[self.index]

    def into(self, numbers: Numbers, like: Tensor) -> Tensor:
        """The parameter, for numbers of which each of its elements has one."""
        flat = np.empty(like.numel())
        flat[self.index.reshape(-1)] = numbers.reshape(-1)
        return torch.from_numpy(flat).reshape(like.shape).to(like)


@dataclass(frozen=True, eq=False)
class Factors:
    """Loadings, means and noise.

    Attributes:
        W: # (D, q)
        mu: # (D,)
        psi: Variances of the noise. # (D,)
        log_psi: log det Ψ.
    """

    W: Numbers
    mu: Numbers
    psi: Numbers
    log_psi: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Sums(Expectation):
    """The evidence with the sums of an E-step.

    Attributes:
        second: Σ E[ε εᵀ]. # (q, q)
        first: Σ E[ε]; None where x̄ = μ, and it is zero. # (q,)
        cross: Σ (x − μ) E[ε]ᵀ. # (D, q)
        total: Σ (x − μ). # (D,)
        squares: Σ (x − μ)². # (D,)
        distance: Σ E[|Ψ^(−½) (x − μ − A ε)|²].
    """

    second: Numbers
    first: Numbers | None
    cross: Numbers
    total: Numbers
    squares: Numbers
    distance: float


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

    loadings: FactorArgument
    mean: FactorArgument
    noise: FactorArgument
    start: Values
    scatter: Numbers
    centre: Numbers
    rows: int
    low: Numbers

    def enter(self, values: Values) -> Factors:
        """Parameter values in the form of the E-step."""
        mu, psi = self.mean.at(values), np.square(self.noise.at(values))
        with np.errstate(all="ignore"):
            return Factors(self.loadings.at(values), mu, psi, _total(np.log(psi)))

    def values(self, at: Factors) -> dict[str, Tensor]:
        """The parameters by name."""
        parts = (self.loadings, at.W), (self.mean, at.mu), (self.noise, np.sqrt(at.psi))
        solved = {
            part.param: part.into(numbers, self.start[part.param])
            for part, numbers in parts
            if part.param is not None
        }
        return {n: solved[n] if n in solved else value.clone() for n, value in self.start.items()}

    def log_prior(self, at: Factors) -> float:
        """No parameter has a prior."""
        return 0.0

    def e_step(self, at: Factors) -> Sums:
        """Evidence and sums.

        Raises:
            Handover: If the step through tables has to look.
        """
        try:
            with np.errstate(all="ignore"):
                return self._sums(at)
        except np.linalg.LinAlgError as error:
            raise Handover from error

    def _sums(self, at: Factors) -> Sums:
        n, psi, loadings = self.rows, at.psi, self._scaled(at.W)
        scatter, squares, total = self.scatter, self._squares, self._zero
        d = None
        if at.mu is not self.centre:
            d = self.centre - at.mu
            scatter = scatter + n * np.outer(d, d)
            squares, total = scatter.diagonal(), n * d
        weight = 1 / psi
        white = loadings * weight[:, None]
        inner = loadings.T @ white
        precision = inner + self._eye
        sign, log_det = np.linalg.slogdet(precision)
        inverse = np.linalg.inv(precision)
        cross = scatter @ white @ inverse
        own, shared = float(squares @ weight), float(np.vdot(white, cross))
        log_dets = at.log_psi + float(log_det)
        evidence = -0.5 * (n * (len(psi) * _LOG_2PI + log_dets) + own - shared)
        if not (sign > 0 and abs(evidence) < math.inf):
            raise Handover
        second = n * inverse + inverse @ (white.T @ cross)
        first = None if d is None else n * (inverse @ (white.T @ d))
        distance = own - 2 * shared + float(np.vdot(inner, second))
        return Sums(
            evidence,
            {},
            second=second,
            first=first,
            cross=cross,
            total=total,
            squares=squares,
            distance=distance,
        )

    def m_step(self, at: Factors, e: Sums) -> tuple[Factors, float]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        try:
            with np.errstate(all="ignore"):
                return self._maximiser(at, e)
        except np.linalg.LinAlgError as error:
            raise Handover from error

    def _maximiser(self, at: Factors, e: Sums) -> tuple[Factors, float]:
        phi, cross, q = e.second, e.cross, len(e.second)
        if self.mean.param is not None and e.first is not None:
            first = e.first[:, None]
            phi = np.block([[phi, first], [first.T, np.array([[float(self.rows)]])]])
            cross = np.column_stack([cross, e.total])
        # The residuals are x − μ at the E-step: coefficients begin from zero.
        coefficients = cross @ np.linalg.inv(phi)
        left = e.squares - np.einsum("dq,dq->d", coefficients, cross)
        # A working mean of the factors goes into μ, which then is that of the data.
        mu = at.mu if self.mean.param is None else self.centre
        if self.noise.param is None:
            psi, log_psi, distance = at.psi, at.log_psi, _total(left / at.psi)
        else:
            psi = self._tied(left / self.rows)
            if (psi <= self._lowest).any():
                raise Handover
            log_psi, distance = _total(np.log(psi)), float(self.rows * len(psi))
        gain = 0.5 * (self.rows * (at.log_psi - log_psi) + e.distance - distance)
        return Factors(self._unscaled(coefficients[:, :q]), mu, psi, log_psi), gain

    @cached_property
    def _is_standard(self) -> bool:
        return bool((self.low == self._eye).all())

    def _scaled(self, W: Numbers) -> Numbers:
        """A = W L."""
        return W if self._is_standard else W @ self.low

    def _unscaled(self, loadings: Numbers) -> Numbers:
        """W = A L⁻¹."""
        if self._is_standard:
            return loadings
        return np.asarray(np.linalg.solve(self.low.T, loadings.T).T, dtype=np.float64)

    @cached_property
    def _eye(self) -> Numbers:
        return np.eye(len(self.low))

    @cached_property
    def _zero(self) -> Numbers:
        return np.zeros(len(self.centre))

    @cached_property
    def _squares(self) -> Numbers:
        return self.scatter.diagonal().copy()

    @cached_property
    def _lowest(self) -> Numbers:
        return _COLLAPSED * self._squares / self.rows

    @cached_property
    def _sharing(self) -> npt.NDArray[np.int64] | None:
        """How many features share each element of the noise; None where each has one of its own."""
        count = np.bincount(self.noise.index)
        return None if bool((count <= 1).all()) else count

    def _tied(self, variances: Numbers) -> Numbers:
        """Averages over the features that share an element of the noise."""
        if self._sharing is None:
            return variances
        index = self.noise.index
        means = np.bincount(index, variances) / self._sharing.clip(min=1)
        return np.asarray(means[index], dtype=np.float64)


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
    data = vectors_of(graph)
    if data is None or data.rows <= 1:
        return None
    if is_matrix(u):
        low = tril_rows(u, u.arguments)[0, 0]
    else:
        low = rows_of(u, u.arguments["scale"])[0, 0].to(torch.float64).diag()
    if bool((low.diagonal() == 0).any()):
        return None
    theta = FactorTheta(
        loadings,
        mean,
        noise,
        {n: v.clone() for n, v in values.items()},
        _numbers(data.scatter),
        _numbers(data.mean),
        data.rows,
        _numbers(low),
    )
    return FactorRows(theta, tuple(block.latents))


def _part(
    group: Group,
    argument: str,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    wanted: type,
) -> FactorArgument | None:
    """Loadings, means or noise as numbers; None where they are of another form."""
    binding = group.bindings[argument]
    tail = 1 if argument == group.lines[1] else 0
    known = _numbers(rows_of(group, binding.evaluate(values), tail)[0, 0])
    constant = FactorArgument(None, np.zeros(known.shape, dtype=np.int64), known)
    if binding.how == "constant":
        return constant
    index = _index(binding)
    if index is None or len(binding.params) != 1:
        return None
    (name,) = binding.params
    update = updates[name]
    if isinstance(update.update, Fixed):
        return constant
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
    return FactorArgument(name, whole.reshape(known.shape).cpu().numpy(), known)


def _index(binding: Binding) -> Tensor | None:
    """The parameter's element behind each element of an argument that takes them as they stand."""
    if binding.how == "selection":
        (part,) = binding.selections[:1]
        plain = len(binding.selections) == 1 and not part.maps and part.factor is None
        return part.index if plain and bool((part.index >= 0).all()) else None
    if binding.jacobians is None or len(binding.jacobians) != 1:
        return None
    jacobian = next(iter(binding.jacobians.values())).dense
    ones = jacobian == 1
    single = bool((ones.sum(-1) == 1).all()) and bool(((jacobian == 0) | ones).all())
    if not single or bool((binding.constant != 0).any()):
        return None
    return ones.to(torch.uint8).argmax(-1)


def _is_whole(part: FactorArgument, value: Tensor) -> bool:
    """Whether each element of a parameter is read once."""
    flat = np.sort(part.index, axis=None)
    return flat.size == value.numel() and bool((flat == np.arange(flat.size)).all())
