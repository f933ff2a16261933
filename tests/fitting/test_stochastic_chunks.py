"""Stochastic fits to chunks: each chunk is a batch, as those of a DataLoader are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_em import Alternating, AutoAmortizedNormal, Chunks, ExactPosteriorEM, UsageError

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 1.0


class Reader:
    """Whose number of rows takes a pass to know."""

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for part in X.split(25):
            yield (part,)


def with_latent_outside(x: Tensor) -> None:
    """A location for all rows, and two clusters that are summed."""
    m = pyro.sample("m", dist.StudentT(3.0, 0.0, 5.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m + torch.tensor([-1.0, 1.0])[z], s), obs=x[:, 0])


def of_rows(x: Tensor) -> None:
    b = pyro.param("b", torch.ones(2))
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(b * h.unsqueeze(-1), 1.0).to_event(1), obs=x)


def fit(data: Any, guide: Any = AutoNormal, model: Any = with_latent_outside, **how: Any) -> Any:
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide)
    return em.fit(data, **({"num_epochs": 3, "seed": 0, "progress": False} | how))


def assert_equal(a: Any, b: Any) -> None:
    assert list(a.history) == list(b.history) and a.elbo == b.elbo and a.num_rows == 60
    assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)


def test_chunks_of_a_loader_are_its_batches() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=25, shuffle=True)
    assert_equal(fit(Chunks(loader)), fit(loader))


def test_rows_are_counted_where_nobody_knows_them(tmp_path: Path) -> None:
    counted, known = fit(Chunks(Reader())), fit(Chunks(X, rows=25))
    assert_equal(counted, known)
    assert counted.num_steps == 9

    def kill(step: Any) -> None:
        if step.index == 4:
            raise ZeroDivisionError

    kept = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    with pytest.raises(ZeroDivisionError):
        fit(Chunks(Reader()), callbacks=[kill], **kept)
    assert_equal(fit(Chunks(Reader()), callbacks=[lambda step: None], **kept), known)


def test_guides_of_rows_and_turns() -> None:
    together = {"schedule": Alternating(2, 1), "validation": X[:10]}
    result = fit(Chunks(X, rows=20), AutoAmortizedNormal, of_rows, **together)
    assert result.num_steps == 9 and len(result.history.validation) == 3
    with pytest.raises(UsageError, match=r"each of the 20 rows of 'h'.*\n.*\n.*\n.*AutoAmortized"):
        fit(Chunks(X, rows=20), AutoNormal, of_rows)
    with pytest.raises(UsageError, match="together with Chunks"):
        fit(Chunks(X, rows=20), batch_size=10)
