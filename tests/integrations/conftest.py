"""transformers with the attention "entmax"."""

from __future__ import annotations

from adasplash_core.integrations.transformers import register

register()
