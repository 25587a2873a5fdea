"""Entmax attention in NumPy: an example of a third-party backend for AdaSplash Core."""
