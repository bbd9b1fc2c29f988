"""Every error that this package raises on purpose.

Each message says what came, why it cannot work and what to do about it.
"""


class HvdQsgdError(Exception):
    """Base of all errors raised by hvd_qsgd."""

    #: TensorFlow's AutoGraph hands on errors with this attribute as they are, and others under another type.
    ag_pass_through = True


class ConfigError(HvdQsgdError, ValueError):
    """A setting has a value that cannot work."""


class PayloadError(HvdQsgdError, ValueError):
    """Bytes that are not a payload of the codec that was asked to decode them."""


class UnsupportedError(HvdQsgdError, TypeError):
    """The surrounding framework asks for something that compression cannot do correctly."""


class ExchangeError(HvdQsgdError, RuntimeError):
    """Ranks disagree about an exchange, or a collective failed."""


class SetupError(HvdQsgdError, RuntimeError):
    """The environment lacks something that has to be installed first."""
