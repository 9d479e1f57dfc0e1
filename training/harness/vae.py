"""A variational autoencoder with categorical latent variables, its bound, and binarised digits to train it on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gumbel_attention as ga

THRESHOLD = 8
SHARES = (0.6, 0.2)


class Split(NamedTuple):
    """Binary images (images, pixels) for training, for choosing, and for the reported numbers."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Bound(NamedTuple):
    """The two terms of the negative ELBO of each image, in nats: (images,) each."""

    reconstruction: Tensor
    divergence: Tensor


class CategoricalVAE(nn.Module):
    """Bernoulli pixels given ``variables`` categorical variables of ``classes`` classes, uniform a priori.

    Encoder and decoder have one hidden layer each.
    """

    def __init__(self, pixels: int = 64, hidden: int = 128, variables: int = 20, classes: int = 10) -> None:
        super().__init__()
        self.variables, self.classes = variables, classes
        codes = variables * classes
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, codes))
        self.decoder = nn.Sequential(nn.Linear(codes, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, images: Tensor) -> Tensor:
        """Images (batch, pixels) -> logits of the posterior (batch, variables, classes)."""
        return self.encoder(images).unflatten(-1, (self.variables, self.classes))

    def reconstruction(self, weights: Tensor, images: Tensor) -> Tensor:
        """-log p(image | weights) in nats: weights (..., batch, variables, classes) -> (..., batch)."""
        pixel_logits = self.decoder(weights.flatten(-2))
        losses = F.binary_cross_entropy_with_logits(pixel_logits, images.expand_as(pixel_logits), reduction="none")
        return losses.sum(-1)


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """KL(Categorical(softmax(logits)) || uniform), summed over the variables: (..., variables, classes) -> (...)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_q.new_tensor(1 / logits.shape[-1]).log())).sum((-2, -1))


@torch.no_grad()
def negative_elbo(model: CategoricalVAE, images: Tensor, samples: int, seed: int) -> Bound:
    """E_q[-log p(x | z)] over hard samples z of the posterior, and the exact KL to the uniform prior.

    Their sum bounds -log p(x) from above, which that of relaxed samples does not.

    Args:
        model: the autoencoder.
        images: (images, pixels) of 0 and 1.
        samples: samples of z for each image.
        seed: of the samples.
    """
    logits = model.encode(images)
    weights = ga.gumbel_softmax(logits.expand(samples, *logits.shape), hard=True, seed=seed)
    return Bound(model.reconstruction(weights, images).mean(0), divergence_from_uniform(logits))


@torch.no_grad()
def relaxed_objective(model: CategoricalVAE, images: Tensor, samples: int, seed: int, tau: float) -> float:
    """The mean of the same sum with relaxed samples at ``tau``: what gumbel-soft minimises; not a bound."""
    logits = model.encode(images)
    weights = ga.gumbel_softmax(logits.expand(samples, *logits.shape), tau, seed=seed)
    return (model.reconstruction(weights, images).mean() + divergence_from_uniform(logits).mean()).item()


def load_images() -> Tensor:
    """scikit-learn's 1797 digits of 8 x 8 pixels, (1797, 64): 1 where the pixel, 0 to 16, is at least 8."""
    return torch.from_numpy(load_digits().data >= THRESHOLD).float()


def split_images(images: Tensor, seed: int) -> Split:
    """A random 60% of the images for training, 20% for validation and the rest for the test."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    first, second = int(SHARES[0] * len(images)), int(sum(SHARES) * len(images))
    return Split(images[order[:first]], images[order[first:second]], images[order[second:]])
