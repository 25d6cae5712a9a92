"""The twin's training step and scoring as one would run them, not as one would check them.

The same values (tests/test_speed.py): positives are gathered for a whole batch at once, pairs are
summed through a mask, and nothing waits for the device but what reads a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from tests.reference.twin_losses import Maps, cosine_distillation, log_probabilities, matches
from tests.reference.twin_model import Noise, Twin
from tests.reference.twin_step import TwinTraining


def local_one_scale(q_b, k_b, q_grid, k_grid, negatives, temperature) -> torch.Tensor:
    """`twin_losses.local_one_scale`, without a loop over the images."""
    best = matches(q_b.detach(), k_b.detach())
    q = functional.normalize(q_grid.flatten(2), dim=1)
    k = functional.normalize(k_grid.flatten(2), dim=1)
    positive_keys = k.gather(2, best[:, None].expand(-1, k.shape[1], -1))
    positive = ((q * positive_keys).sum(dim=1) / temperature).exp()
    negative = ((q * k.index_select(0, negatives)).sum(dim=1) / temperature).exp()
    return -(positive / (positive + negative + 1e-6)).log().mean()


def local_contrastive(
    q_b: Maps,
    k_b: Maps,
    q_grid: Maps,
    k_grid: Maps,
    negatives: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """`twin_losses.local_contrastive` of a batch in which every image has a negative."""
    scales = [
        local_one_scale(*maps, chosen, temperature)
        for *maps, chosen in zip(q_b, k_b, q_grid, k_grid, negatives, strict=True)
    ]
    return torch.stack(scales).mean()


def global_two_view(clean, augmented, labels, *, temperature: float) -> torch.Tensor:
    """`twin_losses.global_two_view`, whose selection of pairs would wait for the device."""
    log_p = log_probabilities(torch.cat([clean, augmented]), temperature)
    twice = torch.cat([labels, labels])
    itself = torch.eye(len(twice), dtype=torch.bool, device=twice.device)
    pairs = (twice[:, None] == twice[None, :]) & ~itself
    return -(log_p * pairs).sum() / pairs.sum()


class FastTraining(TwinTraining):
    """A `TwinTraining` of the first release's losses whose step waits for nothing.

    `fused` runs Adam as one kernel.
    """

    def __init__(self, model: Twin, *, fused: bool = False):
        super().__init__(model)
        if fused:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["fused"], group["foreach"] = True, False

    def losses(self, clean, augmented, labels, negatives, noise: Noise | None = None):
        """The terms by name; running statistics move."""
        first, second = self.model.two_views(clean, augmented, noise)
        return {
            "cosine": cosine_distillation(first.targets, first.rebuilt),
            "local": local_contrastive(
                first.targets,
                second.targets,
                first.projected,
                second.projected,
                negatives,
                temperature=self.temperature,
            ),
            "global": global_two_view(
                first.pooled, second.pooled, labels, temperature=self.temperature
            ),
        }

    def advance(self, losses, *batch) -> dict[str, torch.Tensor]:
        """One optimisation step by `losses`, which may be compiled; the terms, not yet awaited."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = losses(*batch)
        sum(terms.values()).backward()
        self.update()
        return {name: term.detach() for name, term in terms.items()}

    def update(self) -> None:
        """What follows the backward pass: the clip and both optimizers."""
        torch.nn.utils.clip_grad_norm_(self.parameters, max_norm=5.0)
        for optimizer in self.optimizers:
            optimizer.step()


def score_maps(model: Twin, images: torch.Tensor) -> torch.Tensor:
    """[b, h, w]: cosine distances, bilinearly enlarged to the images, over the scales' square."""
    out = model(images)
    return summed_distances(out.targets, out.rebuilt, images.shape[2:])


def summed_distances(targets: Maps, rebuilt: Maps, size: Sequence[int]) -> torch.Tensor:
    """The score maps of pairs of maps."""
    total = torch.zeros((), device=targets[0].device)
    for target, copy in zip(targets, rebuilt, strict=True):
        distance = 1 - functional.cosine_similarity(target, copy, dim=1, eps=1e-8)
        total = total + functional.interpolate(
            distance[:, None].float(), tuple(size), mode="bilinear", align_corners=True
        )
    return total[:, 0] / len(targets) ** 2
