"""What a fit imports, in a process of its own: nothing that takes longer than the fit."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

HEAVY = ("torch._dynamo", "sympy", "numba", "scipy", "sklearn", "pandas", "matplotlib", "networkx")


def fits() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Models with their data: each route to a kernel, closed forms and gradients."""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch.distributions import constraints as C

    x, y, X = torch.randn(30, 2), torch.randn(30), torch.randn(30, 2)
    counts, symbols = torch.randint(5, (30,)).float(), torch.randint(3, (12,))

    def mixture(x):
        w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
        mu = pyro.param("mu", lambda: x[:2].clone())
        L = pyro.param("L", lambda: torch.eye(2).repeat(2, 1, 1), constraint=C.lower_cholesky)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=x)

    def chain(x):
        A = pyro.param("A", lambda: torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=C.simplex)
        E = pyro.param("E", lambda: torch.rand(2, 3).softmax(-1), constraint=C.simplex)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])

    def rates(X, y):
        B = pyro.param("B", lambda: 0.1 * torch.randn(2, 2))
        with pyro.plate("n", len(X)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Poisson((B[z] * X).sum(-1).exp()), obs=y)

    def experts(X, y):
        G = pyro.param("G", lambda: 0.1 * torch.randn(2, 2))
        B = pyro.param("B", lambda: torch.randn(2, 2))
        with pyro.plate("n", len(X)):
            z = pyro.sample("z", dist.Categorical(logits=X @ G.T))
            pyro.sample("y", dist.Normal((B[z] * X).sum(-1), 1.0), obs=y)

    return {
        "mixture": (mixture, (x,)),
        "chain": (chain, (symbols,)),
        "rates by L-BFGS": (rates, (X, counts)),
        "experts": (experts, (X, y)),
    }


def run() -> None:
    """Every call, and what it has imported."""
    import pyro

    before = set(sys.modules)
    import pyro_em

    assert {m for m in set(sys.modules) - before if m.startswith("pyro_em.")} == set()
    for name, (model, data) in fits().items():
        pyro.clear_param_store()
        em = pyro_em.ExactPosteriorEM(model)
        em.plan(*data)
        result = em.fit(*data, max_steps=2, tol=0, progress=False)
        em.posterior(*data)
        em.elbo(*data)
        result.standard_errors()
        em.predictive(*data, num_samples=2)
        if hasattr(em, "score"):
            em.score(*data)
        found = [m for m in HEAVY if m in sys.modules]
        assert not found, f"{name} has imported {found}"


def test_an_exact_fit_imports_neither_compilers_nor_algebra() -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names_have_their_homes() -> None:
    import pyro_em

    tree = ast.parse(Path(pyro_em.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If)).body
    typed = {a.name: n.module for n in block if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == pyro_em._HOMES
    assert pyro_em.__all__ == sorted(typed) and set(dir(pyro_em)) >= set(typed)
    assert all(getattr(pyro_em, n).__name__ == n for n in typed)
    assert pyro_em.plotting.__name__ == "pyro_em.plotting" and not hasattr(pyro_em, "nothing")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    run()
