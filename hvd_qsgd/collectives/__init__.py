"""Collectives: what carries out the requests of exchanges.

``simulated`` runs all ranks inside one process, ``mpi`` uses mpi4py, ``horovod_torch``
Horovod with torch tensors.
"""
