"""The optimisation step in plain PyTorch: two optimisers, one clip over everything trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tests.reference import twin_losses
from tests.reference.twin_model import Noise, Twin


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: its threads wait in a loop, ten times as long where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TwinTraining:
    """A twin with its two optimisers; `step` is one optimisation step of all losses, weights 1."""

    def __init__(
        self,
        model: Twin,
        *,
        global_form: str = "two_view",
        flat: bool = True,
        temperature: float = 0.05,
        projector_lr: float = 1e-3,
        lr: float = 5e-3,
    ):
        self.model = model.train()
        self.global_form, self.flat, self.temperature = global_form, flat, temperature
        projector = [p for name, p in model.trained().items() if name.startswith("proj_layer.")]
        rest = [p for name, p in model.trained().items() if not name.startswith("proj_layer.")]
        settings = {"betas": (0.5, 0.999), "eps": 1e-8}
        self.optimizers = [
            torch.optim.Adam(projector, lr=projector_lr, **settings),
            torch.optim.Adam(rest, lr=lr, **settings),
        ]
        self.parameters = projector + rest

    def losses(
        self,
        clean: torch.Tensor,
        augmented: torch.Tensor,
        labels: torch.Tensor,
        negatives: torch.Tensor,
        noise: Noise | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms by name; running statistics move."""
        first, second = self.model.two_views(clean, augmented, noise)
        if self.global_form == "two_view":
            overall = twin_losses.global_two_view(
                first.pooled, second.pooled, labels, temperature=self.temperature
            )
        else:
            overall = twin_losses.global_second_release(
                first.pooled, labels, temperature=self.temperature
            )
        local = twin_losses.local_contrastive(
            first.targets,
            second.targets,
            first.projected,
            second.projected,
            labels,
            negatives,
            temperature=self.temperature,
        )
        cosine = twin_losses.cosine_distillation(first.targets, first.rebuilt, flat=self.flat)
        return {"cosine": cosine, "local": local, "global": overall}

    def step(self, *batch, noise: Noise | None = None) -> dict[str, float]:
        """The terms, their sum and the gradients' norm before the clip; `batch` as in `losses`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = self.losses(*batch, noise=noise)
        total = sum(terms.values())
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm=5.0)
        for optimizer in self.optimizers:
            optimizer.step()
        values = {"loss": total, **terms, "gradient_norm": norm}
        return {name: float(value.detach()) for name, value in values.items()}
