"""Clusters of vectors: centres drawn far apart, Lloyd's steps, scikit-learn's k-means.

Everything returns responsibilities: rows of probabilities over K clusters. Fewer distinct rows than
clusters leave some centres equal; these share their rows evenly, so that no cluster is empty.

Source: Arthur and Vassilvitskii (2007), "k-means++: the advantages of careful seeding"; Basu,
Banerjee and Mooney (2002), "Semi-supervised clustering by seeding", for observed labels.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message

_LLOYD_STEPS = 30

_MANY_ROWS = 10_000


def spread_centres(
    x: Tensor,
    weights: Tensor,
    size: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """Rows far apart: each is drawn with probability proportional to its squared distance.

    Args:
        x: Vectors. # (R, D)
        weights: Sample weights. # (R,)
        size: Number of centres.
        generator: Source of randomness.
        labels: Observed labels, −1 where unknown; a cluster with labelled rows has their mean. # (R,)

    Returns:
        The centres; fewer distinct ones where there are fewer distinct rows. # (size, D)
    """
    centres: dict[int, Tensor] = {}
    if labels is not None:
        for k in range(size):
            mass = weights * (labels == k)
            if float(mass.sum()) > 0:
                centres[k] = (mass @ x) / mass.sum()
    nearest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for centre in centres.values():
        nearest = torch.minimum(nearest, _squares(x, centre))
    free = [k for k in range(size) if k not in centres]
    for place, k in enumerate(free):
        mass = weights if not centres else weights * nearest
        if float(mass.sum()) <= 0:  # no other distinct row is left
            old = list(centres.values())
            centres.update({f: old[j % len(old)] for j, f in enumerate(free[place:])})
            break
        row = _drawn(mass, generator)
        centres[k], nearest = x[row], torch.minimum(nearest, _squares(x, x[row]))
    return torch.stack([centres[k] for k in range(size)])


def hard(x: Tensor, centres: Tensor) -> Tensor:
    """Each row goes to its nearest centre; equal centres share it. # (R, K)"""
    squares = _distances(x, centres)
    twins = _distances(centres, centres) == 0
    first = squares.argmin(-1)
    near = twins[first].to(x.dtype)
    return near / near.sum(-1, keepdim=True)


def soft(x: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Responsibilities of equal spherical Gaussians about the centres. # (R, K)"""
    squares = _distances(x, centres)
    variance = (weights @ squares.amin(-1)) / weights.sum() / x.shape[1]
    if float(variance) <= 0:
        return hard(x, centres)
    return (-0.5 * squares / variance).softmax(-1)


def lloyd(
    x: Tensor, weights: Tensor, centres: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's steps: assign rows to their nearest centre, move centres to the mean of their rows.

    Args:
        x: Vectors. # (R, D)
        weights: Sample weights. # (R,)
        centres: Where they begin. # (K, D)
        labels: Observed labels, −1 where unknown; these rows stay. # (R,)

    Returns:
        Responsibilities (R, K) and centres (K, D).
    """
    before = None
    for _ in range(_LLOYD_STEPS):
        r = with_labels(hard(x, centres), labels)
        if before is not None and torch.equal(r, before):
            break
        mass = r * weights.unsqueeze(-1)
        total = mass.sum(0)
        moved = (mass.T @ x) / total.clamp(min=1e-300).unsqueeze(-1)
        centres = torch.where((total > 0).unsqueeze(-1), moved, centres)
        before = r
    return with_labels(hard(x, centres), labels), centres


def kmeans(
    x: Tensor, weights: Tensor, size: int, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """scikit-learn's k-means: the best of ten (of one where rows are many or labels are observed).

    Args:
        x: Vectors. # (R, D)
        weights: Sample weights. # (R,)
        size: Number of clusters K.
        generator: Source of scikit-learn's seed.
        labels: Observed labels, −1 where unknown: they place the first centres, and stay. # (R,)

    Returns:
        Responsibilities. # (R, K)

    Raises:
        UsageError: If scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError:
        raise UsageError(
            message(
                "init='kmeans'",
                "scikit-learn is not installed.",
                "k-means is scikit-learn's",
                [
                    "pip install 'pyro-em[data]', or pip install scikit-learn",
                    "use init='random points', which needs nothing",
                ],
            )
        ) from None
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    centres = spread_centres(x, weights, size, generator, labels)
    if len(torch.unique(centres, dim=0)) < size:  # fewer distinct rows than clusters
        return with_labels(hard(x, centres), labels)
    seeded = labels is not None and bool((labels >= 0).any())
    found = KMeans(
        size,
        init=centres.cpu().numpy() if seeded else "k-means++",
        n_init=1 if seeded or len(x) > _MANY_ROWS else 10,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found.fit(x.cpu().numpy(), sample_weight=weights.cpu().numpy())
    r = torch.nn.functional.one_hot(torch.as_tensor(found.labels_).long(), size).to(x)
    return with_labels(r, labels)


def with_labels(r: Tensor, labels: Tensor | None) -> Tensor:
    """Responsibilities with observed labels in place. # (R, K)"""
    if labels is None:
        return r
    sure = torch.nn.functional.one_hot(labels.clamp(min=0), r.shape[-1]).to(r)
    return torch.where((labels >= 0).unsqueeze(-1), sure, r)


def _drawn(mass: Tensor, generator: torch.Generator) -> int:
    """An index drawn with probability proportional to its mass (of any number of them)."""
    heaped = mass.cumsum(0)
    u = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(heaped[-1])
    first = int(torch.searchsorted(heaped, u, right=True))
    return min(first, int(mass.nonzero()[-1]))


def _squares(x: Tensor, centre: Tensor) -> Tensor:
    return (x - centre).square().sum(-1)


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, without the cancellation of a product. # (R, K)"""
    return torch.stack([_squares(x, c) for c in centres], -1)
