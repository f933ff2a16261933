r"""The E-step: evidence and posterior of every factor's cells, and the `Posterior` that users hold.

q(z) = p(z | x; θ) = Π_f f(z) / p(x; θ)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em._errors import DataError, DegenerateError, ModelError, PyroEMError, UsageError, message
from pyro_em._pyro import Role
from pyro_em.contraction import (
    ContractionPlan,
    Ring,
    contract,
    drawing,
    evidence,
    log_sum_exp,
    maximum,
    plan_contraction,
)
from pyro_em.graph import FactorGraph, Group, Latent

Tables = Sequence[Tensor]


def contraction_of(graph: FactorGraph, extra: Sequence[tuple[str, ...]] = ()) -> ContractionPlan:
    """The elimination order for a graph's factors, groups unstacked, plus ``extra`` tables."""
    dims: list[tuple[str, ...]] = [d for g in graph.groups for d in g.dims]
    own: list[str | None] = [
        None if g.observed else name for g in graph.groups for name in g.members
    ]
    sizes = {d: graph.dim_size(d) for ds in (*dims, *extra) for d in ds}
    return plan_contraction(
        [*dims, *extra],
        {name: latent.plates for name, latent in graph.latents.items()},
        sizes,
        own_latent=[*own, *(None for _ in extra)],
    )


def scales_of(graph: FactorGraph) -> list[Tensor | float] | None:
    """Each factor's scale, or None where all are one."""
    scales = [s for g in graph.groups for s in g.scale]
    return None if all(not isinstance(s, Tensor) and s == 1.0 for s in scales) else scales


def check_scales(graph: FactorGraph, plan: ContractionPlan) -> list[str]:
    """Refuse scales under which no evidence is defined; return warnings about tempering.

    Raises:
        ModelError: If latents that are summed together have different scales, or a latent has a
            sample weight that its data lack.
    """
    scales = scales_of(graph)
    if scales is None:
        return []
    names = [n for g in graph.groups for n in g.members]
    observed = [g.observed for g in graph.groups for _ in g.members]

    def equal(a: Tensor | float, b: Tensor | float) -> bool:
        ta, tb = torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()
        return ta.numel() == tb.numel() and bool((ta.reshape(-1) == tb.reshape(-1)).all())

    for a, b in plan.same_scale:
        if not equal(scales[a], scales[b]):
            raise ModelError(
                message(
                    f"sites '{names[a]}' and '{names[b]}'",
                    "they are summed together but have different poutine.scale.",
                    "a scale multiplies the logarithm of a sum, so that all sites in the sum share it",
                    ["put both under one poutine.scale"],
                )
            )
    warnings = []
    for s, reference in plan.locals_scaled_by.items():
        if s >= len(names) or not observed[s] or equal(scales[s], scales[reference]):
            continue
        if equal(scales[reference], 1.0):
            warnings.append(
                message(
                    f"site '{names[s]}'",
                    f"it has a poutine.scale that its latent '{names[reference]}' lacks: this tempers "
                    "its likelihood inside the sum, p(x | z)^s.",
                    "a sample weight scales the latent and its data",
                    ["put the latent under the same poutine.scale if you meant weights"],
                )
            )
        else:
            raise ModelError(
                message(
                    f"sites '{names[reference]}' and '{names[s]}'",
                    "the latent has a poutine.scale that its data do not share.",
                    "a sample weight stands for replicated rows, latent and data together",
                    ["put both under one poutine.scale"],
                )
            )
    return warnings


@dataclass(frozen=True, eq=False)
class EStep:
    """The result of one pass over the contraction.

    Attributes:
        log_evidence: In nats, scaled as the sites are.
        terms: Its terms with their plates.
        cells: Per group the gradient of the evidence: scale × posterior. # (members, *sizes)
    """

    log_evidence: Tensor
    terms: list[tuple[tuple[str, ...], Tensor]]
    cells: list[Tensor]


def _forward(
    graph: FactorGraph, plan: ContractionPlan, tables: Tables, ring: Ring, extra: Tables
) -> tuple[list[Tensor], list[tuple[tuple[str, ...], Tensor]], Tensor]:
    """Leaves per group, terms and their sum, in float64."""
    leaves = [t.detach().to(torch.float64).requires_grad_() for t in (*tables, *extra)]
    n = len(tables)
    flat = [part for leaf in leaves[:n] for part in leaf.unbind(0)] + leaves[n:]
    scales = scales_of(graph)
    if scales is not None:
        scales = [*scales, *(1.0 for _ in extra)]
    terms = contract(plan, flat, scales=scales, ring=ring)
    return leaves, terms, evidence(terms)


@torch.enable_grad()
def run_contraction(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    ring: Ring = log_sum_exp,
    extra: Tables = (),
) -> EStep:
    """One forward and one backward pass, in float64.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        log_densities: Per group. # (members, *sizes)
        ring: How variables are eliminated.
        extra: Tables of zeros whose gradients are wanted too; they come last in ``cells``.
    """
    leaves, terms, total = _forward(graph, plan, log_densities, ring, extra)
    usable = bool(leaves) and bool(torch.isfinite(total))
    cells = torch.autograd.grad(total, leaves) if usable else leaves
    return EStep(total.detach(), [(d, t.detach()) for d, t in terms], list(cells))


@torch.enable_grad()
def draw(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    n: int,
    generator: torch.Generator | None,
) -> Iterator[list[Tensor]]:
    """Exact posterior draws: one forward pass, and a backward pass that draws for each.

    Yields:
        Per group the cells that were drawn, marked by their scale.
    """
    leaves, _, total = _forward(graph, plan, log_densities, drawing(generator), ())
    for _ in range(n):
        yield list(torch.autograd.grad(total, leaves, retain_graph=True))


def e_step(graph: FactorGraph, plan: ContractionPlan, log_densities: Tables) -> EStep:
    """The exact E-step, with its promises checked.

    Raises:
        DataError: If the data are impossible under the model, or a density is not a number.
    """
    for group, table in zip(graph.groups, log_densities, strict=True):
        largest = float(table.amax()) if table.numel() else 0.0
        if largest != largest or largest == math.inf:
            bad = torch.isnan(table) | (table == torch.inf)
            index = tuple(int(i) for i in bad.nonzero()[0])
            site = group.members[index[0]]
            value = "NaN" if bool(torch.isnan(table[index])) else "+inf"
            raise DataError(
                message(
                    f"site '{site}'",
                    f"its log density is {value} {_where(graph, group, index)}.",
                    "an evidence that is no number cannot be raised",
                    [
                        "check the parameters' values and constraints",
                        "check the data at this place",
                    ],
                )
            )
        if largest > 1e9:  # no normalised density on float data comes near it
            _refuse_unbounded(graph, log_densities)
    result = run_contraction(graph, plan, log_densities)
    if not bool(torch.isfinite(result.log_evidence)):
        _refuse_impossible(graph, plan, log_densities)
    _check_sums(graph, result, log_densities)
    return result


def _where(graph: FactorGraph, group: Group, index: tuple[int, ...]) -> str:
    names = group.dims[index[0]]
    shown = [f"{name} = {i}" for name, i in zip(names, index[1:], strict=False)]
    return "at " + ", ".join(shown) if shown else ""


def _refuse_impossible(graph: FactorGraph, plan: ContractionPlan, tables: Tables) -> None:
    """Name the first observed site, in model order, that no assignment can explain, and its row."""
    observed = [
        (g, i, name)
        for g, group in enumerate(graph.groups)
        if group.observed
        for i, name in enumerate(group.members)
    ]
    order = {name: k for k, name in enumerate(graph.structure.sites)}
    observed.sort(key=lambda item: order[item[2]])

    def terms_of_first(n: int) -> list[tuple[tuple[str, ...], Tensor]]:
        """The evidence of the first n observed sites alone."""
        kept = [t.clone() for t in tables]
        for g, i, _ in observed[n:]:
            kept[g][i] = 0.0
        return run_contraction(graph, plan, kept).terms

    def impossible(n: int) -> bool:
        return any(bool((t == -torch.inf).any()) for _, t in terms_of_first(n))

    low, high = 0, len(observed)  # possible with `low` sites, impossible with `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if impossible(middle) else (middle, high)
    row = ""
    for dims, term in terms_of_first(high):
        if bool((term == -torch.inf).any()):
            index = (term == -torch.inf).nonzero()[0]
            row = ", ".join(f"{d} = {int(i)}" for d, i in zip(dims, index, strict=True))
            break
    raise DataError(
        message(
            f"site '{observed[high - 1][2]}'" if observed else "model",
            "the data are impossible under the model (log evidence −inf)"
            + (f", first at {row}." if row else "."),
            "every assignment of the latents has a probability of exactly zero",
            [
                "check for exact zeros in probabilities (structural zeros stay zero)",
                "check this observation",
            ],
        )
    )


def _refuse_unbounded(graph: FactorGraph, tables: Tables) -> None:
    """A log density beyond float64's resolution is the sign of an objective without a maximum."""
    for group, table in zip(graph.groups, tables, strict=True):
        size = table[torch.isfinite(table)].abs()
        if size.numel() and float(size.max()) > 1e9:
            names = ", ".join(f"'{n}'" for n in group.params) or "none"
            raise DegenerateError(
                message(
                    f"site '{group.members[0]}', parameters {names}",
                    f"its log density reaches {float(size.max()):.3g} nats. The update was rolled "
                    "back.",
                    "the objective seems to grow without bound"
                    + (" (pyro.factor is unnormalised)" if group.distribution == "Unit" else ""),
                    ["constrain or fix the parameter", "check the data's units"],
                )
            )


def _check_sums(graph: FactorGraph, result: EStep, tables: Tables) -> None:
    """Promise: every posterior sums to one (times its scale)."""
    for group, cells in zip(graph.groups, result.cells, strict=True):
        if group.observed:
            continue
        axes = tuple(range(1 + group.n_plates, cells.dim()))
        total = cells.sum(axes)
        for i, scale in enumerate(group.scale):
            expected: Tensor | float = scale
            if isinstance(scale, Tensor):
                expected = scale.reshape(scale.shape[: group.n_plates])
            off = (total[i] - expected).abs().max() if total[i].numel() else total.new_zeros(())
            if not float(off) <= 1e-6 * float(torch.as_tensor(expected).abs().max()):
                _refuse_unbounded(graph, tables)
                raise PyroEMError(
                    message(
                        f"site '{group.members[i]}'",
                        f"its posterior sums to {float(total[i].reshape(-1)[0]):.6g}.",
                        "posterior mass was lost; this is a defect of the library",
                        ["please report it with the model"],
                    )
                )


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(z): the exact posterior over all summed latents, or a product that a user gave.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_em import ExactPosteriorEM
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
        >>> q = ExactPosteriorEM(model).posterior(torch.tensor([0.0, 1.0]))
        >>> q.probs("z")
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
        >>> q.mode()["z"].shape
        torch.Size([2])

    Attributes:
        graph: The factor graph at which it was computed.
        cells: Per group the probability of every cell, unscaled. # (members, *sizes)
        counts: Per group expected counts: scaled and masked. # (members, *sizes)
        log_evidence: log p(x; θ) in nats; None for a q that a user gave.
        log_prior: Log density of point-estimated latents in nats; the evidence excludes it.
        bound: ELBO(q, θ) in nats, log prior included; None for a q that a user gave.
        exact: Whether this is p(z | x; θ).
        tables: The log densities behind it.
        entropy_value: H(q) in nats.
        pointwise: The evidence per element of the outermost data plate, where there is one.
    """

    graph: FactorGraph
    cells: list[Tensor]
    counts: list[Tensor]
    log_evidence: float | None
    exact: bool
    tables: list[Tensor]
    entropy_value: float
    pointwise: Tensor | None = None
    log_prior: float = 0.0
    bound: float | None = None

    def __repr__(self) -> str:
        sites = ", ".join(
            f"{n} {tuple(self.graph.dim_size(p) for p in v.plates)}x{v.size}"
            for n, v in list(self.graph.latents.items())[:4]
        )
        more = ", …" if len(self.graph.latents) > 4 else ""
        return f"Posterior(exact={self.exact}, log_evidence={self.log_evidence}, {sites}{more})"

    def entropy(self) -> float:
        """H(q) = −E_q[log q(z)] in nats, scaled as the sites are."""
        return self.entropy_value

    def probs(self, site: str) -> Tensor:
        """The posterior marginals of a latent.

        Args:
            site: Its name; for a site with ``obs_mask`` the name in the model.

        Returns:
            Probabilities. # (*plates, K)

        Raises:
            UsageError: If no such latent was summed.
        """
        if self._own_name(site) != site:
            return self._with_observed(site)
        latent = self._latent(site)
        group, i = self.graph.group_of(site)
        cells = self._cells(group)[i]
        dims = group.dims[i]
        keep = [d for d in dims if d in latent.plates] + [site]
        table = _marginal(cells, dims, keep)
        return self._shaped(table / table.sum(-1, keepdim=True), latent)

    def joint(self, a: str, b: str) -> Tensor:
        """The joint posterior of two latents.

        Args:
            a: One site.
            b: Another.

        Returns:
            Probabilities. # (*plates of both, K_a, K_b)
        """
        if a == b:
            return torch.diag_embed(self.probs(a))
        own_a, own_b = self._own_name(a), self._own_name(b)
        if (own_a, own_b) != (a, b):
            return self._joint_with_observed(a, b, own_a, own_b)
        first, second = self._latent(a), self._latent(b)
        plates = self._ordered({*first.plates, *second.plates})
        wanted = [*plates, a, b]
        for group, cells in zip(self.graph.groups, self.cells, strict=True):
            for i, dims in enumerate(group.dims):
                if a in dims and b in dims:
                    return self._normalised(_marginal(cells[i], dims, wanted), 2)
        if not self.exact:
            return self._product(first, second, plates)
        extra = tuple(wanted)
        plan = contraction_of(self.graph, [extra])
        zeros = torch.zeros(
            [self.graph.dim_size(d) for d in extra],
            dtype=torch.float64,
            device=self.cells[0].device,
        )
        result = run_contraction(self.graph, plan, self.tables, extra=[zeros])
        return self._normalised(result.cells[-1], 2)

    def mode(self) -> dict[str, Tensor]:
        """A jointly most probable assignment of all latents: Viterbi on chains.

        Returns:
            For each latent its values, from its support. # (*plates, *event)
        """
        if not self.exact:
            best = {
                name: latent.support[self.probs(name).argmax(-1)]
                for name, latent in self.graph.latents.items()
            }
            return self._under_user_names(best)
        plan = contraction_of(self.graph)
        result = run_contraction(self.graph, plan, self.tables, ring=maximum)
        return self._assignment(result.cells)

    def sample(self, n: int = 1, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw jointly from the posterior.

        Args:
            n: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.

        Returns:
            For each latent its drawn values. # (n, *plates, *event)
        """
        if n < 1:
            raise UsageError(message("sample", f"n={n}: at least one draw is needed."))
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.cells[0].device).manual_seed(seed)
        if not self.exact:
            return self._sample_product(n, generator)
        plan = contraction_of(self.graph)
        results = draw(self.graph, plan, self.tables, n, generator)
        draws = [self._assignment(cells) for cells in results]
        return {name: torch.stack([d[name] for d in draws]) for name in draws[0]}

    def _sample_product(self, n: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        out = {}
        for name, latent in self.graph.latents.items():
            p = self.probs(name)
            drawn = torch.multinomial(
                p.reshape(-1, p.shape[-1]), n, replacement=True, generator=generator
            )
            out[name] = latent.support[drawn.T.reshape(n, *p.shape[:-1])]
        return out

    def _assignment(self, marked: Sequence[Tensor]) -> dict[str, Tensor]:
        out = {}
        for group, cells in zip(self.graph.groups, marked, strict=True):
            if group.observed:
                continue
            for i, name in enumerate(group.members):
                latent = self.graph.latents[name]
                keep = [d for d in group.dims[i] if d in latent.plates] + [name]
                table = self._shaped(_marginal(cells[i], group.dims[i], keep), latent)
                out[name] = latent.support[table.argmax(-1)]
        return self._under_user_names(out)

    def _under_user_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of ``obs_mask`` sites under the user's names, with what was observed."""
        for name, mask in self.graph.structure.masked_pairs.items():
            hidden = f"{name}_unobserved"
            if hidden in values:
                values[name] = self._where_observed(name, mask, values.pop(hidden))
        return values

    def _where_observed(self, name: str, mask: Tensor, unobserved: Tensor) -> Tensor:
        event_dim = self.graph.latents[f"{name}_unobserved"].support.dim() - 1
        value = self._observed_value(name).to(unobserved.dtype).reshape(unobserved.shape)
        return torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, unobserved)

    def _observed_value(self, name: str) -> Tensor:
        group, i = self.graph.group_of(f"{name}_observed")
        value = group.value[i]
        latent = self.graph.latents[f"{name}_unobserved"]
        plates = value.shape[: group.n_plates]
        event = value.shape[len(group.dims[i]) :]
        value = value.reshape((*plates, *event))
        sizes = [self.graph.dim_size(p) for p in latent.plates]
        return value.expand((*sizes, *event))

    def _own_name(self, site: str) -> str:
        """The summed site behind a name: that of the unobserved part under ``obs_mask``."""
        hidden = f"{site}_unobserved"
        masked = site in self.graph.structure.masked_pairs and hidden in self.graph.latents
        return hidden if masked else site

    def _with_observed(self, name: str) -> Tensor:
        """Marginals of an ``obs_mask`` site: one-hot where it was observed."""
        latent = self.graph.latents[f"{name}_unobserved"]
        probs = self.probs(f"{name}_unobserved")
        value = self._observed_value(name)
        event_dim = latent.support.dim() - 1
        same = value.unsqueeze(value.dim() - event_dim) == latent.support.to(value.dtype)
        hot = same.flatten(same.dim() - event_dim).all(-1) if event_dim else same
        mask = self.graph.structure.masked_pairs[name]
        hot = hot.reshape(probs.shape)
        return torch.where(mask.unsqueeze(-1), hot.to(probs.dtype), probs)

    def _joint_with_observed(self, a: str, b: str, own_a: str, own_b: str) -> Tensor:
        """Where one of the two was observed the joint is a product of the marginals."""
        joint = self.joint(own_a, own_b)
        first, second = self._latent(own_a), self._latent(own_b)
        plates = self._ordered({*first.plates, *second.plates})
        product = self._over(a, first, plates).unsqueeze(-1) * self._over(
            b, second, plates
        ).unsqueeze(-2)
        observed = torch.zeros(product.shape[:-2], dtype=torch.bool, device=product.device)
        for name, latent in ((a, first), (b, second)):
            mask = self.graph.structure.masked_pairs.get(name)
            if mask is not None and latent.name != name:
                flat = mask.expand([self._batch_size(latent, d) for d in latent.batch_dims])
                observed = observed | self._lay_out(flat, latent, plates)
        return torch.where(observed[..., None, None], product, joint)

    def _batch_size(self, latent: Latent, dim: str | None) -> int:
        return 1 if dim is None else self.graph.dim_size(dim)

    def _lay_out(self, table: Tensor, latent: Latent, plates: Sequence[str]) -> Tensor:
        """A table over a latent's own batch dimensions, and more, over some plates."""
        beyond = table.shape[len(latent.batch_dims) :]
        shape = [self.graph.dim_size(d) if d in latent.plates else 1 for d in plates]
        return table.reshape(*shape, *beyond)

    def _over(self, site: str, latent: Latent, plates: Sequence[str]) -> Tensor:
        return self._lay_out(self.probs(site), latent, plates)

    def _cells(self, group: Group) -> Tensor:
        return self.cells[self.graph.groups.index(group)]

    def _latent(self, site: str) -> Latent:
        if site not in self.graph.latents:
            known = ", ".join(f"'{n}'" for n in self.graph.latents) or "none"
            raise UsageError(
                message(
                    f"site '{site}'",
                    f"it is no summed latent of this model; those are: {known}.",
                    fixes=["ask for one of them"],
                )
            )
        return self.graph.latents[site]

    def _ordered(self, plates: set[str]) -> list[str]:
        return sorted(plates, key=lambda p: self.graph.structure.plates[p].dim)

    def _normalised(self, table: Tensor, event: int) -> Tensor:
        table = table / table.sum(tuple(range(-event, 0)), keepdim=True)
        return table.to(self.graph.dtype)

    def _product(self, first: Latent, second: Latent, plates: list[str]) -> Tensor:
        a, b = (self._over(latent.name, latent, plates) for latent in (first, second))
        return a.unsqueeze(-1) * b.unsqueeze(-2)

    def _shaped(self, table: Tensor, latent: Latent) -> Tensor:
        """From (plates, K) to the site's own batch dimensions, size-one ones kept."""
        sizes = dict(zip(latent.plates, table.shape, strict=False))
        shape = [sizes[d] if d is not None else 1 for d in latent.batch_dims]
        return table.reshape(*shape, latent.size).to(self.graph.dtype)


def _marginal(cells: Tensor, dims: Sequence[str], keep: Sequence[str]) -> Tensor:
    """Sum over the dimensions that are not kept; tables are normalised afterwards."""
    dims = list(dims)
    plates_beyond = [i for i, d in enumerate(dims) if d not in keep]
    table = cells
    for i in reversed(plates_beyond):
        table = table.sum(i)
    names = [d for d in dims if d in keep]
    return table.permute([names.index(d) for d in keep])


def regrouped(q: Posterior, graph: FactorGraph) -> Posterior | None:
    """A posterior laid out for another graph of the same model and data; None if it is not."""
    by_site = {
        name: (g.dims[i], g.sizes, q.cells[k][i], q.counts[k][i])
        for k, g in enumerate(q.graph.groups)
        for i, name in enumerate(g.members)
    }
    names = [name for g in graph.groups for name in g.members]
    if set(names) != set(by_site):
        return None
    cells, counts = [], []
    for group in graph.groups:
        for i, name in enumerate(group.members):
            dims, sizes, _, _ = by_site[name]
            if dims != group.dims[i] or sizes != group.sizes:
                return None
        cells.append(torch.stack([by_site[name][2] for name in group.members]))
        counts.append(torch.stack([by_site[name][3] for name in group.members]))
    return replace(q, graph=graph, cells=cells, counts=counts)


def exact_posterior(
    graph: FactorGraph, plan: ContractionPlan, log_densities: Sequence[Tensor]
) -> Posterior:
    """Run the E-step and wrap it."""
    points = [k for k, g in enumerate(graph.groups) if g.role is Role.POINT]
    separate, held = _without_priors(graph, log_densities)
    result = e_step(graph, plan, held)
    cells, counts = _cells_and_counts(graph, result.cells)
    expected = expected_log_joint(counts, log_densities)
    log_prior = _separate_log_prior(graph, separate, counts, log_densities)
    total = float(result.log_evidence) + log_prior
    if len(separate) < len(points):
        log_prior += _joint_log_prior(graph, plan, held)
    return Posterior(
        graph,
        cells,
        counts,
        total - log_prior,
        True,
        [t.detach() for t in log_densities],
        total - expected,
        _pointwise(graph, result) if len(separate) == len(points) else None,
        log_prior,
        total,
    )


def _cells_and_counts(graph: FactorGraph, scaled: Tables) -> tuple[list[Tensor], list[Tensor]]:
    """Probabilities of cells, and expected counts, from the gradient of a contraction."""
    cells, counts = [], []
    for group, table in zip(graph.groups, scaled, strict=True):
        cells.append(_unscaled(group, table))
        counts.append(table if group.mask is None else table * group.mask)
    return cells, counts


def wrapped(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    scaled: Tables,
    *,
    bound: float,
    entropy: float,
) -> Posterior:
    """A q that is not the exact posterior, from its cells.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        log_densities: Per group, at θ.
        scaled: Per group scale × probability of every cell. # (members, *sizes)
        bound: ELBO(q, θ) in nats, log prior included.
        entropy: H(q) in nats.
    """
    cells, counts = _cells_and_counts(graph, scaled)
    separate, held = _without_priors(graph, log_densities)
    log_prior = _separate_log_prior(graph, separate, counts, log_densities)
    if any(g.role is Role.POINT for k, g in enumerate(graph.groups) if k not in separate):
        log_prior += _joint_log_prior(graph, plan, held)
    return Posterior(
        graph,
        cells,
        counts,
        None,
        False,
        [t.detach() for t in log_densities],
        entropy,
        None,
        log_prior,
        bound,
    )


def _without_priors(graph: FactorGraph, tables: Tables) -> tuple[list[int], list[Tensor]]:
    """Groups that are log priors on their own, and the tables with those left out."""
    separate = [
        k
        for k, g in enumerate(graph.groups)
        if g.role is Role.POINT and not any(d in graph.latents for ds in g.dims for d in ds)
    ]
    return separate, [torch.zeros_like(t) if k in separate else t for k, t in enumerate(tables)]


def _separate_log_prior(
    graph: FactorGraph, separate: Sequence[int], counts: Tables, tables: Tables
) -> float:
    """The log density of point-estimated latents that no summed latent reaches, in nats."""
    total = 0.0
    for k in separate:
        part = float(dot(counts[k], tables[k]))
        if not math.isfinite(part):
            group = graph.groups[k]
            bad = ~torch.isfinite(tables[k])
            site = group.members[int(bad.nonzero()[0][0])] if bool(bad.any()) else group.members[0]
            raise DegenerateError(
                message(
                    f"site '{site}'",
                    f"its log prior is {part} at the present point estimate.",
                    f"the density of {group.distribution} is unbounded or zero there",
                    [
                        "use a prior that is bounded at the boundary (concentrations of at least 1)",
                        "start elsewhere: init_loc_fn= of AutoDelta",
                    ],
                )
            )
        total += part
    return total


def _joint_log_prior(graph: FactorGraph, plan: ContractionPlan, tables: Tables) -> float:
    """log p(h) of point-estimated latents below summed ones: the evidence without the data."""
    without_data = [
        torch.zeros_like(t) if g.role is Role.DATA else t
        for g, t in zip(graph.groups, tables, strict=True)
    ]
    return float(run_contraction(graph, plan, without_data).log_evidence)


def _unscaled(group: Group, table: Tensor) -> Tensor:
    if all(not isinstance(s, Tensor) and s == 1.0 for s in group.scale):
        return table
    parts = []
    for i, s in enumerate(group.scale):
        parts.append(table[i] / s)
    return torch.stack(parts)


def expected_log_joint(counts: Sequence[Tensor], log_densities: Sequence[Tensor]) -> float:
    """E_q[log p(x, z; θ)] in nats; 0 · −inf counts as 0."""
    total = 0.0
    for weight, table in zip(counts, log_densities, strict=True):
        total += float(dot(weight, table))
    return total


def dot(weight: Tensor, table: Tensor) -> Tensor:
    """Σ w log p with 0 · −inf = 0, in float64."""
    table = table.to(torch.float64)
    return torch.where(weight == 0, 0.0, weight * table).sum()


def _pointwise(graph: FactorGraph, result: EStep) -> Tensor | None:
    outermost = next(iter(graph.structure.data_plates), None)
    if outermost is None or outermost not in graph.structure.plates:
        return None
    total: Tensor | None = None
    for dims, term in result.terms:
        if outermost not in dims:
            if bool((term == 0).all()):
                continue
            return None
        axes = [i for i, d in enumerate(dims) if d != outermost]
        part = term.sum(axes) if axes else term
        total = part if total is None else total + part
    return total


def product_posterior(
    graph: FactorGraph, marginals: Mapping[str, Tensor], log_densities: Sequence[Tensor]
) -> Posterior:
    """The product of marginals that a user gave.

    Args:
        graph: The factor graph.
        marginals: For every summed latent its probabilities. # (*plates, K)
        log_densities: Per group.

    Raises:
        UsageError: If a latent is missing, or probabilities have a wrong shape or sum.
    """
    tables = {}
    marginals = dict(marginals)
    for name in graph.structure.masked_pairs:
        if name in marginals and f"{name}_unobserved" in graph.latents:
            marginals[f"{name}_unobserved"] = marginals.pop(name)
    missing = [n for n in graph.latents if n not in marginals]
    unknown = [n for n in marginals if n not in graph.latents]
    if missing or unknown:
        names = ", ".join(f"'{n}'" for n in missing or unknown)
        what = "probabilities are missing for" if missing else "no summed latent is called"
        raise UsageError(
            message(
                "q",
                f"{what} {names}.",
                "q must name every summed latent and nothing else",
                ["give {site: probabilities} for: " + ", ".join(graph.latents)],
            )
        )
    for name, latent in graph.latents.items():
        device = log_densities[0].device
        p = torch.as_tensor(marginals[name]).to(dtype=torch.float64, device=device)
        sizes = [graph.dim_size(d) for d in latent.plates]
        shape = [graph.dim_size(d) if d is not None else 1 for d in latent.batch_dims]
        if list(p.shape) not in ([*sizes, latent.size], [*shape, latent.size]):
            raise UsageError(
                message(
                    f"q['{name}']",
                    f"its shape is {tuple(p.shape)}; {(*sizes, latent.size)} was expected.",
                    "plates first, left to right, the support last",
                )
            )
        # Written so that NaN fails too.
        if not bool((p >= 0).all()) or not float((p.sum(-1) - 1).abs().max()) <= 1e-5:
            raise UsageError(
                message(
                    f"q['{name}']",
                    "its rows are not probabilities that sum to one.",
                    fixes=["divide by p.sum(-1, keepdim=True)"],
                )
            )
        tables[name] = p.reshape(*sizes, latent.size)
    cells, counts, entropy = [], [], 0.0
    for group in graph.groups:
        parts = []
        for dims in group.dims:
            table = log_densities[0].new_ones((1,) * len(dims), dtype=torch.float64)
            for d in dims:
                if d in graph.latents:
                    have = (*graph.latents[d].plates, d)
                    p = tables[d].permute([have.index(x) for x in dims if x in have])
                    shape = [graph.dim_size(x) if x in have else 1 for x in dims]
                    table = table * p.reshape(shape)
            parts.append(table.expand(group.sizes))
        cell = torch.stack(parts)
        count = torch.stack([c * s for c, s in zip(cell, group.scale, strict=True)])
        count = count if group.mask is None else count * group.mask
        cells.append(cell)
        counts.append(count)
        if not group.observed:
            for i, name in enumerate(group.members):
                p = _marginal(cell[i], group.dims[i], [*graph.latents[name].plates, name])
                w = _marginal(count[i], group.dims[i], [*graph.latents[name].plates, name])
                entropy -= float(torch.where(w == 0, 0.0, w * p.clamp(min=1e-300).log()).sum())
    return Posterior(
        graph, cells, counts, None, False, [t.detach() for t in log_densities], entropy
    )
