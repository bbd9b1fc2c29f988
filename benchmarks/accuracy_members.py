"""What benchmarks/accuracy.py compares, and the simulated ranks that average gradients with it."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import numpy as np
import torch

from hvd_qsgd import (
    QSGD,
    Codec,
    EliasQSGD,
    GlobalTopK,
    IntSGD,
    PowerSGD,
    RandomK,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import BY_RANKS, Job, Piece, choose_exchange, start_exchange
from hvd_qsgd.feedback import EF21, ErrorFeedback, Feedback, LoCo, MomentumCorrection
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.policies import Accordion, Fixed, LGreCo, Policy, Tensor, WarmUp

EF, NO = ErrorFeedback(), None
#: A codec or a policy, and a kind of feedback if any. MomentumCorrection gets the momentum of the task.
MEMBERS: dict[str, tuple[Codec | Policy | None, Feedback | None]] = {
    "uncompressed": (None, NO),
    "QSGD 8 bits, bucket 512": (QSGD(8), NO),
    "QSGD 4 bits, bucket 512": (QSGD(4), NO),
    "QSGD 2 bits, bucket 128": (QSGD(2, 128), NO),
    "QSGD 4 bits, EF": (QSGD(4), EF),
    "QSGD 2 bits, bucket 128, EF (refused)": (QSGD(2, 128), EF),
    "QSGD 4 bits, LoCo": (QSGD(4), LoCo()),
    "QSGD 2 bits, bucket 128, LoCo": (QSGD(2, 128), LoCo()),
    "QSGD 2 bits nearest, EF": (QSGD(2, 128, rounding="nearest"), EF),
    "QSGD 2 bits nearest, no feedback": (QSGD(2, 128, rounding="nearest"), NO),
    "Elias QSGD 4 bits L2": (EliasQSGD(4), NO),
    "Elias QSGD 2 bits L2": (EliasQSGD(2), NO),
    "Elias QSGD 4 bits L2 nearest, EF": (EliasQSGD(4, rounding="nearest"), EF),
    "Elias QSGD 4 bits L2 scaled, EF": (Scaled(EliasQSGD(4)), EF),
    "TopK 1 %, EF": (TopK(0.01), EF),
    "TopK 0.1 %, EF": (TopK(0.001), EF),
    "TopK 1 %, no feedback": (TopK(0.01), NO),
    "TopK 1 %, EF21": (TopK(0.01), EF21()),
    "TopK 1 %, EF in bfloat16": (TopK(0.01), ErrorFeedback("bfloat16")),
    "TopK 1 %, EF in int8": (TopK(0.01), ErrorFeedback("int8")),
    "TopK by row 1 %, EF": (RowTopK(0.01), EF),
    "TopK by row 1 %, no feedback": (RowTopK(0.01), NO),
    "TopK by buffer 1 %, EF": (GlobalTopK(0.01), EF),
    "TopK by buffer 1 %, no feedback": (GlobalTopK(0.01), NO),
    "TopK by row 0.1 %, EF": (RowTopK(0.001), EF),
    "TopK by buffer 0.1 %, EF": (GlobalTopK(0.001), EF),
    "TopK reused threshold 1 %, EF": (ThresholdTopK(0.01, method="reuse"), EF),
    "TopK reused threshold 0.1 %, EF": (ThresholdTopK(0.001, method="reuse"), EF),
    "TopK reused threshold 1 %, no feedback": (ThresholdTopK(0.01, method="reuse"), NO),
    "TopK SIDCo 1 %, EF": (ThresholdTopK(0.01, method="sidco-gamma"), EF),
    "TopK SIDCo 0.1 %, EF": (ThresholdTopK(0.001, method="sidco-gamma"), EF),
    "DGC 1 %": (ThresholdTopK(0.01, method="sample"), MomentumCorrection()),
    "DGC 0.1 %": (ThresholdTopK(0.001, method="sample"), MomentumCorrection()),
    "DGC 0.1 %, warm-up": (WarmUp.of_ratios(ThresholdTopK(0.001, method="sample")), MomentumCorrection()),
    "TopK 0.1 %, warm-up, EF": (WarmUp.of_ratios(TopK(0.001)), EF),
    "Accordion: TopK 10 % or 1 %, EF": (Accordion(TopK(0.1), TopK(0.01), every=1), EF),
    "L-GreCo: QSGD 4, 2 or 8 bits": (LGreCo([QSGD(4), QSGD(2, 128), QSGD(8)]), NO),
    "RandomK 10 %, EF": (RandomK(0.1), EF),
    "RandomK 1 %, EF": (RandomK(0.01), EF),
    "RandomK 10 % unbiased, no feedback": (RandomK(0.1, unbiased=True), NO),
    "sign, EF": (Sign(), EF),
    "sign, no feedback": (Sign(), NO),
    "PowerSGD rank 4, EF": (PowerSGD(4), EF),
    "PowerSGD rank 1, EF": (PowerSGD(1), EF),
    "PowerSGD rank 4, no feedback": (PowerSGD(4), NO),
    "IntSGD 4 bits": (IntSGD(), NO),
    "IntSGD 2 bits": (IntSGD(2), NO),
    "IntSGD 4 bits, EF": (IntSGD(), EF),
    "IntSGD 8 bits": (IntSGD(8), NO),
}
#: With --quick.
FEW = ("uncompressed", "QSGD 4 bits, bucket 512", "TopK 1 %, EF", "TopK 1 %, no feedback")
MIN_ELEMENTS = 1024


class Ranks:
    """Simulated ranks that average gradients with a codec or policy and feedback."""

    def __init__(self, count: int, codec: Codec | Policy | None, feedback: Feedback | None, seed: int) -> None:
        self.count, self.seed, self.step = count, seed, 0
        self.policy = copy.deepcopy(codec) if isinstance(codec, Policy) else Fixed(codec)
        self.feedback = [feedback.fresh() for _ in range(count)] if feedback is not None else None
        self.memories: list[dict[str, dict[str, Any]]] = [{} for _ in range(count)]
        self.velocities: dict[str, torch.Tensor] = {}
        #: Sent by a rank so far.
        self.bytes = 0.0

    def start_epoch(self, epoch: int) -> None:
        self.policy.apply(self.policy.decide(epoch))

    def average(self, gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        means = {}
        compressed: dict[Codec, list[str]] = {}
        for name, gradient in gradients[0].items():
            codec = self.policy.codec(Tensor(name, tuple(gradient.shape)))
            if codec is not None and gradient.dim() >= 2 and gradient.numel() >= MIN_ELEMENTS:
                compressed.setdefault(codec, []).append(name)
                continue
            means[name] = torch.stack([of_rank[name] for of_rank in gradients]).mean(0)
            self.bytes += 2 * (self.count - 1) / self.count * 4 * gradient.numel()
            correction = self.feedback[0] if self.feedback is not None else None
            if isinstance(correction, MomentumCorrection):
                velocity = self.velocities.get(name, torch.zeros_like(means[name]))
                means[name] = self.velocities[name] = correction.momentum * velocity + means[name]
        for codec, names in compressed.items():
            means.update(self._exchange(codec, gradients, names))
        self.step += 1
        return means

    def _exchange(
        self, codec: Codec, gradients: list[dict[str, torch.Tensor]], names: list[str]
    ) -> dict[str, torch.Tensor]:
        kernels = kernels_for(codec, "numba")
        jobs = []
        for rank, of_rank in enumerate(gradients):
            pieces = []
            for name in names:
                x = of_rank[name].reshape(-1).numpy()
                if self.feedback is not None:
                    x = self.feedback[rank].correct(name, x, self.count)
                stream = stream_of(self.seed, 0 if codec.shared_randomness else rank, name)
                piece = Piece(
                    name,
                    x,
                    np.empty_like(x),
                    stream,
                    self.step,
                    keep_error=self.feedback is not None,
                    shape=tuple(of_rank[name].shape),
                    memory=self.memories[rank].setdefault(f"{codec} {name}", {}),
                )
                pieces.append(piece)
            jobs.append(Job("gradients", pieces, kernels, rank, self.count, np.empty))
        exchange = choose_exchange(BY_RANKS, codec, self.count)
        simulate([start_exchange(exchange, job) for job in jobs])
        for rank, job in enumerate(jobs):
            for piece in job.pieces:
                if self.feedback is not None:
                    self.feedback[rank].keep(piece.name, piece.x, piece.out)
        if self.policy.observes:
            for piece in jobs[0].pieces:
                self.policy.observe(Tensor(piece.name, piece.shape or ()), piece.out)
        self.bytes += statistics.mean(job.wire_bytes for job in jobs)
        return {piece.name: torch.from_numpy(piece.out).view(piece.shape) for piece in jobs[0].pieces}
