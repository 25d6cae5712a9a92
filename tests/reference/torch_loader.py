"""PyTorch's DataLoader as the reference code uses it: decode, resize, and augment on the CPU.

Apart from the benchmark, so that worker processes import PyTorch and Pillow and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.reference.live_torchvision import torch, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_transform(size: int) -> Any:
    """Picture -> the normalised first view, float32 [3, size, size]."""
    return transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def augmenting_transform(size: int) -> Any:
    """Picture -> the normalised second view by the published recipe, float32 [3, size, size]."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            transforms.RandomGrayscale(p=0.2),
            transforms.GaussianBlur(23, sigma=(0.1, 2.0)),
            transforms.RandomRotation(15),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoViews(torch.utils.data.Dataset):
    """Image files and their labels; an item is (first view, second view, label)."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], size: int) -> None:
        self.files = list(files)
        self.labels = list(labels)
        self.plain, self.augmenting = plain_transform(size), augmenting_transform(size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        with Image.open(self.files[index]) as file:
            picture = file.convert("RGB")
        return self.plain(picture), self.augmenting(picture), self.labels[index]


@contextmanager
def endless_batches(
    files: Sequence[Path], labels: Sequence[int], *, size: int, batch_size: int, workers: int
) -> Iterator[Iterator[Any]]:
    """Shuffled batches, epoch after epoch, by worker processes that live until the block ends."""
    # Not forked: the benchmark's process has threads of JAX, which a fork may leave locked.
    loader = torch.utils.data.DataLoader(
        TwoViews(files, labels, size),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    running = batches()
    try:
        yield running
    finally:
        running.close()
        del loader  # ends the workers
