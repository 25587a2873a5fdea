"""Triton kernels: one file a pass, shared device functions in :mod:`primitives`."""
