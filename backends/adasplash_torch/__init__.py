"""The PyTorch reference backend: what entmax attention is, on any device torch runs on, and fast on CPUs.

Importing this package, and registering its backend, imports no torch.
"""

from __future__ import annotations

from adasplash_torch.configs import BackwardConfig, ForwardConfig

__all__ = ["BackwardConfig", "ForwardConfig"]
