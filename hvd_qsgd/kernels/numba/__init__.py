"""CPU kernels compiled by Numba: byte-identical to the codecs' NumPy code, without the GIL."""
