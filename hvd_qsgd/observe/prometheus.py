"""Records as metrics that a Prometheus server fetches."""

from __future__ import annotations

from typing import Any

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.monitor import Record

#: Counters, and the attributes of the statistics that they add up.
TOTALS = {
    "raw_bytes": "Bytes of gradients in their own dtype.",
    "payload_bytes": "Bytes that codecs made of them.",
    "wire_bytes": "Bytes that the rank sent, with collectives run as rings.",
    "uncompressed_wire_bytes": "Bytes that plain Horovod would have sent.",
    "encode_seconds": "Computing until an exchange's first collective had left.",
    "wait_seconds": "Waiting for exchanges with nothing to do.",
    "decode_seconds": "Computing after an exchange's first collective.",
}


class Prometheus:
    """Serves metrics named ``hvd_qsgd_...`` at http://HOST:PORT/metrics, with labels ``rank`` and ``tensor``.

    Args:
        port: to listen at; None if ``registry`` is served by the program itself.
        address: to listen at; "" for all, by default this machine alone.
        registry: a ``prometheus_client.CollectorRegistry``; by default one of its own.

    Raises:
        ConfigError: the package prometheus_client is not installed, or the port is taken.
    """

    def __init__(self, port: int | None = 9464, address: str = "127.0.0.1", registry: Any = None) -> None:
        client = _client()
        self._registry = registry if registry is not None else client.CollectorRegistry()
        self._totals = {
            name: client.Counter(f"hvd_qsgd_{name}", text, ["rank", "tensor"], registry=self._registry)
            for name, text in TOTALS.items()
        }
        self._steps = client.Counter("hvd_qsgd_steps", "Steps seen.", ["rank"], registry=self._registry)
        self._ratio = client.Gauge(
            "hvd_qsgd_ratio", "Times fewer bytes sent than by plain Horovod.", ["rank"], registry=self._registry
        )
        self._error = client.Gauge(
            "hvd_qsgd_relative_error",
            "What a payload lost, relative to what was encoded.",
            ["rank", "tensor"],
            registry=self._registry,
        )
        self._residual = client.Gauge(
            "hvd_qsgd_residual_norm", "Euclidean norm of the residual.", ["rank", "tensor"], registry=self._registry
        )
        self._server: Any = None
        if port is not None:
            try:
                self._server, _ = client.start_http_server(port, address, self._registry)
            except OSError as error:
                raise ConfigError(
                    f"Prometheus cannot listen at {address}:{port} ({error}). Give another port=, one for each rank "
                    f"of a machine that is watched."
                ) from None

    @property
    def port(self) -> int | None:
        """Where metrics are served; None if they are not."""
        return None if self._server is None else int(self._server.server_port)

    def write(self, record: Record) -> None:
        rank = str(record.rank)
        self._steps.labels(rank).inc(record.steps)
        self._ratio.labels(rank).set(record.stats.ratio)
        for name, tensor in record.stats.tensors.items():
            for total, counter in self._totals.items():
                counter.labels(rank, name).inc(getattr(tensor, total))
            if tensor.relative_error is not None:
                self._error.labels(rank, name).set(tensor.relative_error)
            if tensor.residual_norm is not None:
                self._residual.labels(rank, name).set(tensor.residual_norm)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _client() -> Any:
    try:
        import prometheus_client
    except ModuleNotFoundError:
        raise ConfigError("Prometheus needs the package prometheus_client: pip install prometheus_client") from None
    return prometheus_client
