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
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_em import EMResult, ExactPosteriorEM

PIXELS, TRAIN = 64, 1500


class VAE(nn.Module):
    """A decoder and an encoder, and the Pyro model and guide of them.

    Args:
        code: D, the number of dimensions of the code z.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, code: int = 2, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.code = code
        self.decoder = network(code, *hidden, PIXELS)
        self.encoder = network(PIXELS, *hidden, 2 * code)

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

    @torch.no_grad()
    def start_at_average(self, x: Tensor) -> None:
        """Set the decoder's last bias so that it begins with the share of each pixel. # x: (N, 64)"""
        share = (x.sum(0) + 1) / (len(x) + 2)
        self.decoder[-1].bias.copy_(share.logit())


def network(*widths: int) -> nn.Sequential:
    """Linear layers with rectifiers between them. # (N, widths[0]) -> (N, widths[-1])"""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(widths):
        layers += [nn.Linear(inward, outward), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load_data(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Binary images in an order without meaning, and their digits. # (1797, 64), (1797,)"""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data > 7).to(dtype or torch.get_default_dtype())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.as_tensor(digits.target).long()[order]


def initialize(x: Tensor, code: int = 2, hidden: Sequence[int] = (128, 128), seed: int = 0) -> VAE:
    """Random networks whose decoder starts at the average image.

    Args:
        x: Images. # (N, 64)
        code: Number of dimensions of the code.
        hidden: Widths of the hidden layers.
        seed: Of the random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(code, hidden).to(x)
    vae.start_at_average(x)
    return vae


def draw(
    vae: VAE, result: EMResult, data: tuple[Tensor, Tensor], split: int, batch: int, path: Path
) -> None:
    """Reconstructions, draws from the prior, the code space and the bound per epoch.

    Args:
        vae: The fitted networks.
        result: The fit.
        data: All images and their digits.
        split: Number of training images; the others come after them.
        batch: Images per batch.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    x, digits = data
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    axes = figure.subplots(2, 2, gridspec_kw={"height_ratios": (0.44, 1)})

    first, second = torch.stack([(digits[split:] == k).nonzero()[:2, 0] for k in range(10)], 1)
    rows = [x[split:][first], x[split:][second]]
    show(axes[0, 0], torch.cat([r for own in rows for r in (own, vae.decode(vae.encode(own)))]))
    axes[0, 0].set_title("Images not trained on, and below each its reconstruction")

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, vae.code, generator=generator).to(x)
    show(axes[0, 1], vae.decode(z))
    axes[0, 1].set_title("New images: codes drawn from the prior, decoded")

    scatter(axes[1, 0], flat(vae.encode(x)), digits)
    axes[1, 0].set_title("Codes of all images, coloured by digit (which the model never sees)")
    bounds(axes[1, 1], result, split, len(x) - split, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def show(ax: Any, images: Tensor, columns: int = 10) -> None:
    """Tile images in rows of ``columns``, dark where a pixel is on. # images: (N, 64)"""
    tiles = torch.nn.functional.pad(images.reshape(-1, 8, 8), (1, 1, 1, 1))
    rows = [torch.cat(list(row), 1) for row in tiles.split(columns)]
    ax.imshow(torch.cat(rows).cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
    ax.set_axis_off()


def scatter(ax: Any, z: Tensor, digits: Tensor, tags: bool = True) -> None:
    """Codes in the plane, coloured by their digit; with tags, each digit at its median code."""
    from matplotlib import colormaps

    for k in range(10):
        own = z[digits == k].cpu().numpy()
        colour = colormaps["tab10"](k)
        ax.scatter(own[:, 0], own[:, 1], s=9, color=colour, alpha=0.6, linewidth=0, label=str(k))
    for k in range(10 if tags else 0):
        where = z[digits == k].median(0).values.tolist()
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
        colour = colormaps["tab10"](k)
        ax.text(*where, str(k), color=colour, fontsize=13, fontweight="bold", bbox=box)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("first axis of the code")
    ax.set_ylabel("second axis of the code")


def flat(z: Tensor) -> Tensor:
    """Codes in the plane: as they are, or on their first two principal axes. # (N, D) -> (N, 2)"""
    centred = z - z.mean(0)
    if z.shape[1] == 2:
        return z
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


def bounds(ax: Any, result: EMResult, train: int, held_out: int, batch: int) -> None:
    """The bound per image after each epoch, on training and on held-out images."""
    per_epoch = -(-train // batch)
    path = torch.tensor(list(result.history))
    path = path[: len(path) // per_epoch * per_epoch].reshape(-1, per_epoch).mean(1) / train
    epochs = range(1, len(path) + 1)
    ax.plot(epochs, path, color="#1f77b4", label="training (average over the epoch)")
    validation = [b / held_out for _, b in result.history.validation]
    ax.plot(range(1, len(validation) + 1), validation, color="#d95f02", label="held out")
    ax.set_xlabel("epoch")
    ax.set_ylabel("bound (nats per image)")
    ax.set_title("The bound on the log evidence, on images trained on and not")
    low = float(path[min(len(path) - 1, max(1, len(path) // 40))])
    ax.set_ylim(bottom=min(low, min(validation[len(validation) // 40 :])))
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def report(em: ExactPosteriorEM, x: Tensor, name: str) -> None:
    """Print the bound with its standard error, and its two parts, per image."""
    terms = em.elbo(x, num_particles=50)
    n = len(x)
    print(f"{name}: {n} images, in nats per image")
    print(f"  bound {terms.value / n:.4f} ± {(terms.standard_error or 0.0) / n:.4f}")
    assert terms.reconstruction is not None and terms.kl is not None
    print(f"    = reconstruction {terms.reconstruction / n:.4f} - KL {terms.kl / n:.4f}")


def fit(
    em: ExactPosteriorEM, train: Tensor, held_out: Tensor, batch: int, epochs: int, seed: int
) -> EMResult:
    """Print the plan, fit with held-out images as validation, print the bounds.

    Args:
        em: The model with its guide.
        train: Images to fit. # (N, 64)
        held_out: Images to validate on. # (M, 64)
        batch: Images per batch.
        epochs: Passes over the images.
        seed: Of the batches and the draws.
    """
    print(em.plan(train), end="\n\n")
    result = em.fit(
        train,
        batch_size=batch,
        num_epochs=epochs,
        validation=held_out,
        seed=seed,
        progress=True,
    )
    print(f"\n{result}\n")
    report(em, train, "training")
    report(em, held_out, "held out")
    return result


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Fit a variational autoencoder to 8 x 8 digits.")
    parser.add_argument("--code", type=int, default=2, help="dimensions of the code z")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128], help="widths")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100, help="images per batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/vae.png"))
    options = parser.parse_args()

    x, digits = load_data()
    train, held_out = x[:TRAIN], x[TRAIN:]
    vae = initialize(train, options.code, options.hidden, options.seed)
    em = ExactPosteriorEM(
        vae.model, vae.guide, lambda params: torch.optim.Adam(params, lr=options.lr)
    )
    result = fit(em, train, held_out, options.batch, options.epochs, options.seed)
    print(em.estimate_evidence(held_out, num_particles=500))
    try:
        draw(vae, result, (x, digits), TRAIN, options.batch, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
