"""The models that Pyro ships as examples, handed over as they are; Pyro's own ELBO is the oracle.

Written afresh after the GMM tutorial and the examples hmm, lda, capture_recapture and ss_vae_M2 of
Pyro 1.9, with the same sites, plates, masks and annotations.
"""

from __future__ import annotations

import functools
import itertools
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

from pyro_em import (
    Alternating,
    ClosedForm,
    DegenerateError,
    EMStatus,
    ExactPosteriorEM,
    ModelError,
    PyroEMWarning,
    UsageError,
)

pytestmark = pytest.mark.slow


def adam(lr=0.1):
    return pyro.optim.Adam({"lr": lr})


def pyro_bounds(model, guide, *args, nesting, particles=1, **kwargs) -> torch.Tensor:
    """Pyro's own draws of the bound at the parameters in the store."""
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)
    return torch.tensor([-elbo.loss(model, guide, *args, **kwargs) for _ in range(particles)])


def assert_same_bound(em, *args, nesting, particles=20, **kwargs) -> None:
    """The drawn bound is Pyro's, within 3.5 standard errors."""
    terms = em.elbo(*args, num_particles=particles, **kwargs)
    theirs = pyro_bounds(em.model, em.guide, *args, nesting=nesting, particles=particles, **kwargs)
    error = math.hypot(terms.standard_error, float(theirs.std()) / particles**0.5)
    assert abs(terms.value - float(theirs.mean())) < 3.5 * error
    assert error < 0.1 * abs(terms.value)  # so that the comparison means something


def assert_same_objective(em, result, *args, nesting) -> None:
    """Evidence plus log prior is Pyro's loss with the point-estimate guide, to rounding."""
    theirs = float(pyro_bounds(em.model, em.guide, *args, nesting=nesting))
    assert result.log_evidence + result.log_prior == pytest.approx(theirs, rel=1e-6)
    assert result.elbo == pytest.approx(theirs, rel=1e-6)


def assert_rises(result) -> None:
    """Monotone, and better than at the start."""
    history = [*result.history, result.elbo]
    for before, after in itertools.pairwise(history):
        assert after >= before - 1e-9 * max(1.0, abs(before))
    assert history[-1] > history[0] + 1e-3


def assert_learns(result, tail: int = 10) -> None:
    """A drawn bound improves from its first draws to its last; the rest is finite."""
    values = list(result.history)
    assert sum(values[-tail:]) > sum(values[:tail])
    assert math.isfinite(result.elbo)
    assert all(bool(torch.isfinite(v).all()) for v in result.params.values())


def routes(em, *args, **kwargs) -> dict[str, str]:
    return {r.site: r.route for r in em.plan(*args, **kwargs).routes}


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


def rows(args, size):
    return dist.Dirichlet(0.9 * torch.eye(size) + args.jump)


def tones(beta, *shape):
    return dist.Beta(*beta).expand(shape).to_event(len(shape))


def hmm_0(sequences, lengths, args, batch_size=None, include_prior=True):
    D = sequences.shape[-1]
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args, args.hidden_dim).to_event(1))
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
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t])


def hmm_1(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    assert lengths.shape == (N,)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args, args.hidden_dim).to_event(1))
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
        probs_x = pyro.sample("probs_x", rows(args, args.hidden_dim).to_event(1))
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
        probs_w = pyro.sample("probs_w", rows(args, H).to_event(1))
        probs_x = pyro.sample("probs_x", rows(args, H).to_event(1))
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
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, d]), obs=sequences[batch, t])


def hmm_4(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    H = int(args.hidden_dim**0.5)
    with poutine.mask(mask=include_prior):
        probs_w = pyro.sample("probs_w", rows(args, H).to_event(1))
        probs_x = pyro.sample("probs_x", rows(args, H).expand_by([H]).to_event(2))
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
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, d]), obs=sequences[batch, t])


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
        return self.hidden_to_logits(torch.relu(self.x_to_hidden(one_hot) + self.y_to_hidden(seen)))


def hmm_5(sequences, lengths, args, batch_size=None, include_prior=True):
    N, _, D = map(int, sequences.shape)
    pyro.module("tones_generator", args.generator)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", rows(args, args.hidden_dim).to_event(1))
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
                    pyro.sample(f"x_{t}", dist.Categorical(step), infer={"enumerate": "parallel"}),
                )
                with plate:
                    pyro.sample(
                        f"y_{t}",
                        dist.Bernoulli(probs_y[now.squeeze(-1)]),
                        obs=sequences[batch, t],
                    )


HMMS = {0: hmm_0, 1: hmm_1, 2: hmm_2, 3: hmm_3, 4: hmm_4, 5: hmm_5}


def polyphony(hidden=2, beta=(1.1, 1.9), jump=1.1, raftery=False):
    """Three padded sequences over five tones, and the example's options."""
    torch.manual_seed(3)
    sequences = torch.bernoulli(torch.full((3, 6, 5), 0.4))
    lengths = torch.tensor([6, 4, 5])
    generator = TonesGenerator(hidden, 8, 1, 5)
    return (
        sequences,
        lengths,
        SimpleNamespace(
            hidden_dim=hidden, beta=beta, jump=jump, raftery=raftery, generator=generator
        ),
    )


# Latent Dirichlet allocation, after lda.py.


def lda(data=None, args=None, batch_size=None):
    with pyro.plate("topics", args.num_topics):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(args.shape, 1.0))
        topic_words = pyro.sample(
            "topic_words", dist.Dirichlet(args.concentration * torch.ones(args.num_words))
        )
    with pyro.plate("documents", args.num_docs) as index:
        if data is not None:
            assert data.shape == (args.num_words_per_doc, args.num_docs)
            data = data[:, index]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", args.num_words_per_doc):
            word_topics = pyro.sample(
                "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
            )
            data = pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)
    return topic_weights, topic_words, data


def lda_subsampled(data, args, batch_size=None):
    """As the example once was, with the batch in the model's plate too."""
    with pyro.plate("topics", args.num_topics):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(args.shape, 1.0))
        topic_words = pyro.sample(
            "topic_words", dist.Dirichlet(args.concentration * torch.ones(args.num_words))
        )
    with pyro.plate("documents", args.num_docs, batch_size) as index:
        data = data[:, index]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", args.num_words_per_doc):
            word_topics = pyro.sample(
                "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
            )
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)


def predictor_of(args):
    return nn.Sequential(
        nn.Linear(args.num_words, 6),
        nn.Sigmoid(),
        nn.Linear(6, args.num_topics),
        nn.Sigmoid(),
        nn.Softmax(dim=-1),
    )


def lda_guide(predictor, data, args, batch_size=None):
    weights = pyro.param(
        "topic_weights_posterior", lambda: torch.ones(args.num_topics), constraints.positive
    )
    words = pyro.param(
        "topic_words_posterior",
        lambda: torch.ones(args.num_topics, args.num_words),
        constraints.greater_than(0.5),
    )
    with pyro.plate("topics", args.num_topics):
        pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(words))
    pyro.module("predictor", predictor)
    with pyro.plate("documents", args.num_docs, batch_size) as index:
        data = data[:, index]
        counts = torch.zeros(args.num_words, index.size(0))
        counts = counts.scatter_add(0, data, torch.ones(data.shape))
        pyro.sample("doc_topics", dist.Delta(predictor(counts.transpose(0, 1)), event_dim=1))


def documents(**changes):
    """Nine documents of eight words, over six words and two topics."""
    options = {
        "num_topics": 2,
        "num_words": 6,
        "num_docs": 9,
        "num_words_per_doc": 8,
        "shape": 0.5,
        "concentration": 1 / 6,
    }
    args = SimpleNamespace(**{**options, **changes})
    half = torch.randint(3, (8, 9), generator=torch.Generator().manual_seed(1))
    return half + 3 * (torch.arange(9) % 2), args


# Capture and recapture, after cjs.py.


def cjs(capture_history, sex=None):
    N, T = capture_history.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", N, dim=-1):
        z = torch.ones(N)
        seen = torch.zeros(N).bool()
        for t in pyro.markov(range(T)):
            with poutine.mask(mask=seen):
                survive = seen.to(z.dtype) * phi * z + (1 - seen.to(z.dtype))
                z = pyro.sample(f"z_{t}", dist.Bernoulli(survive), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
            seen = seen | capture_history[:, t].bool()


def cjs_in_place(capture_history, sex=None):
    """The example's own line changes the mask in place, after sites have taken it."""
    N, T = capture_history.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", N, dim=-1):
        z = torch.ones(N)
        seen = torch.zeros(N).bool()
        for t in pyro.markov(range(T)):
            with poutine.mask(mask=seen):
                survive = seen.float() * phi * z + (1 - seen.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(survive), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
            seen |= capture_history[:, t].bool()


def cjs_log_likelihood(history, phi, rho) -> float:
    """Sum over the step at which an animal was last alive: no recursion, no Pyro."""
    total = 0.0
    for animal in history.tolist():
        caught = [t for t, y in enumerate(animal) if y]
        if not caught:
            continue
        first, last, T = caught[0], caught[-1], len(animal)
        likelihood = 0.0
        for end in range(last, T):
            alive = phi ** (end - first) * (1 - phi if end < T - 1 else 1.0)
            for t in range(first + 1, end + 1):
                alive *= rho if animal[t] else 1 - rho
            likelihood += alive
        total += math.log(likelihood)
    return total


def captures():
    """Forty animals over five occasions."""
    g = torch.Generator().manual_seed(4)
    alive, out = torch.ones(40, dtype=torch.bool), []
    for _ in range(5):
        out.append(alive & (torch.rand(40, generator=g) < 0.6))
        alive = alive & (torch.rand(40, generator=g) < 0.75)
    return torch.stack(out, -1).double()


# The semi-supervised VAE, after ss_vae_M2.py.


def network(*sizes):
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Softplus(), nn.Linear(*sizes[1:]))


class SSVAE(nn.Module):
    def __init__(self, classes=3, pixels=6, z_dim=2):
        super().__init__()
        self.classes, self.z_dim = classes, z_dim
        self.encoder_y = network(pixels, 8, classes)
        self.encoder_loc = network(pixels + classes, 8, z_dim)
        self.encoder_scale = network(pixels + classes, 8, z_dim)
        self.decoder = network(z_dim + classes, 8, pixels)

    @staticmethod
    def join(a, b):
        shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), self.z_dim), 1.0).to_event(1))
            prior = xs.new_ones(len(xs), self.classes) / self.classes
            ys = pyro.sample("y", dist.OneHotCategorical(prior), obs=ys)
            loc = self.decoder(self.join(zs, ys)).sigmoid()
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                alpha = self.encoder_y(xs).softmax(-1)
                ys = pyro.sample("y", dist.OneHotCategorical(alpha))
            both = self.join(xs, ys)
            loc, scale = self.encoder_loc(both), self.encoder_scale(both).exp()
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def images():
    torch.manual_seed(2)
    ys = torch.eye(3)[torch.arange(12) % 3]
    xs = torch.bernoulli(0.1 + 0.8 * ys.repeat_interleave(2, -1))
    return xs, ys


# A toy mixture whose locations a guide of the user's own draws.


def toy(x):
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def toy_guide(x):
    m = pyro.param("m", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.full((2,), 0.3), constraint=constraints.positive)
    with pyro.plate("components", 2):
        pyro.sample("loc", dist.Normal(m, s))


# ---------------------------------------------------------------------- the mixture


GMM_SITES = ["weights", "locs", "scale"]


@pytest.mark.parametrize(
    "make", [lambda: "map", lambda: AutoDelta(poutine.block(gmm, expose=GMM_SITES))]
)
def test_the_tutorials_mixture_at_a_point_estimate(make) -> None:
    em = ExactPosteriorEM(gmm, make())
    assert routes(em, FIVE) == {
        "weights": "point estimate",
        "scale": "point estimate",
        "locs": "point estimate",
        "assignment": "enumerate",
    }
    result = em.fit(FIVE, init="random", seed=0, tol=1e-4)
    assert result.converged
    assert_rises(result)
    assert_same_objective(em, result, FIVE, nesting=1)
    locs, weights = result.params["locs"], result.params["weights"]
    order = locs.argsort()
    # the data are two clumps far apart: the modes are known in closed form
    assert weights[order].tolist() == pytest.approx([1.5 / 4, 2.5 / 4], abs=1e-3)
    assert locs[order].tolist() == pytest.approx([0.5, 11.0], abs=0.05)
    assert em.posterior(FIVE).mode()["assignment"].tolist() == [order[0]] * 2 + [order[1]] * 3
    assert result.num_free_parameters == 4


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_the_tutorials_mixture_with_autoguides(guide) -> None:
    em = ExactPosteriorEM(gmm, guide, adam())
    assert routes(em, FIVE) == {
        "weights": "guide",
        "scale": "guide",
        "locs": "guide",
        "assignment": "enumerate",
    }
    assert_learns(em.fit(FIVE, max_steps=24, seed=0))
    assert_same_bound(em, FIVE, nesting=1)
    probs = em.posterior(FIVE).probs("assignment")
    assert probs.shape == (5, 2)
    assert torch.allclose(probs.sum(-1), torch.ones(5))


def test_the_tutorials_mixture_without_a_guide_is_told_what_to_add() -> None:
    with pytest.raises(ModelError) as caught:
        ExactPosteriorEM(gmm).fit(FIVE)
    for site in GMM_SITES:
        assert f"site '{site}': a continuous latent" in str(caught.value)
    assert "guide='map'" in str(caught.value)


def test_the_tutorials_mixture_without_a_guide_is_told_nothing_else() -> None:
    with pytest.raises(ModelError) as caught:
        ExactPosteriorEM(gmm).fit(FIVE)
    assert "put 'obs' inside plate 'components'" not in str(caught.value)


@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
def test_a_guide_built_on_the_whole_mixture_is_refused_with_the_remedy(guide) -> None:
    with pytest.raises(ModelError, match=rf"pass the class: .*model, {guide.__name__}"):
        ExactPosteriorEM(gmm, guide(gmm)).fit(FIVE)


# ---------------------------------------------------------------------- hidden Markov models


def probabilities_only(model):
    return AutoDelta(poutine.block(model, expose_fn=lambda m: m["name"].startswith("probs_")))


def hmm_data(k, **options):
    """Arguments in full: the model's own batch_size by position."""
    return (*polyphony(4 if k in (3, 4) else 2, **options), None)


def nesting_of(k):
    return 1 if k == 0 else 2


@pytest.mark.parametrize("k", HMMS)
@pytest.mark.parametrize("form", ["map", "example"])
def test_hidden_markov_examples_are_fitted(k, form) -> None:
    model, data = HMMS[k], hmm_data(k)
    em = ExactPosteriorEM(model, "map" if form == "map" else probabilities_only(model))
    start = em.elbo(*data)
    theirs = float(pyro_bounds(model, em.guide, *data, nesting=nesting_of(k)))
    assert start.value == pytest.approx(theirs, rel=1e-6)
    result = em.fit(*data, init="random", seed=1, max_steps=2 if k == 5 else 4)
    found = {r.site: r.route for r in result.plan.routes}
    assert {n for n, r in found.items() if r == "point estimate"} == {
        n for n in found if n.startswith("probs_")
    }
    assert {r for n, r in found.items() if not n.startswith("probs_")} == {"enumerate"}
    assert_rises(result)
    assert result.status in (EMStatus.CONVERGED, EMStatus.ROUNDING, EMStatus.MAX_STEPS)
    assert_same_objective(em, result, *data, nesting=nesting_of(k))
    # the example evaluates with include_prior=False: the evidence alone
    alone = float(pyro_bounds(model, em.guide, *data, nesting=nesting_of(k), include_prior=False))
    assert result.log_evidence == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("k", HMMS)
def test_parameters_of_the_hidden_markov_examples_are_counted(k) -> None:
    data = hmm_data(k)
    result = ExactPosteriorEM(HMMS[k], "map").fit(*data, max_steps=1)
    network = sum(p.numel() for p in data[2].generator.parameters())
    assert (
        result.num_free_parameters
        == [
            2 + 2 * 5,
            2 + 2 * 5,
            2 + 2 * 2 * 5,
            2 + 2 + 4 * 5,
            2 + 4 + 4 * 5,
            2 + network,
        ][k]
    )


@pytest.mark.parametrize("raftery", [False, True])
def test_the_second_order_example_is_fitted(raftery) -> None:
    data = hmm_data(6, raftery=raftery)
    em = ExactPosteriorEM(hmm_6)
    exact = [n for n, u in em.plan(*data).updates.items() if isinstance(u.update, ClosedForm)]
    assert exact == (["probs_y"] if raftery else ["probs_x", "probs_y"])
    result = em.fit(*data, max_steps=2 if raftery else 8)
    assert_rises(result)
    theirs = pyro_bounds(hmm_6, lambda *a, **k: None, *data, nesting=2)
    assert result.log_evidence == pytest.approx(float(theirs), rel=1e-6)
    assert result.num_free_parameters == (2 + 2 + 1 if raftery else 4) + 2 * 5


def test_sequential_and_vectorised_sequences_are_one_model() -> None:
    found = []
    for k in (0, 1):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = ExactPosteriorEM(HMMS[k], "map")
        init = {"probs_x": torch.tensor([[0.7, 0.3], [0.2, 0.8]])}
        data = hmm_data(k)
        em.plan(*data)
        pyro.get_param_store()["AutoDelta.probs_x"] = init["probs_x"]
        torch.manual_seed(5)
        pyro.get_param_store()["AutoDelta.probs_y"] = torch.rand(2, 5)
        found.append(em.fit(*data, max_steps=10, tol=0))
    assert found[0].elbo == pytest.approx(found[1].elbo, rel=1e-9)
    assert list(found[0].history) == pytest.approx(list(found[1].history), rel=1e-9)
    for name in found[0].params:
        assert torch.allclose(found[0].params[name], found[1].params[name])


REMEDIES = (
    "its posterior mode is on the boundary",
    "the density is unbounded there. The update was rolled back.",
    "use a concentration of at least one",
    "pyro.param instead of pyro.sample",
    "ExactPosteriorEM(model, AutoNormal)",
)


@pytest.mark.parametrize("k", HMMS)
def test_the_examples_own_priors_have_no_mode(k) -> None:
    """Dirichlet(0.1, ...) and Beta(0.1, 0.9) are unbounded at zero: said, and rolled back."""
    data = hmm_data(k, beta=(0.1, 0.9), jump=0.1)
    em = ExactPosteriorEM(HMMS[k], "map")
    em.plan(*data)
    with pytest.warns(PyroEMWarning, match=r"site 'probs_\w', component"):
        result = em.fit(*data, max_steps=40)
    assert result.status is EMStatus.DEGENERATE
    assert not result.converged
    for part in REMEDIES:
        assert part in result.message
    assert all(bool(torch.isfinite(v).all()) for v in result.params.values())
    assert_same_objective(em, result, *data, nesting=nesting_of(k))


def test_a_step_into_an_unbounded_prior_raises_and_changes_nothing() -> None:
    data = hmm_data(1, beta=(0.1, 0.9), jump=0.1)
    em = ExactPosteriorEM(hmm_1, "map")
    em.plan(*data)
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    with pytest.raises(DegenerateError, match=r"site 'probs_\w', component"):
        for _ in range(20):
            em.step(*data)
    assert set(before) == {"AutoDelta.probs_x", "AutoDelta.probs_y"}
    for p in pyro.get_param_store().values():
        assert bool(torch.isfinite(p).all())


def test_the_remedy_of_a_guide_with_a_spread_works_on_the_examples_priors() -> None:
    data = hmm_data(1, beta=(0.1, 0.9), jump=0.1)
    em = ExactPosteriorEM(hmm_1, AutoNormal, adam())
    assert_learns(em.fit(*data, max_steps=24, seed=0))
    assert_same_bound(em, *data, nesting=2)


def test_a_batch_of_sequences_of_one_length_is_fitted_or_refused() -> None:
    sequences, _, args = polyphony()
    data = (sequences, torch.tensor([5, 5, 5]), args, 2)
    with pytest.raises(UsageError, match=r"(?s)plate 'sequences'.*leave subsample_size out"):
        ExactPosteriorEM(hmm_1, "map").fit(*data)
    pyro.clear_param_store()
    em = ExactPosteriorEM(hmm_1, AutoNormal, adam())
    assert_learns(em.fit(*data, max_steps=24, seed=0))
    assert_same_bound(em, *data, nesting=2, particles=30)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("guide", ["map", AutoNormal])
def test_a_batch_of_sequences_of_several_lengths_is_refused_by_its_cause(k, guide) -> None:
    data = (*polyphony(), 2)
    pyro.set_rng_seed(0)  # with some seeds the runs that look see the same sequences
    with pytest.raises((UsageError, ModelError), match="subsample"):
        ExactPosteriorEM(HMMS[k], guide, adam()).fit(*data, max_steps=25)


def test_the_examples_batch_size_need_not_be_passed() -> None:
    sequences, lengths, args = polyphony()
    assert_rises(ExactPosteriorEM(hmm_1, "map").fit(sequences, lengths, args, max_steps=5))


def test_a_sequential_plate_counts_as_rows() -> None:
    rows_of = []
    for k in (0, 1):
        pyro.clear_param_store()
        rows_of.append(ExactPosteriorEM(HMMS[k], "map").fit(*hmm_data(k), max_steps=2).num_rows)
    assert rows_of == [3, 3]


# ---------------------------------------------------------------------- a guide of one's own


def log_evidence_on_a_grid(x, w) -> float:
    """log p(x) with loc[0] < loc[1], by a sum over a fine grid."""
    grid = torch.linspace(-6, 6, 601)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    log_joint = dist.Normal(0.0, 5.0).log_prob(a) + dist.Normal(0.0, 5.0).log_prob(b)
    for value in x:
        both = torch.stack(
            [w[0].log() - 0.5 * (value - a) ** 2, w[1].log() - 0.5 * (value - b) ** 2]
        )
        log_joint = log_joint + both.logsumexp(0) - 0.5 * math.log(2 * math.pi)
    log_joint = log_joint.masked_fill(a >= b, -math.inf)
    return float(log_joint.flatten().logsumexp(0)) + 2 * math.log(12 / 600)


def test_a_mixture_with_marked_labels_and_a_guide_for_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20) - 2, torch.randn(20) + 2])
    em = ExactPosteriorEM(toy, toy_guide, adam())
    assert routes(em, x) == {"loc": "guide", "z": "enumerate"}
    result = em.fit(x, max_steps=60, seed=0)
    assert_learns(result)
    assert_same_bound(em, x, nesting=1)
    evidence = log_evidence_on_a_grid(x, result.params["w"].detach())
    terms = em.elbo(x, num_particles=40)
    assert terms.value < evidence + 4 * terms.standard_error
    assert terms.value > evidence - 0.5
    estimate = em.estimate_evidence(x, num_particles=200)
    assert float(estimate.value) == pytest.approx(evidence, abs=0.3)


def hidden_link(prior, obs, num_obs):
    """After toy_mixture_model_discrete_enumeration.py: A seen -> B hidden -> C seen."""
    p_a = pyro.sample("p_A", dist.Beta(1, 1))
    p_b = pyro.sample("p_B", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    p_c = pyro.sample("p_C", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("data_plate", num_obs):
        a = pyro.sample("A", dist.Bernoulli(p_a.expand(num_obs)), obs=obs["A"])
        b = pyro.sample(
            "B", dist.Bernoulli(Vindex(p_b)[a.type(torch.long)]), infer={"enumerate": "parallel"}
        )
        pyro.sample("C", dist.Bernoulli(Vindex(p_c)[b.type(torch.long)]), obs=obs["C"])


def hidden_link_guide(prior, obs, num_obs):
    a = pyro.param("a", prior["A"], constraint=constraints.positive)
    b = pyro.param("b", prior["B"], constraint=constraints.positive)
    c = pyro.param("c", prior["C"], constraint=constraints.positive)
    pyro.sample("p_A", dist.Beta(a[0], a[1]))
    pyro.sample("p_B", dist.Beta(b[:, 0], b[:, 1]).to_event(1))
    pyro.sample("p_C", dist.Beta(c[:, 0], c[:, 1]).to_event(1))


def test_the_toy_mixture_of_a_hidden_link() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor([[10.0, 1.0], [1.0, 10.0]])
    prior = {"A": torch.tensor([1.0, 10.0]), "B": rows, "C": rows}
    a = torch.bernoulli(torch.full((30,), 0.3), generator=g)
    obs = {"A": a, "C": torch.bernoulli(0.1 + 0.8 * a, generator=g)}
    pair = config_enumerate(hidden_link), hidden_link_guide, adam(0.05)
    found = dict.fromkeys(("p_A", "p_B", "p_C"), "guide") | {"B": "enumerate"}
    assert routes(ExactPosteriorEM(*pair), prior, obs, 30) == found | {"p_A": "conjugate"}
    em = ExactPosteriorEM(*pair, strategy={"p_A": "guide"})
    assert routes(em, prior, obs, 30) == found
    assert_learns(em.fit(prior, obs, 30, max_steps=50, seed=0))
    assert_same_bound(em, prior, obs, 30, nesting=1, particles=50)


# ---------------------------------------------------------------------- topics


def test_topics_at_a_point_estimate() -> None:
    data = (*documents(concentration=1.5, shape=10.0), None)
    em = ExactPosteriorEM(lda, "map")
    assert routes(em, *data) == {
        "topic_weights": "point estimate",
        "topic_words": "point estimate",
        "doc_topics": "point estimate",
        "word_topics": "enumerate",
    }
    result = em.fit(*data, init="random", seed=1, max_steps=15)
    assert_rises(result)
    assert_same_objective(em, result, *data, nesting=2)
    # even documents use words 0-2 and odd ones words 3-5
    topics = result.params["doc_topics"].argmax(-1)
    assert topics.tolist() in ([0, 1] * 4 + [0], [1, 0] * 4 + [1])
    assert result.num_free_parameters == 2 + 2 * 5  # a document's topics are no parameters
    assert result.num_local_estimates == 9 * 1


def test_topics_whose_prior_has_no_mode_are_refused_by_name() -> None:
    data = (*documents(), None)
    with pytest.warns(PyroEMWarning, match="site 'topic_words', component"):
        result = ExactPosteriorEM(lda, "map").fit(*data, init="random", seed=1)
    assert result.status is EMStatus.DEGENERATE
    for part in REMEDIES:
        assert part in result.message


def test_topics_that_start_alike_are_said_to() -> None:
    data = (*documents(concentration=1.5, shape=10.0), None)
    with pytest.warns(PyroEMWarning, match=r"(?s)start is symmetric.*init='random'"):
        result = ExactPosteriorEM(lda, "map").fit(*data)
    assert result.status is EMStatus.SYMMETRIC
    assert not result.converged


def test_topics_with_the_examples_own_guide() -> None:
    texts, args = documents()
    guide = functools.partial(lda_guide, predictor_of(args))
    em = ExactPosteriorEM(lda, guide, adam())
    assert routes(em, texts, args, None) == {
        "topic_weights": "guide",
        "topic_words": "guide",
        "doc_topics": "point estimate",
        "word_topics": "enumerate",
    }
    assert_learns(em.fit(texts, args, None, max_steps=24, seed=0))
    assert_same_bound(em, texts, args, None, nesting=2)


def test_a_batch_of_documents_in_model_and_guide_is_fitted() -> None:
    texts, args = documents()
    guide = functools.partial(lda_guide, predictor_of(args))
    em = ExactPosteriorEM(lda_subsampled, guide, adam())
    assert_learns(em.fit(texts, args, 4, max_steps=24, seed=0))
    assert_same_bound(em, texts, args, 4, nesting=2, particles=50)


def test_a_batch_of_documents_at_a_point_estimate_is_refused() -> None:
    texts, args = documents(concentration=1.5, shape=10.0)
    with pytest.raises(UsageError, match=r"(?s)plate 'documents'.*leave subsample_size out"):
        ExactPosteriorEM(lda_subsampled, "map").fit(texts, args, 4)


def test_the_plan_says_that_a_random_batch_will_be_refused() -> None:
    texts, args = documents(concentration=1.5, shape=10.0)
    try:
        text = str(ExactPosteriorEM(lda_subsampled, "map").plan(texts, args, 4))
    except UsageError as error:
        text = str(error)
    assert "subsample" in text


def test_a_batch_in_the_guides_plate_alone_is_fitted_as_pyro_does() -> None:
    texts, args = documents()
    guide = functools.partial(lda_guide, predictor_of(args))
    assert bool(torch.isfinite(pyro_bounds(lda, guide, texts, args, 4, nesting=2)).all())
    em = ExactPosteriorEM(lda, guide, adam())
    assert_learns(em.fit(texts, args, 4, max_steps=24, seed=0))


def test_the_rows_of_topics_are_documents() -> None:
    data = (*documents(concentration=1.5, shape=10.0), None)
    em = ExactPosteriorEM(lda, "map")
    result = em.fit(*data, init="random", seed=1, max_steps=2)
    assert result.num_rows == 9
    assert em.elbo(*data).pointwise.shape == (9,)


# ---------------------------------------------------------------------- capture and recapture


def test_capture_and_recapture_at_the_maximum() -> None:
    history = captures()
    em = ExactPosteriorEM(cjs, "map")
    assert routes(em, history) == {
        "phi": "point estimate",
        "rho": "point estimate",
        **{f"z_{t}": "enumerate" for t in range(5)},
    }
    result = em.fit(history)
    assert_rises(result)
    assert result.log_prior == 0
    assert_same_objective(em, result, history, nesting=1)
    phi, rho = (float(result.params[n]) for n in ("phi", "rho"))
    best = cjs_log_likelihood(history, phi, rho)
    assert result.log_evidence == pytest.approx(best, rel=1e-9)
    for a, b in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert cjs_log_likelihood(history, phi + a, rho + b) < best
    assert result.num_free_parameters == 2
    assert result.num_rows == int(history.any(-1).sum()) == 37  # the others were never seen


@pytest.mark.parametrize("form", ["class", "built"])
def test_capture_and_recapture_with_a_normal_guide(form) -> None:
    history = captures()
    guide = AutoDiagonalNormal
    if form == "built":
        guide = AutoDiagonalNormal(
            poutine.block(cjs, expose_fn=lambda m: m["name"][:3] in ("phi", "rho"))
        )
    em = ExactPosteriorEM(cjs, guide, adam())
    assert_learns(em.fit(history, max_steps=24, seed=0))
    assert_same_bound(em, history, nesting=1)


def test_a_mask_that_the_example_changes_in_place_is_read_as_pyro_reads_it() -> None:
    """All sites then share the last mask: another likelihood than the one meant, as in Pyro."""
    history = captures()
    em = ExactPosteriorEM(cjs_in_place, "map")
    result = em.fit(history, max_steps=3)
    assert_rises(result)
    assert_same_objective(em, result, history, nesting=1)


def test_a_mask_that_changes_in_place_is_warned_about() -> None:
    with pytest.warns(PyroEMWarning, match="mask"):
        ExactPosteriorEM(cjs_in_place, "map").fit(captures(), max_steps=1)


# ---------------------------------------------------------------------- the semi-supervised VAE


def test_a_semi_supervised_vae_takes_both_kinds_of_batches() -> None:
    xs, ys = images()
    vae = SSVAE()
    em = ExactPosteriorEM(vae.model, config_enumerate(vae.guide), adam(0.03))
    assert routes(em, xs) == {"z": "guide", "y": "guide"}
    assert routes(em, xs, ys) == {"z": "guide"}
    assert "enumerated in the guide" in str(em.plan(xs))
    before = em.elbo(xs, ys, num_particles=20).value, em.elbo(xs, num_particles=20).value
    for _ in range(20):
        assert math.isfinite(em.step(xs, ys))
        assert math.isfinite(em.step(xs))
    after = em.elbo(xs, ys, num_particles=20).value, em.elbo(xs, num_particles=20).value
    assert after[0] > before[0] + 5
    assert after[1] > before[1] + 5
    assert_same_bound(em, xs, ys, nesting=1)
    assert_same_bound(em, xs, nesting=1)


@pytest.mark.parametrize("supervised", [False, True])
def test_a_semi_supervised_vae_is_fitted_in_batches(supervised) -> None:
    xs, ys = images()
    vae = SSVAE()
    em = ExactPosteriorEM(vae.model, config_enumerate(vae.guide), adam(0.01))
    data = (xs, ys) if supervised else (xs,)
    result = em.fit(*data, batch_size=4, num_epochs=12, seed=0)
    assert_learns(result)
    assert_same_bound(em, *data, nesting=1)


def test_a_semi_supervised_vae_needs_no_annotation() -> None:
    xs, _ = images()
    vae = SSVAE()
    em = ExactPosteriorEM(vae.model, vae.guide, adam(0.01))
    assert "enumerated in the guide" in str(em.plan(xs))
    ours = em.elbo(xs, num_particles=30)
    theirs = pyro_bounds(vae.model, config_enumerate(vae.guide), xs, nesting=1, particles=30)
    error = math.hypot(ours.standard_error, float(theirs.std()) / 30**0.5)
    assert abs(ours.value - float(theirs.mean())) < 3.5 * error


def test_a_guides_turn_moves_the_encoder() -> None:
    xs, _ = images()
    vae = SSVAE()
    em = ExactPosteriorEM(vae.model, config_enumerate(vae.guide), adam(0.01))
    before = vae.encoder_y[0].weight.detach().clone()
    decoder = vae.decoder[0].weight.detach().clone()
    em.fit(xs, max_steps=3, schedule=Alternating(1, 0))
    assert torch.equal(vae.decoder[0].weight, decoder)
    assert not torch.equal(vae.encoder_y[0].weight, before)
