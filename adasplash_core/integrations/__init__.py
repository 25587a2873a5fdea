"""Doors from other libraries to :func:`adasplash_core.attention`. Importing this package loads none of them."""
