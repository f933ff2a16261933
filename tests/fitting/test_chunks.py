"""Fits to data in chunks take the steps of a fit to all data at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.errors import ModelError, UsageError
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.results.result import EMResult

_N = 24
_generator = torch.Generator().manual_seed(0)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


_X = torch.cat([_randn(_N // 2) - 2, _randn(_N // 2) + 2])[torch.randperm(_N, generator=_generator)]
_Y = _randn(_N, 2) + 3.0 * (_X > 0).unsqueeze(-1)
_HOLES = torch.where(
    torch.rand(_N, 2, generator=_generator, dtype=torch.float64) < 0.2, torch.nan, _Y
)
_HOLES[:3] = _Y[:3]  # the first chunk may be complete
_COVARIATE = _randn(_N)
_LINE = 1 + 2 * _COVARIATE + 0.3 * _randn(_N)
_COUNTS = torch.poisson(3.0 + 4.0 * (_X > 0).double(), generator=_generator)
_WEIGHTS = 0.5 + torch.rand(_N, generator=_generator, dtype=torch.float64)
_WIDE = _randn(_N, 26)
_SERIES = _randn(_N, 4)
_GROUP = torch.arange(_N) // 9  # the data are sorted by it: a chunk sees one or two groups


def _positive(name: str, *values: float) -> Tensor:
    value = torch.tensor(values if len(values) > 1 else values[0])
    return pyro.param(name, value, constraint=constraints.positive)


def _weights() -> Tensor:
    return pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)


def _means() -> Tensor:
    return pyro.param("m", torch.tensor([-1.0, 1.3]))


def mixture(x: Tensor) -> None:
    w, m, s = _weights(), _means(), _positive("s", 1.0, 1.5)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], s[z]), obs=x)


def full(x: Tensor) -> None:
    w, m = _weights(), pyro.param("m", torch.tensor([[-1.0, 0.0], [1.3, 1.0]]))
    tril = pyro.param("L", torch.eye(2).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(m[z], scale_tril=tril[z]), obs=x)


def counts(x: Tensor) -> None:
    w, r = _weights(), _positive("r", 2.0, 8.0)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(r[z]), obs=x)


def two_latents(x: Tensor) -> None:
    w, s = _weights(), _positive("s", 1.0)
    m = pyro.param("m", torch.tensor([[-1.0, 1.3], [0.0, 2.0]]))
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", dist.Categorical(w))
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(m[a, b], s), obs=x)


def regressions(c: Tensor, y: Tensor) -> None:
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor([1.0, -1.0]))
    s = _positive("s", 1.0)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("y", dist.Normal(a + b[z] * c, s), obs=y)


def regression(c: Tensor, y: Tensor) -> None:
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(1.0))
    s = _positive("s", 1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b * c, s), obs=y)


def logistic(c: Tensor, y: Tensor) -> None:
    a, b = pyro.param("a", torch.tensor([0.0, 0.5])), pyro.param("b", torch.tensor([1.0, -1.0]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("y", dist.Bernoulli(logits=a[z] + b[z] * c), obs=(y > 0.0).to(y))


def robust(x: Tensor, y: Tensor) -> None:
    a = pyro.param("a", torch.zeros(26))  # too many for Newton steps
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(4.0, x @ a, 1.0), obs=y)


def factors(x: Tensor) -> None:
    loadings, m = pyro.param("l", torch.tensor([1.0, 0.5])), pyro.param("m", torch.zeros(2))
    s = _positive("s", 1.0, 1.0)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m + h.unsqueeze(-1) * loadings, s).to_event(1), obs=x)


def vectors_of_factors(x: Tensor) -> None:
    tril = pyro.param("T", torch.eye(2), constraint=constraints.lower_cholesky)
    m, s = pyro.param("m", torch.zeros(2)), _positive("s", 1.0)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        pyro.sample("x", dist.Normal(m + h, s).to_event(1), obs=x)


def intercepts(y: Tensor) -> None:
    m, t, s = pyro.param("m", torch.tensor(0.1)), _positive("t", 1.0), _positive("s", 1.0)
    with pyro.plate("groups", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, t))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(m + u, s), obs=y)


def chains(y: Tensor) -> None:
    rows = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    m, s = _means(), _positive("s", 1.0)
    with pyro.plate("sequences", len(y)):
        z: Any = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"x_{t}", dist.Normal(m[z], s), obs=y[:, t])


def with_data_outside(x: Tensor) -> None:
    m, s = _means(), _positive("s", 1.0)
    pyro.sample("o", dist.Normal(m[0], 1.0), obs=torch.tensor(-5.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(m[z], s), obs=x)


def with_priors(x: Tensor) -> None:
    w = pyro.sample("w", dist.Dirichlet(3.0 * torch.ones(2)))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    v = pyro.sample("v", dist.InverseGamma(3.0, 3.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], v.sqrt()), obs=x)


def _at_a_point(model: Callable[..., Any]) -> AutoDelta:
    begin = {"w": torch.tensor([0.4, 0.6]), "m": torch.tensor([-1.0, 1.0]), "v": torch.tensor(1.0)}
    return AutoDelta(model, init_loc_fn=init_to_value(values=begin))


def weighted(x: Tensor, weight: Tensor) -> None:
    m, s = _means(), _positive("s", 1.0)
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=weight):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(m[z], s), obs=x)


def by_group(x: Tensor, group: Tensor) -> None:
    w = pyro.param(
        "w", torch.tensor([[0.4, 0.6], [0.5, 0.5], [0.7, 0.3]]), constraint=constraints.simplex
    )
    m, s = (
        pyro.param("m", torch.tensor([[-2.0, 0.0, 1.0], [1.0, 2.0, 3.0]])),
        _positive("s", 1.0, 1.5, 2.0),
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w[group]))
        pyro.sample("x", dist.Normal(m[z, group], s[group]), obs=x)


def lines_by_group(x: Tensor, c: Tensor, group: Tensor) -> None:
    a, b = pyro.param("a", torch.zeros(3)), pyro.param("b", torch.tensor([0.0, 0.5, 1.0]))
    d, s = pyro.param("d", torch.tensor([0.0, 1.0])), _positive("s", 1.0)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(a[group] + b[group] * c + d[z], s), obs=x)


def factors_by_group(x: Tensor, group: Tensor) -> None:
    loadings, m = pyro.param("l", torch.tensor([1.0, 0.5])), pyro.param("m", torch.zeros(3, 2))
    s = _positive("s", 1.0, 1.0)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m[group] + h.unsqueeze(-1) * loadings, s).to_event(1), obs=x)


_CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "mixture": (mixture, (_X,), {}),
    "full": (full, (_Y,), {}),
    "counts": (counts, (_COUNTS,), {}),
    "two latents": (two_latents, (_X,), {}),
    "regressions": (regressions, (_COVARIATE, _LINE), {}),
    "regression": (regression, (_COVARIATE, _LINE), {}),
    "logistic": (logistic, (_COVARIATE, _X), {}),
    "robust": (robust, (_WIDE, _LINE), {}),
    "factors": (factors, (_Y,), {}),
    "collapsed": (vectors_of_factors, (_Y,), {}),
    "intercepts": (intercepts, (_SERIES,), {}),
    "chains": (chains, (_SERIES,), {}),
    "data outside": (with_data_outside, (_X,), {}),
    "priors": (with_priors, (_X,), {"guide": _at_a_point}),
    "weights": (weighted, (_X, _WEIGHTS), {}),
    "by group": (by_group, (_X, _GROUP), {}),
    "lines by group": (lines_by_group, (_X, _COVARIATE, _GROUP), {}),
    "factors by group": (factors_by_group, (_Y, _GROUP), {}),
    "holes": (full, (_HOLES,), {"missing": "nan"}),
    "holes of factors": (factors, (_HOLES,), {"missing": "nan"}),
}


def _fit(case: str, *data: Any, steps: int = 3, **options: Any) -> EMResult:
    pyro.clear_param_store()
    model, _, given = _CASES[case]
    em = ExactPosteriorEM(model, **given)
    return em.fit(*data, max_steps=steps, tol=0.0, progress=False, **options)


def _agree(a: EMResult, b: EMResult, after_m_step: bool = True, rtol: float = 1e-11) -> None:
    def path(r: EMResult) -> Tensor:
        return torch.tensor([*r.history, *r.history.after_m_step * after_m_step, r.elbo])

    torch.testing.assert_close(path(a), path(b), rtol=rtol, atol=0.0)
    assert a.log_evidence == pytest.approx(b.log_evidence, rel=rtol)
    for name in a.params:
        torch.testing.assert_close(a.params[name], b.params[name], rtol=1e-9, atol=1e-10)
    assert a.num_rows == pytest.approx(b.num_rows) and len(a.history) == len(b.history)
    assert a.num_free_parameters == b.num_free_parameters


@pytest.mark.parametrize("case", _CASES)
def test_steps_are_those_on_all_data(case: str) -> None:
    _, data, _ = _CASES[case]
    whole = _fit(case, *data)
    # On sums the bound after an M-step is that of completed data, or of factors and data together.
    bounds = case not in ("factors", "holes")
    rtol = 1e-8 if case in ("logistic", "robust") else 1e-11
    _agree(_fit(case, Chunks(*data, rows=9)), whole, bounds, rtol)


@pytest.mark.parametrize("case", ["mixture", "two latents", "chains", "holes"])
def test_chunks_may_have_a_single_row(case: str) -> None:
    _, data, _ = _CASES[case]
    _agree(_fit(case, Chunks(*data, rows=1), steps=2), _fit(case, *data, steps=2))


def test_an_iterable_of_chunks_of_unequal_sizes() -> None:
    items = [(_X[:1],), (_X[1:1],), (_X[1:20],), (_X[20:],)]
    _agree(_fit("mixture", Chunks(items)), _fit("mixture", _X))


def factors_on_covariates(x: Tensor, c: Tensor) -> None:
    loadings, b = pyro.param("l", torch.tensor([1.0, 0.5])), pyro.param("b", torch.zeros(4, 2))
    s = _positive("s", 1.0, 1.0)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        loc = c @ b + h.unsqueeze(-1) * loadings
        pyro.sample("x", dist.Normal(loc, s).to_event(1), obs=x)


def test_what_one_chunk_leaves_undetermined_others_may_not() -> None:
    # Three rows do not determine the coefficients of four covariates.
    pyro.clear_param_store()
    found = ExactPosteriorEM(factors_on_covariates).fit(
        Chunks(_Y, _SERIES, rows=3), max_steps=2, tol=0.0, progress=False
    )
    pyro.clear_param_store()
    whole = ExactPosteriorEM(factors_on_covariates).fit(
        _Y, _SERIES, max_steps=2, tol=0.0, progress=False
    )
    assert found.plan.notes[1:] == whole.plan.notes
    assert found.num_free_parameters == whole.num_free_parameters
    assert found.bic == pytest.approx(whole.bic, rel=1e-11)


def test_factors_know_all_sums_after_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    read = Chunks.read
    monkeypatch.setattr("pyro_em.fitting.parts.chunked._KEPT_BYTES", 0)
    monkeypatch.setattr(Chunks, "read", lambda self: (passes.append(1), read(self))[1])
    counts = []
    for steps in (2, 12):
        passes.clear()
        _fit("factors", Chunks(_Y, rows=9), steps=steps)
        counts.append(len(passes))
    assert counts[0] == counts[1]


def test_extrapolated_steps() -> None:
    chunks = Chunks(_X, rows=7)
    a = _fit("mixture", chunks, steps=30, acceleration="quasi-newton")
    _agree(a, _fit("mixture", _X, steps=30, acceleration="quasi-newton"))


def test_a_fit_stops_where_one_on_all_data_does() -> None:
    pyro.clear_param_store()
    a = ExactPosteriorEM(mixture).fit(Chunks(_X, rows=7), progress=False)
    pyro.clear_param_store()
    b = ExactPosteriorEM(mixture).fit(_X, progress=False)
    assert a.num_steps == b.num_steps and a.status is b.status


def test_magnitudes_and_centres_are_those_of_all_data() -> None:
    # The first chunk is far from the others, and a spread that is tiny beside it is none beside all.
    far = torch.cat([1e3 + _X[:4], _X[4:] * 1e-3])
    a = _fit("mixture", Chunks(far, rows=4), steps=2)
    _agree(a, _fit("mixture", far, steps=2), after_m_step=False)


@pytest.mark.filterwarnings("ignore::pyro_em.PyroEMWarning")
def test_a_spread_collapses_beside_the_size_of_all_data() -> None:
    # A deviation of 1e-10 is clear beside the first chunk, and rounding beside data of a million.
    data = torch.cat([1e-10 * _X[:8].sign(), 1e6 * (1 + 0.1 * _X[8:])])

    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([0.0, 1e6]))
        s = _positive("s", 10.0, 1e5)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(m[z], s[z]), obs=x)

    ends = []
    for given in (data, Chunks(data, rows=8)):
        pyro.clear_param_store()
        result = ExactPosteriorEM(model).fit(given, max_steps=3, tol=0.0, progress=False)
        ends.append((result.status, result.message))
    assert ends[0] == ends[1] and ends[0][0] is EMStatus.DEGENERATE


def test_a_callback_sees_parameters_and_the_bound() -> None:
    seen: list[tuple[float, float]] = []

    def watch(step: Any) -> None:
        seen.append((step.elbo, float(step.params["w"][0])))

    _fit("mixture", Chunks(_X, rows=7), callbacks=[watch])
    whole: list[tuple[float, float]] = seen.copy()
    seen.clear()
    _fit("mixture", _X, callbacks=[watch])
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(seen), rtol=1e-11, atol=1e-12)


def test_there_is_no_posterior_of_all_rows_and_the_sentence_says_what_to_ask() -> None:
    for case, data in (("mixture", _X), ("two latents", _X)):
        result = _fit(case, Chunks(data, rows=9), steps=1)
        with pytest.raises(UsageError, match=r"(?s)given in chunks.*em.posterior\(rows\)"):
            _ = result.posterior


@pytest.mark.parametrize("case", ["mixture", "two latents"])
def test_standard_errors_of_chunks_are_those_of_all_rows(case: str) -> None:
    errors = _fit(case, Chunks(_X, rows=9), steps=30).standard_errors()
    whole = _fit(case, _X, steps=30).standard_errors()
    for name in whole:
        assert torch.allclose(errors[name], whole[name], rtol=1e-8, equal_nan=True), name


def global_mean(x: Tensor) -> None:
    s = _positive("s", 1.0)
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(u, s), obs=x)


def medians(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor(0.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Laplace(m, 1.0), obs=x)


def without_plate(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor(0.0))
    pyro.sample("x", dist.Normal(m, 1.0).expand([len(x)]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (global_mean, "site 'u': it is outside plate 'rows', and the data are given in chunks"),
        (medians, "parameter 'm': its update is a .*median"),
        (without_plate, "model: its observations share no plate"),
    ],
)
def test_models_whose_rows_are_not_independent_are_refused(model: Any, text: str) -> None:
    pyro.clear_param_store()
    with pytest.raises(UsageError, match=text):
        ExactPosteriorEM(model).fit(Chunks(_X, rows=9), progress=False)


def centred(x: Tensor) -> None:
    mixture(x - x.mean())


def weighed_by_number(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor(0.5))
    pyro.sample("prior", dist.Normal(m, 2.0 / len(x) ** 0.5), obs=torch.tensor(0.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def of_neighbours(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor(0.5))
    with pyro.plate("rows", len(x) - 1):
        pyro.sample("x", dist.Normal(m * x[:-1], 1.0), obs=x[1:])


@pytest.mark.parametrize("model", [centred, weighed_by_number, of_neighbours])
def test_models_that_see_which_rows_are_together_are_refused(model: Any) -> None:
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    with pytest.raises(
        UsageError, match=r"'rows': what the model says of a row depends on .*beside"
    ):
        em.fit(Chunks(_X, rows=9), progress=False)
    with pytest.raises(UsageError, match=r"depends on the rows beside"):
        em.score(Chunks(_X, rows=9))
    em.fit(_X, max_steps=1, tol=0.0, progress=False)


@pytest.mark.parametrize("model", [centred, weighed_by_number])
def test_chunks_of_one_row_are_looked_at_together(model: Any) -> None:
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    with pytest.raises(UsageError, match=r"depends on the rows beside"):
        em.fit(Chunks(_X, rows=1), max_steps=1, progress=False)
    with pytest.raises(UsageError, match=r"depends on the rows beside"):
        em.score(Chunks(_X, rows=1))


def exposed(x: Tensor, exposure: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([0.5, 3.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z] * exposure), obs=x)


def overdispersed(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    shape = pyro.param("shape", torch.tensor([1.0, 3.0]), constraint=constraints.positive)
    rate = pyro.param("rate", torch.tensor([1.0, 0.5]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.GammaPoisson(shape[z], rate[z]), obs=x)


_FEW_COUNTS = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0])


def test_rows_that_differ_are_not_read_one_by_one() -> None:
    exposure = torch.linspace(0.5, 2.0, len(_FEW_COUNTS))
    pyro.clear_param_store()
    with pytest.raises(UsageError, match=r"its rate has a value for each row.*a single row"):
        ExactPosteriorEM(exposed).fit(Chunks(_FEW_COUNTS, exposure, rows=1), progress=False)
    paths = []
    for args in ((_FEW_COUNTS, exposure), (Chunks(_FEW_COUNTS, exposure, rows=2),)):
        pyro.clear_param_store()
        result = ExactPosteriorEM(exposed).fit(*args, max_steps=2, tol=0.0, progress=False)
        paths.append(result.log_evidence)
    assert paths[1] == pytest.approx(paths[0], rel=1e-12)  # the last chunk has a single row


def test_counts_of_a_single_row_are_among_the_levels_of_all() -> None:
    paths = []
    for data in (_FEW_COUNTS, Chunks(_FEW_COUNTS, rows=1)):
        pyro.clear_param_store()
        fit = ExactPosteriorEM(overdispersed).fit(data, max_steps=2, tol=0.0, progress=False)
        paths.append(fit.log_evidence)
    assert paths[1] == pytest.approx(paths[0], rel=1e-10)


def test_a_budget_does_not_part_what_sees_all_rows() -> None:
    x = torch.cat([_X.repeat(100) - 3, _X.repeat(100) + 3])
    for model, serves in ((mixture, True), (centred, False)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, max_enumeration=2 * len(x) - 1)
        if serves:
            em.fit(x, max_steps=1, tol=0.0, progress=False)
            continue
        for ask in (em.score, lambda x, em=em: em.fit(x, max_steps=1, tol=0.0, progress=False)):
            with pytest.raises(ModelError, match="max_enumeration"):
                ask(x)


def test_a_chunk_that_reads_as_another_model_is_refused() -> None:
    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([-1.0, 1.0]))
        s = _positive("s", 1.0)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            loc = m[z] if len(x) == 9 else m[z] ** 2
            pyro.sample("x", dist.Normal(loc, s), obs=x)

    pyro.clear_param_store()
    with pytest.raises(ModelError, match=r"rows from 18.*another update"):
        ExactPosteriorEM(model).fit(Chunks(_X, rows=9), progress=False)


# ---------------------------------------------------------------- parts that are read in each pass


@pytest.fixture
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.fitting.parts.chunked._KEPT_BYTES", 0)


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("case", ["mixture", "full", "two latents", "regressions", "chains"])
def test_steps_on_chunks_that_are_read_in_each_pass(case: str) -> None:
    _, data, _ = _CASES[case]
    _agree(_fit(case, Chunks(*data, rows=8), steps=2), _fit(case, *data, steps=2))


@pytest.mark.usefixtures("_nothing_kept")
def test_chunks_whose_data_are_observed_as_they_stand_are_put_in_place_without_the_model() -> None:
    runs = []

    def counting(x: Tensor) -> None:
        runs.append(len(x))
        mixture(x)

    def runs_of(steps: int) -> int:
        pyro.clear_param_store()
        runs.clear()
        chunks = Chunks(_X, rows=6)
        ExactPosteriorEM(counting).fit(chunks, max_steps=steps, tol=0.0, progress=False)
        return len(runs)

    assert runs_of(10) == runs_of(3)


@pytest.mark.usefixtures("_nothing_kept")
def test_chunks_of_which_more_is_read_than_values_are_read_from_the_model() -> None:
    def model(x: Tensor) -> None:
        w, m, s = _weights(), _means(), _positive("s", 1.0, 1.5)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            # The same size and view, and a density that depends on the rows of the chunk.
            pyro.sample("x", dist.Normal(m[z], s[z] * (1 + x.abs())), obs=x)

    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(Chunks(_X, rows=8), max_steps=1, tol=0.0, progress=False)
    w, m, s = (torch.tensor(v) for v in ([0.4, 0.6], [-1.0, 1.3], [1.0, 1.5]))
    total = 0.0
    for x in _X.split(8):
        spread = s * (1 + x.abs().unsqueeze(-1))
        density = dist.Normal(m, spread).log_prob(x.unsqueeze(-1)) + w.log()
        total += float(density.logsumexp(-1).sum())
    assert result.history[0] == pytest.approx(total, rel=1e-12)
