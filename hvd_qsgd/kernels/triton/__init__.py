"""CUDA kernels written in Triton: byte-identical to the codecs' NumPy code, one launch where torch needs dozens."""
