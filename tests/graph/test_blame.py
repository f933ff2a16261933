"""A model that raises: the message names the culprit and the line, and its advice works."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, ModelError, PyroEMError

NAN = math.nan
X = tensor([0.0, 0.1, 0.3, 1.0, 1.2], dtype=torch.float64)
CODES = tensor([0.0, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def label(k: int = 2) -> Tensor:
    return pyro.sample("z", dist.Categorical(torch.ones(k) / k))


def effects() -> Tensor:
    return pyro.param("effects", lambda: torch.arange(6.0).reshape(2, 3))


def means() -> Tensor:
    return pyro.param("mu", lambda: torch.arange(2.0))


def coded(x: Tensor, codes: Tensor, site: bool = True, cast: bool = False) -> None:
    t = effects()
    with pyro.plate("n", len(x)):
        z = label()
        if site:
            codes = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), obs=codes)
        if cast:
            codes = codes.long()
        pyro.sample("x", dist.Normal(t[z, codes], 1.0), obs=x)


def without_latents(x: Tensor, codes: Tensor) -> None:
    b = pyro.param("b", lambda: torch.zeros(3))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(b[codes], 1.0), obs=x)


def beside_a_coin(x: Tensor, codes: Tensor) -> None:
    t = effects()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(t[z, codes], 1.0), obs=x)


def nested(data: dict[str, Tensor]) -> None:
    t, x = effects(), data["x"]
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(t[label(), data["c"]], 1.0), obs=x)


def gathered(x: Tensor, codes: Tensor) -> None:
    b = pyro.param("b", lambda: torch.zeros(3))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(b.index_select(0, codes), 1.0), obs=x)


def hot(x: Tensor, codes: Tensor) -> None:
    b = pyro.param("b", lambda: torch.zeros(3))
    loc = torch.nn.functional.one_hot(codes, 3).to(b) @ b
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def of_label(x: Tensor, loc: Callable[[Tensor], Any], inside: bool = True) -> None:
    mu = means()
    if inside:
        with pyro.plate("n", len(x)):
            z = label()
            pyro.sample("x", dist.Normal(mu[0] + loc(z), 1.0), obs=x)
    else:
        z = label()
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu[0] + loc(z), 1.0), obs=x)


TABLE: dict[Any, float] = {0: 0.0, 1: 1.0}
LIST, TUPLE = [0.0, 1.0], (0.0, 1.0)
NETS = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])


def key(z: Tensor) -> Any:
    return TABLE[z]


def item_of_list(z: Tensor) -> Any:
    return LIST[z]  # type: ignore[call-overload]


def item_of_tuple(z: Tensor) -> Any:
    return TUPLE[z]  # type: ignore[call-overload]


def item_of_modules(z: Tensor) -> Any:
    return NETS[z](z)  # type: ignore[index]


def looped(z: Tensor) -> Any:
    total = 0.0
    for _ in range(z):  # type: ignore[call-overload]
        total += 1.0
    return total


def onehot(x: Tensor) -> None:
    mu = means()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def too_few_means(x: Tensor) -> None:
    mu = means()
    z = label(9)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu[z + 0 if len(mu) > 9 else z], 1.0), obs=x)


def weighted(x: Tensor, w: Tensor | float) -> None:
    mu = means()
    with pyro.plate("n", len(x)), poutine.scale(scale=w):
        pyro.sample("x", dist.Normal(mu[label()], 1.0), obs=x)


def weighted_and_masked(x: Tensor, w: Tensor) -> None:
    mu = means()
    with (
        pyro.plate("n", len(x)),
        poutine.mask(mask=w > 0),
        poutine.scale(scale=torch.where(w > 0, w, torch.ones_like(w))),
    ):
        pyro.sample("x", dist.Normal(mu[label()], 1.0), obs=x)


def branching_on_data(x: Tensor) -> None:
    mu = means()
    loc = mu[0] if x > 0.5 else mu[1]
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(loc + label(), 1.0), obs=x)


def number_of_data(x: Tensor) -> None:
    mu = means()
    with pyro.plate("n", len(x)):
        z = label()
        pyro.sample("x", dist.Normal(mu[z] + x.item(), 1.0), obs=x)


def refusal(call: Callable[[], Any], kind: type[PyroEMError], words: str) -> str:
    with pytest.raises(PyroEMError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert [w for w in words.split(" | ") if w not in text] == [], text
    return text


def fit(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ExactPosteriorEM(model).fit(*args, max_steps=3, **kwargs)


INDEX: dict[str, tuple[Callable[[], Any], str]] = {
    "observed site": (
        lambda: fit(coded, X, CODES),
        "site 'c' | observed values are floats (float64) | t[z, codes] | codes.long()",
    ),
    "argument": (lambda: fit(coded, X, CODES, False), "argument 'codes' | float64 | codes.long()"),
    "no latent": (lambda: fit(without_latents, X, CODES), "argument 'codes' | b[codes] | .long()"),
    "beside a coin": (lambda: fit(beside_a_coin, X, CODES), "argument 'codes' | codes.long()"),
    "in a dict": (
        lambda: fit(nested, {"x": X, "c": CODES}),
        "argument 'data['c']' | data['c'].long()",
    ),
    "index_select": (lambda: fit(gathered, X, CODES), "argument 'codes' | codes.long()"),
    "one_hot": (lambda: fit(hot, X, CODES), "argument 'codes' | codes.long()"),
    "dict": (lambda: fit(of_label, X, key), "site 'z' | key of a dict | TABLE[z] | torch.stack"),
    "dict, one latent": (lambda: fit(of_label, X, key, False), "site 'z' | key of a dict"),
    "list": (lambda: fit(of_label, X, item_of_list), "site 'z' | Python list | torch.stack"),
    "tuple": (lambda: fit(of_label, X, item_of_tuple), "site 'z' | Python tuple | torch.stack"),
    "modules": (lambda: fit(of_label, X, item_of_modules), "site 'z' | ModuleList | Vindex"),
    "range": (lambda: fit(of_label, X, looped), "site 'z' | length of a loop | mask"),
    "one-hot latent": (lambda: fit(onehot, X), "site 'z' | zeros and a one | dist.Categorical"),
}


@pytest.mark.parametrize("case", INDEX)
def test_the_value_that_cannot_be_an_index_is_named(case: str) -> None:
    call, words = INDEX[case]
    text = refusal(call, ModelError, words + " | test_blame.py, line ")
    if "codes" in words:
        assert "Python list" not in text and "'z'" not in text, text


def test_the_advice_on_an_index_works() -> None:
    a = fit(coded, X, CODES, True, True)
    pyro.clear_param_store()
    b = fit(coded, X, CODES.long())
    assert a.log_evidence == pytest.approx(b.log_evidence, rel=1e-12)
    pyro.clear_param_store()
    table = torch.stack([tensor(0.0), tensor(1.0)])
    c = fit(of_label, X, lambda z: table[z])
    n, outs = torch.arange(len(X)), lambda: torch.stack([net(X) for net in NETS], -1)
    pyro.clear_param_store()
    d = fit(of_label, X, lambda z: 0.0 * Vindex(outs())[..., n, z] + table[z])
    assert c.log_evidence == pytest.approx(d.log_evidence, rel=1e-9)


@pytest.mark.parametrize("beyond", [tensor([1, 2, 3, 1, 2]), tensor([0, 3, 0, 1, 2])])
def test_codes_beyond_what_they_index(beyond: Tensor) -> None:
    text = refusal(lambda: fit(coded, X, beyond, False), DataError, "argument 'codes' | to 3 | 3")
    assert ("codes - 1" in text) == (int(beyond.min()) == 1)


def test_a_latent_with_more_values_than_the_parameter() -> None:
    words = "site 'z' | beyond what it indexes | dimension 0 has size 2 | as many"
    refusal(lambda: fit(too_few_means, X), ModelError, words)


def test_data_are_not_taken_for_a_random_value() -> None:
    text = refusal(lambda: fit(branching_on_data, X), ModelError, "argument 'x' | torch.where")
    assert "random" not in text
    text = refusal(lambda: fit(number_of_data, X), ModelError, "x.item() | one Python number")
    assert "random" not in text


def test_a_weight_of_zero() -> None:
    w = tensor([1.0, 0.0, 2.0, 1.0, 3.0])
    words = "poutine.scale | 1 of its 5 numbers is zero | mask(w > 0)"
    refusal(lambda: fit(weighted, X, w), ModelError, words)
    refusal(lambda: fit(weighted, X, w - 1), ModelError, "3 of its 5 numbers are not positive")
    refusal(lambda: fit(weighted, X, w * NAN), DataError, "argument 'w' | 5 of its 5 | NaN")
    refusal(lambda: fit(weighted, X, 0.0), ModelError, "scale > 0 | it is zero")
    got = fit(weighted_and_masked, X, w)
    pyro.clear_param_store()
    kept = w > 0
    assert got.log_evidence == pytest.approx(fit(weighted, X[kept], w[kept]).log_evidence)


# ------------------------------------------------------------------ NaN on its way


def covariance(x: Tensor, start: Callable[[Tensor], Tensor]) -> None:
    s = pyro.param("S", start(x), constraint=constraints.positive_definite)
    mu = pyro.param("mu", lambda: torch.arange(4.0).reshape(2, 2))
    with pyro.plate("n", len(x)):
        seen = torch.isfinite(x).all(-1)
        pyro.sample("x", dist.MultivariateNormal(mu[label()], s), obs=x, obs_mask=seen)


def around_the_mean(x: Tensor) -> None:
    mu = pyro.param("mu", x.mean() + torch.arange(2.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu[label()], 1.0), obs=x)


def regression(x: Tensor, w: Tensor) -> None:
    mu = means()
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu[label()] * w, 1.0), obs=x)


def rows(nan: bool = True) -> Tensor:
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    if nan:
        x[3, 1] = NAN
    return x


def test_nan_that_reaches_a_covariance_is_named_where_it_is() -> None:
    def start(x: Tensor) -> Tensor:
        return torch.cov(x.T)

    words = "argument 'x': 1 of 24 numbers is NaN, the first at index (3, 1) | x[torch.isfinite(x)"
    text = refusal(lambda: fit(covariance, rows(), start), DataError, words + " | parameter 'S'")
    assert text.index("argument 'x'") < text.index("parameter 'S'")
    assert "positive-definite" not in text
    # What is advised works, and the bad start is forgotten.
    fit(covariance, rows(), lambda x: torch.cov(x[torch.isfinite(x).all(-1)].T))


def test_nan_that_reaches_a_mean_is_named_and_its_start_forgotten() -> None:
    x = X.clone()
    x[2] = NAN
    refusal(lambda: fit(around_the_mean, x), DataError, "1 of 5 | NaN | parameter 'mu'")
    fit(around_the_mean, X)


def test_nan_in_a_variable_of_the_model() -> None:
    x = rows()

    def model() -> None:
        mu = pyro.param("mu", x.mean(0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x.nan_to_num())

    refusal(lambda: fit(model), DataError, "variable 'x' | 1 of 24 | (3, 1) | 'mu'")


def test_nan_in_a_covariate() -> None:
    w = torch.ones(5)
    w[4] = NAN
    words = "argument 'w': 1 of 5 | NaN | (4,) | parameter loc | distribution Normal"
    words += " | 1 of 5, the first at index (4,): nan | mu[label()] * w"
    text = refusal(lambda: fit(regression, X, w), DataError, words)
    assert "Trace Shapes" not in text and "tensor([" not in text


# ------------------------------------------------------------------ loops


def sequential(x: Tensor, plate: bool) -> None:
    mu = means()
    for i in pyro.plate("data", len(x)) if plate else range(len(x)):
        z = pyro.sample(f"z_{i}", dist.Categorical(torch.ones(2) / 2))
        pyro.sample(f"x_{i}", dist.Normal(mu[z], 1.0), obs=x[i])


def chain(x: Tensor) -> None:
    mu, z = means(), tensor(0)
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2)[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


@pytest.mark.parametrize("plate", [True, False])
def test_rows_in_a_loop_are_sent_to_a_plate_first(plate: bool) -> None:
    text = refusal(lambda: fit(sequential, torch.zeros(100), plate), ModelError, "100 enumerated")
    first = next(line for line in text.splitlines() if line.startswith("    - "))
    assert "pyro.plate" in first and "markov" not in first
    if plate:
        assert 'with pyro.plate("data", 100):' in first


def test_a_chain_in_a_loop_is_sent_to_markov_first() -> None:
    text = refusal(lambda: fit(chain, torch.zeros(100)), ModelError, "100 enumerated")
    assert "pyro.markov(range(T))" in next(t for t in text.splitlines() if t.startswith("    - "))


def test_a_cell_of_a_notebook_is_called_so() -> None:
    source = "def model(x):\n    return [1, 2][x]\n"
    space: dict[str, object] = {}
    exec(compile(source, "/tmp/ipykernel_12/1379834911.py", "exec"), space)
    with pytest.raises(ModelError, match=r"\(notebook cell, line 2") as caught:
        ExactPosteriorEM(space["model"]).fit(torch.tensor([0.5]))  # type: ignore[arg-type]
    assert "1379834911" not in str(caught.value)
