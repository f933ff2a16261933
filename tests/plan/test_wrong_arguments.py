"""Arguments of a wrong type get a sentence; names of other libraries say what does it here."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import (
    Alternating,
    Annealed,
    ClosedForm,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    TraceExact_ELBO,
    UsageError,
    compare,
)

X = tensor([0.0, 0.1, 0.3, 1.0, 1.2, 3.0], dtype=torch.float64)


def mixture(x: Tensor) -> None:
    mu = pyro.param("mu", lambda: torch.arange(2.0))
    w = pyro.param("w", lambda: torch.ones(2) / 2, constraint=constraints.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def drawn(x: Tensor) -> None:
    h = pyro.sample("h", dist.Normal(pyro.param("m", tensor(0.0)), 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def em(**kwargs: Any) -> ExactPosteriorEM:
    return ExactPosteriorEM(mixture, **kwargs)


def guided() -> ExactPosteriorEM:
    return ExactPosteriorEM(drawn, AutoNormal, strategy="guide")


def fit(**kwargs: Any) -> Any:
    return em().fit(X, **{"max_steps": 2, **kwargs})


def fit_guided(**kwargs: Any) -> Any:
    return guided().fit(X, **{"max_steps": 2, **kwargs})


def q() -> Any:
    return em().posterior(X)


def gq() -> Any:
    return guided().posterior(X)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "max_steps word": (lambda: fit(max_steps="a"), "max_steps='a' | whole number"),
    "max_steps None": (lambda: fit(max_steps=None), "max_steps=None"),
    "max_steps fraction": (lambda: fit(max_steps=1.5), "max_steps=1.5 | whole number"),
    "tol word": (lambda: fit(tol="a"), "tol='a' | real number"),
    "tol None": (lambda: fit(tol=None), "tol=None"),
    "tol nan": (lambda: fit(tol=math.nan), "tol=nan"),
    "restarts word": (lambda: fit(num_restarts="a"), "num_restarts='a'"),
    "restarts fraction": (lambda: fit(num_restarts=1.5), "num_restarts=1.5"),
    "seed word": (lambda: fit(seed="a"), "seed='a' is no seed"),
    "seed fraction": (lambda: fit(seed=1.5), "seed=1.5 is no seed"),
    "seed large": (lambda: fit(seed=2**70), "is no seed | 63 bits"),
    "seed bool": (lambda: fit(seed=True), "seed=True"),
    "seed generator": (lambda: fit(seed=torch.Generator()), "an object of type Generator"),
    "progress": (lambda: fit(progress="a"), "progress='a' | True nor False"),
    "callbacks number": (lambda: fit(callbacks=3), "callbacks | cannot be called | [watch]"),
    "callbacks list": (lambda: fit(callbacks=[3]), "callbacks | cannot be called"),
    "init near": (lambda: fit(init="k-means"), "init: 'k-means' is | did you mean 'kmeans'?"),
    "a peer's word": (lambda: fit(n_iter=5), "keyword 'n_iter' | did you mean 'max_steps'?"),
    "another's": (lambda: fit(random_state=5), "keyword 'random_state' | did you mean 'seed'?"),
    "init number": (lambda: fit(init=3), "init: 3 is not understood | {site: labels"),
    "init labels": (lambda: fit(init=[0, 1] * 3), "init | not understood | init={'z': labels}"),
    "init tensor": (lambda: fit(init=torch.zeros(6)), "init: a tensor of shape (6,)"),
    "init key": (lambda: fit(init={3: [0] * 6}), "init | not understood"),
    "init word": (lambda: fit(init={"z": "a"}), "init['z']: 'a' does not make a tensor"),
    "init None": (lambda: fit(init={"z": None}), "init['z']: None does not make a tensor"),
    "epochs word": (lambda: fit_guided(num_epochs="a"), "num_epochs='a'"),
    "epochs fraction": (lambda: fit_guided(num_epochs=1.5), "num_epochs=1.5"),
    "batch word": (lambda: fit_guided(batch_size="a"), "batch_size='a'"),
    "batch fraction": (lambda: fit_guided(batch_size=1.5), "batch_size=1.5"),
    "q word": (lambda: em().elbo(X, q="x"), "q: it is 'x' | {site: probabilities}"),
    "q tensor": (lambda: em().elbo(X, q=torch.ones(6, 2) / 2), "q: it is a tensor of shape (6, 2)"),
    "q result": (lambda: em().elbo(X, q=fit()), "q: it is an object of type EMResult"),
    "q drawn": (lambda: em().elbo(X, q=gq()), "DrawnPosterior | draws are no table"),
    "q value": (lambda: em().elbo(X, q={"z": "a"}), "q['z']: 'a' does not make a tensor"),
    "m_step None": (lambda: em().m_step(None, X), "q: it is None"),  # type: ignore[arg-type]
    "m_step data": (lambda: em().m_step(X), "q: it is a tensor"),  # type: ignore[arg-type]
    "params word": (lambda: em().elbo(X, params="mu"), "params: 'mu' is no dict | result.params"),
    "params tensor": (lambda: em().elbo(X, params=torch.zeros(2)), "params | is no dict"),
    "params result": (lambda: em().elbo(X, params=fit()), "params | EMResult is no dict"),
    "params value": (lambda: em().elbo(X, params={"mu": "a"}), "params['mu']: 'a' does not"),
    "params None": (lambda: em().elbo(X, params={"mu": None}), "params['mu']: None does not"),
    "probs list": (lambda: q().probs(["z"]), "probs | site=['z'] is no site's name"),
    "probs number": (lambda: q().probs(3), "site=3"),
    "joint list": (lambda: q().joint("z", ["z"]), "joint | b=['z']"),
    "sample word": (lambda: q().sample("a"), "n='a' | whole number"),
    "sample fraction": (lambda: q().sample(1.5), "n=1.5"),
    "sample negative": (lambda: q().sample(-1), "n=-1"),
    "sample seed": (lambda: q().sample(2, seed="a"), "seed='a'"),
    "drawn sample": (lambda: gq().sample("a"), "n='a'"),
    "drawn seed": (lambda: gq().sample(2, seed="a"), "seed='a'"),
    "drawn mean": (lambda: gq().mean("h", num_particles="a"), "num_particles='a'"),
    "drawn mean site": (lambda: gq().mean(["h"]), "site=['h']"),
    "drawn probs": (lambda: gq().probs("h", num_particles=0), "num_particles=0"),
    "predictive": (lambda: em().predictive(X, num_samples="a"), "num_samples='a'"),
    "predictive fraction": (lambda: em().predictive(X, num_samples=1.5), "num_samples=1.5"),
    "predictive seed": (lambda: em().predictive(X, seed=1.5), "seed=1.5"),
    "predictive keep": (lambda: em().predictive(X, keep_observed=3), "keep_observed=3"),
    "sort list": (lambda: em().sort_components([0, 1], "mu", X), "site=[0, 1] is no site's name"),
    "sort list, data": (lambda: em().sort_components([0, 1], X), "site=[0, 1]"),
    "sort words": (lambda: em().sort_components("z", ["a", "b"], X), "by: ['a', 'b'] does not"),
    "sort None": (lambda: em().sort_components("z", None, X), "by: None"),
    "sort list alone": (lambda: em().sort_components([1, 0]), "site=[1, 0]"),
    "sort by nothing": (lambda: em().sort_components("z"), "by: None does not say | 'mu', data"),
    "sort dict": (lambda: em().sort_components("z", {"a": 1}, X), "by: {'a': 1} does not"),
    "sort keys": (lambda: em().sort_components("z", [0, 1, 2], X), "by: 3 keys for 2 components"),
    "sort NaN": (lambda: em().sort_components("z", tensor([math.nan, 1.0]), X), "NaN | no order"),
    "sort descending": (
        lambda: em().sort_components("z", "mu", X, descending="a"),
        "descending='a'",
    ),
    "updates word": (lambda: em(updates="mu"), "updates: 'mu' is no dict | {'mu': Fixed()}"),
    "updates list": (lambda: em(updates=["mu"]), "updates: ['mu'] is no dict"),
    "updates value": (lambda: em(updates=Fixed()), "updates: Fixed() is no dict"),
    "updates key": (lambda: em(updates={3: Fixed()}), "updates | is no dict"),
    "strategy key": (lambda: em(strategy={3: "exact"}), "strategy | is no dict"),
    "optim made": (
        lambda: em(optim=torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
        "optim=an object of type Adam | made anew | lambda params",
    ),
    "nesting word": (lambda: em(max_plate_nesting="a"), "max_plate_nesting='a'"),
    "nesting fraction": (lambda: em(max_plate_nesting=1.5), "max_plate_nesting=1.5"),
    "budget word": (lambda: em(max_enumeration="a"), "max_enumeration='a'"),
    "budget negative": (lambda: em(max_enumeration=-5), "max_enumeration=-5"),
    "floor": (lambda: ClosedForm(floor="a"), "floor='a'"),  # type: ignore[arg-type]
    "step size": (lambda: ClosedForm(step_size="a"), "step_size='a'"),  # type: ignore[arg-type]
    "optimizer": (lambda: Gradient("adam"), "optimizer='adam' | lambda"),  # type: ignore[arg-type]
    "steps": (lambda: Gradient(None, "a"), "steps='a'"),  # type: ignore[arg-type]
    "schedule word": (lambda: Annealed("a"), "schedule='a' | neither"),
    "schedule value": (lambda: fit_with(Annealed(lambda i: "a")), "β='a'"),  # type: ignore
    "alternating": (lambda: Alternating("a", 1), "guide_steps='a'"),  # type: ignore[arg-type]
    "alternating fraction": (lambda: Alternating(1.5, 1), "guide_steps=1.5"),  # type: ignore
    "loss nesting": (lambda: TraceExact_ELBO(max_plate_nesting="a"), "max_plate_nesting='a'"),  # type: ignore
    "compare label": (lambda: compare({3: em()}, X), "label 3 is no string"),  # type: ignore
    "compare steps": (lambda: compare({"a": em()}, X, max_steps="a"), "max_steps='a'"),  # type: ignore
    "compare seeds": (lambda: compare({"a": em()}, X, seeds="a"), "seeds='a'"),
    "compare data": (lambda: compare({"a": em()}), "cannot be called | 'x' | the model takes: x"),
    "compare keyword": (lambda: compare({"a": em()}, X, nonsense=3), "'nonsense'"),
    "save": (lambda: em().save(3), "save: 3 is no path"),  # type: ignore[arg-type]
    "load": (lambda: em().load(3), "load: 3 is no path"),  # type: ignore[arg-type]
}


def fit_with(strategy: Any) -> Any:
    return em(strategy=strategy).fit(X, max_steps=2)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert [w for w in words.split(" | ") if w not in text] == [], text


@pytest.mark.parametrize("seed", [np.int64(3), tensor(3), 3])
def test_numbers_of_other_libraries_are_numbers(seed: Any) -> None:
    result = fit(max_steps=np.int64(3), tol=tensor(0.0), num_restarts=np.int32(2), seed=seed)
    assert result.num_steps <= 3 and result.seed == 3
    assert torch.equal(q().sample(np.int64(2), seed=seed)["z"], q().sample(2, seed=3)["z"])
    assert fit(max_steps=math.inf, callbacks=None).converged


# ------------------------------------------------------------------ names of other libraries

NAMES: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "em": (em, ("predict", "decode", "fit_predict", "labels_"), "em.posterior(x).mode()"),
    "em probs": (em, ("predict_proba", "transform", "fit_transform"), "em.posterior(x).probs('z')"),
    "em samples": (em, ("sample",), "em.predictive(x"),
    "em params": (em, ("means_", "weights_", "transmat_", "coef_"), "em.fit(x).params['mu']"),
    "em score": (em, ("loglik",), "em.score(x)"),
    "em rows": (em, ("score_samples",), "em.posterior(x).evidence_per_row"),
    "em ends": (em, ("n_iter_", "converged_", "bic"), "result.num_steps"),
    "result": (fit, ("labels_", "predict", "mode"), "result.posterior.mode()"),
    "result probs": (fit, ("predict_proba", "responsibilities"), "result.posterior.probs('z')"),
    "result evidence": (fit, ("loglik", "llf", "score"), "result.log_evidence"),
    "result params": (fit, ("weights_", "means_"), "result.params['mu']"),
    "result case": (fit, ("BIC", "AIC"), "result.bic"),
    "posterior": (q, ("predict", "labels_", "argmax"), "q.mode()"),
    "posterior probs": (q, ("responsibilities", "predict_proba"), "q.probs('z')"),
    "drawn": (gq, ("predict", "labels"), "q.mode()"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_from_elsewhere_says_what_does_it_here(case: str) -> None:
    make, names, words = NAMES[case]
    thing = make()
    for name in names:
        if hasattr(type(thing), name):  # it has come to exist
            continue
        assert not hasattr(thing, name) and getattr(thing, name, 7) == 7
        with pytest.raises(AttributeError, match=re.escape(words)):
            getattr(thing, name)


def test_what_the_sentences_name_exists() -> None:
    result = fit()
    known = {"em": em(), "result": result, "q": result.posterior, "pyro_em": None}
    for make in (em, fit, q):
        for sentence in set(type(make()).elsewhere.values()):
            for owner, name in re.findall(r"\b(em|result|q)\.([a-z_]+)", sentence):
                assert hasattr(known[owner], name), (owner, name, sentence)
            for name in re.findall(r"em\.elbo\(x[^)]*\)(?: has \w+ \w+)?\.([a-z_]+)", sentence):
                assert hasattr(em().elbo(X), name)


def test_other_names_are_missing_as_ever() -> None:
    for thing in (em(), fit(), q()):
        with pytest.raises(AttributeError, match=r"has no attribute 'nonsense'$"):
            _ = thing.nonsense


def test_an_error_inside_a_property_keeps_its_own_words() -> None:
    class Broken(ExactPosteriorEM):
        @property
        def predict(self) -> Any:
            raise AttributeError("mine")

    with pytest.raises(AttributeError, match=r"^mine$"):
        _ = Broken(mixture).predict


def test_copies_are_whole() -> None:
    assert copy.copy(em()).model is mixture
    for thing in (fit(), q()):
        for twin in (copy.copy(thing), copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
            assert type(twin) is type(thing) and twin.log_evidence == thing.log_evidence
            with pytest.raises(AttributeError, match="mode"):
                _ = twin.labels_


def test_an_unknown_parameter_of_a_result_names_those_that_exist() -> None:
    with pytest.raises(KeyError, match=r"no parameter is called 'nu'; the model has: 'mu', 'w'"):
        fit().params["nu"]
