"""Continuous latents that need no guide: the distribution that is left when one integrates them out.

A pair of families such as Gamma and Poisson has a marginal with a name. Written as one site it has
an exact evidence; the latent itself is then no longer part of the model. That an argument is the
latent's value, proportional to it or affine in it is seen by running the model at other values.

Source: Gelman et al. (2013), appendix A, for the pairs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.families.conjugate_kernels import KERNELS
from pyro_em.tracing.runs import Model, Run, held_run
from pyro_em.tracing.sites import is_latent, latents_in

logger = logging.getLogger("pyro_em")


Sites = Mapping[str, Mapping[str, Any]]

Rerun = Callable[[Mapping[str, Tensor]], Sites]

_LARGE = 1 << 17  # elements of a latent from which on a run is dear

_GAUSSIAN = ("Normal", "MultivariateNormal")

_NO_GAP = "parameters of its own has no gap"


# (latent, child): the argument that has to be the latent's value, and the child's marginal.
_SAME: dict[tuple[str, str], tuple[str, str]] = {
    ("Beta", "Binomial"): (
        "probs",
        "dist.BetaBinomial(concentration1, concentration0, total_count)",
    ),
    ("Beta", "Bernoulli"): (
        "probs",
        "dist.Bernoulli(concentration1 / (concentration1 + concentration0))",
    ),
    ("Dirichlet", "Multinomial"): (
        "probs",
        "dist.DirichletMultinomial(concentration, total_count)",
    ),
    ("Dirichlet", "Categorical"): (
        "probs",
        "dist.Categorical(concentration / concentration.sum(-1, keepdim=True))",
    ),
    ("Dirichlet", "OneHotCategorical"): (
        "probs",
        "dist.OneHotCategorical(concentration / concentration.sum(-1, keepdim=True))",
    ),
    ("Poisson", "Binomial"): ("total_count", "dist.Poisson(rate * probs)"),
}


# The argument has to be proportional to the latent's value; e is the factor.
_PROPORTIONAL: dict[tuple[str, str], tuple[str, str]] = {
    ("Gamma", "Poisson"): ("rate", "dist.GammaPoisson(concentration, rate{e})"),
    ("Exponential", "Poisson"): ("rate", "dist.GammaPoisson(1., rate{e})"),
    ("Gamma", "Exponential"): (
        "rate",
        "dist.TransformedDistribution(dist.Pareto(rate{e}, concentration), "
        "[AffineTransform(-rate{e}, 1.)])",
    ),
}


# Several observations share the latent: what is observed of them, and its marginal.
_SUMS: dict[tuple[str, str], tuple[str, str]] = {
    ("Gamma", "Poisson"): ("sum", "dist.GammaPoisson(concentration, rate / N)"),
    ("Exponential", "Poisson"): ("sum", "dist.GammaPoisson(1., rate / N)"),
    ("Beta", "Bernoulli"): ("sum", "dist.BetaBinomial(concentration1, concentration0, N)"),
    ("Beta", "Binomial"): (
        "sum",
        "dist.BetaBinomial(concentration1, concentration0, total_count.sum())",
    ),
    ("Dirichlet", "Categorical"): ("counts", "dist.DirichletMultinomial(concentration, N)"),
    ("Dirichlet", "Multinomial"): (
        "sum",
        "dist.DirichletMultinomial(concentration, total_count.sum())",
    ),
}


# Normal(loc, scale) with scale² the latent to a power: the marginal.
_SPREADS: dict[str, tuple[int, str]] = {
    "Gamma": (-1, "dist.StudentT(2 * concentration, loc, (rate / concentration).sqrt(){c})"),
    "Chi2": (-1, "dist.StudentT(df, loc, df.rsqrt(){c})"),
    "Exponential": (-1, "dist.StudentT(2., loc, rate.sqrt(){c})"),
    "InverseGamma": (1, "dist.StudentT(2 * concentration, loc, (rate / concentration).sqrt(){c})"),
}


def marginals_of(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    plain: Run,
    scopes: Mapping[str, frozenset[str]],
    wanted: bool = True,
) -> Callable[[str], tuple[str, ...]]:
    """How to do without a latent, in sentences; the steps of a chain are looked at once.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plain: A plain run of it.
        scopes: Per site the latents that reach it.
        wanted: Whether anyone reads it: nothing is run otherwise.
    """
    known: dict[str, tuple[str, ...]] = {}
    drawn = {n: s["value"] for n, s in latents_in(plain.sites).items()}

    def rerun(values: Mapping[str, Tensor]) -> Sites:
        return held_run(model, args, kwargs, {**drawn, **values})

    def is_large(name: str) -> bool:
        """Whether a run to see how to leave it out is dear: most often it is integrated as it is."""
        fn, value = unwrap(plain.sites[name]["fn"])[0], drawn.get(name)
        return type(fn) in KERNELS and value is not None and value.numel() > _LARGE

    def marginals(name: str) -> tuple[str, ...]:
        stem = _stem(name)
        if is_large(name):
            return ()
        if wanted and stem not in known and plain.shadows is None:
            try:
                known[stem] = marginal_fixes(name, plain.sites, scopes, rerun)
            except Exception as error:  # a user's code, at values that it has not seen
                logger.debug("no marginal is looked for: %s", error)
        return known.get(stem, ())

    return marginals


def marginal_fixes(
    name: str, sites: Sites, scopes: Mapping[str, frozenset[str]], rerun: Rerun
) -> tuple[str, ...]:
    """How to write a latent's children without it, where their marginal distribution has a name.

    Args:
        name: The latent.
        sites: The sites of a plain run.
        scopes: Per site the latents that reach it.
        rerun: The sites of a run with other values of latents.

    Returns:
        Sentences, most likely first; none where no marginal is known.
    """
    children = [n for n, scope in scopes.items() if name in scope and n != name]
    fixes = _fixes(name, children, sites, scopes, rerun)
    if {n for c in children for n in scopes[c]} - {name, *children}:
        return tuple(f for f in fixes if _NO_GAP not in f)  # it is so given the others only
    return fixes


def _fixes(
    name: str,
    children: list[str],
    sites: Sites,
    scopes: Mapping[str, frozenset[str]],
    rerun: Rerun,
) -> tuple[str, ...]:
    """As `marginal_fixes`, where no other latent reaches the children."""
    kind, value = _kind(sites[name]), sites[name]["value"].detach()
    kinds = {_kind(sites[c]) for c in children}
    if kind in _GAUSSIAN and kinds and kinds <= set(_GAUSSIAN):
        return _of_gaussians(name, children, sites, scopes, rerun)
    if len(kinds) != 1 or any(is_latent(sites[c]) for c in children):
        return ()
    pair = (kind, kinds.pop())
    shown = _in_words(children)
    shared = len(children) > 1 or _plates(sites[children[0]]) != _plates(sites[name])
    if pair in _SAME:
        argument, marginal = _SAME[pair]
        if not all(_is(_argument(sites[c], argument), value) for c in children):
            return ()
        return _of_shared(name, pair, shown) if shared else (_alone(shown, marginal),)
    if pair in _PROPORTIONAL:
        argument, marginal = _PROPORTIONAL[pair]
        moved = rerun({name: 4 * value})
        before = [_argument(sites[c], argument) for c in children]
        after = [_argument(moved[c], argument) for c in children]
        both = zip(before, after, strict=True)
        if not all(a is not None and _is(b, 4 * a) for a, b in both):
            return ()
        factor = "" if all(_is(a, value) for a in before) else " / factor"
        if shared:
            return _of_shared(name, pair, shown) if not factor else _same_family(kind)
        why = f", with factor what '{name}' is multiplied by" if factor else ""
        return (_alone(shown, marginal.format(e=factor)) + why,)
    if kind in _SPREADS and pair[1] == "Normal" and not shared:
        return _of_spread(name, kind, children[0], sites, rerun)
    return ()


def _alone(shown: str, marginal: str) -> str:
    return f"integrate it out, and let site {shown} be {marginal}"


def _same_family(kind: str) -> tuple[str, ...]:
    article = "an" if kind[0] in "AEIOU" else "a"
    own = "Gamma" if kind == "Exponential" else kind
    article = "a" if own == "Gamma" else article
    return (
        f"its posterior is {article} {own}: a guide that draws it from {article} {own} with "
        f"{_NO_GAP}",
    )


def _of_shared(name: str, pair: tuple[str, str], shown: str) -> tuple[str, ...]:
    """A latent that several observations share: their sum is all that they say of it."""
    if pair not in _SUMS:
        return ()
    what, marginal = _SUMS[pair]
    return (
        f"integrate it out: in place of site {shown} observe the {what} of the N values that share "
        f"'{name}', and let it be {marginal}; the evidence differs by a constant",
        *_same_family(pair[0]),
    )


def _of_spread(name: str, kind: str, child: str, sites: Sites, rerun: Rerun) -> tuple[str, ...]:
    """A precision or a variance of a Normal: Student's t."""
    power, marginal = _SPREADS[kind]
    value = sites[name]["value"].detach()
    moved = rerun({name: 4 * value})
    scale, other = _argument(sites[child], "scale"), _argument(moved[child], "scale")
    same_loc = _is(_argument(moved[child], "loc"), _argument(sites[child], "loc"))
    if scale is None or not same_loc or not _is(other, scale * 2.0**power):
        return ()
    factor = "" if _is(scale, value ** (power / 2)) else " * factor"
    why = f", with factor the scale where '{name}' is one" if factor else ""
    return (_alone(f"'{child}'", marginal.format(c=factor)) + why,)


def _of_gaussians(
    name: str,
    children: list[str],
    sites: Sites,
    scopes: Mapping[str, frozenset[str]],
    rerun: Rerun,
) -> tuple[str, ...]:
    """A Gaussian latent on which the means of Gaussian children depend as an affine function."""
    value = sites[name]["value"].detach()
    one, two = rerun({name: value + 1}), rerun({name: value + 2})
    for child in children:
        at = [_argument(run[child], "loc") for run in (sites, one, two)]
        spread = "scale" if _kind(sites[child]) == "Normal" else "covariance_matrix"
        fixed = _is(_argument(one[child], spread), _argument(sites[child], spread))
        if any(a is None for a in at) or not fixed:
            return ()
        if not _is(at[2] - at[1], at[1] - at[0]):  # type: ignore[operator]
            return ()
    below = [n for n in children if is_latent(sites[n])]
    stem = _stem(name)
    if any(_stem(n) == stem for n in (*below, *scopes[name]) if n != name):
        others = {n for c in children for n in scopes[c]} - {name, *children}
        if any(_stem(n) != stem for n in others):  # a switching system has no such marginal
            return ()
        return (
            "integrate the whole chain out as one site: dist.GaussianHMM(initial_dist, "
            "transition_matrix, transition_dist, observation_matrix, observation_dist, "
            "duration=T); initial_dist is that of the state before the first step",
        )
    if below:
        return (f"integrate {_in_words(below)} out first: it is Gaussian given '{name}'",)
    shown = _in_words(children)
    _, events, _ = unwrap(sites[children[0]]["fn"])
    if len(children) > 1 or _plates(sites[children[0]]) != _plates(sites[name]):
        return (
            f"integrate it out: one dist.LowRankMultivariateNormal(loc, cov_factor, cov_diag) for "
            f"all values of {shown} that share '{name}', with cov_factor the weights times its "
            "scale, and cov_diag the variance of the noise",
            *(() if unwrap(sites[name]["fn"])[1] else _same_family("Normal")),
        )
    if value.shape == _argument(sites[children[0]], "loc").shape and not events:  # type: ignore
        return (
            _alone(shown, "dist.Normal(mean, (w ** 2 * prior_scale ** 2 + scale ** 2).sqrt())")
            + ", with w what it is multiplied by",
        )
    return (
        _alone(shown, "dist.LowRankMultivariateNormal(loc, cov_factor, cov_diag)")
        + ", with cov_factor the weights times its scale, and cov_diag the variance of the noise",
    )


def _kind(site: Mapping[str, Any]) -> str:
    return type(unwrap(site["fn"])[0]).__name__


def _argument(site: Mapping[str, Any], name: str) -> Tensor | None:
    value = getattr(unwrap(site["fn"])[0], name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _is(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers where they are broadcast."""
    if a is None or b is None:
        return False
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    if not b.numel():
        return True
    a, scale = a.to(b.dtype), max(_largest(b), 1e-6)
    if _largest(a - b) <= 1e-4 * scale:  # mostly: a look at single elements takes far longer
        return True
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale))


def _largest(t: Tensor) -> float:
    low, high = t.aminmax()
    return max(-float(low), float(high))


def _plates(site: Mapping[str, Any]) -> set[str]:
    return {f.name for f in site["cond_indep_stack"]}


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _in_words(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:4]) + (", …" if len(names) > 4 else "")
