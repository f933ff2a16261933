"""What is asked of a fresh process: that a fit imports nothing slower than itself, keeps memory.

One process answers all that is asked of it, since importing the libraries takes most of its time.
"""

from __future__ import annotations

import ast
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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

    def bent(X, y):
        B = pyro.param("B", lambda: 0.1 * torch.randn(2, 2))
        with pyro.plate("n", len(X)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            rate = torch.nn.functional.softplus((B[z] * X).sum(-1))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def two_chains(x):
        A = pyro.param("A", lambda: torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=C.simplex)
        mu = pyro.param("mu", lambda: torch.randn(2, 2))
        z = u = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            u = pyro.sample(f"u_{t}", dist.Categorical(A[u]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z, u], 1.0), obs=x[t])

    def gammas(y):
        a = pyro.param("a", torch.tensor([1.0, 3.0]), constraint=C.positive)
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Gamma(a[z], 1.0), obs=y)

    def own_rates(y):
        a = pyro.param("a", torch.tensor(2.0), constraint=C.positive)
        with pyro.plate("n", len(y)):
            rate = pyro.sample("rate", dist.Gamma(a, 1.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return {
        "mixture": (mixture, (x,)),
        "chain": (chain, (symbols,)),
        "rates by Newton's method": (rates, (X, counts)),
        "rates by L-BFGS": (bent, (X, counts)),
        "experts": (experts, (X, y)),
        "two chains": (two_chains, (y[:12],)),
        "Newton on sums": (gammas, (y.abs(),)),
        "conjugate": (own_rates, (counts,)),
    }


def faults() -> int:
    """Page faults of twenty steps with temporaries of some MB."""
    import resource

    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(2**19, dtype=torch.float64) for _ in range(14)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_before_and_after() -> tuple[int, int]:
    """Of steps as the C library has it, and where freed memory is kept."""
    import torch

    from pyro_em.tracing.freed import keep_freed_memory

    # Room for small blocks, which at the end of the heap would keep all below them.
    small = [bytes(n) for n in range(600, 3000) for _ in range(4)]
    del small
    before, ballast = 0, []
    for _ in range(4):
        faults()
        before = faults()
        if before > 1000:
            break
        # A block above them keeps what they free: the next ones are to come above that.
        ballast.append([torch.ones(2**19, dtype=torch.float64) for _ in range(14)])
    keep_freed_memory()
    faults()
    return before, faults()


def without_parameters(x):
    """Nothing to learn: the first look at its operations is all that there is."""
    import pyro
    import pyro.distributions as dist
    import torch

    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=x)


def run() -> None:
    """Prints page faults; then every call, and what it has imported."""
    import pyro
    import torch

    before = set(sys.modules)
    import pyro_em

    assert {m for m in set(sys.modules) - before if m.startswith("pyro_em.")} == set()
    print(json.dumps(faults_before_and_after()), flush=True)
    pyro_em.ExactPosteriorEM(without_parameters).posterior(torch.zeros(3))
    assert "torch._dynamo" not in sys.modules
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


def process(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", __file__, *options]
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def fresh() -> subprocess.CompletedProcess[str]:
    return process()


@pytest.mark.slow
def test_an_exact_fit_imports_neither_compilers_nor_algebra(
    fresh: subprocess.CompletedProcess[str],
) -> None:
    assert fresh.returncode == 0, fresh.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
@pytest.mark.slow
def test_steps_do_not_take_their_memory_anew(fresh: subprocess.CompletedProcess[str]) -> None:
    out = fresh
    for _ in range(6):  # in some processes what was imported keeps the memory already
        before, after = json.loads(out.stdout)
        assert after < 1000
        if before > 1000:
            return
        out = process("--faults")
    pytest.skip("this C library keeps freed memory by itself")


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
    if "--faults" in sys.argv:
        print(json.dumps(faults_before_and_after()))
    else:
        run()
