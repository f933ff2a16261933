"""A mixture on as many processes as are started: ``torchrun --nproc-per-node=4 many_machines.py``.

The data are a file that all processes can read; each takes its own rows. In the end rank 0 prints how
far the parameters are from those of one process with all rows.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM

ROWS = 40_000
MEANS = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])


# begin of the model
def model(x: torch.Tensor) -> None:
    """A mixture of three Gaussians. # x: (rows, 2)"""
    w = pyro.param("w", torch.ones(3) / 3, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    Sigma = pyro.param(
        "Sigma", torch.eye(2).repeat(3, 1, 1), constraint=constraints.positive_definite
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], Sigma[z]), obs=x)


# end of the model


def make_file(path: Path) -> None:
    """Write data, whole or not at all: several processes may do it at once."""
    generator = np.random.default_rng(0)
    z = generator.integers(3, size=ROWS)
    aside = path.with_suffix(f".{os.getpid()}.npy")
    np.save(aside, MEANS[z] + generator.normal(size=(ROWS, 2)))
    aside.replace(path)


def main() -> None:
    """Fit the rows of a file, on as many processes as there are."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    path = Path(os.environ.get("DATA", tempfile.gettempdir())) / "rows_of_a_mixture.npy"
    make_file(path)

    # begin of the fit
    torch.distributed.init_process_group("gloo")  # "nccl" where every process has a GPU
    rank = torch.distributed.get_rank()
    size = torch.distributed.get_world_size()

    rows = np.load(path, mmap_mode="r")
    begin, end = len(rows) * rank // size, len(rows) * (rank + 1) // size
    shard = torch.from_numpy(rows[begin:end].copy())

    em = ExactPosteriorEM(model)
    result = em.fit(shard, process_group=torch.distributed.group.WORLD, tol=1e-6)
    if rank == 0:
        print(result)
    torch.distributed.destroy_process_group()
    # end of the fit

    if rank == 0:
        pyro.clear_param_store()
        alone = ExactPosteriorEM(model).fit(
            torch.from_numpy(rows[:].copy()), tol=1e-6, progress=False
        )
        far = max(float((result.params[n] - alone.params[n]).abs().max()) for n in alone.params)
        print(f"{size} processes and one differ by {far:.1e}")


if __name__ == "__main__":
    main()
