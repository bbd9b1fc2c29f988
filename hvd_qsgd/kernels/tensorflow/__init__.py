"""Kernels in TensorFlow operations, for whatever XLA compiles for: see :mod:`hvd_qsgd.kernels.tensorflow.base`."""
