"""What every kind of feedback offers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback.store import Store

Kind = TypeVar("Kind", bound="Feedback")


@dataclass(eq=False)
class Feedback(ABC):
    """Settings, which are the fields, and the memory of this rank.

    One step of a tensor is :meth:`correct`, an exchange that leaves in the corrected array what
    it did not send, and then either :meth:`keep` or, if the result is not finite, :meth:`discard`.
    If the mean is not applied after all, :meth:`settle` goes back to before the step.
    """

    #: Name in the registry and in configurations.
    name: ClassVar[str]
    #: Whether an error is only partly fed back.
    damped: ClassVar[bool] = False
    #: Whether the memories of the ranks must fit together, see :meth:`check`.
    linked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Forget everything: make the stores."""

    @abstractmethod
    def correct(self, name: str, x: Any, ranks: int = 1) -> Any:
        """What to compress in place of the gradient ``x`` of one of ``ranks`` ranks: an array of its own."""

    @abstractmethod
    def keep(self, name: str, error: Any, mean: Any = None) -> None:
        """Go on from ``error``: what :meth:`correct` returned less what this rank sent.

        ``mean`` is the decoded mean over ranks; kinds that compress something else than
        gradients turn it into the mean gradient, in place.
        """

    @abstractmethod
    def discard(self, name: str, error: Any, mean: Any = None) -> None:
        """Leave the memory as it was before :meth:`correct`."""

    def settle(self, name: str, applied: bool) -> None:
        """Say whether the last mean was applied to the parameter, as the next :meth:`correct` takes for granted.

        If it was not, the memory is restored to what it was before that step.
        """
        for store in self.stores.values():
            store.settle(name, applied)

    def forget(self, name: str) -> None:
        """Free what is remembered of a tensor."""
        for store in self.stores.values():
            store.forget(name)

    def check(self, average: Callable[[str, Any], Any]) -> None:
        """Raise ExchangeError if what must hold between the memories of the ranks does not.

        ``average`` gives the mean over ranks of an array under a name; all ranks must ask in the same order.
        """
        return None

    def fresh(self: Kind) -> Kind:
        """The same settings with empty memory."""
        return dataclasses.replace(self)

    def config(self) -> dict[str, Any]:
        """The settings as a dictionary that survives JSON; see ``feedback_from_config``."""
        return {"feedback": self.name, **dataclasses.asdict(self)}

    # -- the memory, for checkpoints -------------------------------------------------------

    @property
    def stores(self) -> dict[str, Store]:
        """All stores by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Store)}

    def arrays(self, unapplied: Collection[str] = ()) -> dict[str, Any]:
        """Every remembered array, float32, by "store/tensor".

        Args:
            unapplied: tensors whose arrays are those that :meth:`settle` would restore.
        """
        found = {
            f"{kind}/{name}": store.get_before(name) if name in unapplied else store.get(name)
            for kind, store in self.stores.items()
            for name in store.names()
        }
        return {path: array for path, array in found.items() if array is not None}

    def numbers(self, unapplied: Collection[str] = ()) -> dict[str, int]:
        """Every remembered whole number, equal on all ranks, by "what/tensor"; see :meth:`arrays`."""
        return {}

    def resized(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """What every rank of a job of another size starts from: made of the old ranks' mean :meth:`arrays`."""
        return arrays

    def load(self, arrays: dict[str, Any], numbers: dict[str, int]) -> None:
        """Replace the memory by what :meth:`arrays` and :meth:`numbers` gave; keeps references to the arrays.

        Raises:
            ConfigError: it belongs to another kind of feedback.
        """
        self.start()
        for path, array in arrays.items():
            kind, _, name = path.partition("/")
            if kind not in self.stores:
                raise ConfigError(
                    f"The saved state has a {kind!r} of {name!r}, which the feedback {self.name!r} does not know. "
                    f"Use the feedback of the saved run."
                )
            self.stores[kind].put(name, array)
            # Of what was loaded nothing can be dropped: it is what the gradients before have left.
            self.stores[kind].settle(name)
