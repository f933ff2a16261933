"""Arrays and tables in place of tensors: the same numbers to the bit, never the user's memory."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, ModelError, compare
from pyro_em.sources.given import Given

ROWS = np.random.default_rng(0).normal(size=(12, 2)) + np.repeat([[-2.0], [2.0]], 6, 0)
TABLE = pd.DataFrame(ROWS, columns=["width", "height"])


def model(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.arange(4)[::-2], torch.tensor([3, 1])),
        (np.array([1.5], dtype=">f4"), torch.tensor([1.5])),
        (np.array([True]), torch.tensor([True])),
        (np.ma.masked_array([1.0, 2.0], [True, False]), torch.tensor([torch.nan, 2.0]).double()),
        (pd.Series([1, 2], index=[7, 8]), torch.tensor([1, 2])),
        (pd.Series([1, None], dtype="Int64"), torch.tensor([1.0, torch.nan]).double()),
        (pd.Series(["b", "a", "b"], dtype="category"), torch.tensor([1, 0, 1])),
        (pd.DataFrame({"a": [1, 2], "b": [0, 1]}), torch.tensor([[1, 0], [2, 1]])),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1]}), torch.tensor([[1, 0.5], [2, 1]]).double()),
        ([np.zeros(2), 3], [torch.zeros(2).double(), 3]),
    ],
)
def test_numbers_keep_their_kind(value, expected) -> None:
    found = Given().read(value, "x")
    if isinstance(expected, list):
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array(["a"]), r"an array of texts.*pandas.Series\(x, dtype='category'\)"),
        (pd.Series([1, "a"]), r"Python objects.*pass x.astype\(float\)"),
        (pd.Series(["a", None], dtype="category"), r"1 of 2 categories are missing.*x.dropna\(\)"),
        (TABLE.assign(kind="a"), r"x\['kind'\].*columns with numbers: x\[\['width', 'height'\]\]"),
        (pd.DataFrame(), "has no columns"),
    ],
)  # fmt: skip
def test_what_has_no_numbers_is_refused_with_the_line_that_converts(value, said) -> None:
    with pytest.raises(DataError, match=f"(?s){said}"):
        ExactPosteriorEM(model).plan(value)


@pytest.mark.parametrize("data", [ROWS, TABLE], ids=["array", "table"])
def test_every_public_method_takes_them_as_it_takes_a_tensor(data, caplog) -> None:
    caplog.set_level(logging.INFO, logger="pyro_em")
    before, x = data.copy(), torch.from_numpy(ROWS.copy())
    em = ExactPosteriorEM(model)
    result = em.fit(data, num_restarts=2, seed=0, validation=None)
    kind = "a DataFrame" if data is TABLE else "an array"
    words = f"x is {kind}: read as a tensor of float64, of shape (12, 2), a copy"
    assert f"fit: {words}" in caplog.text and words in em.plan(data).notes
    assert em.score(data) == em.score(x) == result.log_evidence
    assert em.evaluate_loss(x=data) == em.evaluate_loss(x)
    assert torch.equal(em.posterior(data).probs("z"), em.posterior(x).probs("z"))
    assert em.elbo(data).value == em.elbo(x).value
    draws = [em.predictive(d, num_samples=2, seed=1)["x"] for d in (data, x)]
    assert torch.equal(*draws)
    assert em.generate(2, data, seed=0)["x"].shape == (2, 2)
    em.m_step(em.posterior(data), data)
    assert em.step(data) == pytest.approx(em.step(data), abs=1e-3)  # and no word of other data
    assert em.sort_components("z", "mu", data).tolist() == [0, 1]
    init = {"z": np.repeat([0, 1], 6)}
    assert em.fit(data, init=init).log_evidence == pytest.approx(result.log_evidence, abs=1e-3)
    if data is TABLE:
        assert result.summary().loc[("mu", 0, "height"), "estimate"] == float(
            result.params["mu"][0, 1]
        )
        assert compare({"em": em}, data, max_steps=2, progress=False).measure == "evidence"
    assert data.equals(before) if data is TABLE else (data == before).all()
    assert not np.shares_memory(np.asarray(data), result.posterior.graph.groups[1].value.numpy())


def test_a_model_that_reads_tables_says_so_or_gets_them_where_tensors_fail() -> None:
    def plain(data):
        model(torch.from_numpy(data[["width", "height"]].to_numpy().copy()))

    def neither(data):
        model(data.no_such_thing)

    def annotated(data: pd.DataFrame):
        model(torch.from_numpy(data[["width", "height"]].to_numpy().copy()))

    with pytest.raises(ModelError, match=r"data is a DataFrame: .* annotate the argument"):
        ExactPosteriorEM(neither).plan(TABLE)
    for reads in (plain, annotated):
        assert ExactPosteriorEM(reads).score(TABLE) == ExactPosteriorEM(model).score(ROWS)


def test_parameters_and_data_of_two_kinds_of_floats_are_named() -> None:
    def lines(X, y):
        b = pyro.param("b", torch.zeros(2, dtype=torch.float32))
        with pyro.plate("rows", len(X)):
            pyro.sample("y", dist.Normal(X @ b, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"(?s)'X' is float64.*x.new_zeros"):
        ExactPosteriorEM(lines).fit(ROWS, ROWS[:, 0])
