"""Random parametrised models and the brute-force oracle that judges them.

A seed makes a Pyro model: plates, discrete latents with learnable tables, observed sites of random
families whose arguments reach their parameters in random ways. The oracle is Pyro's own density,
conditioned on every assignment of the latents at once (an outermost plate of assignments); it
shares no code with the library. Weights are integers: their oracle is the model with rows repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints

from pyro_em import (
    ClosedForm,
    DegenerateError,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
)
from pyro_em.plan.given_q import as_posterior

RANK = 3  # plate dimensions that a model may use

MOST = 2**12  # assignments that the oracle visits

LAYOUTS: tuple[tuple[dict[str, int], tuple[str, ...]], ...] = (
    ({"a": -1}, ("", "a")),
    ({"a": -2, "b": -1}, ("", "a", "ab")),
    ({"a": -1, "b": -2}, ("", "a", "ab")),
    ({"a": -1, "c": -1}, ("", "a", "c")),
    ({"a": -2, "b": -1, "c": -1}, ("", "a", "ab", "ac")),
    ({"a": -3, "b": -2, "c": -1}, ("", "a", "ab", "abc")),
)

DOMAINS: dict[str, tuple[Any, Callable[..., Any], str]] = {
    # constraint, random value, ways in which an argument of this domain is made
    "real": (
        constraints.real,
        lambda r, s: r.normal(0, 1, s),
        "const select select select stacked affine log known",
    ),
    "positive": (
        constraints.positive,
        lambda r, s: r.lognormal(0, 0.5, s),
        "const select select select stacked exp sqrt known product",
    ),
    "unit": (
        constraints.unit_interval,
        lambda r, s: r.uniform(0.1, 0.9, s),
        "const select select select stacked sigmoid",
    ),
    "simplex": (
        constraints.simplex,
        lambda r, s: r.dirichlet(np.ones(s[-1]), s[:-1]),
        "const select select select stacked softmax",
    ),
    "cov": (
        constraints.positive_definite,
        lambda r, s: np.eye(s[-1]) + (lambda m: m @ m.mT)(r.normal(0, 0.5, s)),
        "const select select",
    ),
    "tril": (
        constraints.lower_cholesky,
        lambda r, s: np.tril(r.normal(0, 0.5, s), -1) + np.eye(s[-1]) * r.lognormal(0, 0.3, s),
        "const select select",
    ),
}

MAPS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "exp": ("real", torch.exp),
    "log": ("positive", torch.log),
    "sqrt": ("positive", torch.sqrt),
    "sigmoid": ("real", torch.sigmoid),
    "softmax": ("real", lambda t: t.softmax(-1)),
}

MATRICES = {"scale_tril": "tril", "covariance_matrix": "cov", "precision_matrix": "cov"}

LOCATED = {"loc": "real", "scale": "positive"}

FAMILIES: dict[str, tuple[dict[str, str], Callable[..., Any]]] = {
    "Normal": (LOCATED, lambda r, s: r.normal(0, 2, s)),
    "LogNormal": (LOCATED, lambda r, s: r.lognormal(0, 1, s)),
    "Laplace": (LOCATED, lambda r, s: r.laplace(0, 2, s)),
    "Poisson": ({"rate": "positive"}, lambda r, s: r.poisson(2.5, s)),
    "Exponential": ({"rate": "positive"}, lambda r, s: r.exponential(1, s)),
    "Bernoulli": ({"probs": "unit"}, lambda r, s: r.integers(0, 2, s)),
    "Geometric": ({"probs": "unit"}, lambda r, s: r.geometric(0.4, s) - 1),
    "Binomial": ({"probs": "unit"}, lambda r, s: r.integers(0, 6, s)),
    "Categorical": ({"probs": "simplex"}, lambda r, s: r.integers(0, 3, s)),
    "MultivariateNormal": ({"loc": "real"}, lambda r, s: r.normal(0, 2, s)),
    "Gamma": ({"concentration": "positive", "rate": "positive"}, lambda r, s: r.gamma(2, 1, s)),
}

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent's plates, its number of values, the cells to be summed, its traced site."""

    plates: str
    size: int
    free: Tensor
    site: str
    dtype: torch.dtype = torch.long


@dataclass(eq=False)
class RandomModel:
    """A model as statements over its data; tensors hold RANK plate dimensions first."""

    sizes: dict[str, int]
    dims: dict[str, int]
    statements: list[Callable[[RandomModel, Values], None]] = field(default_factory=list)
    data: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    latents: dict[str, Latent] = field(default_factory=dict)
    parameters: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    holes: dict[str, str] = field(default_factory=dict)
    weighted: bool = False
    guide: str | None = None
    text: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return "\n".join([f"{self.sizes} {self.dims} weighted={self.weighted}", *self.text])

    def __call__(self) -> None:
        self.plates = {n: pyro.plate(n, s, dim=self.dims[n]) for n, s in self.sizes.items()}
        values: Values = {}
        for statement in self.statements:
            statement(self, values)

    def sample(self, name: str, plates: str, fn: Any, obs: bool = True) -> Tensor:
        with self.inside(plates) as stack:
            if f"{name} mask" in self.data:
                stack.enter_context(pyro.poutine.mask(mask=self.get(f"{name} mask")))
            holes = self.get(f"{name} known") if f"{name} known" in self.data else None
            value = self.get(name) if obs or holes is not None else None
            return pyro.sample(name, fn, obs=value, obs_mask=holes)

    def inside(self, plates: str) -> ExitStack:
        """The plates of a site, entered, and the weights of its rows."""
        stack = ExitStack()
        for plate in plates:
            stack.enter_context(self.plates[plate])
        if self.weighted and "a" in plates:
            weights = self.data["weights"][1]
            rank = max(-self.dims[p] for p in plates)
            weights = weights.reshape(weights.shape[RANK - rank :])
            stack.enter_context(pyro.poutine.scale(scale=weights))
        return stack

    def get(self, name: str) -> Tensor:
        """A data tensor without the leading dimensions that no plate of the site needs."""
        plates, x = self.data[name]
        rank = max((-self.dims[p] for p in plates), default=0)
        return x.reshape(x.shape[RANK - rank :])

    @property
    def enumerated_holes(self) -> list[str]:
        """Observed sites with holes that are latents of finite support in Pyro's eyes."""
        return [n for n, f in self.holes.items() if f in ("Bernoulli", "Binomial", "Categorical")]

    def param(self, name: str) -> Tensor:
        domain, start = self.parameters[name]
        return pyro.param(name, start.clone(), constraint=DOMAINS[domain][0])

    def shape(self, plates: str) -> tuple[int, ...]:
        out = [1] * RANK
        for p in plates:
            out[self.dims[p]] = self.sizes[p]
        return tuple(out)

    def replicated(self) -> RandomModel:
        """The model without weights, rows of plate a repeated instead."""
        if not self.weighted:
            return self
        axis, counts = RANK + self.dims["a"], self.data["weights"][1].reshape(-1).long()

        def repeat(plates: str, x: Tensor) -> Tensor:
            return x.repeat_interleave(counts, axis) if "a" in plates else x

        return replace(
            self,
            weighted=False,
            sizes={**self.sizes, "a": int(counts.sum())},
            data={n: (p, repeat(p, x)) for n, (p, x) in self.data.items()},
            latents={n: replace(z, free=repeat(z.plates, z.free)) for n, z in self.latents.items()},
        )

    def assignments(self) -> Values | None:
        """Every assignment of the cells that are summed, or None where they are too many."""
        wide = [z for z in self.latents.values() if z.size > 1]
        cells = [(z, tuple(i)) for z in wide for i in z.free.nonzero().tolist()]
        total = math.prod(z.size for z, _ in cells)
        if total > MOST:
            return None
        latents = self.latents.values()
        out = {z.site: torch.zeros(total, *z.free.shape, dtype=z.dtype) for z in latents}
        codes = np.unravel_index(np.arange(total), [z.size for z, _ in cells]) if cells else ()
        for (z, index), code in zip(cells, codes, strict=True):
            out[z.site][(slice(None), *index)] = torch.as_tensor(code).to(z.dtype)
        return out

    def log_joint(self, assignments: Values) -> Tensor:
        """log p(x, z) of each assignment at the parameters in the store, by Pyro."""
        total = len(next(iter(assignments.values())))

        def wrapped() -> None:
            with pyro.plate("assignments", total, dim=-RANK - 1):
                self()

        with pyro.validation_enabled(False), torch.no_grad():
            conditioned = pyro.poutine.condition(wrapped, data=assignments)
            trace = pyro.poutine.trace(conditioned).get_trace()
            trace.compute_log_prob()
            out = torch.zeros(total)
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                    continue
                if name.endswith("_unobserved") and name not in assignments:
                    continue  # an unobserved leaf integrates to one
                out += site["log_prob"].reshape(total, -1).sum(-1)
        return out


class Builder:
    """Draws one model from a seed."""

    weighted = 0.25

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        dims, self.sets = self.pick(LAYOUTS)
        self.model = RandomModel({p: int(self.rng.integers(1, 5)) for p in dims}, dims)
        self.bits = 0.0

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def draw(self, domain: str, shape: tuple[int, ...]) -> Tensor:
        return torch.as_tensor(DOMAINS[domain][1](self.rng, shape), dtype=torch.float64)

    def parameter(self, domain: str, shape: tuple[int, ...]) -> str:
        """A new parameter, or one that another argument uses already."""
        known = self.model.parameters
        same = [n for n, (d, t) in known.items() if d == domain and t.shape == shape]
        if same and self.chance(0.25):
            return self.pick(same)
        name = f"theta{len(known)}"
        known[name] = (domain, self.draw(domain, shape))
        return name

    def argument(
        self, name: str, plates: str, domain: str, event: tuple[int, ...], parents: dict[str, int]
    ) -> Callable[[RandomModel, Values], Tensor]:
        """An argument made of parameters, the latents ``parents`` and covariates."""
        spread = name.endswith(("scale", "concentration"))
        if spread and self.chance(0.6):
            parents = {}
        chosen = {z: k for z, k in parents.items() if self.chance(0.8)}
        shape = (*chosen.values(), *event)
        how = self.pick(DOMAINS[domain][2].split())
        if name.endswith("concentration") or (spread and how == "product"):
            how = "const"  # a gradient step would run off along an unbounded likelihood
        if how == "stacked" and (not chosen or shape[0] == 1):
            how = "select"
        source = MAPS[how][0] if how in MAPS else domain
        if how == "const":
            fixed = self.draw(domain, shape)
            p, used = "", [str(fixed.tolist())]
        else:
            fixed = self.draw(domain, (1, *shape[1:])) if how == "stacked" else torch.zeros(())
            p = self.parameter(source, (shape[0] - 1, *shape[1:]) if how == "stacked" else shape)
            used = [p]
        other = self.parameter(domain, shape) if how in ("affine", "product") else ""
        covariate = f"{name} x"
        if how in ("affine", "known"):
            x = self.draw("positive", (*self.model.shape(plates), *(1,) * len(event)))
            self.model.data[covariate] = (plates, x if how == "known" else x.log())
        self.model.text.append(f"  {name} = {how} {[*used, other]}[{', '.join(chosen)}] {event}")

        def build(model: RandomModel, values: Values) -> Tensor:
            def at(table: Tensor) -> Tensor:
                return table[tuple(values[z] for z in chosen)] if chosen else table

            if how == "const":
                return at(fixed)
            if how == "stacked":
                return at(torch.cat([fixed, model.param(p)]))
            out = at(model.param(p))
            if how in MAPS:
                return MAPS[how][1](out)
            if how == "affine":
                return out + at(model.param(other)) * model.get(covariate)
            if how == "product":
                return out * at(model.param(other))
            return out * model.get(covariate) if how == "known" else out

        return build

    def discrete(
        self, name: str, plates: str, size: int, parents: dict[str, int]
    ) -> tuple[Callable[[RandomModel, Values], Any], torch.dtype]:
        """A Categorical or a Bernoulli, with probs or logits, and the dtype of its values."""
        kind = "Bernoulli" if size == 2 and self.chance(0.35) else "Categorical"
        logits = self.chance(0.25)
        event = (size,) if kind == "Categorical" else ()
        domain = "real" if logits else ("simplex" if event else "unit")
        word = "logits" if logits else "probs"
        table = self.argument(f"{name}.{word}", plates, domain, event, parents)
        return (
            lambda model, values: getattr(dist, kind)(**{word: table(model, values)}),
            torch.long if kind == "Categorical" else torch.float64,
        )

    def random_mask(self, plates: str) -> Tensor:
        return torch.as_tensor(self.rng.random(self.model.shape(plates)) < 0.7)

    def add_latent(self, name: str) -> None:
        model, size = self.model, self.pick((2, 2, 2, 3, 1))
        plates = self.pick(self.sets)
        parents = self.parents(plates)
        model.text.append(f"{name} in '{plates}', {size} values")
        fn, dtype = self.discrete(name, plates, size, parents)
        free = torch.ones(model.shape(plates), dtype=torch.bool)
        site = name
        if self.chance(0.15):
            known = self.random_mask(plates)
            values = torch.as_tensor(self.rng.integers(0, size, model.shape(plates)))
            model.data[f"{name} known"], model.data[name] = (
                (plates, known),
                (plates, values.to(dtype)),
            )
            free, site = ~known, f"{name}_unobserved"
            model.text.append("  partly observed")
        self.bits += float(free.sum()) * math.log2(size)
        model.latents[name] = Latent(plates, size, free, site, dtype)

        def statement(model: RandomModel, values: Values) -> None:
            values[name] = model.sample(name, plates, fn(model, values), obs=False).long()

        model.statements.append(statement)

    def parents(self, plates: str) -> dict[str, int]:
        """Up to two latents that are visible inside some plates."""
        allowed = [n for n, z in self.model.latents.items() if set(z.plates) <= set(plates)]
        allowed = [n for n in allowed if not n.startswith("h")]
        some = self.rng.permutation(len(allowed))[:2]
        return {allowed[i]: self.model.latents[allowed[i]].size for i in sorted(some)}

    def emission(
        self, name: str, plates: str, parents: dict[str, int]
    ) -> tuple[Callable[[RandomModel, Values], Any], Callable[[], Tensor]]:
        """A random observed distribution, and a source of its data."""
        model, family = self.model, self.pick(list(FAMILIES))
        self.family = family
        domains, draw = FAMILIES[family]
        domains, own = dict(domains), {}
        extra = (2,) if family != "MultivariateNormal" and self.chance(0.25) else ()
        if family == "MultivariateNormal":
            matrix = self.pick(list(MATRICES))
            domains[matrix], own = MATRICES[matrix], {"loc": (2,), matrix: (2, 2)}
        if family == "Categorical":
            own = {"probs": (3,)}
        if "probs" in domains and self.chance(0.25):
            domains, own = {"logits": "real"}, {"logits": own.get("probs", ())}
        model.text.append(f"{name} ~ {family} in '{plates}', event {extra}")
        arguments = {}
        for i, (word, domain) in enumerate(domains.items()):
            event = extra if not i or self.chance(0.5) else (1,) * len(extra)
            event = (*event, *own.get(word, ()))
            arguments[word] = self.argument(f"{name}.{word}", plates, domain, event, parents)
        more: dict[str, Any] = {"total_count": 5} if family == "Binomial" else {}

        def fn(model: RandomModel, values: Values) -> Any:
            given = {word: a(model, values) for word, a in arguments.items()}
            return getattr(dist, family)(**given, **more).to_event(len(extra))

        def data() -> Tensor:
            event = (2,) if family == "MultivariateNormal" else extra
            x = torch.as_tensor(draw(self.rng, (*model.shape(plates), *event)))
            return x if family == "Categorical" else x.double()

        return fn, data

    def add_observed(self, name: str) -> None:
        model, plates = self.model, self.pick(self.sets[1:])
        fn, data = self.emission(name, plates, self.parents(plates))
        x = data()
        if self.chance(0.3):
            what = self.pick(("known", "mask"))
            mask = self.random_mask(plates)
            if what == "known":
                model.holes[name] = self.family
            model.data[f"{name} {what}"] = (plates, mask)
            model.text.append(f"  {what} {mask.tolist()}")
            if x.is_floating_point() and self.chance(0.5):
                x[~mask] = torch.nan
        model.data[name] = (plates, x)
        model.statements.append(lambda m, v: (m.sample(name, plates, fn(m, v)), None)[1])

    def add_chain(self) -> None:
        model, size, length = self.model, self.pick((2, 3)), self.pick((1, 2, 3))
        plates = self.pick(self.sets[:2])
        outer = self.parents(plates)
        model.text.append(f"chain in '{plates}', {length} steps, {size} values")
        first = self.argument("h0.probs", plates, "simplex", (size,), outer)
        after = self.argument("h.probs", plates, "simplex", (size,), {"previous": size, **outer})
        fn, data = self.emission("y", plates, {"h": size, **outer})
        lengths = torch.as_tensor(self.rng.integers(0, length + 1, model.shape(plates)))
        padded = self.chance(0.4)
        for t in range(length):
            free = lengths > t if padded else torch.ones_like(lengths, dtype=torch.bool)
            self.bits += float(free.sum()) * math.log2(size)
            model.latents[f"h{t}"] = Latent(plates, size, free, f"h{t}")
            model.data[f"y{t}"] = (plates, data())
            if padded:
                model.data[f"h{t} mask"] = model.data[f"y{t} mask"] = (plates, free)

        def statement(model: RandomModel, values: Values) -> None:
            for t in pyro.markov(range(length)):
                probs = (after if t else first)(model, values)
                values["h"] = model.sample(f"h{t}", plates, dist.Categorical(probs), obs=False)
                model.sample(f"y{t}", plates, fn(model, values))
                values["previous"] = values["h"]

        model.statements.append(statement)

    def add_chains(self) -> None:
        if self.chance(0.25):
            self.add_chain()

    def build(self) -> Any:
        self.model.weighted = self.chance(self.weighted)
        weights = self.rng.integers(1, 4, self.model.shape("a"))
        self.model.data["weights"] = ("a", torch.as_tensor(weights).double())
        for i in range(int(self.rng.integers(1, 4))):
            self.add_latent(f"z{i}")
        self.add_chains()
        for i in range(int(self.rng.integers(1, 4))):
            self.add_observed(f"x{i}")
        return self.model


def random_model(seed: int) -> tuple[RandomModel, RandomModel, Values]:
    """A model that the oracle can sum, its replicated form and the assignments of that."""
    for attempt in range(100):
        model = Builder(seed * 100 + attempt).build()
        long = model.replicated()
        assignments = long.assignments()
        if assignments is not None and model.parameters:
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            return model, long, assignments
    raise AssertionError("no model within the oracle's reach")


seeds = st.integers(0, 10**6)


def collapsed(parameters: Any) -> bool:
    """Whether a spread has gone to zero: few data, unbounded likelihood, rounding rules."""
    positive = [p.value() for p in parameters.values() if p.constraint is constraints.positive]
    return any(float(v.min()) < 1e-6 for v in positive)


def short_gradients(updates: Any) -> dict[str, Gradient]:
    """Few iterations, for the parameters that take any: to rise is promised of each of them."""
    return {n: Gradient(steps=3) for n, u in updates.items() if isinstance(u.update, Gradient)}


def determined(updates: Any, values: Values) -> Values:
    """Parameters whose maximisers are known to the last digits.

    Newton's method ends where nothing more is gained in nats: logits of what hardly occurs are flat.
    """
    return {n: v for n, v in values.items() if not isinstance(updates[n].update, Newton)}


def evidence_and_posterior(model: RandomModel, long: RandomModel, assignments: Values) -> None:
    q = ExactPosteriorEM(model).posterior()
    joint = long.log_joint(assignments)
    evidence = float(joint.logsumexp(0))
    assert q.log_evidence == pytest.approx(evidence, rel=1e-9, abs=1e-9), model
    weights = (joint - evidence).exp()
    for name, z in long.latents.items():
        p = q.probs(name)
        shape = model.shape(model.latents[name].plates)
        p = p.reshape(*shape, z.size)
        if model.weighted and "a" in z.plates:
            counts = model.data["weights"][1].reshape(-1).long()
            p = p.repeat_interleave(counts, RANK + model.dims["a"])
        values = assignments[z.site].long()
        for k in range(z.size):
            truth = torch.einsum("s,s...->...", weights, (values == k).double())
            torch.testing.assert_close(
                p[..., k][z.free], truth[z.free], rtol=1e-9, atol=1e-9, msg=f"{name} of {model}"
            )


def monotone_and_compiled_as_generic(model: RandomModel) -> None:
    compiled = ExactPosteriorEM(model, guide=model.guide)._look((), {})
    parameters = compiled.graph.parameters
    short = short_gradients(compiled.updates)
    exact = not short
    if short:
        compiled = ExactPosteriorEM(model, guide=model.guide, updates=short)._look((), {})
    generic = replace(compiled, compiled=False)
    previous = -math.inf
    last = 3 if exact else 2
    for step in range(last + 1):
        start = {n: p.unconstrained.detach().clone() for n, p in parameters.items()}
        one, two = compiled.evaluate(), generic.evaluate()
        q, other = compiled.posterior(one), generic.posterior(two)
        assert q.log_evidence is not None and other.log_evidence is not None
        assert q.log_evidence == pytest.approx(other.log_evidence, rel=1e-9, abs=1e-9), model
        assert q.log_evidence >= previous - 1e-9 * max(1.0, abs(previous)), model
        previous = q.log_evidence
        if not exact:  # quasi-Newton steps need not agree to the last digits
            if step == last:
                break
            try:
                compiled.m_step(q.counts, one)
            except DegenerateError:
                break
            if collapsed(parameters):
                break
            continue
        try:
            generic.m_step(other.counts, two)
        except DegenerateError:
            break
        if collapsed(parameters):
            break
        theirs = {n: p.value() for n, p in parameters.items()}
        after = generic.posterior(generic.evaluate()).log_evidence
        with torch.no_grad():
            for n, p in parameters.items():
                p.unconstrained.copy_(start[n])
        compiled.m_step(q.counts, one)
        ours = {n: p.value() for n, p in parameters.items()}
        known, expected = (determined(compiled.updates, values) for values in (ours, theirs))
        torch.testing.assert_close(known, expected, rtol=1e-9, atol=1e-9, msg=f"{model}")
        reached = compiled.posterior(compiled.evaluate()).log_evidence
        assert reached == pytest.approx(after, rel=1e-9, abs=1e-9), model


def m_step_maximises(model: RandomModel, long: RandomModel, assignments: Values, seed: int) -> None:
    assume(not model.enumerated_holes)  # the library counts these latents, the oracle does not
    em = ExactPosteriorEM(model, guide=model.guide)
    q = em.posterior()
    weights = long.log_joint(assignments).softmax(0)

    def expected_log_joint() -> float:
        return float((weights * long.log_joint(assignments)).sum())

    best = expected_log_joint()

    def m_step(first: bool) -> float:
        """What the bound gains."""
        nonlocal best
        try:
            if first:
                em.m_step(q)
            else:  # as em.m_step does, without another look at the model
                evaluation = em._session.program.evaluate()
                em._session.program.m_step(as_posterior(q, evaluation).counts, evaluation)
        except DegenerateError:
            assume(False)
        assume(not collapsed(em._session.program.graph.parameters))
        now = expected_log_joint()
        assert now >= best - 1e-9 * max(1.0, abs(best)), model
        gain, best = now - best, now
        return gain

    updates = em._session.program.updates
    short = short_gradients(updates)
    if short:
        em = ExactPosteriorEM(model, guide=em.guide, updates=short)
        for step in range(2):
            m_step(first=not step)
        if not any(isinstance(u.update, (ClosedForm, LeastSquares)) for u in updates.values()):
            return
        # The maximum is promised of exact updates: of all where the others stand still.
        held = {name: Fixed() for name in short}
        em = ExactPosteriorEM(model, guide=em.guide, updates=held)
    for step in range(30):
        if m_step(first=not step) < 1e-12 * max(1.0, abs(best)):
            break
    else:
        assume(False)  # updates that wait for each other are not at their common maximum yet
    generator = torch.Generator().manual_seed(seed)
    for name, p in em._session.program.graph.parameters.items():
        if not isinstance(em._session.program.updates[name].update, (ClosedForm, LeastSquares)):
            continue
        saved = p.unconstrained.detach().clone()
        for size in (1e-3, 1e-2, 0.3):
            noise = torch.randn(saved.shape, generator=generator)
            with torch.no_grad():
                p.unconstrained.copy_(saved + size * noise)
            moved = expected_log_joint()
            with torch.no_grad():
                p.unconstrained.copy_(saved)
            assert moved <= best + 1e-9 * max(1.0, abs(best)), (name, moved - best, model)
