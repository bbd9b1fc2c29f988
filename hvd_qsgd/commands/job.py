"""Whether this process is a rank of a job."""

from __future__ import annotations

import os

from hvd_qsgd.errors import SetupError

#: What launchers tell their processes: horovodrun, Open MPI, MPICH and Intel MPI, Slurm.
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def check_launched(command: str) -> None:
    """Raise SetupError unless a launcher started this process."""
    if not any(variable in os.environ for variable in RANK_VARIABLES):
        raise SetupError(
            f"`{command}` measures between ranks, and this is one process. Start it on all of them, on the hosts "
            f"of your training: horovodrun -np 2 -H host1:1,host2:1 {command} ..."
        )
