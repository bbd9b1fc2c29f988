"""Calls of compressors, for mypy: it must report the lines that are marked as wrong, and no other.

Read by ``test_settings.py``; never run.
"""

from __future__ import annotations

from typing_extensions import Unpack

import hvd_qsgd.keras as for_keras
import hvd_qsgd.tensorflow as for_tensorflow
import hvd_qsgd.torch as for_torch
from hvd_qsgd import QSGD
from hvd_qsgd.compressors.settings import Settings
from hvd_qsgd.feedback import EF21
from hvd_qsgd.observe import LogLines, Monitor
from hvd_qsgd.policies import Rules

for_torch.Compressor(QSGD(), exchange="auto", seed=3, threads=None, progress_thread=True)
for_torch.Compressor(Rules({"*": QSGD()}), monitor=Monitor(LogLines()))
for_torch.QSGDCompressor()
for_torch.QSGDCompressor(8, 512, "l2", "nearest", True, exchange="allgather", error_feedback=EF21())
for_torch.TopKCompressor(ratio=None, k=100, error_feedback=False, min_elements=1, min_dims=0, fusion_elements=10)
for_torch.DGCCompressor(0.01, warm_up=(), min_dims=1, progress_thread=True)
for_torch.Compressor(QSGD(), min_elemnts=1)  # wrong: name
for_torch.Compressor(QSGD(), min_elements="1")  # wrong: type
for_torch.Compressor(QSGD(), kernels="numba")  # wrong: of TensorFlow
for_torch.Compressor()  # wrong: no codec
for_torch.CastCompressor(min_elemnts=1)  # wrong: name
for_torch.CastCompressor(16)  # wrong: type
for_torch.EliasQSGDCompressor(min_elements="1")  # wrong: type
for_torch.GlobalTopKCompressor(exchange=None)  # wrong: type
for_torch.IdentityCompressor(bits=4)  # wrong: of another codec
for_torch.IntSGDCompressor(seed=1.5)  # wrong: type
for_torch.PowerSGDCompressor(error_feedback="EF21")  # wrong: type
for_torch.QSGDCompressor(bits="4")  # wrong: type
for_torch.QSGDCompressor(bit=4)  # wrong: name
for_torch.QSGDCompressor(kernels="numba")  # wrong: of TensorFlow
for_torch.RandomKCompressor(progress_thread="yes")  # wrong: type
for_torch.RowTopKCompressor(monitor=LogLines())  # wrong: type
for_torch.SignCompressor(threads="all")  # wrong: type
for_torch.ThresholdTopKCompressor(min_dims=None)  # wrong: type
for_torch.TopKCompressor(k=0.5)  # wrong: type
for_torch.DGCCompressor(error_feedback=True)  # wrong: it makes its own
for_torch.DGCCompressor(momentun=0.9)  # wrong: name

for_tensorflow.Compressor(QSGD(), exchange="auto", seed=3, kernels="tensorflow")
for_tensorflow.QSGDCompressor(8, 512, "l2", "nearest", True, exchange="allgather", error_feedback=EF21())
for_tensorflow.TopKCompressor(ratio=None, k=100, error_feedback=False, min_elements=1, kernels="auto")
for_keras.QSGDCompressor(bits=2, min_elements=1, kernels="numba")
for_tensorflow.Compressor(QSGD(), min_elemnts=1)  # wrong: name
for_tensorflow.Compressor(QSGD(), min_elements="1")  # wrong: type
for_tensorflow.Compressor(Rules({"*": QSGD()}))  # wrong: for torch only
for_tensorflow.CastCompressor(min_elemnts=1)  # wrong: name
for_tensorflow.EliasQSGDCompressor(min_elements="1")  # wrong: type
for_tensorflow.GlobalTopKCompressor(exchange=None)  # wrong: type
for_tensorflow.IdentityCompressor(bits=4)  # wrong: of another codec
for_tensorflow.QSGDCompressor(bits="4")  # wrong: type
for_tensorflow.QSGDCompressor(progress_thread=True)  # wrong: of torch
for_tensorflow.RandomKCompressor(kernels=None)  # wrong: type
for_tensorflow.RowTopKCompressor(monitor=LogLines())  # wrong: type
for_tensorflow.SignCompressor(threads="all")  # wrong: type
for_tensorflow.ThresholdTopKCompressor(min_dims=None)  # wrong: type
for_tensorflow.TopKCompressor(k=0.5)  # wrong: type
for_keras.QSGDCompressor(min_elemnts=1)  # wrong: name


def hand_on(**settings: Unpack[Settings]) -> for_torch.Compressor:
    return for_torch.QSGDCompressor(bits=2, **settings)


hand_on(seed=1)
hand_on(sed=1)  # wrong: name
