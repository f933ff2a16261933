"""A variational autoencoder of handwritten digits: the encoder is an amortised guide.

    z_n ~ N(0, I),   x_n | z_n ~ Bernoulli(logits = decoder(z_n)),   q(z_n | x_n) = N(m(x_n), s(x_n)²)

    log p(x) ≥ E_q[log p(x | z)] − KL(q(z | x) ‖ p(z))

The code z has no exact posterior, so it is drawn from the guide, and model and guide climb the bound
together by stochastic gradients. Run it: ``python -m models.vae`` (half a minute; ``--epochs 20``
for a first look). Data: 1,797 images of 8 x 8 pixels that scikit-learn brings along, binarised.

Source: Kingma and Welling (2014), "Auto-encoding variational Bayes".
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_em import EMResult, ExactPosteriorEM

PIXELS = 64


class VAE(nn.Module):
    """A decoder and an encoder with one hidden layer each, and the Pyro model and guide of them.

    Args:
        code: D, the number of dimensions of the code z.
        hidden: Width of the hidden layers.
    """

    def __init__(self, code: int = 2, hidden: int = 128) -> None:
        super().__init__()
        self.code = code
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.Softplus(), nn.Linear(hidden, PIXELS)
        )
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, hidden), nn.Softplus(), nn.Linear(hidden, 2 * code)
        )

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z). # x: (N, 64)"""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.code), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x). # x: (N, 64)"""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The mean code of each image. # (N, 64) -> (N, D)"""
        return self.encoder(x).chunk(2, dim=-1)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The probability that each pixel is on. # (N, D) -> (N, 64)"""
        return self.decoder(z).sigmoid()


def load_data(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Binary images in an order without meaning, and their digits. # (1797, 64), (1797,)"""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data > 7).to(dtype or torch.get_default_dtype())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.as_tensor(digits.target).long()[order]


def initialize(x: Tensor, code: int = 2, hidden: int = 128, seed: int = 0) -> VAE:
    """Random networks; the decoder's last bias is the average image, so that training starts there.

    Args:
        x: Images. # (N, 64)
        code: Number of dimensions of the code.
        hidden: Width of the hidden layers.
        seed: Of the random weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VAE(code, hidden).to(x.dtype)
    share = (x.sum(0) + 1) / (len(x) + 2)
    with torch.no_grad():
        vae.decoder[-1].bias.copy_(share.logit())
    return vae
