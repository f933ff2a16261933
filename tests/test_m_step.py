"""The M-step against something that is not us: stationarity by autograd, textbook EM in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from scipy.stats import norm, poisson
from torch.distributions import constraints, transform_to
from torch.nn.functional import one_hot, softplus

from pyro_em import ClosedForm, ExactPosteriorEM, Fixed, Gradient, LeastSquares, PyroEMWarning

C = constraints
T = partial(torch.tensor, dtype=torch.float64)
K, N = 2, 30
RNG = np.random.default_rng(11)
REAL = T(np.concatenate([RNG.normal(-1.5, 0.7, 14), RNG.normal(2.0, 1.2, 16)]))
POSITIVE, UNIT = REAL.abs() + 0.1, REAL.sigmoid()
COUNTS = T(RNG.poisson(np.repeat([1.5, 6.0], [14, 16])))
VECTORS = T(RNG.normal(size=(N, 3))) @ T([[1.0, 0.4, 0.0], [0, 1, 0.3], [0, 0, 0.6]])
VECTORS = VECTORS + REAL[:, None]
BITS, SHARES = (VECTORS > 0).double(), torch.softmax(VECTORS, -1)
EXPOSURE = T(RNG.uniform(0.5, 3.0, N))
TRIALS = T(RNG.integers(3, 12, N))
SUCCESSES = (UNIT * TRIALS).round()
BASKETS = T(RNG.multinomial(9, [0.2, 0.3, 0.5], N))
WORDS = torch.tensor(RNG.integers(0, 3, N))
H = T(RNG.normal(size=N))
X2 = torch.stack([torch.ones_like(H), H], -1)
LINE = H * T(np.repeat([2.0, -1.0], 15)) + 0.3 * REAL
PREDICTORS = torch.stack([H, EXPOSURE], -1)
RESPONSE = LINE + T(RNG.normal(size=N)) * 0.4
MASK = torch.arange(N) % 4 != 0
SPD = T([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.0]])
LO_HI, PAIR, KNOWN = T([-1.0, 1.5]), T([0.8, 1.7]), T([0.5, 2.0])
MU3 = LO_HI[:, None] + T([0.0, 0.1, -0.1])
ROWS = T([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
DIAGONAL = (torch.ones_like(ROWS), C.positive)


@dataclass
class Case:
    """A two-component mixture: an emission, its parameters with constraints, the plan expected."""

    x: torch.Tensor
    emission: object  # (parameters, z) -> distribution
    plan: str  # one letter per parameter, or one for all
    params: dict
    mask: torch.Tensor | None = None

    @property
    def exact(self):
        return "G" not in self.plan

    def model(self):
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        read = {n: pyro.param(n, v.clone(), constraint=c) for n, (v, c) in self.params.items()}
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(w))
            d = self.emission(SimpleNamespace(**read), z)
            pyro.sample("x", d if self.mask is None else d.mask(self.mask), obs=self.x)

    def log_joint(self, P):  # (N, K), by torch's own densities, one component at a time
        P = SimpleNamespace(**P)
        each = [self.emission(P, torch.tensor(k)).log_prob(self.x).expand(N) for k in range(K)]
        log_p = torch.stack(each, -1)
        return P.w.log() + (log_p if self.mask is None else log_p * self.mask[:, None])


LETTERS = {"C": ClosedForm, "L": LeastSquares, "G": Gradient}
CASES = {}


def case(name, x, emission, plan="C", mask=None, **params):
    CASES[name] = Case(x, emission, plan, params, mask)


def real(value):
    return torch.as_tensor(value).double(), C.real


def positive(value):
    return torch.as_tensor(value).double(), C.positive


MU, STD, TWO, ONE = real(LO_HI), positive(PAIR), real(PAIR), positive(1.0)
ODDS, CHANCE, TABLE = real(MU3), (T([0.2, 0.5]), C.unit_interval), (ROWS, C.simplex)
Normal, Poisson = dist.Normal, dist.Poisson

case("normal", REAL, lambda P, z: Normal(P.mu[z], P.s[z]), mu=MU, s=STD)
case("tied scale", REAL, lambda P, z: Normal(P.mu[z], P.s), mu=MU, s=ONE)
case("log scale", REAL, lambda P, z: Normal(P.mu[z], P.s[z].exp()), mu=MU, s=TWO)
case("variance", REAL, lambda P, z: Normal(P.mu[z], P.s[z].sqrt()), mu=MU, s=STD)
case("precision", REAL, lambda P, z: Normal(P.mu[z], P.s.rsqrt()[z]), mu=MU, s=STD)
case("softplus", REAL, lambda P, z: Normal(P.mu[z], softplus(P.s)[z]), mu=MU, s=TWO)
case("known shape", REAL, lambda P, z: Normal(P.mu[z], P.s[z] * EXPOSURE), mu=MU, s=STD)
case("known scale", REAL, lambda P, z: Normal(P.mu[z], KNOWN[z]), mu=MU)
case("shared mean, known scales", REAL, lambda P, z: Normal(P.mu, KNOWN[z]), mu=real(0.3))
case("scales per row", REAL, lambda P, z: Normal(P.mu, KNOWN[z] * EXPOSURE), mu=real(0.3))
case(
    "constant and parameter",
    REAL,
    lambda P, z: Normal(torch.stack([torch.tensor(-1.0), P.mu])[z], P.s[z]),
    mu=real(1.0),
    s=STD,
)
case(
    "two parameters stacked",
    REAL,
    lambda P, z: Normal(torch.stack([P.a, P.b])[z], P.s[z]),
    a=real(-1.0),
    b=real(1.5),
    s=STD,
)
case("permuted", REAL, lambda P, z: Normal(P.mu.flip(0)[z], P.s[1 - z]), mu=MU, s=STD)
case("masked", REAL, lambda P, z: Normal(P.mu[z], P.s[z]), mask=MASK, mu=MU, s=STD)
case("lognormal", POSITIVE, lambda P, z: dist.LogNormal(P.mu[z], P.s[z]), mu=MU, s=STD)
case("diagonal", VECTORS, lambda P, z: Normal(P.mu[z], P.s[z]).to_event(1), mu=ODDS, s=DIAGONAL)
case(
    "spherical",
    VECTORS,
    lambda P, z: Normal(P.mu[z], P.s[z].unsqueeze(-1)).to_event(1),
    mu=ODDS,
    s=STD,
)
case(
    "mean tied over features, expanded",
    VECTORS,
    lambda P, z: (
        Normal(P.mu[z].unsqueeze(-1), P.s[z].unsqueeze(-1)).expand((*z.shape, 3)).to_event(1)
    ),
    mu=MU,
    s=STD,
)
for _name, _matrix, _constraint in (
    ("covariance_matrix", SPD, C.positive_definite),
    ("scale_tril", torch.linalg.cholesky(SPD), C.lower_cholesky),
    ("precision_matrix", SPD, C.positive_definite),
):
    case(
        f"mvn {_name}",
        VECTORS,
        lambda P, z, a=_name: dist.MultivariateNormal(P.mu[z], **{a: P.S[z]}),
        mu=ODDS,
        S=(_matrix.repeat(2, 1, 1), _constraint),
    )
    case(
        f"mvn tied {_name}",
        VECTORS,
        lambda P, z, a=_name: dist.MultivariateNormal(P.mu[z], **{a: P.S}),
        mu=ODDS,
        S=(_matrix, _constraint),
    )
case(
    "mvn shared mean, known covariances",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu, torch.stack([SPD, 3 * SPD.inverse()])[z]),
    mu=real([0.0, 0.0, 0.0]),
)
case("poisson", COUNTS, lambda P, z: Poisson(P.r[z]), r=STD)
case("log rate", COUNTS, lambda P, z: Poisson(P.r[z].exp()), r=TWO)
case("exposure", COUNTS, lambda P, z: Poisson(P.r[z] * EXPOSURE), r=STD)
case("log rate, exposure", COUNTS, lambda P, z: Poisson(EXPOSURE * P.r.exp()[z]), r=TWO)
case("tied by a factor", COUNTS, lambda P, z: Poisson(P.r * KNOWN[z]), r=ONE)
case("exponential", POSITIVE, lambda P, z: dist.Exponential(P.r[z]), r=STD)
case("mean time", POSITIVE, lambda P, z: dist.Exponential(1 / P.r[z]), r=STD)
case("time exposure", POSITIVE, lambda P, z: dist.Exponential(P.r[z] / EXPOSURE), r=STD)
case("geometric", COUNTS, lambda P, z: dist.Geometric(P.p[z]), p=CHANCE)
case("geometric logits", COUNTS, lambda P, z: dist.Geometric(logits=P.p[z]), p=MU)
case(
    "bernoulli",
    BITS,
    lambda P, z: dist.Bernoulli(P.p[z]).to_event(1),
    p=(ROWS, C.unit_interval),
)
case("bernoulli logits", BITS, lambda P, z: dist.Bernoulli(logits=P.p[z]).to_event(1), p=ODDS)
case(
    "bernoulli sigmoid",
    (torch.stack([H, H.flip(0), EXPOSURE - 1.5], -1) > 0).double(),
    lambda P, z: dist.Bernoulli(P.p.sigmoid()[z]).to_event(1),
    p=ODDS,
)
case("binomial", SUCCESSES, lambda P, z: dist.Binomial(TRIALS, P.p[z]), p=CHANCE)
case("binomial logits", SUCCESSES, lambda P, z: dist.Binomial(TRIALS, logits=P.p[z]), p=MU)
case("multinomial", BASKETS, lambda P, z: dist.Multinomial(9, P.p[z]), p=TABLE)
case("multinomial logits", BASKETS, lambda P, z: dist.Multinomial(9, logits=P.p[z]), p=real(ROWS))
case("categorical", WORDS, lambda P, z: dist.Categorical(P.p[z]), p=TABLE)
case("positive rows", WORDS, lambda P, z: dist.Categorical(P.p[z]), p=positive(2 * ROWS))
case("categorical logits", WORDS, lambda P, z: dist.Categorical(logits=P.p[z]), p=real(ROWS))
case("one hot", one_hot(WORDS).double(), lambda P, z: dist.OneHotCategorical(P.p[z]), p=TABLE)
case("laplace scale", REAL, lambda P, z: dist.Laplace(LO_HI[z], P.s[z]), s=STD)
case(
    "regressions",
    LINE,
    lambda P, z: Normal(P.a[z] + (P.B[z] * X2[:, 1:]).sum(-1), P.s[z]),
    "LLC",
    a=MU,
    B=real([[0.5], [-0.5]]),
    s=STD,
)
case("common slope", LINE, lambda P, z: Normal(P.a[z] - P.b * H, KNOWN[z]), "L", a=MU, b=real(0.1))
case("matrix product", LINE, lambda P, z: Normal(X2 @ P.b + LO_HI[z], P.s), "LC", b=MU, s=ONE)
case("negated", REAL, lambda P, z: Normal(-P.mu[1 - z], 1.0), "L", mu=MU)
case("masked slope", LINE, lambda P, z: Normal(P.b[z] * H, P.s), "LC", mask=MASK, b=MU, s=ONE)
case("lognormal slope", LINE.exp(), lambda P, z: dist.LogNormal(P.b[z] * H, P.s), "LC", b=MU, s=ONE)
case(
    "rows without a use", REAL, lambda P, z: Normal(P.mu[z + 1], P.s[z]), mu=real([9, -1, 1]), s=STD
)
case(
    "counts per feature",
    BASKETS,
    lambda P, z: Poisson(P.r[z] * EXPOSURE[:, None]).to_event(1),
    r=positive(3 * ROWS),
)
case(
    "several questions",
    torch.stack([WORDS, WORDS.flip(0), WORDS.roll(5)], -1),
    lambda P, z: dist.Categorical(P.p[z]).to_event(1),
    p=(torch.stack([ROWS[[0, 0, 1]], ROWS[[1, 0, 1]]]), C.simplex),
)
case(
    "three looks at one matrix",
    VECTORS,
    lambda P, z: Normal(Vindex(P.m)[z.unsqueeze(-1), torch.tensor([2, 0, 2])], P.s).to_event(1),
    m=ODDS,
    s=ONE,
)
case(
    "pairs of vectors",
    torch.stack([VECTORS, VECTORS.flip(0)], 1),
    lambda P, z: (
        dist.MultivariateNormal(P.mu[z].unsqueeze(-2), P.S)
        .expand((*torch.broadcast_shapes(z.shape, (N,)), 2))
        .to_event(1)
    ),
    mu=ODDS,
    S=(SPD, C.positive_definite),
)
# The rest has no closed form, or only looks as if it had.
case("gamma", POSITIVE, lambda P, z: dist.Gamma(P.a[z], P.b[z]), "G", a=STD, b=STD)
case("beta", UNIT, lambda P, z: dist.Beta(P.a[z], P.b[z]), "G", a=STD, b=STD)
case("dirichlet", SHARES, lambda P, z: dist.Dirichlet(P.a[z]), "G", a=positive(1 + ROWS))
case(
    "negative binomial",
    (COUNTS**1.5).round(),
    lambda P, z: dist.NegativeBinomial(P.r[z], logits=P.p[z]),
    "G",
    r=STD,
    p=MU,
)
case("student", REAL, lambda P, z: dist.StudentT(4.0, P.mu[z], P.s[z]), "G", mu=MU, s=STD)
case(
    "logistic regressions",
    BITS[:, 0],
    lambda P, z: dist.Bernoulli(logits=(P.B[z] * X2).sum(-1)),
    "G",
    B=real([[0.5, 0.3], [-0.5, 0.1]]),
)
case("neural", LINE, lambda P, z: Normal(P.mu[z] + (H * P.h).tanh(), 0.5), "G", h=real(0.3), mu=MU)
case("mean equals scale", POSITIVE, lambda P, z: Normal(P.s[z], P.s[z]), "G", s=STD)
case("both places", POSITIVE, lambda P, z: dist.Gamma(P.r[z], 1 / P.r[1 - z]), "G", r=STD)
case("squared, of both signs", COUNTS, lambda P, z: Poisson(P.mu[z] ** 2), "G", mu=MU)
case("simplex slice", WORDS % 2, lambda P, z: dist.Categorical(P.p[z][..., :2]), "G", p=TABLE)
case(
    "reference class",
    WORDS,
    lambda P, z: dist.Categorical(logits=torch.cat([torch.zeros(2, 1), P.p], -1)[z]),
    "G",
    p=real([[0.1, 0.3], [0.5, -0.2]]),
)
case(
    "scale_tril of diag_embed",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu[z], scale_tril=torch.diag_embed(P.s)[z]),
    "CG",
    mu=ODDS,
    s=DIAGONAL,
)
case(
    "unit diagonal scale_tril",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu[z], scale_tril=P.S[z]),
    "CG",
    mu=ODDS,
    S=(torch.eye(3).double().repeat(2, 1, 1), dist.constraints.unit_lower_cholesky),
)


def stationarity(log_joint, q, P, constraints_of):
    """The largest |∂ E_q[log joint]| in the unconstrained space, per parameter."""
    free = {
        n: transform_to(c).inv(P[n]).clone().requires_grad_() for n, c in constraints_of.items()
    }
    values = {n: transform_to(c)(free[n]) for n, c in constraints_of.items()}
    gradients = torch.autograd.grad((q * log_joint(values)).sum(), list(free.values()))
    return {n: float(g.abs().max()) for n, g in zip(free, gradients, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_expected_log_joint_is_stationary(name):
    c = CASES[name]
    em = ExactPosteriorEM(c.model)
    plan = em.plan()
    letters = c.plan * len(c.params) if len(c.plan) == 1 else c.plan
    for parameter, letter in zip(["w", *c.params], "C" + letters, strict=True):
        decided = plan.updates[parameter]
        assert type(decided.update) is LETTERS[letter], (parameter, decided.reason)
    assert plan.compiled or not c.exact
    q = em.posterior().probs("z")
    em.step()
    P = {n: pyro.param(n).detach() for n in ["w", *c.params]}
    found = stationarity(
        c.log_joint, q, P, {"w": C.simplex, **{n: v[1] for n, v in c.params.items()}}
    )
    assert max(found.values()) < (1e-9 if c.exact else 1e-6) * N, found
    by_hand = float(c.log_joint(P).logsumexp(-1).sum())
    assert em.elbo().log_evidence == pytest.approx(by_hand, rel=1e-9)
    history = np.array([by_hand, *em.fit(max_steps=30, tol=0).history])
    assert len(history) == 31
    assert np.all(np.diff(history) > -1e-9 * np.abs(history[1:]))


def run(model, *args, steps=30, **settings):
    """A monotone fit of exactly so many steps, from the model's own start."""
    pyro.clear_param_store()
    result = ExactPosteriorEM(model, **settings).fit(*args, max_steps=steps, tol=0)
    path = np.array([*result.history, result.log_evidence])
    assert result.num_steps == steps, result.message
    assert np.all(np.diff(path) > -1e-9 * np.abs(path[1:]))
    return result


def close(found, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(found.detach()), expected, **{"rtol": 1e-8, **tolerance})


def responsibilities(log_joint):
    evidence = logsumexp(log_joint, axis=-1, keepdims=True)
    return np.exp(log_joint - evidence), float(evidence.sum())


@pytest.mark.parametrize(
    "lower,upper,constraint",
    [
        (-np.inf, np.inf, C.real),
        (-1.2, 1.9, C.interval(-1.2, 1.9)),
        (0.0, np.inf, C.positive),
    ],
)
def test_a_laplace_location_is_a_weighted_median(lower, upper, constraint):
    scales = torch.tensor([0.5, 2.0])

    def model(x):
        m = pyro.param("m", torch.tensor([0.5, 1.5]), constraint=constraint)
        shared = pyro.param("shared", torch.tensor(0.1), constraint=constraint)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Laplace(m[z], 1.0), obs=x)
            pyro.sample("y", dist.Laplace(shared, scales[z]), obs=x + 0.2)

    em = ExactPosteriorEM(model)
    assert type(em.plan(REAL).updates["m"].update) is ClosedForm
    q = em.posterior(REAL).probs("z")
    em.step(REAL)
    m, shared = pyro.param("m").detach(), pyro.param("shared").detach()
    for weight, x, found in [
        (q[:, 0], REAL, m[0]),
        (q[:, 1], REAL, m[1]),
        ((q / scales).sum(-1), REAL + 0.2, shared),
    ]:  # a convex, piecewise linear function has its least value at a knot or a bound
        knots = np.clip(x.numpy(), lower, upper)
        best = min(float(weight @ (x - g).abs()) for g in knots)
        assert float(weight @ (x - found).abs()) == pytest.approx(best, rel=1e-9)
    run(model, REAL)


CLIPPED = {
    "mean": ((-1.0, 0.2), REAL, lambda v: Normal(v, 1.0)),
    "scale": ((0.9, 1.2), REAL, lambda v: Normal(0.5, v)),
    "variance": ((0.9, 1.2), REAL, lambda v: Normal(-0.5, v.sqrt())),
    "rate": ((3.0, 5.0), COUNTS, lambda v: Poisson(v)),
    "mean time": ((0.8, 1.4), POSITIVE, lambda v: dist.Exponential(1 / v)),
    "probability": ((0.3, 0.35), COUNTS, lambda v: dist.Geometric(v)),
}


@pytest.mark.parametrize("kind", CLIPPED)
def test_interval_constrained_scalars_are_clipped(kind):
    """Against a grid over the interval, one number at a time."""
    (low, high), x, build = CLIPPED[kind]
    start = torch.tensor([0.55 * low + 0.45 * high, 0.45 * low + 0.55 * high])

    def model(x):
        v = pyro.param("v", start, constraint=C.interval(low, high))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", build(v[z]), obs=x)

    em = ExactPosteriorEM(model)
    assert type(em.plan(x).updates["v"].update) is ClosedForm
    q = em.posterior(x).probs("z")
    em.step(x)
    found, grid = pyro.param("v").detach(), torch.linspace(low, high, 2001)
    for k in range(2):
        best = (q[:, k] @ build(grid).log_prob(x[:, None])).max()
        assert float(q[:, k] @ build(found[k]).log_prob(x)) >= float(best) - 1e-9
    at_bound = torch.minimum((found - low).abs(), (found - high).abs())
    assert float(found.min()) >= low and float(found.max()) <= high and float(at_bound.min()) < 1e-9
    run(model, x)


def test_a_constrained_mean_keeps_its_constraint_beside_a_regression():
    """`a` shares an argument with `b`, and `b` is a coefficient elsewhere."""

    def model(x, y):
        a = pyro.param("a", torch.tensor(0.5), constraint=C.positive)
        b = pyro.param("b", torch.tensor(1.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.stack([a, b])[z], 1.0), obs=x)
            pyro.sample("y", dist.Normal(b * H + 0.5, 1.0), obs=y)

    result = run(model, REAL, LINE)
    assert float(result.params["a"]) >= 0
    assert type(result.plan.updates["b"].update) is LeastSquares


def mixture_of_regressions(x, y):
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=C.simplex)
    a = pyro.param("a", torch.tensor([0.5, -0.5]))
    B = pyro.param("B", torch.tensor([[1.0, 0.0], [-1.0, 0.3]]))
    s = pyro.param("s", torch.tensor([1.0, 1.0]), constraint=C.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + (B[z] * x).sum(-1), s[z]), obs=y)


class Regressions(PyroModule):
    """The same, as a module: buffers of its own, plain and Pyro parameters."""

    def __init__(self):
        super().__init__()
        self.w = PyroParam(torch.tensor([0.5, 0.5]), C.simplex)
        self.a = torch.nn.Parameter(torch.tensor([0.5, -0.5]))
        self.B = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 0.3]]))
        self.s = PyroParam(torch.tensor([1.0, 1.0]), C.positive)

    def forward(self, x, y):
        a, B, s = self.a, self.B, self.s
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(self.w))
            pyro.sample("y", dist.Normal(a[z] + (B[z] * x).sum(-1), s[z]), obs=y)


@pytest.mark.parametrize("form", ["function", "module", "module-local"])
def test_mixture_of_regressions_step_by_step(form):
    x, y = PREDICTORS, RESPONSE
    D = np.column_stack([np.ones(N), x])
    w, s = np.array([0.5, 0.5]), np.ones(2)
    beta = np.array([[0.5, 1.0, 0.0], [-0.5, -1.0, 0.3]])
    path = []
    for _ in range(25):
        r, evidence = responsibilities(np.log(w) + norm.logpdf(y[:, None], D @ beta.T, s))
        path.append(evidence)
        w = r.mean(0)
        for k in range(2):
            root = np.sqrt(r[:, k])
            beta[k] = np.linalg.lstsq(D * root[:, None], np.asarray(y) * root, rcond=None)[0]
            s[k] = np.sqrt(r[:, k] @ (np.asarray(y) - D @ beta[k]) ** 2 / r[:, k].sum())
    with pyro.settings.context(module_local_params=form == "module-local"):
        model = mixture_of_regressions if form == "function" else Regressions()
        result = run(model, x, y, steps=25)
        np.testing.assert_allclose(list(result.history), path, rtol=1e-9)
        for name, value in {"a": beta[:, 0], "B": beta[:, 1:], "s": s, "w": w}.items():
            close(result.params[name], value)
            if form != "function":
                close(getattr(model, name), value)
    assert result.plan.compiled


def test_a_shared_mean_with_free_scales_converges_to_the_optimum():
    """One conditional maximisation after another: each step is exact given the other argument."""

    def model(x):
        mu = pyro.param("mu", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor([0.5, 2.0]), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu, s[z]), obs=x)

    def loss(v):
        log_p = norm.logpdf(REAL.numpy()[:, None], v[0], np.exp(v[1:])) + np.log(0.5)
        return -logsumexp(log_p, axis=1).sum()

    best = minimize(loss, [0.0, np.log(0.5), np.log(2.0)], options={"gtol": 1e-8})
    result = run(model, REAL, steps=400)
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-7)


def test_float32_stays_float32_and_agrees():
    x, y = PREDICTORS, RESPONSE
    expected = run(mixture_of_regressions, x, y, steps=10).params
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture_of_regressions)
    found = em.fit(x.float(), y.float(), max_steps=10, tol=0).params
    for name, value in found.items():
        assert value.dtype == torch.float32
        close(value.double(), expected[name], rtol=1e-3, atol=1e-4)


def hmm(y, lengths):
    pi = pyro.param("pi", torch.tensor([0.6, 0.4]), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor([1.0, 1.5]), constraint=C.positive)
    with pyro.plate("sequences", len(y), dim=-1):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], s[z]), obs=y[:, t])


def forward_backward(pi, A, B):
    """Posterior states, summed posterior transitions and evidence of one sequence."""
    alpha, scale, beta = np.zeros_like(B), np.zeros(len(B)), np.ones_like(B)
    for t in range(len(B)):
        alpha[t] = (pi if t == 0 else alpha[t - 1] @ A) * B[t]
        scale[t] = alpha[t].sum()
        alpha[t] /= scale[t]
    for t in range(len(B) - 2, -1, -1):
        beta[t] = A @ (B[t + 1] * beta[t + 1]) / scale[t + 1]
    pairs = alpha[:-1].T @ (B[1:] * beta[1:] / scale[1:, None]) * A
    return alpha * beta, pairs, np.log(scale).sum()


def test_padded_and_masked_sequences_equal_unpadded_baum_welch():
    rng = np.random.default_rng(4)
    lengths = np.array([7, 3, 1, 5])
    y = rng.normal(size=(4, 7)) + np.sign(rng.normal(size=(4, 7))) * 2
    pi, A = np.array([0.6, 0.4]), np.array([[0.7, 0.3], [0.4, 0.6]])
    mu, s, path = np.array([-1.0, 1.0]), np.array([1.0, 1.5]), []
    for _ in range(20):
        runs = [
            forward_backward(pi, A, norm.pdf(y[n, : lengths[n], None], mu, s)) for n in range(4)
        ]
        path.append(sum(r[2] for r in runs))
        gamma = np.concatenate([r[0] for r in runs])
        flat = np.concatenate([y[n, : lengths[n]] for n in range(4)])[:, None]
        pi = np.mean([r[0][0] for r in runs], 0)
        A = sum(r[1] for r in runs)
        A = A / A.sum(1, keepdims=True)
        mu = (gamma * flat).sum(0) / gamma.sum(0)
        s = np.sqrt((gamma * (flat - mu) ** 2).sum(0) / gamma.sum(0))
    for padding in (0.0, float("nan")):
        padded = np.where(np.arange(7) < lengths[:, None], y, padding)
        result = run(hmm, torch.tensor(padded), torch.tensor(lengths), steps=20)
        np.testing.assert_allclose(list(result.history), path, rtol=1e-9)
        for name, value in {"pi": pi, "A": A, "mu": mu, "s": s}.items():
            close(result.params[name], value)


def test_autoregressive_hmm_with_a_tied_spread_is_stationary():
    y, T_ = LINE[:12], 12

    def model():
        A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
        c = pyro.param("c", torch.tensor([-0.5, 0.5]))
        phi = pyro.param("phi", torch.tensor([0.1, 0.2]))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        z = torch.tensor(0)
        for t in pyro.markov(range(T_)):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            before = y[t - 1] if t else torch.tensor(0.0)
            pyro.sample(f"y{t}", dist.Normal(c[z] + phi[z] * before, s), obs=y[t])

    em = ExactPosteriorEM(model)
    plan = em.plan()
    assert plan.compiled and type(plan.updates["phi"].update) is LeastSquares
    assert type(plan.updates["s"].update) is ClosedForm
    q = em.posterior()
    gamma = torch.stack([q.probs(f"z{t}") for t in range(T_)])
    pairs = sum(q.joint(f"z{t - 1}", f"z{t}") for t in range(1, T_))
    em.step()
    P = {n: pyro.param(n).detach().clone().requires_grad_() for n in ("c", "phi", "s")}
    lag = torch.cat([torch.zeros(1), y[:-1]])
    emission = dist.Normal(P["c"] + lag[:, None] * P["phi"], P["s"])
    gradients = torch.autograd.grad((gamma * emission.log_prob(y[:, None])).sum(), list(P.values()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    counts = pairs + torch.stack([gamma[0], torch.zeros(2)])
    close(pyro.param("A"), counts / counts.sum(-1, keepdim=True))
    run(model)


def test_one_matrix_for_two_chains_and_the_first_state():
    """A row of the transition matrix is the initial distribution too, over two chains."""
    E = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    data = {"a": [0, 0, 1, 2, 2, 2], "b": [2, 1, 0, 0]}

    def model():
        A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
        for name, x in data.items():
            z = torch.tensor(0)
            for t in pyro.markov(range(len(x))):
                z = pyro.sample(f"{name}z{t}", dist.Categorical(A[z]))
                pyro.sample(f"{name}x{t}", dist.Categorical(E[z]), obs=torch.tensor(x[t]))

    A = np.array([[0.7, 0.3], [0.4, 0.6]])
    for _ in range(10):
        counts = np.zeros((2, 2))
        for x in data.values():
            gamma, pairs, _ = forward_backward(A[0], A, E.numpy()[:, x].T)
            counts += pairs
            counts[0] += gamma[0]
        A = counts / counts.sum(1, keepdims=True)
    close(run(model, steps=10).params["A"], A)


def test_semi_supervised_labels():
    labels = (REAL > 0).long()
    known = torch.arange(N) % 3 == 0

    def model(x):
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([-0.5, 0.5]))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(w), obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(mu[z], s), obs=x)

    x, hot, seen = REAL.numpy(), np.eye(2)[labels], known.numpy()[:, None]
    w, mu, s = np.array([0.5, 0.5]), np.array([-0.5, 0.5]), 1.0
    for _ in range(15):
        r, _ = responsibilities(np.log(w) + norm.logpdf(x[:, None], mu, s))
        r = np.where(seen, hot, r)
        w, mu = r.mean(0), x @ r / r.sum(0)
        s = np.sqrt((r * (x[:, None] - mu) ** 2).sum() / N)
    result = run(model, REAL, steps=15)
    for name, value in {"w": w, "mu": mu, "s": s}.items():
        close(result.params[name], value)


@pytest.mark.parametrize("route", ["stack of a constant", "exposure of zero"])
def test_zero_inflation(route):
    x = torch.tensor(np.where(np.arange(N) % 3 == 0, 0, COUNTS))

    def model(x):
        p = pyro.param("p", torch.tensor(0.5), constraint=C.unit_interval)
        lam = pyro.param("lam", torch.tensor(2.0), constraint=C.positive)
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Bernoulli(p)).long()
            if route == "stack of a constant":
                rate = torch.stack([torch.tensor(0.0), lam])[z]
            else:
                rate = lam * torch.tensor([0.0, 1.0])[z]
            pyro.sample("x", dist.Poisson(rate), obs=x)

    assert type(ExactPosteriorEM(model).plan(x).updates["lam"].update) is ClosedForm
    p, lam, zero = 0.5, 2.0, x.numpy() == 0
    for _ in range(20):
        on = p * poisson.pmf(x, lam)
        r = on / (on + (1 - p) * zero)
        p, lam = r.mean(), r @ x.numpy() / r.sum()
    result = run(model, x, steps=20)
    close(result.params["p"], p)
    close(result.params["lam"], lam)


def test_rasch_model_on_a_quadrature_grid():
    """Against scipy's maximiser of the marginal likelihood over a fixed grid of abilities."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 1)) > np.array([-1.0, -0.2, 0.3, 1.1]) + rng.logistic(size=(60, 4))
    x = x.astype(float)

    def model(x):
        b = pyro.param("b", torch.zeros(4))
        with pyro.plate("people", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor(weights)))
            ability = torch.tensor(nodes)[z].unsqueeze(-1)
            pyro.sample("x", dist.Bernoulli(logits=ability - b).to_event(1), obs=x)

    def loss(b):
        p = expit(nodes[:, None] - b)
        each = x @ np.log(p).T + (1 - x) @ np.log1p(-p).T
        return -logsumexp(each + np.log(weights), axis=1).sum()

    result = run(model, torch.tensor(x), steps=80)
    assert type(result.plan.updates["b"].update) is Gradient
    best = minimize(loss, np.zeros(4), options={"gtol": 1e-8})
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)
    close(result.params["b"], best.x, atol=1e-4)


def test_a_change_point():
    y = COUNTS
    after = np.arange(N)[None, :] >= np.arange(N)[:, None]  # (change, year)

    def model(y):
        lam = pyro.param("lam", torch.tensor([3.0, 4.0]), constraint=C.positive)
        change = pyro.sample("change", dist.Categorical(torch.ones(N) / N))
        with pyro.plate("years", N):
            z = (torch.arange(N) >= change).long()
            pyro.sample("y", dist.Poisson(lam[z]), obs=y)

    lam = np.array([3.0, 4.0])
    for _ in range(15):
        log_p = poisson.logpmf(y[:, None], lam)
        r, _ = responsibilities(np.where(after, log_p[:, 1], log_p[:, 0]).sum(1))
        late = r @ after
        lam = np.array([(1 - late) @ y.numpy() / (1 - late).sum(), late @ y.numpy() / late.sum()])
    result = run(model, y, steps=15)
    close(result.params["lam"], lam)
    assert result.plan.compiled


def test_weights_equal_replication_under_a_latent_outside_the_plate():
    x = torch.tensor([0.3, -1.0, 2.0, 1.5])
    times = torch.tensor([3.0, 1.0, 2.0, 1.0])

    def model(x, times):
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=C.simplex)
        w = pyro.param("w", torch.tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([[-1.0, 0.5], [0.2, 1.5]]))
        s = pyro.param("s", torch.tensor([1.0, 0.8]), constraint=C.positive)
        g = pyro.sample("g", dist.Categorical(p))
        with pyro.plate("n", len(x)), pyro.poutine.scale(scale=times):
            z = pyro.sample("z", dist.Categorical(w[g]))
            pyro.sample("x", dist.Normal(mu[g, z], s[z]), obs=x)

    short = run(model, x, times, steps=15)
    many = torch.repeat_interleave(x, times.long())
    long = run(model, many, torch.ones(7), steps=15)
    np.testing.assert_allclose(list(short.history), list(long.history), rtol=1e-10)
    for name, value in long.params.items():
        close(short.params[name], value)


def test_structural_zeros_stay_zero_under_gradient_steps_too():
    start = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    y = torch.tensor([0.0, 0.2, 0.1, 2.1, 1.9, 4.2, 4.0, 3.9])

    def model(y):
        A = pyro.param("A", start, constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 2.0, 4.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Normal(mu[z], 0.5), obs=y[t])

    closed = run(model, y, steps=10)
    by_gradient = run(model, y, steps=10, updates={"A": Gradient()})
    assert bool((by_gradient.params["A"][start == 0] == 0).all())
    close(by_gradient.params["A"], closed.params["A"], rtol=1e-5, atol=1e-7)


HIDDEN = {
    "detach": lambda mu: (mu[0], 0.5 + mu.detach()[1].abs()),
    "item": lambda mu: (mu[0], 0.5 + abs(mu[1].item())),
    "clamp": lambda mu: (mu[0].clamp(min=-0.5), 1.0),
    "relu": lambda mu: (mu[0].relu(), 1.0),
    "sort": lambda mu: (mu.sort().values[0], 1.0),
    "branch": lambda mu: (mu[0], 1.0 if bool(mu[1] < 1.4) else 0.7),
}


def hidden(how):
    def model(x):
        mu = pyro.param("mu", torch.tensor([0.2, 1.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            loc, scale = HIDDEN[how](mu)
            pyro.sample("x", dist.Normal(torch.stack([loc, mu[1]])[z], scale), obs=x)

    def evidence(mu):
        loc, scale = HIDDEN[how](mu)
        log_p = dist.Normal(torch.stack([loc, mu[1]]), scale).log_prob(REAL[:, None])
        return (log_p.logsumexp(-1) - np.log(2)).sum()

    return model, evidence


@pytest.mark.parametrize("how", [n for n in HIDDEN if n != "branch"])
def test_hidden_dependences_are_not_compiled(how):
    model, evidence = hidden(how)
    em = ExactPosteriorEM(model)
    plan = em.plan(REAL)
    assert not plan.compiled and type(plan.updates["mu"].update) is Gradient
    result = em.fit(REAL, max_steps=20, tol=0)
    path = np.array([*result.history, result.log_evidence])
    assert path[0] == pytest.approx(float(evidence(torch.tensor([0.2, 1.0]))))
    assert result.log_evidence == pytest.approx(float(evidence(result.params["mu"])), rel=1e-9)
    assert path[-1] > path[0]
    if how not in ("detach", "item"):  # whose gradients are not the function's
        assert np.all(np.diff(path) > -1e-9 * np.abs(path[1:]))


def test_a_branch_that_flips_on_the_way_discards_the_compiled_plan():
    """`mu[1]` crosses the threshold: from there on the scale is another.

    The evidence jumps there, so that a monotone ascent may end at the edge; what is reported is the
    model's own evidence all the way, not that of the compiled plan.
    """
    model, evidence = hidden("branch")
    with pytest.warns(PyroEMWarning, match=r"site 'x', argument 'scale'.*generic path"):
        result = ExactPosteriorEM(model).fit(REAL, tol=1e-9)
    assert not result.plan.compiled
    path = [*result.history, result.log_evidence]
    assert np.all(np.diff(path) > -1e-9)
    assert path[-1] == pytest.approx(float(evidence(result.params["mu"])), rel=1e-9)


def test_a_symmetric_matrix_is_no_closed_form():
    y = [0, 1, 1, 0, 2, 2, 1, 0]
    E = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])

    def model():
        a = pyro.param("a", torch.tensor([0.7, 0.3, 0.5]), constraint=C.positive)
        A = a[torch.tensor([[0, 1], [1, 2]])]
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Categorical(E[z]), obs=torch.tensor(y[t]))

    em = ExactPosteriorEM(model)
    assert type(em.plan().updates["a"].update) is Gradient
    q = em.posterior()
    counts = sum(q.joint(f"z{t - 1}", f"z{t}") for t in range(1, len(y)))
    counts = counts + torch.stack([q.probs("z0"), torch.zeros(2)])
    em.step()
    a = pyro.param("a").detach().clone().requires_grad_()
    A = a[torch.tensor([[0, 1], [1, 2]])]
    (gradient,) = torch.autograd.grad((counts * (A / A.sum(-1, keepdim=True)).log()).sum(), a)
    assert float((a.detach() * gradient).abs().max()) < 1e-6
    run(model)


def test_one_parameter_in_two_families_of_one_form():
    """A Poisson count and exponential waiting times add up; a Normal mean beside them cannot."""
    counts, times = torch.tensor([3.0, 5.0, 4.0]), torch.tensor([0.2, 0.4])

    def model(extra):
        r = pyro.param("r", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("a", 3):
            pyro.sample("counts", dist.Poisson(r * 2.0), obs=counts)
        with pyro.plate("b", 2):
            pyro.sample("times", dist.Exponential(r), obs=times)
        if extra:
            pyro.sample("x", dist.Normal(r, 1.0), obs=torch.tensor(2.0))

    result = run(model, False, steps=2)
    assert type(result.plan.updates["r"].update) is ClosedForm
    close(result.params["r"], (12 + 2) / (6 + 0.6))
    result = run(model, True, steps=2)
    assert type(result.plan.updates["r"].update) is Gradient
    r = result.params["r"]
    assert float(14 / r - 6.6 + (2.0 - r)) == pytest.approx(0, abs=1e-7)


@pytest.mark.filterwarnings("ignore:parameter 'b'")
def test_boundary_estimates_through_a_map_do_not_end_the_fit():
    """A probability of one is at infinity through a sigmoid, as it is through `logits=`."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])

    def model(x, mapped):
        b = pyro.param("b", torch.tensor([[3.0, -2.0], [-1.0, 3.0]]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            given = {"probs": b.sigmoid()[z]} if mapped else {"logits": b[z]}
            pyro.sample("x", dist.Bernoulli(**given).to_event(1), obs=x)

    by_logits = run(model, x, False, steps=60)
    assert run(model, x, True, steps=60).log_evidence == pytest.approx(
        by_logits.log_evidence, abs=1e-8
    )


def test_fixed_and_torch_optimisers_by_glob():
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    def model(x):
        low = pyro.param("mu_low", torch.tensor(-1.0))
        high = pyro.param("mu_high", torch.tensor(1.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.stack([low, high])[z], s), obs=x)

    em = ExactPosteriorEM(model, updates={"mu_*": Gradient(adam, steps=4), "s": Fixed()})
    result = em.fit(REAL, max_steps=150, tol=0)
    assert float(result.params["s"]) == 1.0 and not result.plan.is_monotone
    pyro.clear_param_store()
    exact = run(model, REAL, steps=150, updates={"s": Fixed()})
    for name in ("mu_low", "mu_high"):
        close(result.params[name], exact.params[name], atol=1e-4)
