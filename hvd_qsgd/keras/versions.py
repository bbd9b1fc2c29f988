"""Which Keras works."""

from __future__ import annotations

import keras

from hvd_qsgd.errors import SetupError


def check_keras() -> None:
    """Raise SetupError unless Keras is of version 3 and runs on TensorFlow."""
    if not keras.__version__.startswith("3."):
        raise SetupError(
            f"Keras {keras.__version__} is installed, and hvd_qsgd.keras is for Keras 3. "
            f"With Keras 2 use horovod.keras and the compressors of hvd_qsgd.tensorflow."
        )
    if keras.backend.backend() != "tensorflow":
        raise SetupError(
            f"Keras runs on {keras.backend.backend()}, and hvd_qsgd.keras works on TensorFlow only. "
            f"Set KERAS_BACKEND=tensorflow before Keras is imported."
        )
