"""Random models with Gaussian latents, and their dense joint as Pyro itself sees it.

A seed makes a Pyro model: scalars, vectors and MultivariateNormals in plates, read by position, by
index and by products with covariates, below and beside each other, with parameters in all places.
log p(x, h) is quadratic in h, so its value, slope and curvature at one point, taken from Pyro's own
densities, give evidence and posterior; nothing here shares code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

Values = dict[str, Tensor]

CONSTRAINTS: dict[str, Any] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "tril": constraints.lower_cholesky,
    "cov": constraints.positive_definite,
}

MATRICES = {"scale_tril": "tril", "covariance_matrix": "cov", "precision_matrix": "cov"}

# Plates with their dimensions, and the sets of them in which latents and observations lie.
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]] = {
    "rows": ({"r": -1}, ("r", "r", ""), ("r",)),
    "groups": ({"g": -1, "k": -1, "s": -1, "r": -1}, ("g", "k", "s", "r", ""), ("r",)),
    "nested": ({"a": -2, "b": -1}, ("a", "ab", ""), ("ab", "ab", "a")),
    "features": ({"a": -2, "f": -1}, ("a", "f", ""), ("af",)),
    "chain": ({"r": -1}, ("", "r"), ("", "r")),
}

# Plates whose elements the elements of another plate name by an index.
INDEXED = {("r", "g"), ("r", "k"), ("r", "s"), ("g", "s")}


@dataclass(frozen=True, eq=False)
class Site:
    """One site.

    Attributes:
        plates: Letters of its plates, outermost first.
        width: D of its event; 0 for a number.
        mean: Its mean from the values of all sites before it.
        around: The distribution of this mean.
        observed: Its data, None for a latent.
        mask: What counts of it, and how that is said.
        weights: Its `poutine.scale`.
    """

    name: str
    plates: str
    width: int
    mean: Callable[[Values], Tensor]
    around: Callable[[Tensor], Any]
    observed: Tensor | None = None
    mask: tuple[str, Tensor] | None = None
    weights: Tensor | float | None = None


@dataclass(eq=False, repr=False)
class GaussianModel:
    """A model as a list of sites; ``at`` holds parameters that take the place of those of Pyro."""

    sizes: dict[str, int]
    dims: dict[str, int]
    sites: list[Site] = field(default_factory=list)
    parameters: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    means: set[str] = field(default_factory=set)
    text: list[str] = field(default_factory=list)
    at: Values = field(default_factory=dict)
    reads: dict[str, set[str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "\n".join(["", *self.text, str({n: v for n, (_, v) in self.parameters.items()})])

    def param(self, name: str) -> Tensor:
        if name in self.at:
            return self.at[name]
        domain, start = self.parameters[name]
        return pyro.param(name, start.clone(), constraint=CONSTRAINTS[domain])

    def __call__(self) -> None:
        values: Values = {}
        plates = {p: pyro.plate(p, n, dim=self.dims[p]) for p, n in self.sizes.items()}
        for site in self.sites:
            with ExitStack() as stack:
                for p in site.plates:
                    stack.enter_context(plates[p])
                if site.weights is not None:
                    stack.enter_context(poutine.scale(scale=site.weights))
                fn, how = site.around(site.mean(values)), ""
                seen: dict[str, Any] = {}
                if site.mask is not None:
                    how, mask = site.mask
                    if how == "poutine":
                        stack.enter_context(poutine.mask(mask=mask))
                    elif how == "distribution":
                        fn = fn.mask(mask)
                    elif how == "entries":
                        fn = fn.base_dist.mask(mask).to_event(1)
                    else:
                        seen["obs_mask"] = mask
                values[site.name] = pyro.sample(site.name, fn, obs=site.observed, **seen)

    def log_joint(self, latents: Mapping[str, Tensor]) -> Tensor:
        """log p(x, h) of Pyro's trace, without what integrates to one: what an ``obs_mask`` hides, and
        latents that nothing observed depends on.
        """
        given = poutine.condition(self, data=dict(latents))
        trace = poutine.trace(given).get_trace()
        trace.compute_log_prob()
        barren = {s.name for s in self.sites if s.observed is None} - self.needed()
        return sum(
            site["log_prob_sum"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and "log_prob_sum" in site
            if not name.endswith("_unobserved") and name not in barren
        )

    def needed(self) -> set[str]:
        """Latents that something observed depends on."""
        out: set[str] = set()
        for site in reversed(self.sites):
            if site.observed is not None or site.name in out:
                out |= self.reads.get(site.name, set())
        return out

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each latent's value."""
        names = {s.name for s in self.sites if s.observed is None} & self.needed()
        trace = poutine.trace(self).get_trace()
        return {n: trace.nodes[n]["value"].shape for n in trace.nodes if n in names}


@dataclass(frozen=True, eq=False)
class DenseJoint:
    """Evidence and posterior of all latents, one after the other.

    Attributes:
        log_evidence: In nats.
        mean: # (d,)
        covariance: # (d, d)
        places: Where each latent is.
        shapes: The shape of each latent's value.
    """

    log_evidence: float
    mean: Tensor
    covariance: Tensor
    places: dict[str, slice]
    shapes: dict[str, torch.Size]

    def unpacked(self, flat: Tensor) -> Values:
        return {n: flat[p].reshape(self.shapes[n]) for n, p in self.places.items()}


def dense_joint(
    shapes: Mapping[str, torch.Size], log_joint: Callable[[Values], Tensor]
) -> DenseJoint:
    """The dense joint from a log density that is quadratic in the latents.

    Args:
        shapes: Of each latent.
        log_joint: From values of the latents to a number.
    """
    places, d = {}, 0
    for name, shape in shapes.items():
        places[name] = slice(d, d + shape.numel())
        d += shape.numel()
    empty = DenseJoint(0.0, torch.zeros(d), torch.zeros(d, d), places, dict(shapes))

    def flat(h: Tensor) -> Tensor:
        return log_joint(empty.unpacked(h))

    start = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(flat(start) + 0 * start.sum(), start, create_graph=True)
    precision = -torch.stack(
        [torch.autograd.grad(s, start, retain_graph=True)[0] for s in slope.unbind()]
    )
    mean = torch.linalg.solve(precision, slope.detach())
    with torch.no_grad():
        there = flat(mean)
    evidence = there + 0.5 * d * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(precision)[1]
    return DenseJoint(float(evidence), mean, torch.linalg.inv(precision), places, dict(shapes))


def expected_log_joint(joint: DenseJoint, log_joint: Callable[[Values], Tensor]) -> Tensor:
    """E_q[log p(x, h)], exact: a quadratic's mean over the points m ± √d L_j is its expectation.

    Of each pair of points one is looked at. What the slope at m adds to their mean is the slope along
    their sum w, half the difference of the values at m ± w.
    """
    d = len(joint.mean)
    steps = (torch.linalg.cholesky(joint.covariance) * math.sqrt(d)).T

    def at(step: Tensor) -> Tensor:
        return log_joint(joint.unpacked(joint.mean + step))

    along = (at(steps.sum(0)) - at(-steps.sum(0))) / 2
    return torch.stack([at(step) for step in steps]).mean() - along / d


class GaussianBuilder:
    """Draws one model from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.layout = self.pick(tuple(LAYOUTS))
        dims, self.of_latents, self.of_data = LAYOUTS[self.layout]
        sizes = {"r": 7, "g": 4, "k": 3, "s": 2, "a": 3, "b": 3, "f": 3}
        self.model = GaussianModel({p: sizes[p] for p in dims}, dict(dims))
        self.index = {
            (a, b): torch.as_tensor(self.rng.integers(0, sizes[b], sizes[a])) for a, b in INDEXED
        }
        self.model.text.append(self.layout)
        self.widths: dict[str, tuple[str, int]] = {}  # latents and observed parents

    def pick(self, of: Any) -> Any:
        return of[int(self.rng.integers(len(of)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def normal(self, *shape: int) -> Tensor:
        return torch.as_tensor(self.rng.normal(size=shape))

    def shape(self, plates: str) -> tuple[int, ...]:
        """The batch shape of a site in some plates."""
        rank = max((-self.model.dims[p] for p in plates), default=0)
        out = [1] * rank
        for p in plates:
            out[self.model.dims[p]] = self.model.sizes[p]
        return tuple(out)

    def number(self, domain: str, shape: tuple[int, ...], mean: bool) -> Callable[[], Tensor]:
        """A constant, a parameter, or one that another place uses too."""
        make: dict[str, Callable[[], Tensor]] = {
            "real": lambda: self.normal(*shape),
            "positive": lambda: self.normal(*shape).abs() + 0.4,
            "tril": lambda: 0.4 * self.normal(*shape).tril() + torch.eye(shape[-1]).double(),
            "cov": lambda: (
                (lambda m: m @ m.mT)(0.5 * self.normal(*shape)) + torch.eye(shape[-1]).double()
            ),
        }
        value = make[domain]()
        if domain == "tril":
            value.diagonal(dim1=-2, dim2=-1).abs_()
        if self.chance(0.4):
            return lambda: value
        parameters = self.model.parameters
        like = [
            n
            for n, (kind, v) in parameters.items()
            if kind == domain and v.shape == shape and (n in self.model.means) == mean
        ]
        if like and self.chance(0.3):
            name = self.pick(like)
        else:
            name = f"p{len(parameters)}"
            parameters[name] = (domain, value)
            if mean:
                self.model.means.add(name)
        self.model.text.append(f"    uses {name}")
        return lambda: self.model.param(name)

    def term(self, plates: str, width: int, reader: str) -> Callable[[Values], Tensor] | None:
        """What a mean in some plates reads of one site before it."""
        readable = []
        for name, (own, _) in self.widths.items():
            missing = [p for p in own if p not in plates]
            if not missing:
                readable.append((name, None))
            elif len(own) == 1 and len(plates) == 1 and (plates, own) in self.index:
                readable.append((name, self.index[plates, own]))
        if not readable:
            return None
        name, index = self.pick(readable)
        self.model.reads.setdefault(reader, set()).add(name)
        own, q = self.widths[name]
        self.model.text.append(
            f"    reads {name}" + ("" if index is None else f"[{index.tolist()}]")
        )
        covariate = self.normal(*self.shape(plates)) if self.chance(0.3) else None
        rank = len(self.shape(plates))

        def value(v: Values) -> Tensor:
            h = v[name] if index is None else v[name][index]
            if q and h.dim() - 1 < rank:
                h = h.reshape(*(1,) * (rank - h.dim() + 1), *h.shape)
            return h

        def scaled(x: Tensor, wide: bool) -> Tensor:
            if covariate is None:
                return x
            return x * (covariate.unsqueeze(-1) if wide else covariate)

        if not width and not q:
            how = self.pick(("one", "parameter"))
            c = self.number("real", (), True)
            return lambda v: scaled(value(v) if how == "one" else c() * value(v), False)
        if width and q:
            W = self.number("real", (width, q), True)
            return lambda v: scaled(value(v) @ W().mT, True)
        if width:
            w = self.number("real", (width,), True)
            return lambda v: scaled(value(v).unsqueeze(-1) * w(), True)
        how = self.pick(("dot", "covariates", "component"))
        if how == "dot":
            w = self.number("real", (q,), True)
            return lambda v: scaled(value(v) @ w(), False)
        if how == "covariates":
            X = self.normal(*self.shape(plates), q)
            return lambda v: scaled((X * value(v)).sum(-1), False)
        return lambda v: scaled(value(v)[..., q - 1], False)

    def mean(self, name: str, plates: str, width: int, terms: int) -> Callable[[Values], Tensor]:
        batch, event = self.shape(plates), (width,) if width else ()
        how = self.pick(("number", "event", "index", "covariates"))
        if how == "index" and plates:
            i = torch.as_tensor(self.rng.integers(0, 2, batch))
            b = self.number("real", (2, *event), True)

            def base() -> Tensor:
                return b()[i]

        elif how == "covariates" and plates:
            X, B = self.normal(*batch, 2), self.number("real", (2, *event), True)

            def base() -> Tensor:
                return X @ B()

        else:
            base = self.number("real", event if how == "event" else (), True)
        parts = [t for t in (self.term(plates, width, name) for _ in range(terms)) if t is not None]

        def total(v: Values) -> Tensor:
            out = base()
            for part in parts:
                out = out + part(v)
            return out.expand((*batch, *event))

        return total

    def around(self, plates: str, width: int, matrix: bool) -> Callable[[Tensor], Any]:
        batch = self.shape(plates)
        if matrix:
            argument = self.pick(tuple(MATRICES))
            M = self.number(MATRICES[argument], (width, width), False)
            self.model.text.append(f"    {argument}")
            return lambda m: dist.MultivariateNormal(m, **{argument: M()})
        how = self.pick(("one", "event", "index", "known"))
        if how == "index" and plates:
            i = torch.as_tensor(self.rng.integers(0, 2, batch))
            s = self.number("positive", (2, width) if width else (2,), False)

            def scale() -> Tensor:
                return s()[i]

        elif how == "known":
            known = self.normal(*batch, *((width,) if width else ())).abs() + 0.4

            def scale() -> Tensor:
                return known

        else:
            scale = self.number("positive", (width,) if width and how == "event" else (), False)
        if width:
            return lambda m: dist.Normal(m, scale()).to_event(1)
        return lambda m: dist.Normal(m, scale())

    def add_latent(self, name: str) -> None:
        plates = self.pick(self.of_latents)
        width = self.pick((0, 0, 1, 2))
        matrix = width > 0 and self.chance(0.4)
        self.model.text.append(f"{name} latent in '{plates}', width {width}, matrix {matrix}")
        mean = self.mean(name, plates, width, int(self.rng.integers(0, 2)))
        self.model.sites.append(Site(name, plates, width, mean, self.around(plates, width, matrix)))
        self.widths[name] = (plates, width)

    def add_observed(self, name: str) -> None:
        plates = self.pick(self.of_data)
        width = self.pick((0, 0, 2, 3))
        matrix = width > 0 and self.chance(0.4)
        batch = self.shape(plates)
        self.model.text.append(f"{name} observed in '{plates}', width {width}, matrix {matrix}")
        mean = self.mean(name, plates, width, int(self.rng.integers(1, 3)))
        data = 2 * self.normal(*batch, *((width,) if width else ()))
        mask, weights = None, None
        if plates and self.chance(0.4):
            kinds = ["poutine", "distribution", "obs_mask"]
            kinds += ["entries"] * (2 if width and not matrix else 0)
            kind = self.pick(kinds)
            seen = torch.as_tensor(
                self.rng.random((*batch, width) if kind == "entries" else batch) < 0.7
            )
            mask = (kind, seen)
            self.model.text.append(f"    {kind} {seen.tolist()}")
        if plates and self.chance(0.2):
            weights = torch.as_tensor(self.rng.uniform(0.3, 3, batch)) if self.chance(0.5) else 2.5
            self.model.text.append(f"    weights {weights}")
        around = self.around(plates, width, matrix)
        self.model.sites.append(Site(name, plates, width, mean, around, data, mask, weights))
        if self.chance(0.4) and (mask is None or mask[0] != "obs_mask"):
            self.widths[name] = (plates, width)

    def add_chain(self) -> None:
        """A chain by a loop, each step observed."""
        width = self.pick((0, 2))
        shape = (width, width) if width else ()
        A = self.number("real", shape, True)
        sd, noise = self.number("positive", (), False), self.number("positive", (), False)
        order = self.pick((1, 1, 2))
        drift = self.number("real", (), True)
        for t in range(4):

            def state(v: Values, t: int = t) -> Tensor:
                out = drift().expand(shape[:1])
                for lag in range(1, min(order, t) + 1):
                    h = v[f"z_{t - lag}"]
                    out = out + (h @ A().mT if width else A() * h) / lag
                return out

            def of_state(m: Tensor) -> Any:
                return dist.Normal(m, sd()).to_event(1 if width else 0)

            def of_data(m: Tensor) -> Any:
                return dist.Normal(m, noise())

            self.model.sites.append(Site(f"z_{t}", "", width, state, of_state))

            def read(v: Values, t: int = t) -> Tensor:
                h = v[f"z_{t}"]
                return h.sum(-1) if width else h

            self.model.sites.append(Site(f"y_{t}", "", 0, read, of_data, self.normal()))
            self.widths[f"z_{t}"] = ("", width)
            self.model.reads[f"z_{t}"] = {f"z_{t - lag}" for lag in range(1, min(order, t) + 1)}
            self.model.reads[f"y_{t}"] = {f"z_{t}"}
        self.model.text.append(f"chain of width {width}, order {order}")

    def build(self) -> GaussianModel:
        if self.layout == "chain":
            self.add_chain()
        for i in range(int(self.rng.integers(1, 4)) if self.layout != "chain" else 0):
            self.add_latent(f"h{i}")
        for i in range(int(self.rng.integers(1, 3))):
            self.add_observed(f"x{i}")
        return self.model


def random_gaussian_model(seed: int) -> GaussianModel:
    """The model of a seed."""
    return GaussianBuilder(seed).build()
