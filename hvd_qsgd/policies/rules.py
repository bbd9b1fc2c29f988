"""Rules: codecs by name pattern and size, from a dictionary or a YAML file."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hvd_qsgd.codecs import CODECS
from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.policies.base import Fixed, Policy, Tensor

DEFAULT = "default"
#: A shell pattern and, if wanted, a bound of the number of elements: "embed* >= 100000".
KEY = re.compile(r"^(?P<pattern>\S+)(?:\s+(?P<bound>>=|<)\s*(?P<elements>\d+))?$")


class Rules(Policy):
    """The first rule that fits a tensor gives its codec.

        Rules({"*.bias": None, "embed* >= 100000": TopK(0.01), "default": QSGD(4)})
        Rules({"*.bias": "none", "embed* >= 100000": "topk(0.01)", "default": "qsgd(4)"})
        Rules.from_file("compression.yaml")

    Args:
        rules: from a shell pattern of parameter names, with a bound of the number of elements if
            wanted (">= n" or "< n"), to a codec, another policy, None or "none" (leave it to
            Horovod), a codec's configuration, or its name with arguments as text. "default" holds
            for all other tensors and must be there.

    Raises:
        ConfigError: a rule that cannot be read, an unknown codec, no "default"; once the model is
            known, a pattern that fits none of its parameters.

    Examples:
        >>> rules = Rules({"*.bias": "none", "embed* >= 100000": "topk(0.01)", "default": "qsgd(4)"})
        >>> rules.codec(Tensor("embed.weight", (50_000, 64)))
        TopK(ratio=0.01, k=None, values='float32')
        >>> rules.codec(Tensor("head.weight", (10, 64)))
        QSGD(bits=4, bucket_size=512, norm='max', rounding='stochastic')
        >>> rules.codec(Tensor("head.bias", (10,)))
    """

    def __init__(self, rules: dict[str, Any]) -> None:
        if DEFAULT not in rules:
            raise ConfigError(f'Rules: there is no "{DEFAULT}" among {list(rules)}; say what other tensors get.')
        self._rules = [(*_read_key(key), _read_choice(key, choice)) for key, choice in rules.items() if key != DEFAULT]
        self._default = _read_choice(DEFAULT, rules[DEFAULT])
        self._text = {key: _read_choice(key, choice).config() for key, choice in rules.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> Rules:
        """Read a YAML mapping like the dictionary above.

        Raises:
            ConfigError: it is no such mapping, or PyYAML is not installed.
        """
        try:
            import yaml
        except ModuleNotFoundError:
            raise ConfigError("Rules in YAML need the package PyYAML: pip install PyYAML") from None
        try:
            rules = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is no YAML: {error}") from error
        if not isinstance(rules, dict):
            raise ConfigError(f"{path} must map name patterns to codecs; it holds {type(rules).__name__}.")
        return cls({str(key): choice for key, choice in rules.items()})

    def __repr__(self) -> str:
        return f"Rules({self._text})"

    def policy_of(self, tensor: Tensor) -> Policy:
        """That of the first rule that fits the tensor, else the default."""
        for pattern, low, high, policy in self._rules:
            if fnmatch.fnmatchcase(tensor.name, pattern) and low <= tensor.elements < high:
                return policy
        return self._default

    @property
    def _policies(self) -> list[Policy]:
        return [policy for *_, policy in self._rules] + [self._default]

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return any(policy.observes for policy in self._policies)

    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        return self.policy_of(tensor).choices(tensor)

    def codec(self, tensor: Tensor) -> Codec | None:
        return self.policy_of(tensor).codec(tensor)

    def every_codec(self) -> Sequence[Codec]:
        return [codec for policy in self._policies for codec in policy.every_codec()]

    def config(self) -> dict[str, Any]:
        return {"policy": "rules", "rules": self._text}

    def check_names(self, names: Collection[str]) -> None:
        for pattern, _, _, _ in self._rules:
            if not fnmatch.filter(names, pattern):
                some = ", ".join(sorted(names)[:5])
                raise ConfigError(
                    f"Rules: the pattern {pattern!r} fits no parameter of the model; these are {some}, ... "
                    f"({len(names)} in all). Correct the pattern or leave it out."
                )

    def observe(self, tensor: Tensor, gradient: Any) -> None:
        self.policy_of(tensor).observe(tensor, gradient)

    def forget(self, key: str) -> None:
        for policy in self._policies:
            policy.forget(key)

    # Decisions and states of the policies inside stand under their numbers.

    def decide(self, epoch: int, learning_rate: float | None = None) -> dict[str, int]:
        decided = enumerate(policy.decide(epoch, learning_rate) for policy in self._policies)
        return {f"{number}/{name}": value for number, part in decided for name, value in part.items()}

    def apply(self, decisions: dict[str, int]) -> None:
        for number, policy in enumerate(self._policies):
            head = f"{number}/"
            policy.apply({name[len(head) :]: value for name, value in decisions.items() if name.startswith(head)})

    def state(self) -> dict[str, Any]:
        return {str(number): policy.state() for number, policy in enumerate(self._policies)}

    def load(self, state: dict[str, Any]) -> None:
        for number, policy in enumerate(self._policies):
            policy.load(state[str(number)])


def _read_key(key: str) -> tuple[str, float, float]:
    """Pattern, and the range of numbers of elements."""
    match = KEY.match(key)
    if match is None:
        raise ConfigError(
            f'Rules: cannot read {key!r}; write a pattern like "embed*", if wanted with ">= 100000" or "< 100000" '
            f"after a space."
        )
    if match["bound"] is None:
        return match["pattern"], 0, float("inf")
    elements = int(match["elements"])
    return (match["pattern"], elements, float("inf")) if match["bound"] == ">=" else (match["pattern"], 0, elements)


def _read_choice(key: str, choice: Any) -> Policy:
    if isinstance(choice, Policy):
        return choice
    if choice is None or isinstance(choice, Codec):
        return Fixed(choice)
    if isinstance(choice, dict):
        from hvd_qsgd.codecs import codec_from_config

        return Fixed(codec_from_config(choice))
    if isinstance(choice, str):
        return Fixed(parse_codec(choice))
    raise ConfigError(f"Rules: {choice!r} for {key!r} is no codec, policy, configuration or text.")


def parse_codec(text: str) -> Codec | None:
    """A codec from its registered name with arguments, like "qsgd(4)" or "topk(ratio=0.01)"; None from "none".

    Raises:
        ConfigError: an unknown codec, or arguments that are not plain values or do not fit.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name = call.func if isinstance(call, ast.Call) else call
        if not isinstance(name, ast.Name):
            raise ValueError("no name")
        arguments = [ast.literal_eval(argument) for argument in call.args] if isinstance(call, ast.Call) else []
        settings = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if isinstance(call, ast.Call) else {}
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f'Cannot read the codec {text!r}; write it like "qsgd(4)" or "none".') from error
    if name.id == "none" and not isinstance(call, ast.Call):
        return None
    if name.id not in CODECS:
        known = ", ".join(["none", *sorted(CODECS)])
        raise ConfigError(f"Unknown codec {name.id!r} in {text!r}; known are {known}.")
    try:
        return CODECS[name.id](*arguments, **settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"The arguments of {text!r} do not fit: {error}.") from error
