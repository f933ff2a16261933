"""Every shipped record passes the conformance suite; a wrong one does not."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import vonmises

import pyro_em
from pyro_em import ExactPosteriorEM, Family, Kind, Rule, UsageError, register_family
from pyro_em.families import chunks
from pyro_em.families.registry import REGISTRY, family_of
from pyro_em.testing.families import check_family

P = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
H = torch.tensor([0.3, 0.8])
LOC = torch.tensor([[0.0, 1.0], [3.0, -1.0]])
COV = torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[2.0, -0.4], [-0.4, 1.0]]])
CASES = {
    "Categorical": (dist.Categorical, {"probs": P}),
    "Categorical logits": (dist.Categorical, {"logits": P.log()}),
    "OneHotCategorical": (dist.OneHotCategorical, {"probs": P}),
    "OneHotCategorical logits": (dist.OneHotCategorical, {"logits": P.log() + 1}),
    "Multinomial": (dist.Multinomial, {"probs": P, "total_count": torch.tensor([5, 5])}),
    "Bernoulli": (dist.Bernoulli, {"probs": H}),
    "Bernoulli logits": (dist.Bernoulli, {"logits": torch.logit(H)}),
    "Binomial": (dist.Binomial, {"probs": H, "total_count": torch.tensor([7.0, 7.0])}),
    "Binomial logits": (
        dist.Binomial,
        {"logits": torch.logit(H), "total_count": torch.tensor([7.0, 7.0])},
    ),
    "Geometric": (dist.Geometric, {"probs": H}),
    "Geometric logits": (dist.Geometric, {"logits": torch.logit(H)}),
    "Poisson": (dist.Poisson, {"rate": torch.tensor([1.5, 6.0])}),
    "Exponential": (dist.Exponential, {"rate": torch.tensor([0.5, 2.0])}),
    "Normal": (dist.Normal, {"loc": torch.tensor([0.0, 100.0]), "scale": torch.tensor([1.0, 3.0])}),
    "LogNormal": (dist.LogNormal, {"loc": torch.tensor([0.0, 1.0]), "scale": H}),
    "Gamma": (dist.Gamma, {"concentration": torch.tensor([0.8, 9.0]), "rate": H}),
    "InverseGamma": (
        dist.InverseGamma,
        {"concentration": torch.tensor([2.0, 9.0]), "rate": torch.tensor([0.5, 20.0])},
    ),
    "Beta": (
        dist.Beta,
        {"concentration1": torch.tensor([0.8, 4.0]), "concentration0": torch.tensor([2.0, 30.0])},
    ),
    "Dirichlet": (dist.Dirichlet, {"concentration": 20 * P}),
    "VonMises": (
        dist.VonMises,
        {"loc": torch.tensor([0.5, -2.0]), "concentration": torch.tensor([0.7, 30.0])},
    ),
    "NegativeBinomial": (
        dist.NegativeBinomial,
        {"total_count": torch.tensor([0.8, 9.0]), "probs": H},
    ),
    "NegativeBinomial logits": (
        dist.NegativeBinomial,
        {"total_count": torch.tensor([3.0, 2000.0]), "logits": torch.tensor([0.5, -7.0])},
    ),
    "GammaPoisson": (
        dist.GammaPoisson,
        {"concentration": torch.tensor([0.8, 9.0]), "rate": H},
    ),
    "BetaBinomial": (
        dist.BetaBinomial,
        {
            "concentration1": torch.tensor([0.8, 4.0]),
            "concentration0": torch.tensor([2.0, 3.0]),
            "total_count": torch.tensor([9.0, 9.0]),
        },
    ),
    "ZeroInflatedPoisson": (
        dist.ZeroInflatedPoisson,
        {"rate": torch.tensor([1.5, 6.0]), "gate": H},
    ),
    "ZeroInflatedPoisson logits": (
        dist.ZeroInflatedPoisson,
        {"rate": torch.tensor([0.5, 60.0]), "gate_logits": torch.tensor([-2.0, 1.0])},
    ),
    "ZeroInflatedNegativeBinomial": (
        dist.ZeroInflatedNegativeBinomial,
        {"total_count": torch.tensor([1.5, 9.0]), "probs": H, "gate": torch.tensor([0.2, 0.6])},
    ),
    "ZeroInflatedNegativeBinomial logits": (
        dist.ZeroInflatedNegativeBinomial,
        {
            "total_count": torch.tensor([3.0, 20.0]),
            "logits": torch.tensor([0.5, -1.0]),
            "gate_logits": torch.tensor([0.5, -1.0]),
        },
    ),
    "StudentT": (
        dist.StudentT,
        {"df": torch.tensor([1.5, 9.0]), "loc": torch.tensor([0.0, 5.0]), "scale": H},
    ),
    "Cauchy": (dist.Cauchy, {"loc": torch.tensor([0.0, 5.0]), "scale": H}),
    "HalfCauchy": (dist.HalfCauchy, {"scale": torch.tensor([0.5, 3.0])}),
    "MultivariateStudentT": (
        dist.MultivariateStudentT,
        {"df": torch.tensor([1.5, 9.0]), "loc": LOC, "scale_tril": torch.linalg.cholesky(COV)},
    ),
    "Weibull": (
        dist.Weibull,
        {"scale": torch.tensor([0.5, 20.0]), "concentration": torch.tensor([0.8, 6.0])},
    ),
    "HalfNormal": (dist.HalfNormal, {"scale": torch.tensor([0.5, 3.0])}),
    "Chi2": (dist.Chi2, {"df": torch.tensor([1.5, 9.0])}),
    "Pareto": (
        dist.Pareto,
        {"scale": torch.tensor([1.0, 1.0]), "alpha": torch.tensor([0.8, 5.0])},
    ),
    "Laplace": (dist.Laplace, {"loc": torch.tensor([0.0, 5.0]), "scale": H}),
    "Uniform": (dist.Uniform, {"low": torch.zeros(2), "high": torch.full((2,), 1.5)}),
    "MultivariateNormal": (dist.MultivariateNormal, {"loc": LOC, "covariance_matrix": COV}),
    "MultivariateNormal tril": (
        dist.MultivariateNormal,
        {"loc": LOC, "scale_tril": torch.linalg.cholesky(COV)},
    ),
    "MultivariateNormal precision": (
        dist.MultivariateNormal,
        {"loc": LOC, "precision_matrix": torch.linalg.inv(COV)},
    ),
    "Wishart": (dist.Wishart, {"df": torch.tensor([4.0, 7.0]), "covariance_matrix": COV}),
}


@pytest.mark.parametrize("case", CASES)
def test_shipped_family(case: str) -> None:
    cls, arguments = CASES[case]
    family = REGISTRY[cls]
    check_family(family, {n: a.to(torch.float64) for n, a in arguments.items()})


def test_every_shipped_record_has_a_case() -> None:
    shipped = {
        c
        for c, f in REGISTRY.items()
        if c.__module__.startswith("pyro.") and (f.rules or f.natural)
    }
    assert shipped == {cls for cls, _ in CASES.values()}


def test_a_wrong_record_is_caught() -> None:
    wrong = Family(
        dist.HalfNormal,
        statistics=lambda x, a: {"square": x * x},
        rules={"scale": Rule(Kind.SCALE, lambda s, a: (2 * s["square"], s["weight"]))},
    )
    before = dict(REGISTRY)
    try:
        register_family(wrong, replace=True)
        with pytest.raises(AssertionError, match="gradient of the expected log joint in 'scale'"):
            check_family(wrong, {"scale": torch.tensor([1.0, 2.0])})
        right = Family(
            dist.HalfNormal,
            statistics=lambda x, a: {"square": x * x},
            rules={"scale": Rule(Kind.SCALE, lambda s, a: (s["square"], s["weight"]))},
        )
        with pytest.raises(UsageError, match="has a record already"):
            register_family(right)
        check_family(register_family(right, replace=True), {"scale": torch.tensor([1.0, 2.0])})
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


def test_lookup_is_by_exact_type() -> None:
    class Own(dist.Gamma):
        pass

    assert family_of(Own(3.0, 1.0)) is None
    assert family_of(dist.Normal(torch.zeros(3), 1.0).to_event(1)) is REGISTRY[dist.Normal]
    masked = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True]))
    assert family_of(masked) is REGISTRY[dist.Normal]
    with pytest.raises(UsageError, match="Family record was expected"):
        register_family(dist.Normal)


@pytest.mark.parametrize("piece", [3, 20, 10**6])
@pytest.mark.parametrize("rows", ["of data", "of components", "of both", "of neither"])
@pytest.mark.parametrize("case", CASES)
def test_log_densities_in_pieces(
    case: str, rows: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces and whatever varies along rows, as the distribution says itself."""
    monkeypatch.setattr(chunks, "_PIECE", piece)
    cls, arguments = CASES[case]
    N, K = 7, 2
    arguments = {n: a.to(torch.float64).unsqueeze(0) for n, a in arguments.items()}
    if "probs" in arguments and arguments["probs"].dim() == 3:  # rounded in single precision
        arguments["probs"] /= arguments["probs"].sum(-1, keepdim=True)
    if rows in ("of components", "of both"):
        arguments = {n: a.expand(N, *a.shape[1:]).clone() for n, a in arguments.items()}
    torch.manual_seed(0)
    given = dict(arguments, **({"total_count": 5} if cls is dist.Multinomial else {}))
    fn = cls(**given)
    value = fn.expand([N, K]).sample()[:, :1]  # (N, 1, *event)
    if rows in ("of components", "of neither"):
        value = value[:1]
    expected = fn.log_prob(value)
    if cls is dist.VonMises:  # torch's own has seven digits
        numbers = (value, arguments["concentration"], arguments["loc"])
        expected = torch.as_tensor(vonmises.logpdf(*(t.numpy() for t in numbers)))
    with torch.no_grad():
        found = chunks.log_density(REGISTRY[cls], value, arguments, 2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.shape in {(N, K), (1, K)}


@pytest.mark.parametrize("piece", [1, 50, 10**6])
def test_events_of_independent_dimensions_in_pieces(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_PIECE", piece)
    loc, x = torch.randn(1, 3, 4), torch.randn(11, 1, 4)
    expected = dist.Normal(loc, 2.0).to_event(1).log_prob(x)
    with torch.no_grad():
        family, scale = REGISTRY[dist.Normal], torch.full((1, 1, 1), 2.0)
        found = chunks.log_density(family, x, {"loc": loc, "scale": scale}, 2, 1)
    torch.testing.assert_close(found, expected)


def test_a_density_that_does_not_read_the_longest_dimension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "_PIECE", 5)
    flat = Family(dist.Normal, lambda x, a: {}, {}, log_density=lambda x, a: -a["scale"])
    scale = torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        found = chunks.log_density(flat, torch.zeros(30, 1), {"scale": scale}, 2, 0)
    assert torch.equal(found, -scale.expand(30, 2))


def test_the_temporaries_of_a_posterior_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of a family sees more events than a piece holds."""
    monkeypatch.setattr(chunks, "_PIECE", 1000)
    seen = []
    family = REGISTRY[dist.MultivariateNormal]
    density = family.log_density

    def watched(value, arguments):
        seen.append(value.numel() * arguments["covariance_matrix"].numel() // 4)
        return density(value, arguments)

    object.__setattr__(family, "log_density", watched)
    try:
        x, w = torch.randn(5000, 2, dtype=torch.float64), torch.ones(2) / 2
        mu, S = LOC.double(), COV.double()

        def model(x):
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Categorical(w))
                pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)

        q = ExactPosteriorEM(model).posterior(x)
    finally:
        object.__setattr__(family, "log_density", density)
    joint = dist.MultivariateNormal(mu, S).log_prob(x.unsqueeze(1)) + w.log()
    torch.testing.assert_close(q.probs("z"), joint.softmax(-1))
    assert len(seen) >= 20 and max(seen) <= 1000


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.form.is_log_linear])
def test_a_log_linear_form_is_its_features_times_its_natural_parameters(kind: Kind) -> None:
    n = torch.tensor([[1.0, 4.0, 0.5], [2.0, 1.0, 3.0]], dtype=torch.float64)
    d = torch.full_like(n, 6.0)
    for which in (0, 1):
        a = kind.form.inside(n, which)
        products = zip(kind.form.features(n, d), kind.form.natural_parameters(a), strict=True)
        total = sum(float((feature * eta).sum()) for feature, eta in products)
        assert total == pytest.approx(float(kind.form.expected(n, d, a)), rel=1e-13)


def test_kinds_are_found_by_their_words() -> None:
    assert Kind("mean vector") is Kind.MEAN_VECTOR
    assert [kind.value for kind in Kind if kind.form.needs_data] == [
        "median",
        "smallest value",
        "largest value",
    ]


def test_no_wing_asks_for_a_form_by_its_name() -> None:
    """A new functional form is one class and one member: what it is, it says itself."""
    root = Path(pyro_em.__file__).parent
    elsewhere = [path for path in root.rglob("*.py") if path.parent.name != "families"]
    assert elsewhere
    assert [str(p) for p in elsewhere if re.search(r"\bKind\.[A-Z]", p.read_text())] == []
