"""Horovod's own example pattern trains to the accuracy of uncompressed training."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from launch import launch

EPOCHS = 5
SEEDS = 3
#: Points of accuracy on 1,000 test images, as a mean over the seeds. The standard error of one run is
#: about 0.6 points, that of the difference of two means of three runs 0.5: this is two of them and a half.
MARGIN = 0.0125


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compressed_training_reaches_the_accuracy_of_uncompressed(tmp_path: Path) -> None:
    output = tmp_path / "accuracies.json"
    worker = Path(__file__).with_name("accuracy_worker.py")
    outcome = launch([str(worker), str(output), str(EPOCHS), str(SEEDS)], ranks=2, timeout=800)
    assert outcome.status == 0, outcome.output
    accuracies = json.loads(output.read_text())
    assert mean(accuracies["none"]) > 0.93, accuracies
    for name in ("qsgd", "topk"):
        assert mean(accuracies[name]) > mean(accuracies["none"]) - MARGIN, accuracies
