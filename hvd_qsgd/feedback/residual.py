"""Error feedback: what compression lost of a gradient is added to the next one.

Source: Seide et al., 1-bit SGD, Interspeech 2014; Karimireddy et al., Error feedback fixes
SignSGD, ICML 2019 (arXiv 1901.09847), Algorithm 2. Residuals are kept for gradients, not
for steps, so a change of the learning rate applies to them as well.

Invariant: input + old residual = own decoded payload + new residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.feedback.base import Feedback
from hvd_qsgd.feedback.store import Store, check_kept_as


@dataclass(eq=False)
class ErrorFeedback(Feedback):
    """Adds the residual of the step before.

    Args:
        kept_as: "float32", "bfloat16" or "int8", which keeps residuals as payloads of 8-bit
            QSGD with nearest rounding. The smaller ones lose a little of each residual for
            good: at most 2^-9 of a value with bfloat16, 1/254 of the largest of 512 with int8.

    Raises:
        ConfigError: a value is out of range.
    """

    kept_as: str = "float32"

    name: ClassVar[str] = "ef"

    def __post_init__(self) -> None:
        check_kept_as("ErrorFeedback", "kept_as", self.kept_as)
        super().__post_init__()

    def start(self) -> None:
        self.residual = Store(self.kept_as)

    def correct(self, name: str, x: Any, ranks: int = 1) -> Any:
        residual = self.residual.get_for(name, x)
        corrected = self.residual.room(name, x)
        corrected[...] = x
        if residual is not None:
            corrected += residual
        return corrected

    def keep(self, name: str, error: Any, mean: Any = None) -> None:
        self.residual.put(name, error)

    def discard(self, name: str, error: Any, mean: Any = None) -> None:
        """Nothing was changed yet."""
