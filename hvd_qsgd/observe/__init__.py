"""Watching a run: what was sent, how long it took, and what was lost.

    from hvd_qsgd.observe import JsonLines, Monitor
    compression = QSGDCompressor(monitor=Monitor(JsonLines("run.jsonl"), every=100))

A :class:`Monitor` makes a :class:`Record` of every so many steps and hands it to sinks. Sinks whose
package is missing say so when they are made.
"""

from hvd_qsgd.observe.json_lines import JsonLines
from hvd_qsgd.observe.log_lines import LogLines
from hvd_qsgd.observe.monitor import Monitor, Record, Sink
from hvd_qsgd.observe.prometheus import Prometheus
from hvd_qsgd.observe.reading import read_records
from hvd_qsgd.observe.tensorboard import TensorBoard

__all__ = ["JsonLines", "LogLines", "Monitor", "Prometheus", "Record", "Sink", "TensorBoard", "read_records"]
