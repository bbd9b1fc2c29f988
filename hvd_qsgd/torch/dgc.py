"""Deep gradient compression: the optimizer's momentum, moved to where gradients are compressed.

Source: Lin et al., ICLR 2018 (arXiv 1712.01887); the parts are :class:`hvd_qsgd.feedback.MomentumCorrection`,
:class:`hvd_qsgd.ThresholdTopK` with a sampled threshold, and :class:`hvd_qsgd.policies.WarmUp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Unpack

from hvd_qsgd.codecs import ThresholdTopK
from hvd_qsgd.collectives.horovod_torch import wrap
from hvd_qsgd.compressors.base import class_or_instance
from hvd_qsgd.compressors.settings import SettingsWithoutFeedback
from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.feedback import MomentumCorrection
from hvd_qsgd.kernels.torch.untraced import out_of_inference, untraced
from hvd_qsgd.policies import WarmUp
from hvd_qsgd.torch.callsite import CallSite
from hvd_qsgd.torch.compressor import Compressor
from hvd_qsgd.torch.tensors import array_of, put_back


@dataclass
class Dense:
    """A tensor that is not compressed and whose mean gets its momentum here."""

    key: str
    site: CallSite
    context: Any


class DGCCompressor(Compressor):
    """The largest values of accumulated velocities; for ``torch.optim.SGD`` without momentum.

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)   # no momentum, no weight_decay here
        compression = DGCCompressor(ratio=0.001, momentum=0.9, weight_decay=1e-4)
        ...
        compression.set_epoch(epoch)                              # in each epoch: the warm-up

    Args:
        ratio: share of the values that is sent after the warm-up.
        momentum, nesterov, masking, clip: see :class:`hvd_qsgd.feedback.MomentumCorrection`. Tensors
            that are not compressed get the same momentum after their allreduce.
        weight_decay: times the parameter, is added to gradients before they are accumulated.
        warm_up: ratios of the first epochs; none if empty.
        settings: those of :class:`hvd_qsgd.compressors.base.CompressorBase`.

    Raises:
        ConfigError: a value is out of range.
        UnsupportedError: at the first gradient, if the optimizer has a momentum or weight decay of
            its own, or there is no optimizer.
    """

    _moves_momentum = True
    _made = ("error_feedback",)

    def __init__(
        self,
        ratio: float = 0.001,
        momentum: float = 0.9,
        nesterov: bool = False,
        masking: bool = True,
        clip: float | None = None,
        weight_decay: float = 0.0,
        warm_up: Sequence[float] = (0.25, 0.0625, 0.0156, 0.004),
        *,
        progress_thread: bool = False,
        **settings: Unpack[SettingsWithoutFeedback],
    ) -> None:
        correction = MomentumCorrection(momentum, nesterov, masking, clip)
        policy = WarmUp.of_ratios(ThresholdTopK(ratio, method="sample"), warm_up)
        super().__init__(policy, error_feedback=correction, progress_thread=progress_thread, **settings)
        self.weight_decay = weight_decay
        self.correction: MomentumCorrection = self.feedback  # type: ignore[assignment]

    @class_or_instance
    @untraced
    @out_of_inference
    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """See :meth:`Compressor.decompress`."""
        if not isinstance(context, Dense):
            return super().decompress(tensor, context)
        mean = super().decompress(tensor, context.context)
        gradient = self._decayed(context.site, mean)
        momentum, store = self.correction.momentum, self.correction.velocity
        flat = gradient.reshape(-1).to(torch.float32)
        before = wrap(store.get(context.key)) if context.key in store else torch.zeros_like(flat)
        velocity = before * momentum + flat
        # A step that is not finite will be skipped. A look at that would make the host wait for a device.
        finite = flat.isfinite().all()
        store.put(context.key, array_of(torch.where(finite, velocity, before)))
        self._applied(context.site, context.key)
        step = torch.where(finite, flat + momentum * velocity if self.correction.nesterov else velocity, flat)
        return put_back(context.site, mean, step)

    def _gradient(self, site: CallSite, tensor: torch.Tensor) -> Any:
        return array_of(self._decayed(site, tensor))

    def _decayed(self, site: CallSite, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + self.weight_decay * site.parameter.detach() if self.weight_decay else gradient

    def _bypass(self, key: str, tensor: torch.Tensor, site: CallSite, reason: str) -> tuple[torch.Tensor, Any]:
        sent, context = super()._bypass(key, tensor, site, reason)
        self._check(site.optimizer)
        return sent, Dense(key, site, context)

    def _plan(self, optimizer: Any, process_set: Any, exchange: str) -> Any:
        self._check(optimizer)
        return super()._plan(optimizer, process_set, exchange)

    def _bundles(self, site: CallSite, tensor: torch.Tensor) -> Any:
        self._check(None)

    def _check(self, optimizer: Any) -> None:
        if optimizer is None:
            raise UnsupportedError(
                "DGCCompressor takes the place of an optimizer's momentum; a single allreduce has none. "
                "Use it with hvd.DistributedOptimizer, or TopKCompressor here."
            )
        for group in optimizer.param_groups:
            if group.get("momentum") or "betas" in group or "alpha" in group:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} has a momentum of its own (momentum={group.get('momentum')}, "
                    f"betas={group.get('betas')}), and DGCCompressor applies momentum={self.correction.momentum} "
                    f"before compression: together they would count twice. Use torch.optim.SGD(lr=...) without "
                    f"momentum, or another compressor."
                )
            if group.get("weight_decay"):
                raise UnsupportedError(
                    f"The optimizer has weight_decay={group['weight_decay']}, which would stay out of the momentum "
                    f"that DGCCompressor applies. Give it as DGCCompressor(weight_decay={group['weight_decay']})."
                )
