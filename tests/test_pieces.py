"""What is made piece by piece is what is made at once, in less memory."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em import ExactPosteriorEM
from pyro_em.graph.findings.value_checks import data_problems
from pyro_em.incomplete import IncompleteMultivariateNormal, distinct_patterns, patterns_of
from pyro_em.pieces import PIECE, pieces, where_true


class Asked(TorchDispatchMode):
    """The most elements of which it is asked at once whether they are infinite."""

    most = 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch's compiler is imported

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.isinf.default:
            self.most = max(self.most, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(), (3, 4), (100_001, 2), (2, 70_000, 1)])
def test_pieces_make_up_the_whole(shape):
    x = torch.randn(shape).masked_fill_(torch.rand(shape) < 0.1, math.inf)
    assert torch.equal(where_true(torch.isinf, x), torch.isinf(x))
    assert sum(part.numel() for (part,) in pieces(x)) == x.numel()
    assert all(part.numel() <= PIECE for (part,) in pieces(x))


def test_a_look_at_values_of_which_some_are_missing_makes_no_number_for_each():
    x = torch.zeros(2**17, 2)
    x[-5, 1] = torch.nan
    fn = IncompleteMultivariateNormal.of(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    site = {"fn": fn.expand([len(x)]), "value": x, "mask": None, "cond_indep_stack": ()}
    with Asked() as asked:  # torch makes the absolute value of each
        assert not data_problems("x", site)
    assert 0 < asked.most <= 2**16


def test_patterns_of_parts_are_those_of_all():
    seen = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    assert torch.equal(distinct_patterns(seen.split(7)), patterns_of(seen).seen)


def test_several_chunks_of_rows_with_missing_entries_have_the_evidence_of_their_marginals():
    torch.manual_seed(0)
    x = torch.randn(9000, 2, dtype=torch.float64)
    x[torch.rand(9000, 2) < 0.3] = torch.nan
    w = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mu = torch.tensor([[-1.0, 0.5], [2.0, 0.0]], dtype=torch.float64)
    S = torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[2.0, -0.3], [-0.3, 1.0]]], dtype=torch.float64)

    def model(x):
        weights = pyro.param("w", w.clone(), constraint=constraints.simplex)
        means = pyro.param("mu", mu.clone())
        spreads = pyro.param("S", S.clone(), constraint=constraints.positive_definite)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(means[z], spreads[z]), obs=x)

    result = ExactPosteriorEM(model, missing="nan").fit(x, max_steps=1, tol=0)
    seen, y = ~torch.isnan(x), x.nan_to_num(0.0)
    each = torch.zeros(9000, 2, dtype=torch.float64)
    for k in range(2):
        both = torch.distributions.MultivariateNormal(mu[k], S[k]).log_prob(y)
        one = torch.distributions.Normal(mu[k], S[k].diagonal().sqrt()).log_prob(y)
        each[:, k] = torch.where(seen.all(1), both, (one * seen).sum(1)) + w[k].log()
    assert result.history[0] == pytest.approx(float(each.logsumexp(1).sum()), rel=1e-11)
