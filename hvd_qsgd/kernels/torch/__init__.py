"""Kernels made of torch operations: byte-identical, on any torch device, without a compiler."""
