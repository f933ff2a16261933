"""The models that Pyro ships as examples, handed over as they are; Pyro's own ELBO is the oracle.

Written afresh after the GMM tutorial and the examples hmm, lda, capture_recapture and ss_vae_M2 of
Pyro 1.9, with the same sites, plates, masks and annotations.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from pyro_em import DegenerateError, ExactPosteriorEM, UsageError
from pyro_em.result import EMStatus

ADAM = {"lr": 0.05}


def pyro_bound(model, guide, *args, nesting, particles=1, **kwargs) -> float:
    """Pyro's own estimate of the bound at the parameters in the store."""
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting)
    losses = [elbo.loss(model, guide, *args, **kwargs) for _ in range(particles)]
    return -sum(losses) / particles


def rises(history) -> bool:
    """No fall by more than rounding."""
    pairs = zip(history, list(history)[1:], strict=False)
    return all(b >= a - 1e-9 * max(1.0, abs(a)) for a, b in pairs)


def learns(history, tail: int = 10) -> bool:
    """A drawn bound improves from its first draws to its last."""
    values = list(history)
    return sum(values[-tail:]) / tail > sum(values[:tail]) / tail


def finite(params) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in params.values())


# The mixture of the GMM tutorial.


@config_enumerate
def gmm(data, K=2):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(K)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", K):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


FIVE = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0], dtype=torch.float64)


# The hidden Markov models of hmm.py.


def rows(size):
    return dist.Dirichlet(0.9 * torch.eye(size) + 0.1)


def tones(beta, *shape):
    return dist.Beta(*beta).expand(shape).to_event(len(shape))


def hmm_0(sequences, lengths, args, batch_size=None, include_prior=True):
    D = sequences.shape[-1]
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args.hidden_dim).to_event(1))
        probs_y = pyro.sample("probs_y", tones(args.beta, args.hidden_dim, D))
    plate = pyro.plate("tones", D, dim=-1)
    for i in pyro.plate("sequences", len(sequences), batch_size):
        length = lengths[i]
        sequence = sequences[i, :length]
        x = 0
        for t in pyro.markov(range(length)):
            x = pyro.sample(
                f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
            )
            with plate:
                pyro.sample(
                    f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t]
                )


def hmm_1(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    assert lengths.shape == (N,)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args.hidden_dim).to_event(1))
        probs_y = pyro.sample("probs_y", tones(args.beta, args.hidden_dim, D))
    plate = pyro.plate("tones", D, dim=-1)
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with plate:
                    pyro.sample(
                        f"y_{t}",
                        dist.Bernoulli(probs_y[x.squeeze(-1)]),
                        obs=sequences[batch, t],
                    )


def hmm_2(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args.hidden_dim).to_event(1))
        probs_y = pyro.sample("probs_y", tones(args.beta, args.hidden_dim, 2, D))
    plate = pyro.plate("tones", D, dim=-1)
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x, y = 0, 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with plate as d:
                    y = pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[x, y, d]), obs=sequences[batch, t]
                    ).long()


def hmm_3(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    H = int(args.hidden_dim**0.5)
    with poutine.mask(mask=include_prior):
        probs_w = pyro.sample("probs_w", rows(H).to_event(1))
        probs_x = pyro.sample("probs_x", rows(H).to_event(1))
        probs_y = pyro.sample("probs_y", tones(args.beta, H, H, D))
    plate = pyro.plate("tones", D, dim=-1)
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        w, x = 0, 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(
                    f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"}
                )
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with plate as d:
                    pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[w, x, d]), obs=sequences[batch, t]
                    )


def hmm_4(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    H = int(args.hidden_dim**0.5)
    with poutine.mask(mask=include_prior):
        probs_w = pyro.sample("probs_w", rows(H).to_event(1))
        probs_x = pyro.sample("probs_x", rows(H).expand_by([H]).to_event(2))
        probs_y = pyro.sample("probs_y", tones(args.beta, H, H, D))
    plate = pyro.plate("tones", D, dim=-1)
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        w = x = torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(
                    f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"}
                )
                x = pyro.sample(
                    f"x_{t}",
                    dist.Categorical(Vindex(probs_x)[w, x]),
                    infer={"enumerate": "parallel"},
                )
                with plate as d:
                    pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[w, x, d]), obs=sequences[batch, t]
                    )


class TonesGenerator(nn.Module):
    def __init__(self, hidden, width, channels, D):
        super().__init__()
        self.hidden, self.D = hidden, D
        self.x_to_hidden = nn.Linear(hidden, width)
        self.y_to_hidden = nn.Linear(channels * D, width)
        self.conv = nn.Conv1d(1, channels, 3, padding=1)
        self.hidden_to_logits = nn.Linear(width, D)

    def forward(self, x, y):
        one_hot = y.new_zeros((*x.shape[:-1], self.hidden)).scatter_(-1, x, 1)
        seen = torch.relu(self.conv(y.reshape(-1, 1, self.D))).reshape((*y.shape[:-1], -1))
        return self.hidden_to_logits(
            torch.relu(self.x_to_hidden(one_hot) + self.y_to_hidden(seen))
        )


def hmm_5(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    pyro.module("tones_generator", args.generator)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args.hidden_dim).to_event(1))
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x, y = 0, torch.zeros(D)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"}
                )
                with pyro.plate(f"tones_{t}", D, dim=-1):
                    y = pyro.sample(
                        f"y_{t}",
                        dist.Bernoulli(logits=args.generator(x, y)),
                        obs=sequences[batch, t],
                    )


def hmm_6(sequences, lengths, args, batch_size=None, include_prior=False):
    N, _, D = sequences.shape
    H = args.hidden_dim
    if args.raftery:
        first = pyro.param("probs_x1", torch.rand(H, H), constraint=constraints.simplex)
        second = pyro.param("probs_x2", torch.rand(H, H), constraint=constraints.simplex)
        mix = pyro.param("mix_lambda", torch.tensor(0.5), constraint=constraints.unit_interval)
        probs_x = mix * first + (1.0 - mix) * second.unsqueeze(-2)
    else:
        probs_x = pyro.param("probs_x", torch.rand(H, H, H), constraint=constraints.simplex)
    probs_y = pyro.param("probs_y", torch.rand(H, D), constraint=constraints.unit_interval)
    plate = pyro.plate("tones", D, dim=-1)
    with pyro.plate("sequences", N, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        now, before = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max())), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                step = Vindex(probs_x)[before, now]
                before, now = (
                    now,
                    pyro.sample(
                        f"x_{t}", dist.Categorical(step), infer={"enumerate": "parallel"}
                    ),
                )
                with plate:
                    pyro.sample(
                        f"y_{t}",
                        dist.Bernoulli(probs_y[now.squeeze(-1)]),
                        obs=sequences[batch, t],
                    )


HMMS = {0: hmm_0, 1: hmm_1, 2: hmm_2, 3: hmm_3, 4: hmm_4, 5: hmm_5}


def polyphony(hidden=2, beta=(1.1, 1.9), raftery=False):
    """Three padded sequences over five tones, and the example's options."""
    torch.manual_seed(3)
    sequences = torch.bernoulli(torch.full((3, 6, 5), 0.4))
    lengths = torch.tensor([6, 4, 5])
    generator = TonesGenerator(hidden, 4, 2, 5)
    return (
        sequences,
        lengths,
        SimpleNamespace(hidden_dim=hidden, beta=beta, raftery=raftery, generator=generator),
    )
