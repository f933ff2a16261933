"""A mixture fitted to a file that is read some rows at a time: the script of the how-to page."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, ExactPosteriorEM

# begin of the model
K = 3


def model(x: Tensor) -> None:
    """A mixture of K Gaussians with diagonal covariances. # x: (rows, D)"""
    w = pyro.param("w", lambda: x.new_ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: x[:K].clone())
    scale = pyro.param("scale", lambda: x.new_ones(K, x.shape[1]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


# end of the model


def write(path: Path, rows: int) -> None:
    """Write a file of numbers, a part at a time. # (rows, 2)"""
    random = np.random.default_rng(0)
    centres = np.array([[-4.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 2))
    for begin in range(0, rows, 50_000):
        some = x[begin : begin + 50_000]
        some[:] = centres[random.integers(0, K, len(some))] + random.normal(size=some.shape)


def main(arguments: list[str] | None = None) -> None:
    """Write a file, fit it, and ask for what is too large to be asked of all rows at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args(arguments).rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        write(path, rows)

        # begin of the fit
        x = np.load(path, mmap_mode="r")
        chunks = Chunks(x, rows=100_000)
        print(chunks)

        em = ExactPosteriorEM(model)
        result = em.fit(chunks, max_steps=100)
        print(result)
        # end of the fit

        # begin of the questions
        print("log evidence per row:", em.score(chunks) / rows)
        labels = np.lib.format.open_memmap(Path(folder) / "z.npy", "w+", np.int8, (rows,))
        begin = 0
        for q in em.posterior(chunks):
            z = q.probs("z").argmax(-1)
            labels[begin : begin + len(z)] = z
            begin += len(z)
        print("rows per component:", np.bincount(labels, minlength=K))
        # end of the questions


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
