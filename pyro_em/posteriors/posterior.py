"""`Posterior`: q over all latents with an exact posterior, as users hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_em.arguments import seed_of, site_name, whole
from pyro_em.elsewhere import OF_SUMMED, NamesFromElsewhere
from pyro_em.errors import UsageError, message
from pyro_em.globs import Values, meant, stacked_answers
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.latent_series import kinds_of
from pyro_em.portable import Portable
from pyro_em.posteriors.crossed import across_plates, are_connected
from pyro_em.posteriors.enumeration import (
    contraction_of,
    largest_cells,
    run_contraction,
    tables_that_count,
)
from pyro_em.posteriors.gaussian_faces import (
    GaussianFaces,
    refuse_gaussian,
    regrouped_solutions,
)
from pyro_em.posteriors.gaussian_steps import Solved
from pyro_em.posteriors.later_faces import LaterFaces
from pyro_em.posteriors.names import (
    by_glob,
    latent_of,
    observed_steps,
    own_name,
    pairs_by_glob,
)
from pyro_em.posteriors.sampling import (
    Conditional,
    codes_of,
    conditionals,
    cumulative_rows,
    draw_codes,
)
from pyro_em.posteriors.series_faces import (
    covariances,
    filtered,
    marginals,
    prediction_errors,
)
from pyro_em.posteriors.site_runs import means
from pyro_em.posteriors.stacks import (
    are_alike,
    batch_shape,
    factors_of_pairs,
    parts_of,
    parts_of_joints,
    parts_of_marginals,
    places_of,
    plates_of,
    stack_of,
    table_of,
)
from pyro_em.posteriors.steps import best_path
from pyro_em.tracing.without_sympy import PlainShapes


@dataclass(frozen=True, eq=False)
class Posterior(Portable, NamesFromElsewhere):
    """q(z): the exact posterior over all summed latents, or a product that a user gave.

    Gaussian latents that enter the model linearly are part of it: q(z, h) = q(z) N(h | m(z), S(z)).
    Of these ``mean``, ``covariance`` and ``marginal`` answer, of discrete ones ``probs`` and ``joint``.

    Where a method takes a site it takes a glob as well (``"z_*"``, as in `fnmatch`; a name that exists
    is no glob) and stacks its answers along a new first dimension, in order of time: ``z_2`` comes
    before ``z_10``.

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
        entropy_value: H(q) of the discrete latents in nats.
        pointwise: The evidence per element of the outermost data plate, where there is one.
        solved: For groups that integrate Gaussian latents, by their number, the posterior of these.
        later: Answers for Gaussian latents that no observation depends on; None where there are none.
    """

    elsewhere: ClassVar[Mapping[str, str]] = OF_SUMMED

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
    solved: Solved = field(default_factory=dict)
    later: LaterFaces | None = None

    def __repr__(self) -> str:
        shown = [
            f"{n} {tuple(self.graph.dim_size(p) for p in v.plates)}x{v.size}"
            for n, v in list(self.graph.latents.items())[:4]
        ]
        faces = self._gaussian
        for name in list(faces.places)[: 4 - len(shown)]:
            site = faces.site("repr", name)
            shown.append(f"{name} {(*site.batch, *site.event)} Gaussian")
        more = [", …"] if len(self.graph.latents) + len(faces.places) > len(shown) else [""]
        about = f"exact={self.exact}, log_evidence={self.log_evidence}"
        return f"Posterior({', '.join([about, *shown])}{more[0]})"

    def entropy(self) -> float:
        """H(q) = −E_q[log q(z, h)] in nats, scaled as the sites are.

        The entropy of the discrete latents, and the expected differential entropy of Gaussian ones
        given these, which may be negative, and is −inf where a variance is zero.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor(2.0))
            >>> round(q.entropy(), 4)  # log(2 π e / 2) / 2
            1.0724
        """
        return self.entropy_value + (self._gaussian.entropy() if self.solved else 0.0)

    def mean(self, site: str) -> Tensor:
        """The posterior mean of a Gaussian latent, or of all steps of a chain.

        Args:
            site: Its name, or a glob.

        Returns:
            E_q[h]; under discrete latents the mean of the mixture; where no observation depends on the
            latent, the mean of its prior. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If the model has no such Gaussian latent, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor([2.0, 4.0])).mean("h")
            tensor([1., 2.])
        """
        site_name("mean", "site", site)
        faces = self._faces_of(site)
        names = faces.names("mean", site)
        if names is None:
            return faces.site("mean", site).mean()
        return means(faces, names)

    def covariance(self, a: str, b: str | None = None, *, lag: int | None = None) -> Tensor:
        """The posterior covariance of a Gaussian latent, or of two, element by element of the plates.

        Elements of one plate may depend on each other too; ``sample`` draws them jointly.

        Args:
            a: One site; left alone also a glob, for the covariance of each.
            b: Another, or a glob: pairs are taken in order of time, and a single site goes with each.
            lag: Of a glob left alone the covariance of steps so far apart, Cov(h_t, h_{t+lag}).

        Returns:
            Of numbers # (*plates,), of vectors # (*plates, D, D); of events of more dimensions with D
            numbers in all. Of two sites # (*plates of both, D_a, D_b) without the D of numbers; zero
            where nothing connects them. Of a glob # (T, ...), with a lag # (T - lag, ...)

        Raises:
            UsageError: If the model has no such Gaussian latent, or the two lie in different plates of
                one dimension.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
            ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor(3.0))
            >>> q.covariance("a"), q.covariance("a", "b")
            (tensor(0.6667), tensor(-0.3333))
        """
        site_name("covariance", "a", a)
        if b is not None:
            site_name("covariance", "b", b)
        return covariances(self._faces_of(*([a] if b is None else [a, b])), a, b, lag)

    def marginal(self, site: str) -> Any:
        """The posterior distribution of a Gaussian latent, for each element of its plates by itself.

        Args:
            site: Its name, or a glob.

        Returns:
            A Pyro distribution over the site's plates: a Normal of numbers, a MultivariateNormal
            of vectors (of events of more dimensions flattened to one); below discrete latents a
            MixtureSameFamily of these. Variances may be zero. Of a glob one over # (T, *plates)

        Raises:
            UsageError: If the model has no such Gaussian latent, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor(2.0)).marginal("h")
            Normal(loc: 1.0, scale: 0.7071067690849304)
        """
        site_name("marginal", "site", site)
        faces = self._faces_of(site)
        names = faces.names("marginal", site)
        if names is None:
            return faces.site("marginal", site).marginal()
        return marginals(faces, "marginal", names)

    def filtered(self, site: str) -> Any:
        """What was known of each step of a series at that step: given no data that come later.

        Data come at the step that has their number (``y_3`` at ``h_3``); of data with other names the
        order of the model decides, and of rows of a plate what they read.

        Args:
            site: A glob of the steps, discrete or Gaussian, or one of them.

        Returns:
            Of discrete latents p(z_t | x_1, …, x_t) # (T, *plates, K); of Gaussian ones a distribution
            over # (T, *plates) as ``marginal`` gives it, with ``mean`` and ``variance``. Of one name
            without the T.

        Raises:
            UsageError: If there are no such latents, they differ in shape, or this q is not the exact
                posterior of data.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(y):
            ...     h = 0.0
            ...     for t in pyro.markov(range(len(y))):
            ...         h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            ...         pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([1.0, 2.0]))
            >>> q.filtered("h_*").mean, q.mean("h_*")
            (tensor([0.5000, 1.4000]), tensor([0.8000, 1.4000]))
        """
        site_name("filtered", "site", site)
        with PlainShapes():
            return filtered(self, site, self._faces_of(site))

    def prediction_errors(self, site: str) -> Tensor:
        """Standardised one-step prediction errors of data that read Gaussian latents, for diagnostics.

            e_t = (y_t − E[y_t | y_1, …, y_{t−1}]) / sd(y_t | y_1, …, y_{t−1})

        Under the model they are independent and standard normal along a series of numbers. Entries of a
        vector are standardised each by itself. Other data of the same step are not used.

        Args:
            site: An observed site, or a glob of the steps of a series.

        Returns:
            NaN where nothing was observed. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If no such data read Gaussian latents.

        Source: Durbin and Koopman (2012), "Time Series Analysis by State Space Methods", section 2.12.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(y):
            ...     h = 0.0
            ...     for t in pyro.markov(range(len(y))):
            ...         h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            ...         pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([1.0, 2.0]))
            >>> q.prediction_errors("y_*")  # 1 / √2 and (2 − 1/2) / √2.5
            tensor([0.7071, 0.9487])
        """
        site_name("prediction_errors", "site", site)
        with PlainShapes():
            return prediction_errors(self, site)

    def _faces_of(self, *sites: str) -> GaussianFaces:
        """What answers for some Gaussian latents: names or globs."""
        names = () if self.later is None else self.later.names
        unread = {n for s in sites for n in meant(s, names)}
        if unread and self.later is not None:
            return self.later.faces(unread)
        return replace(self._gaussian, others=names)

    @property
    def _gaussian(self) -> GaussianFaces:
        return GaussianFaces(self.graph, self.solved, self.cells)

    def probs(self, site: str) -> Tensor:
        """The posterior marginals of a latent, or of all steps of a chain.

        Args:
            site: Its name; for a site with ``obs_mask`` the name in the model. Or a glob.

        Returns:
            Probabilities. # (*plates, K), of a glob (T, *plates, K)

        Raises:
            UsageError: If no such latent was summed, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     A, z = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0
            ...     for t in pyro.markov(range(len(x))):
            ...         z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            ...         pyro.sample(f"x_{t}", dist.Normal(2.0 * z, 1.0), obs=x[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([0.1, 1.2, 2.3]))
            >>> q.probs("z_*").shape, q.joint("z_*").shape, q.mode()["z_*"]
            (torch.Size([3, 2]), torch.Size([2, 2, 2]), tensor([0, 1, 1]))
        """
        site_name("probs", "site", site)
        refuse_gaussian(self.graph, "probs", site)
        names = by_glob(self.graph, site)
        if names is not None:
            return self.stacked(names)
        if own_name(self.graph, site) != site:
            return self._with_observed(site)
        latent = latent_of(self.graph, site)
        group, i = self.graph.group_of(site)
        cells = self._cells(group)[i]
        dims = group.dims[i]
        keep = [d for d in dims if d in latent.plates] + [site]
        table = marginal(cells, dims, keep)
        return self._shaped(table / table.sum(-1, keepdim=True), latent)

    def stacked(self, sites: Sequence[str]) -> Tensor:
        """The posterior marginals of several latents, in this order.

        Args:
            sites: Their names, at least one; no globs.

        Returns:
            Probabilities. # (T, *plates, K)

        Raises:
            UsageError: If no such latent was summed, or two differ in shape.
        """
        names = tuple(sites)
        for name in names if self.solved else ():
            refuse_gaussian(self.graph, "stacked", name)
        partly = self.graph.structure.masked_pairs
        if partly and any(own_name(self.graph, n) != n for n in names):
            return stacked_answers("probs", names, self.probs)
        table = stack_of(self.cells, parts_of_marginals(self.graph, names))
        table = table / table.sum(-1, keepdim=True)
        first = self.graph.latents[names[0]]
        shape = (len(names), *batch_shape(self.graph, first), first.size)
        return table.reshape(shape).to(self.graph.dtype)

    def joint(self, a: str, b: str | None = None) -> Tensor:
        """The joint posterior of two latents, or of all neighbours along a chain.

        Args:
            a: One site, or a glob.
            b: Another, or a glob: pairs are taken in order of time, and a single site goes with
                each. Left out, a glob's own neighbours are the pairs: (z_0, z_1), (z_1, z_2), …

        Returns:
            Probabilities. # (*plates of both, K_a, K_b), of a glob (pairs, *plates of both, K_a, K_b):
            T − 1 pairs of neighbours

        Raises:
            UsageError: If no such latent was summed, or pairs differ in shape or do not match.
        """
        site_name("joint", "a", a)
        if b is not None:
            site_name("joint", "b", b)
        for name in (a, b):
            refuse_gaussian(self.graph, "joint", name)
        pairs = pairs_by_glob(self.graph, a, b)
        if pairs is not None:
            return self._stacked_joints(pairs, a)
        assert b is not None
        if a == b:
            return torch.diag_embed(self.probs(a))
        own_a, own_b = own_name(self.graph, a), own_name(self.graph, b)
        if (own_a, own_b) != (a, b):
            return self._joint_with_observed(a, b, own_a, own_b)
        first, second = latent_of(self.graph, a), latent_of(self.graph, b)
        plates = plates_of(self.graph, first, second)
        wanted = [*plates, a, b]
        place = factors_of_pairs(self.graph).get((a, b))
        if place is not None:
            g, i = place
            dims = self.graph.groups[g].dims[i]
            return self._normalised(marginal(self.cells[g][i], dims, wanted), 2)
        if not self.exact or not are_connected(self.graph, a, b):
            return self._product(first, second, plates)
        if not (set(first.plates) <= set(second.plates) or set(second.plates) <= set(first.plates)):
            return self._normalised(
                across_plates(self.graph, self.tables, first, second, plates), 2
            )
        extra = tuple(wanted)
        plan = contraction_of(self.graph, [extra])
        zeros = torch.zeros(
            [self.graph.dim_size(d) for d in extra],
            dtype=torch.float64,
            device=self.cells[0].device,
        )
        result = run_contraction(self.graph, plan, self.tables, extra=[zeros])
        return self._normalised(result.cells[-1], 2)

    def mode(self) -> Values:
        """A jointly most probable assignment of the discrete latents; Gaussian ones at their means.

        The discrete latents are most probable with the Gaussian ones integrated out (on chains the
        path of Viterbi); each Gaussian latent is at its mean given these, which is its mode.

        Returns:
            For each latent its values, a discrete one's from its support # (*plates, *event); a glob
            gives the path of a chain: ``mode()["z_*"]`` # (T, *plates, *event)
        """
        best = self._best()
        if self.solved:
            best |= self._gaussian.mode(self._codes(best))
        return self._under_user_names(best)

    def _best(self) -> dict[str, Tensor]:
        """The most probable values of the discrete latents."""
        if not self.exact:
            return {
                name: latent.support[self.probs(name).argmax(-1)]
                for name, latent in self.graph.latents.items()
            }
        path = best_path(self.graph, tables_that_count(self.graph, self.tables))
        if path is not None:
            return self._values_of(list(self.graph.latents), path)
        if not self.graph.latents:
            return {}
        result = largest_cells(self.graph, contraction_of(self.graph), self.tables)
        return self._assignment(result.cells)

    def _codes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The places of values in the supports of the discrete latents. # (*leading, *plates)"""
        if all(s.cells == 1 for s in self.solved.values()):
            return {}
        return codes_of(self.graph, values)

    def sample(self, n: int = 1, *, seed: int | None = None) -> Values:
        """Draw jointly from the posterior: discrete latents first, Gaussian ones given these.

        Args:
            n: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.

        Returns:
            For each latent its drawn values # (n, *plates, *event); a glob gives those of a chain, time
            first as everywhere: ``sample(n)["z_*"]`` # (T, n, *plates, *event)
        """
        n, seed = whole("sample", "n", n, None), seed_of("sample", seed)
        if n < 1:
            raise UsageError(message("sample", f"n={n}: at least one draw is needed."))
        generator = None
        if seed is not None:
            device = self.cells[0].device if self.cells else None
            generator = torch.Generator(device=device).manual_seed(seed)
        latents = self.graph.latents
        out = {
            name: z.support.new_empty((n, *batch_shape(self.graph, z), *z.support.shape[1:]))
            for name, z in latents.items()
        }
        done, found = 0, self._conditionals() if latents else []
        for size, codes in draw_codes(self.graph, found, n, generator) if found else ():
            for name, z in latents.items():
                values = z.support[codes[name].reshape(size, *batch_shape(self.graph, z))]
                out[name][done : done + size] = values
            done += size
        if self.solved:
            out |= self._gaussian.sample(n, generator, self._codes(out))
        return self._under_user_names(out)

    def _conditionals(self) -> list[Conditional]:
        if self.exact:
            return conditionals(self.graph, contraction_of(self.graph), self.tables)
        return [
            Conditional(name, z.plates, (), cumulative_rows(self.probs(name).reshape(-1, z.size)))
            for name, z in self.graph.latents.items()
        ]

    def _assignment(self, marked: Sequence[Tensor]) -> dict[str, Tensor]:
        names = list(self.graph.latents)
        out: dict[str, Tensor] = dict.fromkeys(names, marked[0])
        for part in parts_of(places_of(self.graph, self.graph.latents.values())):
            own = (
                names[part.rows] if isinstance(part.rows, slice) else [names[r] for r in part.rows]
            )
            out.update(self._values_of(own, table_of(marked, part).argmax(-1)))
        return out

    def _values_of(self, names: Sequence[str], codes: Tensor) -> dict[str, Tensor]:
        """Values at positions in the latents' supports. # (latents, *plates)"""
        support = self._one_support()
        if support is None:
            latents = [self.graph.latents[name] for name in names]
            shapes = [(*batch_shape(self.graph, z), *z.support.shape[1:]) for z in latents]
            each = [z.support[c] for z, c in zip(latents, codes, strict=True)]
            return {n: v.reshape(s) for n, v, s in zip(names, each, shapes, strict=True)}
        shape = (*batch_shape(self.graph, self.graph.latents[names[0]]), *support.shape[1:])
        values = support[codes].reshape(len(names), *shape).unbind(0)
        # Memory of its own for each: a view would be pickled with all the others.
        return {n: v.clone() for n, v in zip(names, values, strict=True)}

    def _one_support(self) -> Tensor | None:
        """The support of all latents, if it is one and they have one batch shape."""
        if not are_alike(self.graph):
            return None
        first, *others = (z.support for z in kinds_of(self.graph.latents))
        return first if all(s is first or torch.equal(s, first) for s in others) else None

    def _under_user_names(self, values: dict[str, Tensor]) -> Values:
        """Values of ``obs_mask`` sites under the user's names, with what was observed."""
        for name, mask in self.graph.structure.masked_pairs.items():
            hidden = f"{name}_unobserved"
            if hidden in values:
                values[name] = self._where_observed(name, mask, values.pop(hidden))
        return Values(values, observed_steps(self.graph))

    def _where_observed(self, name: str, mask: Tensor, unobserved: Tensor) -> Tensor:
        event_dim = self.graph.latents[f"{name}_unobserved"].support.dim() - 1
        own = len(self.graph.latents[f"{name}_unobserved"].batch_dims) + event_dim
        shape = unobserved.shape[unobserved.dim() - own :]  # without that of draws
        value = self._observed_value(name).to(unobserved.dtype).reshape(shape)
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
        first, second = latent_of(self.graph, own_a), latent_of(self.graph, own_b)
        plates = plates_of(self.graph, first, second)
        product = self._over(a, first, plates).unsqueeze(-1) * self._over(
            b, second, plates
        ).unsqueeze(-2)
        observed = torch.zeros(product.shape[:-2], dtype=torch.bool, device=product.device)
        for name, latent in ((a, first), (b, second)):
            mask = self.graph.structure.masked_pairs.get(name)
            if mask is not None and latent.name != name:
                flat = mask.expand(batch_shape(self.graph, latent))
                observed = observed | self._lay_out(flat, latent, plates)
        return torch.where(observed[..., None, None], product, joint)

    def _lay_out(self, table: Tensor, latent: Latent, plates: Sequence[str]) -> Tensor:
        """A table over a latent's own batch dimensions, and more, over some plates."""
        beyond = table.shape[len(latent.batch_dims) :]
        shape = [self.graph.dim_size(d) if d in latent.plates else 1 for d in plates]
        return table.reshape([*shape, *beyond])

    def _over(self, site: str, latent: Latent, plates: Sequence[str]) -> Tensor:
        return self._lay_out(self.probs(site), latent, plates)

    def _stacked_joints(self, pairs: tuple[tuple[str, str], ...], site: str) -> Tensor:
        """# (pairs, *plates of both, K_a, K_b)"""
        if not pairs:  # the neighbours of a chain of one step
            name = own_name(self.graph, next(iter(by_glob(self.graph, site) or ())))
            latent = self.graph.latents[name]
            sizes = [self.graph.dim_size(p) for p in plates_of(self.graph, latent)]
            shape = (0, *sizes, latent.size, latent.size)
            return self.cells[0].new_empty(shape, dtype=self.graph.dtype)
        parts = parts_of_joints(self.graph, pairs)
        if parts is not None:
            return self._normalised(stack_of(self.cells, parts), 2)
        each = {", ".join(pair): pair for pair in pairs}
        return stacked_answers("joint", list(each), lambda words: self.joint(*each[words]))

    def _cells(self, group: Group) -> Tensor:
        return self.cells[self.graph.groups.index(group)]

    def _normalised(self, table: Tensor, event: int) -> Tensor:
        table = table / table.sum(tuple(range(-event, 0)), keepdim=True)
        return table.to(self.graph.dtype)

    def _product(self, first: Latent, second: Latent, plates: list[str]) -> Tensor:
        a, b = (self._over(latent.name, latent, plates) for latent in (first, second))
        sizes = [self.graph.dim_size(p) for p in plates]
        return (a.unsqueeze(-1) * b.unsqueeze(-2)).expand(*sizes, first.size, second.size)

    def _shaped(self, table: Tensor, latent: Latent) -> Tensor:
        """From (plates, K) to the site's own batch dimensions, size-one ones kept."""
        sizes = dict(zip(latent.plates, table.shape, strict=False))
        shape = [sizes[d] if d is not None else 1 for d in latent.batch_dims]
        return table.reshape([*shape, latent.size]).to(self.graph.dtype)


def marginal(cells: Tensor, dims: Sequence[str], keep: Sequence[str]) -> Tensor:
    """A table summed over the dimensions that are not kept; tables are normalised afterwards."""
    dims = list(dims)
    plates_beyond = [i for i, d in enumerate(dims) if d not in keep]
    table = cells
    for i in reversed(plates_beyond):
        table = table.sum(i)
    names = [d for d in dims if d in keep]
    return table.permute([names.index(d) for d in keep])


def regrouped(q: Posterior, graph: FactorGraph) -> Posterior | None:
    """A posterior laid out for another graph of the same model and data; None if it is not."""
    solved = regrouped_solutions(q.graph, q.solved, graph)
    if solved is None:
        return None
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
    return replace(q, graph=graph, cells=cells, counts=counts, solved=solved)
