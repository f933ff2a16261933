"""Predictors that are affine in logarithms of parameters, read off the autograd graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.useful import Useful

N, K = 7, 3
X = torch.arange(2.0 * N, dtype=torch.float64).reshape(N, 1, 2).sin()
Z = torch.arange(K)
EXPOSURE = torch.linspace(0.5, 2.0, N, dtype=torch.float64).unsqueeze(-1)

Expression = Callable[[Tensor, Tensor, Tensor], Tensor]  # of w (K, 2), a (K,), b ()

RATES: dict[str, Expression] = {
    "product": lambda w, a, b: a[Z] * (-(X * w[Z]).sum(-1)).exp(),
    "ratio": lambda w, a, b: a[Z] / (X * w[Z]).sum(-1).exp(),
    "reciprocal": lambda w, a, b: (X @ w[0]).exp().reciprocal() * b,
    "one for all": lambda w, a, b: b * (X @ w[0]).exp(),
    "inside": lambda w, a, b: ((X * w).sum(-1) + a.log()[Z]).exp(),
    "two": lambda w, a, b: EXPOSURE * b * a[Z] * (X * w[Z]).sum(-1).exp(),
    "row of a table": lambda w, a, b: a.unsqueeze(0)[:, Z] * (0.5 - (X * w).sum(-1)).exp(),
}
LOGITS: dict[str, Expression] = {
    "difference": lambda w, a, b: (X * w[Z]).sum(-1) - a[Z].log(),
    "half": lambda w, a, b: (X * w[Z]).sum(-1) + 0.5 * a.log()[Z] - b.log(),
    "offset": lambda w, a, b: EXPOSURE.log() + (X * w[Z]).sum(-1) - b.log(),
    "of a mean": lambda w, a, b: (X * w[Z]).sum(-1).exp().log() - a[Z].log(),
    "of a ratio": lambda w, a, b: ((X * w[Z]).sum(-1).exp() / a[Z]).log(),
    "of an inverse": lambda w, a, b: (X * w[Z]).sum(-1) - (1 / a[Z]).log(),
}


def _share(m: Tensor, r: Tensor) -> Tensor:
    return m / (m + r)


SHARES: dict[str, Expression] = {
    "of means": lambda w, a, b: _share((X * w[Z]).sum(-1).exp(), a[Z]),
    "of one shape": lambda w, a, b: _share(b * (X @ w[0]).exp(), a[:1]),
}
OTHERS: dict[str, Expression] = {
    "a sum": lambda w, a, b: a[Z] + (X * w[Z]).sum(-1).exp(),
    "a square": lambda w, a, b: b * b * (X * w[Z]).sum(-1).exp(),
    "both ways": lambda w, a, b: b * (b * X[..., 0] + (X * w).sum(-1)).exp(),
    "a scalar product of products": lambda w, a, b: b * ((X * w).sum(-1) * a).exp(),
    "softplus": lambda w, a, b: b * torch.nn.functional.softplus((X * w).sum(-1)),
    "a mean of logarithms": lambda w, a, b: ((X * w).sum(-1) + a.log().mean()).exp(),
    "stacked": lambda w, a, b: torch.stack([b, b])[Z.clamp(max=1)] * (X * w).sum(-1).exp(),
}


def _leaves(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    wide = {"dtype": torch.float64, "generator": draw}
    out = {"w": torch.randn(K, 2, **wide), "a": torch.rand(K, **wide) + 0.3}
    out["b"] = torch.rand((), **wide) + 0.4
    return {n: t.requires_grad_() for n, t in out.items()}


def _bound(expression: Expression, link: str):
    leaves = _leaves(0)
    argument = expression(*leaves.values()).expand(N, K)
    return bind(argument, leaves, Useful(affine=True, link=link, logs=True), plates=1)


LINKS = {"exp": RATES, "": LOGITS, "sigmoid": SHARES}


@pytest.mark.parametrize("name, link", [(n, link) for link in LINKS for n in LINKS[link]])
def test_a_binding_gives_the_argument_at_other_values_and_its_derivatives(name, link):
    expression = LINKS[link][name]
    binding = _bound(expression, link)
    assert binding.how == "affine" and binding.logs
    other = _leaves(1)
    expected = expression(*other.values()).expand(N, K)
    torch.testing.assert_close(binding.evaluate(other), expected, rtol=1e-13, atol=1e-13)
    predictor = {"exp": torch.log, "sigmoid": torch.logit}.get(link, torch.clone)(expected)
    for p in binding.params:
        (slope,) = torch.autograd.grad(predictor.sum(), other[p], retain_graph=True)
        slope = slope * other[p] if p in binding.logs else slope
        found = binding.jacobians[p].dense.sum((0, 1)).reshape(slope.shape)
        torch.testing.assert_close(found, slope.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_form_is_opaque(name):
    assert _bound(OTHERS[name], "exp").how == "opaque"


def test_a_share_of_another_sum_is_opaque():
    def expression(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a[Z] / (a[Z] + 2 * (X * w[Z]).sum(-1).exp() + b)

    assert _bound(expression, "sigmoid").how == "opaque"


def test_a_product_of_exponentials_has_no_logarithms():
    binding = _bound(lambda w, a, b: a[Z].exp() * (X * w[Z]).sum(-1).exp(), "exp")
    assert binding.how == "affine" and not binding.logs


def test_covariates_are_held_once_for_all_components():
    slopes = _bound(RATES["product"], "exp").jacobians["w"]
    assert slopes.index is not None and slopes.value.stride(1) == 0
