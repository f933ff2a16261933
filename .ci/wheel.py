"""Build a wheel, install it alone in an empty folder, and use it from somewhere else.

``make wheel`` leaves the wheel in ``dist/``. Torch, Pyro and scikit-learn are those of the environment
that runs this, so that nothing is downloaded; the package is the wheel's, which is checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

USE = """
import importlib.metadata as metadata
import pathlib
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_em
from pyro_em import ExactPosteriorEM

folder = pathlib.Path(sys.argv[1]).resolve()
assert pathlib.Path(pyro_em.__file__).is_relative_to(folder), pyro_em.__file__
about = metadata.metadata("pyro-em")
assert about["Version"] == pyro_em.__version__ and about["License-Expression"] == "Apache-2.0"
assert "ExactPosteriorEM" in about.get_payload()
assert all(getattr(pyro_em, name) is not None for name in pyro_em.__all__)


def model(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


x = torch.cat([torch.randn(200) - 5, torch.randn(200) + 5])
result = ExactPosteriorEM(model).fit(x, progress=False)
assert abs(result.params["mu"] - torch.tensor([-5.0, 5.0])).max() < 0.5, result

from pyro_em.sklearn import GaussianMixture

means = GaussianMixture(2, random_state=0).fit(x.numpy().reshape(-1, 1)).means_
assert abs(np.sort(means.ravel()) - [-5, 5]).max() < 0.5, means
print(f"pyro_em {pyro_em.__version__} from a wheel fits a mixture: {result.status.name}")
"""


def run(*command: str | Path, **options: object) -> None:
    """Run a command; a failure ends everything with its output."""
    subprocess.run([str(c) for c in command], check=True, **options)  # type: ignore[call-overload]


def build(folder: Path) -> Path:
    """The wheel, made of copies, so that nothing of an earlier build gets into it."""
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pyro_em", source / "pyro_em", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheels = folder / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", wheels, source)
    (wheel,) = wheels.glob("pyro_em-*-py3-none-any.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The wheel alone in a folder, with all files that the source has."""
    target = folder / "installed"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel)
    here, there = files_of(ROOT / "pyro_em"), files_of(target / "pyro_em")
    assert here == there, f"in one of source and wheel only: {sorted(here ^ there)}"
    assert "py.typed" in there and list(target.glob("pyro_em-*.dist-info/licenses/LICENSE"))
    assert {p.name.split("-")[0] for p in target.iterdir()} == {"pyro_em"}
    return target


def files_of(package: Path) -> set[str]:
    """Files of a package, relative to it."""
    found = (p.relative_to(package) for p in package.rglob("*") if p.is_file())
    return {p.as_posix() for p in found if "__pycache__" not in p.parts}


def main() -> None:
    """Build, install, use; keep the wheel."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        target = install(wheel, folder)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        run(sys.executable, "-c", USE, target, cwd=elsewhere, env=environment)
        (ROOT / "dist").mkdir(exist_ok=True)
        shutil.copy(wheel, ROOT / "dist")
    print(f"dist/{wheel.name}")


if __name__ == "__main__":
    main()
