"""Which versions work together."""

from __future__ import annotations

import horovod
import tensorflow as tf

from hvd_qsgd.errors import SetupError

#: Minor releases with which this package is tested. Horovod 0.28.1 does not compile against later ones of TensorFlow.
TENSORFLOW = "2.18"
HOROVOD = "0.28"


def check_versions() -> None:
    """Raise SetupError unless TensorFlow and Horovod are of versions with which this package is tested."""
    for name, version, works in (("TensorFlow", tf.__version__, TENSORFLOW), ("Horovod", horovod.__version__, HOROVOD)):
        if version.split(".")[:2] != works.split("."):
            raise SetupError(
                f"{name} {version} is installed, and hvd_qsgd.tensorflow works with TensorFlow {TENSORFLOW} and "
                f"Horovod {HOROVOD} only, whose inner functions it relies on. Install them with: "
                f"pip install 'tensorflow=={TENSORFLOW}.*' 'tf-keras=={TENSORFLOW}.*' && hvd-qsgd install-horovod"
            )
