"""The data and the network of the examples for torch."""

from __future__ import annotations

import torch
from mnist_data import load_images, split
from torch import nn
from torch.utils.data import TensorDataset

SPLIT_SEED = 0


def load_mnist() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images for training and 1,000 for testing, always the same, with all digits equally often."""
    array, numbers = load_images()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = split(numbers, lambda count: torch.randperm(count, generator=generator).numpy())
    images, digits = torch.from_numpy(array).unsqueeze(1), torch.from_numpy(numbers)
    return TensorDataset(images[train], digits[train]), TensorDataset(images[test], digits[test])


class Net(nn.Sequential):
    """A convolutional network with 212,426 parameters, nearly all of them in the first linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 5 * 5, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The part of the images that the model recognizes."""
    images, digits = dataset.tensors
    with torch.no_grad():
        return (model(images).argmax(dim=1) == digits).float().mean().item()
