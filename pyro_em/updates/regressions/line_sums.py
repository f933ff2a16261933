"""Sums over rows of a Normal site whose mean is a line, in a form to which other rows add.

With φ the unknowns that a row reads and 1, coefficients C and residuals r = y − C φ,

    Σ w E[φ φᵀ],    Σ w E[r φᵀ],    Σ w E[r rᵀ],

all at one C. Sums that were taken at other coefficients are brought to these first, which is exact:
r − Δφ is the residual at C + Δ. Where rows have covariates of their own, the coefficients are those of
θ itself, φ ← (∂C/∂θ)ᵀ φ: their number does not grow with the rows either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_em.errors import Finding, Handover
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import Group
from pyro_em.reduction.trees import SAME
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.gaussian_rows import (
    coefficient_rows,
    design_of,
    event_shape,
    is_matrix,
    once,
    rows_of,
    weights_of,
)
from pyro_em.updates.expectations.linear_moments import LinearMoments, linear_moments, shifted
from pyro_em.updates.regressions.line_bindings import (
    LINE,
    factors_of,
    has_factor,
    in_parameters,
    with_one_factor,
)

Arguments = Mapping[str, Tensor]

_MANY = 2**24  # numbers of second moments that are kept


@dataclass(frozen=True, eq=False)
class LineSums:
    """Sums over rows; see the module's text. They add up where their coefficients are the same.

    Attributes:
        phi_phi: Σ w E[φ φᵀ]. # (cells, rows, P, P)
        r_phi: Σ w E[r φᵀ]. # (cells, rows, D, P)
        r_r: Σ w E[r rᵀ], or its diagonal. # (cells, rows, D, D) or (cells, rows, D)
        weight: Σ w. # (cells, rows)
        coefficients: C. # (cells or 1, rows or 1, D, P)
        counts: How many rows there are, where the weights are not how often each counts: known factors
            f of spreads are in them, Σ w f⁻². # (cells, rows)
    """

    phi_phi: Tensor
    r_phi: Tensor
    r_r: Tensor
    weight: Tensor
    coefficients: Tensor = field(metadata=SAME)
    counts: Tensor | None = None

    def about(self, coefficients: Tensor) -> LineSums:
        """The same sums at other coefficients.

        Example:
            >>> one = torch.ones(1, 1, 1)
            >>> s = LineSums(one[..., None], 0 * one[..., None], one, one[0], 0 * one[..., None])
            >>> s.about(3 * one[..., None]).r_r.item()  # r = ±1 on average, and 3 further away
            10.0
        """
        delta = coefficients - self.coefficients
        diagonal = self.r_r.dim() == self.r_phi.dim() - 1
        second = shifted(LinearMoments(self.phi_phi, self.r_phi, self.r_r, diagonal), delta)
        r_phi = self.r_phi - delta @ self.phi_phi
        return LineSums(self.phi_phi, r_phi, second, self.weight, coefficients, self.counts)


@dataclass(frozen=True, eq=False)
class LineSite:
    """How rows of a site are added up, and what stands for all of them.

    Attributes:
        group: The site's group, in an M-step.
        outer: Which of its dimensions is the plate of rows: members, then plates.
        kept: Which of these dimensions sums keep, since arguments differ along them.
        is_split: Whether each entry of a row has sums of its own.
        sizes: How many numbers the parameters have that are the coefficients; none where a row's own
            coefficients are those of all rows.
        precise: Whether known spreads differ between rows, and go into the weights.
        scaled: Whether known factors of a spread differ between rows, and go into the weights.
    """

    group: Group
    outer: int
    kept: tuple[bool, ...]
    is_split: bool
    sizes: Mapping[str, int]
    precise: bool
    scaled: bool = False

    @classmethod
    def of(
        cls,
        group: Group,
        plate: str,
        values: Mapping[str, Tensor],
        differing: AbstractSet[str],
        may_lack: bool = False,
    ) -> LineSite | Finding:
        """How a Normal site's rows are added up, or why they are not.

        Args:
            group: The group, in an M-step.
            plate: The plate of rows.
            values: The parameters, for their sizes.
            differing: The arguments that differ between rows.
            may_lack: Whether other rows may lack entries that all of these have.
        """
        site, arguments = f"site '{group.members[0]}'", group.arguments
        outer = 1 + group.dims[0].index(plate)
        mean = group.lines or ("loc",)
        opaque = [a for a, b in group.bindings.items() if not b.is_static or b.pairs]
        if opaque:
            what = f"{opaque[0]} of '{group.members[0]}' is neither a selection nor linear"
            return Finding(site, f"{what} in parameters")
        spreads, matrix = [a for a in arguments if a not in mean], is_matrix(group)
        precise = bool(differing & set(spreads))
        scaled = precise and not matrix and has_factor(group, group.bindings["scale"])
        precise = precise and not scaled
        if precise and (matrix or any(group.bindings[a].how != "constant" for a in spreads)):
            what = f"{spreads[0]} of '{group.members[0]}' has parameters and differs between rows"
            return Finding(site, what)
        in_parameters = bool(differing & set(mean))
        if in_parameters and matrix:
            what = f"covariates of each row enter the mean of '{group.members[0]}'"
            return Finding(site, f"{what}, a MultivariateNormal")
        read = spreads if in_parameters else list(arguments)
        kept = tuple(
            d != outer and any(_varies(arguments[a], d) for a in read)
            for d in range(1 + group.n_plates)
        )
        several = in_parameters or precise or (may_lack and group.observed)
        several = several and event_shape(group).numel() > 1
        is_split = not matrix and (group.elements is not None or several)
        names = group.mean_params if in_parameters else ()
        sizes = {n: values[n].numel() for n in names}
        out = cls(group, outer, kept, is_split, sizes, precise, scaled)
        cells = math.prod(group.sizes[group.n_plates :]) * math.prod(out._rows)
        if (1 + sum(out.sizes.values())) ** 2 * cells > _MANY:
            what = (
                f"covariates of '{group.members[0]}' have too many coefficients for their products"
            )
            return Finding(site, what)
        return out

    # ------------------------------------------------------------------ adding up

    def sums(self, arguments: Arguments, counts: Tensor, values: Mapping[str, Tensor]) -> LineSums:
        """The sums of the rows at hand.

        Args:
            arguments: At the E-step.
            counts: Expected counts. # (members, *sizes)
            values: The parameters at the E-step.
        """
        group, belief = self.group, self.group.belief
        if isinstance(belief, Moments):
            moments, weights = belief.moments, belief.weights
        else:
            moments, weights = _seen(group, arguments), _weights(group, counts)
        cells, rows = moments.phi_phi.shape[:2]
        weights = weights.to(torch.float64).expand(cells, rows, *weights.shape[2:])
        if self.precise:
            precision = rows_of(group, arguments["scale"]).to(torch.float64) ** -2
            weights = (weights.unsqueeze(-1) if weights.dim() == 2 else weights) * precision
            weights = weights if self.is_split else weights.squeeze(-1)
        design, counts = self._design(values), None
        if self.scaled:
            if not has_factor(group, group.bindings["scale"]):  # entries of these rows differ
                raise Handover
            counts = self._arranged(weights.unsqueeze(-1)).sum(-2).squeeze(-1)
            weights = weights * factors_of(group) ** -2
        if not self.is_split:
            sums = self._of_entry(moments, weights, design, None)
            return LineSums(*sums, self.at(values), counts)
        weights = weights.unsqueeze(-1) if weights.dim() == 2 else weights
        entries = moments.r_phi.shape[-2]
        each = [
            self._of_entry(moments, weights[..., d % weights.shape[-1]], design, d)
            for d in range(entries)
        ]
        phi_phi, r_phi, r_r, weight = (self._joined(part) for part in zip(*each, strict=True))
        return LineSums(phi_phi, r_phi, r_r, weight, self.at(values))

    def _of_entry(
        self, m: LinearMoments, w: Tensor, design: Tensor | None, entry: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sums of one entry of all rows, or of whole rows where it is None."""
        chosen = slice(None) if entry is None else slice(entry, entry + 1)
        second = m.r_r if entry is None else m.r_r[..., chosen]
        weight = self._arranged(w.unsqueeze(-1)).sum(-2).squeeze(-1)
        r_r = self._over_rows(second, w)
        if design is None:
            r_phi = self._over_rows(m.r_phi[:, :, chosen], w)
            return self._over_rows(m.phi_phi, w), r_phi, r_r, weight
        J = design[:, :, entry or 0]
        read = (J != 0).any(-1).any(1).any(0).nonzero().reshape(-1).tolist()
        left = {a: self._arranged(J[:, :, a].expand(*w.shape, J.shape[-1])) for a in read}
        phi_phi = r_phi = w.new_zeros(())
        for a in read:
            r = self._arranged((w * m.r_phi[:, :, entry or 0, a]).unsqueeze(-1))
            r_phi = r_phi + r.mT @ left[a]
            for b in read:
                both = self._arranged((w * m.phi_phi[:, :, a, b]).unsqueeze(-1))
                phi_phi = phi_phi + left[a].mT @ (both * left[b])
        return phi_phi, r_phi, r_r, weight

    def _over_rows(self, t: Tensor, w: Tensor) -> Tensor:
        """Σ w t over the dimensions that are not kept. # (cells, rows, …) -> (cells, kept, …)"""
        tail = t.shape[2:]
        flat = t.to(torch.float64).reshape(*t.shape[:2], -1)
        out = self._arranged(w.unsqueeze(-1)).mT @ self._arranged(flat)
        return out.reshape(*out.shape[:2], *tail)

    def _arranged(self, t: Tensor) -> Tensor:
        """Kept dimensions apart from the others. # (cells, rows, T) -> (cells, kept, summed, T)"""
        kept = [d for d, k in enumerate(self.kept) if k]
        rest = [d for d, k in enumerate(self.kept) if not k]
        lead = self._lead
        order = (0, *(1 + d for d in (*kept, *rest)), 1 + len(lead))
        size = math.prod(lead[d] for d in kept)
        return (
            t.reshape(len(t), *lead, t.shape[-1])
            .permute(order)
            .reshape(len(t), size, -1, t.shape[-1])
        )

    def _joined(self, entries: Sequence[Tensor]) -> Tensor:
        """Rows of each entry as rows: entries stand where the plate of rows stood."""
        before = math.prod(self._rows[: self.outer])
        parts = [e.reshape(len(e), before, 1, -1, *e.shape[2:]) for e in entries]
        return torch.cat(parts, 2).flatten(1, 3)

    @property
    def _lead(self) -> tuple[int, ...]:
        return (len(self.group.members), *self.group.sizes[: self.group.n_plates])

    @property
    def _rows(self) -> tuple[int, ...]:
        """Members and plates of what stands for all rows."""
        entries = event_shape(self.group).numel() if self.is_split else 1
        return tuple(
            entries if d == self.outer else size if k else 1
            for d, (size, k) in enumerate(zip(self._lead, self.kept, strict=True))
        )

    def _design(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """∂(C, b)/∂θ, and one for what is no parameter. # (cells or 1, rows or 1, D, Q + 1, P)"""
        if not self.sizes:
            return None
        group, columns = self.group, []
        for name in self.sizes:
            lines = [(a, 1) for a in group.lines if a != "loc"]
            parts = [design_of(group, group.bindings[a], name, values[name], t) for a, t in lines]
            own = design_of(group, group.bindings["loc"], name, values[name], 0)
            columns.append(_side_by_side([*parts, own.unsqueeze(-2)], -2))
        whole = _side_by_side(columns, -1)
        one = torch.zeros_like(whole[..., :1])
        one[..., -1, :] = 1.0
        return torch.cat([whole, one], -1)

    # ------------------------------------------------------------------ standing for all

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """The coefficients at parameter values, as sums hold them. # (cells or 1, rows or 1, D, P)"""
        group = self.group
        if self.sizes:
            flat = [values[n].detach().reshape(-1).to(torch.float64) for n in self.sizes]
            theta = torch.cat([*flat, flat[0].new_zeros(1)])
            return theta.expand(1, 1, 1, -1)
        found = coefficient_rows(group, group.evaluate_arguments(values)).detach()
        if found.shape[1] > 1:
            found = found.reshape(len(found), *self._lead, *found.shape[2:])
            for d, k in enumerate(self.kept):
                found = found if k else found.narrow(1 + d, 0, 1)
            found = found.flatten(1, len(self.kept))
        if not self.is_split:
            return found
        if found.shape[1] == 1:
            kept = [n for n, k in zip(self._lead, self.kept, strict=True) if k]
            found = found.expand(-1, math.prod(kept), -1, -1)
        return self._joined([found[:, :, d : d + 1] for d in range(found.shape[2])])

    def standing_for(self, sums: LineSums) -> tuple[Group, Tensor]:
        """A group of few rows that has the sums, and how often its cells count. # (members, *sizes)"""
        group, rows, event = self.group, self._rows, event_shape(self.group)
        states = group.sizes[group.n_plates :]
        sizes, ones = (*rows[1:], *states), (1,) * len(states)
        weight = sums.weight
        mass = torch.where(weight > 0, weight, 1.0)
        phi_phi, r_phi, r_r = (
            t / mass.reshape(*mass.shape, *(1,) * (t.dim() - 2))
            for t in (sums.phi_phi, sums.r_phi, sums.r_r)
        )
        coefficients, elements = sums.coefficients, None
        counts = weight if sums.counts is None else sums.counts
        weights = counts
        entries = event.numel()
        coefficients = coefficients.expand(*coefficients.shape[:2], entries, -1)
        if self.is_split:
            at = [1] * len(rows)
            at[self.outer] = entries
            eye = torch.eye(entries, dtype=torch.float64, device=weight.device)
            hot = eye.reshape(*at, entries).expand(*rows, entries).reshape(-1, entries)
            r_phi, r_r = r_phi * hot.unsqueeze(-1), r_r * hot
            weights = weight.unsqueeze(-1) * hot
            elements = hot.reshape(*rows, *ones, *event) > 0
        arguments, bindings = self._narrowed()
        if self.scaled:  # Σ w f⁻² of n rows is n f̄⁻²
            factor = (counts / mass).sqrt().transpose(0, 1).reshape(rows[0], *sizes)
            with_one_factor(arguments, bindings, factor)
        if self.sizes:
            one = (1,) * (1 + len(sizes))
            in_parameters(arguments, bindings, self.sizes, (*one, *event), weight)
        diagonal = r_r.dim() == r_phi.dim() - 1
        few = replace(
            group,
            members=tuple(group.members)[: rows[0]],
            dims=tuple(group.dims)[: rows[0]],
            sizes=sizes,
            arguments=arguments,
            bindings=bindings,
            value=weight.new_zeros(*rows, *ones, *event),
            mask=None,
            elements=elements,
            scale=(1.0,) * rows[0],
            lines=("loc", LINE) if self.sizes else group.lines or ("loc",),
            reads=(LINE,) if self.sizes else group.reads,
            belief=Moments(LinearMoments(phi_phi, r_phi, r_r, diagonal), coefficients, weights),
        )
        return few, counts.transpose(0, 1).reshape(rows[0], *sizes)

    def _narrowed(self) -> tuple[dict[str, Tensor], dict[str, Binding]]:
        """Arguments and bindings of a group of few rows; of a line in parameters the spreads alone."""
        group = self.group
        left_out = (group.lines or ("loc",)) if self.sizes else ()
        names = [a for a in group.bindings if a not in left_out]
        arguments = {a: self._first(group.arguments[a]) for a in names}
        bindings = {a: group.bindings[a].mapped(self._first) for a in names}
        if self.precise:
            arguments["scale"] = torch.ones_like(arguments["scale"])
            bindings["scale"] = Binding("constant", (), arguments["scale"])
        return arguments, bindings

    def _first(self, t: Tensor) -> Tensor:
        """The first of each dimension that is summed: arguments are the same there, or in the sums."""
        for d, kept in enumerate(self.kept):
            t = t if kept else t.narrow(d, 0, 1)
        return t


def _varies(argument: Tensor, dim: int) -> bool:
    """Whether an argument may differ along one of the dimensions of members and plates."""
    return (once(argument) if dim == 0 else argument).shape[dim] > 1


def _weights(group: Group, counts: Tensor) -> Tensor:
    """Counts as weights of rows, or of entries where some are masked."""
    plain = replace(group, mask=None, scale=(1.0,) * len(group.members))
    return weights_of(plain, counts)


def _seen(group: Group, arguments: Arguments) -> LinearMoments:
    """Moments of a site that reads no Gaussian latent: its residuals themselves."""
    value, loc = (rows_of(group, t).to(torch.float64) for t in (group.value, arguments["loc"]))
    r = value - loc
    if group.elements is not None:  # whatever stands where nothing was seen
        r = torch.where(rows_of(group, group.elements.to(r.dtype)) > 0, r, 0.0)
    rows = math.prod((len(group.members), *group.sizes[: group.n_plates]))
    r = r.expand(math.prod(group.sizes[group.n_plates :]), rows, -1)
    none = r[..., :0]
    diagonal = not is_matrix(group)
    second = r.square() if diagonal else r.unsqueeze(-1) * r.unsqueeze(-2)
    covariance = none.unsqueeze(-1).expand(*none.shape, 0)
    return linear_moments(none, covariance, r, r.unsqueeze(-1)[..., :0], second, diagonal)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    shape = torch.broadcast_shapes(*(p.shape[:2] for p in parts))
    return torch.cat([p.expand(*shape, *p.shape[2:]) for p in parts], dim)
