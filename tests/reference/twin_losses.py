"""The three losses in plain PyTorch, written out with whole similarity matrices (maps are NCHW)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

Maps = Sequence[torch.Tensor]


def cosine_distillation(targets: Maps, rebuilt: Maps, *, flat: bool = True) -> torch.Tensor:
    """1 - cosine of whole samples, or of each position's channels; means, summed over scales."""
    total = torch.zeros((), dtype=targets[0].dtype)
    for target, copy in zip(targets, rebuilt, strict=True):
        if flat:
            target, copy = target.flatten(1), copy.flatten(1)
        total = total + (1 - functional.cosine_similarity(target, copy, dim=1, eps=1e-8)).mean()
    return total


def matches(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """For each position of each sample the flat position of `keys` with the largest cosine."""
    q = functional.normalize(queries.flatten(2), dim=1)
    k = functional.normalize(keys.flatten(2), dim=1)
    return torch.einsum("bcq,bck->bqk", q, k).argmax(dim=2)


def local_one_scale(q_b, k_b, q_grid, k_grid, negatives, temperature) -> torch.Tensor:
    """The local loss of one scale; gradients reach the two projected maps only."""
    best = matches(q_b.detach(), k_b.detach())
    q = functional.normalize(q_grid.flatten(2), dim=1)
    k = functional.normalize(k_grid.flatten(2), dim=1)
    positive_keys = torch.stack([k[i][:, best[i]] for i in range(len(k))])
    positive = ((q * positive_keys).sum(dim=1) / temperature).exp()
    negative = ((q * k[negatives]).sum(dim=1) / temperature).exp()
    return -(positive / (positive + negative + 1e-6)).log().mean()


def local_contrastive(
    q_b: Maps,
    k_b: Maps,
    q_grid: Maps,
    k_grid: Maps,
    labels: torch.Tensor,
    negatives: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """The mean over scales; `negatives[scale, sample]` is an image of another class."""
    if bool((labels == labels[0]).all()):  # nobody has a negative
        return torch.zeros((), dtype=q_grid[0].dtype)
    scales = [
        local_one_scale(*maps, chosen, temperature)
        for *maps, chosen in zip(q_b, k_b, q_grid, k_grid, negatives, strict=True)
    ]
    return torch.stack(scales).mean()


def log_probabilities(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    unit = functional.normalize(rows, dim=1)
    return functional.log_softmax(unit @ unit.T / temperature, dim=1)


def global_two_view(clean, augmented, labels, *, temperature: float) -> torch.Tensor:
    """First release: minus the mean log-probability over all pairs of one class, none with itself.

    Both views are rows.
    """
    log_p = log_probabilities(torch.cat([clean, augmented]), temperature)
    twice = torch.cat([labels, labels])
    pairs = twice[:, None] == twice[None, :]
    pairs.fill_diagonal_(False)
    return -log_p[pairs].sum() / pairs.sum()


def global_second_release(pooled, labels, *, temperature: float) -> torch.Tensor:
    """Second release: own class (itself included) and other classes, each averaged per row."""
    log_p = log_probabilities(pooled, temperature)
    # The float64 record shows counts of float32: 2 + 1e-6 is 2.00000095 there.
    same = (labels[:, None] == labels[None, :]).float()
    other = 1 - same
    attract = (same * log_p).sum(dim=1) / (same.sum(dim=1) + 1e-6)
    repel = (other * log_p).sum(dim=1) / (other.sum(dim=1) + 1e-6)
    return -attract.mean() - repel.mean()
