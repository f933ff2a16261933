"""What a model does may hang on what nobody can look up: each kind of change is found all the same.

Here it hangs on a number that no name of the model stands for, and changes when the model has come to
be known by what it asks of torch. The truth is what an object says that has never read the model.
"""

import operator
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, PyroEMError
from pyro_em.plan import kept
from pyro_em.tracing.calls import CallLog

X = torch.tensor([0.3, -1.2, 4.1, 3.7, 0.1, 2.2])
GROUP = torch.tensor([0, 1, 1, 0, 2, 2])


class _Elsewhere:
    changed = False

    @staticmethod
    def get(name):
        return getattr(_Elsewhere, name)


_changed = operator.methodcaller("get", "changed")


def _is():
    return _changed(_Elsewhere)


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * (3 if _is() else 2)

    @staticmethod
    def backward(ctx, grad):
        return grad * (3 if _is() else 2)


def _kept_values(m):
    """Numbers that pass through memory which numpy writes."""
    out = m.clone()
    out.detach().numpy()[:] = [1.0, -2.0] if _is() else [0.0, 3.0]
    return out


# From parameters `mu` and `nu`, the latent and the data to the mean of what is observed.
MEANS = {
    "another parameter": lambda mu, nu, z, x: (nu if _is() else mu)[z],
    "one more operation": lambda mu, nu, z, x: mu[z] + 1 if _is() else mu[z],
    "a constant as a tensor": lambda mu, nu, z, x: mu[z] + torch.tensor(1.5 if _is() else 0.5),
    "a constant of numpy": lambda mu, nu, z, x: (
        mu[z] + torch.as_tensor(np.full(1, 1.5 if _is() else 0.5))
    ),
    "memory of numpy": lambda mu, nu, z, x: (
        mu[z] + torch.from_numpy(np.full(1, 1.5 if _is() else 0.5))
    ),
    "written by numpy": lambda mu, nu, z, x: _kept_values(mu)[z],
    "rows that read each other": lambda mu, nu, z, x: mu[z.roll(1, -1) if _is() else z],
    "rows that read each other, either way made": lambda mu, nu, z, x: mu[
        (z, z.roll(1, -1))[int(_is())]
    ],
    "by how much they are shifted": lambda mu, nu, z, x: mu[
        z.roll(torch.tensor(int(_is())), -1).roll(0, -1)
    ],
    "rows that read the data of others": lambda mu, nu, z, x: (
        mu[z] + 0.1 * (x.flip(0) if _is() else x.clone())
    ),
    "where an index comes from": lambda mu, nu, z, x: (
        mu[z] + nu[(GROUP.flip(0) if _is() else GROUP) % 2]
    ),
    "what is written in place": lambda mu, nu, z, x: mu[z].add_(nu[0] if _is() else nu[1]),
    "the dimension of an outer function": lambda mu, nu, z, x: torch.einsum(
        "i,j->ij" if _is() else "j,i->ij", mu, nu
    )[z, 0],
    "inside a vmap": lambda mu, nu, z, x: torch.vmap(lambda m: m * 2 if _is() else m + 2)(mu)[z],
    "inside a function with its own gradient": lambda mu, nu, z, x: _Doubling.apply(mu)[z],
    "a number that leaves torch": lambda mu, nu, z, x: mu[z] + (nu if _is() else mu)[1].item(),
    "whether a gradient flows": lambda mu, nu, z, x: (mu.detach() if _is() else mu)[z],
}


def _mean(read):
    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 3.0]))
        nu = pyro.param("nu", torch.tensor([4.0, 2.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(read(mu, nu, z, x), 1.5), obs=x)

    return model


def _sites(x):
    """A site more."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)
        if _is():
            pyro.sample("y", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)


def _distributions(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        kind = dist.Laplace if _is() else dist.Normal
        pyro.sample("x", kind(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)


def _masked(x):
    with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=x > 0 if _is() else x < 3):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)


def _scaled(x):
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=2.0 if _is() else 1.0):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)


def _plates(x):
    """The latent leaves its plate: all rows have one."""
    rows = pyro.plate("rows", len(x))
    if _is():
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
    with rows:
        if not _is():
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)


def _constraints(x):
    """A parameter that is declared otherwise."""
    within = constraints.interval(0.0, 9.0) if _is() else constraints.positive
    s = pyro.param("s", torch.tensor([1.0, 2.0]), constraint=within)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], s[z]), obs=x)


def _observed(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=-x if _is() else x / 2)


MODELS = {**{name: _mean(read) for name, read in MEANS.items()}}
MODELS |= {f.__name__: f for f in (_sites, _distributions, _masked, _scaled, _plates)}
MODELS |= {f.__name__: f for f in (_constraints, _observed)}


def _unread(model):
    return types.FunctionType(
        model.__code__, model.__globals__, model.__name__, model.__defaults__, model.__closure__
    )


def outcome(call):
    try:
        return call()
    except PyroEMError as error:
        return str(error)


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_change_is_found(name, monkeypatch):
    model = _unread(MODELS[name])
    monkeypatch.setattr(_Elsewhere, "changed", False)
    em = ExactPosteriorEM(model)
    em.score(X)
    em.score(X + 0.1), em.score(X - 0.1)
    _Elsewhere.changed = True
    got = outcome(lambda: em.score(X + 1))
    expected = outcome(lambda: ExactPosteriorEM(_unread(model)).score(X + 1))
    assert got == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-9))
    assert outcome(lambda: em.score(X + 1)) == got


def test_calls_stand_for_operations_from_the_third_call_on(monkeypatch):
    """Else the test above would test nothing."""
    seen = []
    noting = CallLog.noting
    monkeypatch.setattr(
        CallLog, "noting", lambda log, limit: seen.append(log.beneath is None) or noting(log, limit)
    )
    monkeypatch.setattr(_Elsewhere, "changed", False)
    em = ExactPosteriorEM(_unread(MODELS["one more operation"]))
    for n in range(4):
        em.score(X + n)
    assert seen == [False, True, True]
    (known,) = kept._by_model[em._session.request.model].values()
    assert known.calls is not None
    _Elsewhere.changed = True
    em.score(X)  # calls tell nothing, nor do operations: read anew
    (known,) = kept._by_model[em._session.request.model].values()
    assert known.calls is None and known.has_calls
