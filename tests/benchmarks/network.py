"""The step of a VAE beside a bare torch loop with the same networks and fused Adam."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_em import ExactPosteriorEM
from tests.benchmarks.timing import Steps


class Networks(nn.Module):
    """784-400-50 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus())
        self.loc, self.scale = nn.Linear(400, 50), nn.Linear(400, 50)
        self.decoder = nn.Sequential(nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of q(h | x)."""
        hidden = self.encoder(x)
        return self.loc(hidden), self.scale(hidden).exp()


def make() -> tuple[Steps, Steps]:
    """Our steps and the bare loop, on batches of 256 random images."""
    torch.manual_seed(0)
    images = (torch.rand(256 * 20, 784) < 0.3).float()
    batches = images.split(256)
    mine, bare = Networks(), Networks()

    def model(x: Tensor) -> None:
        pyro.module("networks", mine)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(x.new_zeros(50), 1.0).expand([50]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=mine.decoder(h)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("networks", mine)
        loc, scale = mine.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.Adam(p, lr=1e-3, fused=True))
    optimiser = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)

    def ours(steps: int) -> None:
        for i in range(steps):
            em.step(batches[i % len(batches)])

    def theirs(steps: int) -> None:
        for i in range(steps):
            x = batches[i % len(batches)]
            loc, scale = bare.encode(x)
            h = loc + scale * torch.randn_like(loc)
            fit = nn.functional.binary_cross_entropy_with_logits(
                bare.decoder(h), x, reduction="sum"
            )
            kl = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum()
            optimiser.zero_grad()
            (fit + kl).backward()
            optimiser.step()

    return ours, theirs
