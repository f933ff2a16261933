"""Normal components in scikit-learn's four structures of covariances.

    full  Σ_k,   tied  Σ_k = Σ,   diag  Σ_k = diag(σ_k1², …, σ_kD²),   spherical  Σ_k = σ_k² I

Full and tied ones are kept as their Cholesky factors, the others as standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.arguments import number, shown
from pyro_em.errors import DataError, UsageError, message

KINDS = ("full", "tied", "diag", "spherical")


def check_kind(kind: Any) -> None:
    """Refuse what is none of the four.

    Raises:
        UsageError: If it is none.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(
            message(
                f"covariance_type={shown(kind)}",
                "there are no such covariances.",
                "",
                [f"pass {', '.join(map(repr, KINDS))}"],
            )
        )


def shape_of(kind: str, K: int, D: int) -> tuple[int, ...]:
    """The shape in which scikit-learn and hmmlearn hold covariances.

    >>> shape_of("diag", 3, 2), shape_of("tied", 3, 2)
    ((3, 2), (2, 2))
    """
    return {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}[kind]


def check_least(where: str, least: Any) -> None:
    """Refuse what is no smallest eigenvalue.

    Raises:
        UsageError: If it is no number, or below zero.
    """
    if not number(where, "reg_covar", least) >= 0:
        raise UsageError(
            message(
                where,
                f"reg_covar={least} is no variance.",
                "no covariance has a smaller eigenvalue",
                ["pass reg_covar=1e-6, in squared units of X", "pass 0 for no bound"],
            )
        )


def covariances(name: str, given: Tensor, kind: str, *, is_inverse: bool) -> Tensor:
    """Covariances that the user gave, themselves or their inverses. # `shape_of`

    Raises:
        UsageError: If they are not positive definite.
    """
    if kind in ("full", "tied"):
        failed = torch.linalg.cholesky_ex(given)[1].any()
        is_sound = torch.allclose(given, given.mT) and not bool(failed)
    else:
        is_sound = bool((given > 0).all())
    if not is_sound:
        raise UsageError(
            message(
                name,
                "a matrix is not symmetric and positive definite."
                if kind in ("full", "tied")
                else "a number is not above zero: these are not positive definite.",
                "a normal density needs that",
                ["check the numbers and their order"],
            )
        )
    if not is_inverse:
        return given
    return torch.linalg.inv(given) if kind in ("full", "tied") else 1 / given


def parameters(means: Tensor, covariances: Tensor, kind: str) -> dict[str, Tensor]:
    """Parameters "means" and "scales" of a Pyro model.

    Args:
        means: Where they start. # (K, D)
        covariances: Where they start. # `shape_of`
        kind: One of `KINDS`.
    """
    mu = pyro.param("means", means.clone())
    if kind in ("full", "tied"):
        factors = torch.linalg.cholesky(covariances)
        scales = pyro.param("scales", factors, constraint=constraints.lower_cholesky)
    else:
        start = covariances.sqrt().reshape(len(means), -1)  # (K, D) or (K, 1)
        scales = pyro.param("scales", start, constraint=constraints.positive)
    return {"means": mu, "scales": scales}


def component(values: Mapping[str, Tensor], kind: str, z: Tensor) -> Any:
    """The component that an index selects, of what `parameters` gives."""
    mu, scales = values["means"], values["scales"]
    if kind == "full":
        return dist.MultivariateNormal(mu[z], scale_tril=scales[z])
    if kind == "tied":
        return dist.MultivariateNormal(mu[z], scale_tril=scales)
    return dist.Normal(mu[z], scales[z]).to_event(1)


def covariances_of(scales: Tensor, kind: str) -> Tensor:
    """Covariances from the "scales" of `parameters`. # `shape_of`"""
    if kind in ("full", "tied"):
        return scales @ scales.mT
    return scales[:, 0] ** 2 if kind == "spherical" else scales**2


def as_matrices(covariances: Tensor, kind: str, K: int, D: int) -> Tensor:
    """The same as matrices. # `shape_of` -> (K, D, D)"""
    if kind == "tied":
        return covariances.expand(K, D, D)
    if kind == "full":
        return covariances
    return torch.diag_embed(covariances.reshape(K, -1).expand(K, D))


def weighted(x: Tensor, r: Tensor, kind: str, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and covariances of rows with responsibilities: the M-step of a mixture.

    A component whose rows span no volume gets the covariance of all rows: a start needs a density.

    Args:
        x: Rows. # (N, D)
        r: Responsibilities; a component may have a part of the rows only. # (N, K)
        kind: One of `KINDS`.
        least: The smallest eigenvalue of a covariance.

    Returns:
        Weights # (K,), means # (K, D), covariances # `shape_of`

    Raises:
        DataError: If the rows span no volume, and ``least`` is zero.

    Example:
        >>> x, r = torch.tensor([[0.0], [2.0], [9.0]]), torch.eye(2)[[0, 0, 1]]
        >>> w, mu, S = weighted(x, r, "diag", 0.0)
        >>> w, mu.flatten(), S.flatten()
        (tensor([0.6667, 0.3333]), tensor([1., 9.]), tensor([ 1.0000, 14.8889]))
    """
    counts = r.sum(0).clamp(min=10 * torch.finfo(x.dtype).eps)
    w, mu = counts / counts.sum(), (r.T @ x) / counts.unsqueeze(-1)
    S = torch.stack([_scatter(x - m, own) for m, own in zip(mu, r.T, strict=True)])
    pooled = _scatter(x - x.mean(0), x.new_ones(len(x))) / len(x)
    if kind == "tied":
        S = _or_pooled((S.sum(0) / counts.sum()).unsqueeze(0), pooled, least)[0]
    elif kind == "full":
        S = _or_pooled(S / counts.reshape(-1, 1, 1), pooled, least)
    else:
        S, pooled = S.diagonal(dim1=1, dim2=2) / counts.unsqueeze(-1), pooled.diagonal()
        if kind == "spherical":
            S, pooled = S.mean(1, keepdim=True), pooled.mean(0, keepdim=True)
        S, pooled = torch.diag_embed(S), torch.diag_embed(pooled)
        S = _or_pooled(S, pooled, least).diagonal(dim1=1, dim2=2)
    return w, mu, S[:, 0] if kind == "spherical" else S


def _scatter(away: Tensor, w: Tensor) -> Tensor:
    return (away * w.unsqueeze(-1)).T @ away


_SMALL = 1e-10


def _or_pooled(S: Tensor, pooled: Tensor, least: float) -> Tensor:
    """Covariances that have volume; the pooled one in place of those that have none. # (K, D, D)"""
    spread = pooled.diagonal().sqrt()
    unit = torch.where(spread > 0, spread, torch.ones_like(spread))
    volumes = torch.linalg.eigvalsh(torch.cat([S, pooled.unsqueeze(0)]) / unit / unit.unsqueeze(-1))
    flat = volumes[:, 0] < _SMALL
    S = torch.where(flat[:-1, None, None], pooled, S)
    if least > 0:
        values, vectors = torch.linalg.eigh(S)
        return vectors @ torch.diag_embed(values.clamp(min=least)) @ vectors.mT
    if bool(flat[-1]) and bool(flat[:-1].any()):
        raise DataError(
            message(
                "X",
                "the rows span no volume: a column is constant, or a sum of others.",
                "a normal density has no finite maximum there",
                ["pass reg_covar=1e-6: no variance is below it", "leave the column out"],
            )
        )
    return S
