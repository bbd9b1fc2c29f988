"""All exchanges, one line each: what is imported here is known by its ``name``."""

from hvd_qsgd.exchanges.allgather import ALLGATHER as ALLGATHER
from hvd_qsgd.exchanges.allreduce import ALLREDUCE as ALLREDUCE
from hvd_qsgd.exchanges.intsgd import INTSGD as INTSGD
from hvd_qsgd.exchanges.linear import LINEAR as LINEAR
from hvd_qsgd.exchanges.powersgd import POWERSGD as POWERSGD
from hvd_qsgd.exchanges.scatter_gather import SCATTER_GATHER as SCATTER_GATHER
