"""What a batch stands for: declared plates, subsamples, loaders of every kind, held-out data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from pyro_em import ExactPosteriorEM, UsageError

X = torch.tensor([0.3, -1.2, 2.0, 0.7, 1.1, -0.4, 0.0, 1.9, -2.2, 0.5, 0.8, -0.9])


def still(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Bounds of batches at one place."""
    return torch.optim.SGD(parameters, lr=0.0)


def rows(x, size=None):
    h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", size or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def rows_guide(x, size=None):
    """Draws without noise: bounds of batches are exact to 1e-5."""
    pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1e-9))
    w = pyro.param("w", torch.tensor(0.8))
    with pyro.plate("n", size or len(x), subsample_size=len(x)):
        pyro.sample("z", dist.Normal(w * x, 1e-9))


def given_global(x):
    pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1e-9))


def bound_of(x: torch.Tensor) -> float:
    return ExactPosteriorEM(rows, rows_guide, strategy="guide").elbo(x).value


def fit(*args: Any, model: Any = rows, guide: Any = rows_guide, **options: Any) -> Any:
    em = ExactPosteriorEM(model, guide, still, strategy="guide")
    return em.fit(*args, num_epochs=1, seed=0, progress=False, **options)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize("loader", [True, False])
def test_a_plate_that_declares_all_rows_needs_no_number_of_data(loader: bool) -> None:
    def model(x):
        rows(x, 12)

    def guide(x):
        rows_guide(x, 12)

    data, options = (DataLoader(Stream(), 5), {}) if loader else (X, {"batch_size": 5})
    result = fit(data, model=model, guide=guide, **options)
    full = bound_of(X)
    assert len(result.history) == 3
    assert np.average(list(result.history), weights=[5, 5, 2]) == pytest.approx(full, abs=1e-4)
    assert result.elbo == pytest.approx(full, abs=1e-4)


def test_a_sampler_of_some_rows_is_the_data() -> None:
    """The customary split into training and validation."""
    result = fit(DataLoader(X, 5, sampler=SubsetRandomSampler(range(8))))
    assert result.elbo == pytest.approx(bound_of(X[:8]), abs=1e-4)
    assert result.num_rows == 8


def test_a_loader_of_ready_batches_does_not_know_the_number_of_rows() -> None:
    loader = DataLoader([X[:5], X[5:]], batch_size=None)
    with pytest.raises(UsageError, match="the number of data is unknown"):
        fit(loader)
    assert fit(loader, num_data=12).elbo == pytest.approx(bound_of(X), abs=1e-4)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_subsample_of_something_else_leaves_the_rows_of_a_batch_scaled(batch: int) -> None:
    """Of four columns two are drawn; rows are alike, so that every batch has the bound of all."""

    def model(x):
        h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
        with (
            pyro.plate("columns", x.shape[1], subsample_size=2, dim=-1) as i,
            pyro.plate("n", len(x), dim=-2),
        ):
            pyro.sample("x", dist.Normal(h, 0.5), obs=x[:, i])

    x = torch.full((12, 4), 1.0)
    full = ExactPosteriorEM(model, given_global).elbo(x).value
    history = fit(x, model=model, guide=given_global, batch_size=batch).history
    assert list(history) == pytest.approx([full] * (12 // batch), abs=1e-4)


def test_a_model_may_draw_some_rows_of_a_batch() -> None:
    def model(x):
        h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(h, 0.5), obs=x[i])

    x = torch.full((12,), 1.0)
    full = ExactPosteriorEM(model, given_global).elbo(x).value
    history = fit(x, model=model, guide=given_global, batch_size=4).history
    assert list(history) == pytest.approx([full] * 3, abs=1e-4)


@pytest.mark.parametrize("number", [0, -3, 2, 12.5, True])
def test_a_number_of_data_that_cannot_be(number: Any) -> None:
    with pytest.raises(UsageError, match=f"num_data={number}"):
        fit(X, batch_size=3, num_data=number)


# ------------------------------------------------------------------ parameters for every row


@pytest.mark.parametrize("size", [4, 5])
def test_rows_of_an_autoguide_and_a_loader_do_not_go_together(size: int) -> None:
    """Batches of one size would share parameters that belong to other rows, without a word."""
    with pytest.raises(UsageError, match=rf"AutoNormal.*each of the {size} rows of 'z'"):
        fit(DataLoader(X, size), guide=AutoNormal)
    assert fit(DataLoader(X, 12), guide=AutoNormal).num_steps == 1


def test_an_autoguide_without_rows_or_with_its_own_plates_takes_batches() -> None:
    def shared(x):
        h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(h, 0.5), obs=x)

    def indexed(x, i):
        with pyro.plate("n", 12, subsample=i):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def create_plates(x, i):
        return pyro.plate("n", 12, subsample=i)

    def with_plates(model):
        return AutoNormal(model, create_plates=create_plates)

    assert fit(DataLoader(X, 4), model=shared, guide=AutoNormal, validation=X[:3]).num_steps == 3
    result = fit(X, torch.arange(12), model=indexed, guide=with_plates, batch_size=4)
    assert result.num_steps == 3


# ------------------------------------------------------------------ held-out data


def test_held_out_data_that_cannot_be_used_are_refused_before_training() -> None:
    def own_rows(x):
        pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1e-9))
        with pyro.plate("n", 12):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(12)), 0.1))

    seen: list[int] = []
    options = {"callbacks": [lambda step: seen.append(step.index)]}
    with pytest.raises(UsageError, match=r"AutoNormal.*12 rows of 'z', so that other data"):
        fit(X, guide=AutoNormal, validation=X[:5], **options)
    with pytest.raises(UsageError, match="validation: model and guide cannot be run on it"):
        fit(X, guide=own_rows, validation=X[:5], **options)
    empty = DataLoader(TensorDataset(X[:0]))
    with pytest.raises(UsageError, match="validation: it is empty"):
        fit(X, validation=empty, **options)
    assert not seen


def test_held_out_batches_weigh_by_their_rows() -> None:
    result = fit(X, validation=DataLoader(X[:5], 2))
    assert result.history.validation[-1][1] == pytest.approx(bound_of(X[:5]), abs=1e-4)


def test_a_loader_where_one_batch_is_meant_is_named() -> None:
    loader = DataLoader(X, 4)
    em = ExactPosteriorEM(rows, rows_guide)
    for ask in (em.plan, em.elbo, em.posterior, em.estimate_evidence, em.evaluate_loss):
        with pytest.raises(UsageError, match="a DataLoader was given"):
            ask(loader)
    with pytest.raises(UsageError, match="as its first argument"):
        em.fit(x=loader, num_epochs=1)
