"""The table of a fit: names, labels and notes of its rows, and intervals by formulas of textbooks."""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Comparison, EMResult, ExactPosteriorEM, Fixed, UsageError
from pyro_em.comparison.table import Row
from pyro_em.fitting.results.table import Table
from pyro_em.graph.axes import axis_names

D64 = torch.float64


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=D64)


def mixture(x: Tensor) -> None:
    w = pyro.param("w", tensor([0.5, 0.5]), constraint=constraints.simplex)
    mu = pyro.param("mu", tensor([[-2.0, 0.0, 1.0], [2.0, 0.0, -1.0]]))
    s = pyro.param("s", tensor([1.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z].unsqueeze(-1)).to_event(1), obs=x)


@pytest.fixture(scope="module")
def fitted() -> EMResult:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3)) + np.where(rng.random((30, 1)) < 0.4, 2.0, -2.0)
    with pyro.get_param_store().scope():
        return ExactPosteriorEM(mixture, updates={"s": Fixed()}).fit(tensor(x), seed=1)


def test_each_element_has_a_row_under_the_names_of_its_axes(fitted: EMResult) -> None:
    table = fitted.summary()
    assert table.index.names == ["parameter", "component", "feature"]
    assert list(table.columns) == ["estimate", "standard_error", "z", "lower", "upper", "note"]
    assert table.loc["mu", "estimate"].tolist() == fitted.params["mu"].reshape(-1).tolist()
    errors = fitted.standard_errors()
    assert table.loc[("mu", 1, 2), "standard_error"] == float(errors["mu"][1, 2])
    row = table.loc[("mu", 1, 2)]
    assert row["z"] == pytest.approx(row["estimate"] / row["standard_error"])
    assert (table.loc["s", "note"] == "fixed").all() and table.loc["s", "z"].isna().all()
    assert table.attrs["steps"] == fitted.num_steps
    assert "the logit (w), the value (mu)" in table.attrs["intervals"]
    assert "log evidence (nats)" in str(table) and "<table" in table._repr_html_()
    assert pickle.loads(pickle.dumps(table)).equals(table)


def test_labels_are_the_users_and_serve_a_wide_table(fitted: EMResult) -> None:
    labels = {"component": ["low", "high"], "mu": {"feature": ["a", "b", "c"]}}
    table = fitted.summary(labels=labels)
    assert table.loc[("mu", "high", "b"), "estimate"] == float(fitted.params["mu"][1, 1])
    wide = fitted.summary(labels=labels, wide=True)
    assert list(wide.columns) == ["low", "high"] and wide.columns.name == "component"
    assert wide.loc[("mu", "c")].tolist() == fitted.params["mu"][:, 2].tolist()
    assert wide.loc[("w", "")].tolist() == fitted.params["w"].tolist()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"component": ["a", "b", "c"]}, "3 labels were given"),
        ({"colour": ["a", "b"]}, "no parameter has such an axis. The axes are: 'w': 'component'"),
        ({"nu": {"feature": ["a"]}}, "no parameter has this name"),
        ({"mu": ["a", "b"]}, "'mu' is a parameter"),
        ({"component": "ab"}, "'ab' is no list of labels"),
        ({"component": ["a", "a"]}, "two labels are the same"),
        (["a", "b"], "is no dict of labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fitted: EMResult, labels, said) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        fitted.summary(labels=labels)


def test_without_pandas_there_is_a_table_of_the_same(fitted: EMResult, monkeypatch) -> None:
    frame = fitted.summary(level=0.9)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "pyro_em.fitting.results.frame", raising=False)
    table = fitted.summary(level=0.9)
    assert type(table) is Table and table.attrs == frame.attrs
    assert table.names == tuple(frame.index.names) and list(table.columns) == list(frame.columns)
    assert list(table.index) == frame.index.tolist()
    np.testing.assert_array_equal(
        [row[:5] for row in table.rows], frame.iloc[:, :5].to_numpy(dtype=float)
    )
    assert "mu" in str(table) and "<td" in table._repr_html_()


def counts(x: Tensor, k: Tensor) -> None:
    rate = pyro.param("rate", tensor(1.0), constraint=constraints.positive)
    p = pyro.param("p", tensor([0.5, 0.5]), constraint=constraints.unit_interval)
    c = pyro.param("c", tensor(0.3))
    unused = pyro.param("unused", tensor(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)
        pyro.sample("k", dist.Binomial(10, p).to_event(1), obs=k)
        pyro.sample("y", dist.Normal((c - c) + (unused - unused), 1.0), obs=0.0 * x)


def test_intervals_stay_within_constraints_and_are_those_of_textbooks() -> None:
    x, k = (
        tensor([1.0, 0.0, 2.0, 0.0]),
        tensor([[1.0, 10.0], [0.0, 10.0], [2.0, 10.0], [1.0, 10.0]]),
    )
    table = ExactPosteriorEM(counts).fit(x, k).summary(level=0.95)
    rate, half = (
        0.75,
        1.959964 / math.sqrt(3),
    )  # the logarithm of a rate has the variance 1 / events
    assert table.loc["rate"]["lower"].item() == pytest.approx(rate * math.exp(-half), rel=1e-5)
    assert table.loc["rate"]["upper"].item() == pytest.approx(rate * math.exp(half), rel=1e-5)
    logit, error = math.log(0.1 / 0.9), 1 / math.sqrt(40 * 0.1 * 0.9)
    ends = [1 / (1 + math.exp(-logit - s * 1.959964 * error)) for s in (-1, 1)]
    assert table.loc[("p", 0), ["lower", "upper"]].tolist() == pytest.approx(ends, rel=1e-5)
    assert table.loc[("p", 1), "note"] == "boundary" and math.isnan(table.loc[("p", 1), "upper"])
    assert table.loc["c", "note"].tolist() == ["not identified"]


def names(model, *args) -> dict[str, tuple[str, ...]]:
    em = ExactPosteriorEM(model)
    em.plan(*args)
    return axis_names(em._session.program.graph)


def test_axes_have_names_by_how_a_parameter_reaches_its_site() -> None:
    rows = tensor([[0.2, 0.8], [0.4, 0.6]])

    def chain(x: Tensor) -> None:
        start = pyro.param("start", tensor([0.5, 0.5]), constraint=constraints.simplex)
        A = pyro.param("A", rows, constraint=constraints.simplex)
        w = pyro.param("w", tensor([[0.2, 0.3, 0.5]] * 2), constraint=constraints.simplex)
        B = pyro.param("B", tensor([[0.1, 0.2, 0.3, 0.4]] * 3), constraint=constraints.simplex)
        p = start
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            m = pyro.sample(f"m_{t}", dist.Categorical(w[z]))
            pyro.sample(f"x_{t}", dist.Categorical(B[m]), obs=x[t])
            p = A[z]

    assert names(chain, torch.tensor([0, 3, 1])) == {
        "start": ("z",),
        "A": ("from", "to"),
        "w": ("z", "m"),
        "B": ("m", "category"),
    }

    def factors(x: Tensor) -> None:
        W = pyro.param("W", torch.eye(3, 2, dtype=D64) + 0.1)
        psi = pyro.param("psi", torch.ones(3, dtype=D64), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2, dtype=D64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ W.T, psi).to_event(1), obs=x)

    assert names(factors, torch.randn(4, 3, dtype=D64)) == {
        "W": ("feature", "factor"),
        "psi": ("feature",),
    }

    def lines(x: Tensor, y: Tensor, g: Tensor) -> None:
        a = pyro.param("a", tensor([0.0, 1.0]))
        b = pyro.param("b", tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        c = pyro.param("c", torch.zeros(4, dtype=D64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(a[z] + c[g] + (b[z] * x).sum(-1), 1.0), obs=y)

    x = torch.randn(8, 3, dtype=D64)
    assert names(lines, x, x[:, 0], torch.arange(8) % 4) == {
        "a": ("component",),
        "b": ("component", "covariate"),
        "c": ("index",),
    }
    pyro.clear_param_store()
    by_one = names(mixture_of_one, x)
    assert by_one == {"w": ("component",), "mu": ("component", "feature")}


def mixture_of_one(x: Tensor) -> None:
    w = pyro.param("w", tensor([1.0]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.zeros(1, 3, dtype=D64))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)


def test_plan_result_and_comparison_are_tables_in_a_notebook(fitted: EMResult) -> None:
    row = Row("<script>alert(1)</script>", -1.5, -1.5, -1.5, 3, 0.1, 3, 0.1, None, 1, 0.1, "a & b")
    shown = {
        "plan": replace(fitted.plan, notes=("<b>bold</b>",)),
        "result": replace(fitted, message="<i>done</i>"),
        "comparison": Comparison((row,), {}, {}, -1.5, "evidence", 4.0, 0.01),
    }
    for name, value in shown.items():
        text = value._repr_html_()
        words = [" ".join(t.split()) for t in ElementTree.fromstring(text).itertext()]
        tags = {element.tag for element in ElementTree.fromstring(text).iter()}
        assert tags <= {"div", "table", "thead", "tbody", "tr", "th", "td"}, name
        assert "color:" not in text.replace("background: none", "")
        plain = set(str(value).replace("\n", " ").split())
        assert plain - set(" ".join(words).split()) <= {"Comparison:"}, name
