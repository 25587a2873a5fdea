"""alpha-entmax attention in the models of Hugging Face transformers (5.4 or newer), under the name "entmax".

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=register())

Importing this module loads no transformers; :func:`register` does.
"""

from __future__ import annotations

import re
from importlib import metadata

from adasplash_core.errors import MissingDependencyError
from adasplash_core.integrations.hf_alpha import NAME, set_alpha, with_learnable_alpha

__all__ = ["NAME", "register", "set_alpha", "with_learnable_alpha"]

_OLDEST = (5, 4)


def register() -> str:
    """Teach transformers the attention "entmax" and its masks. Calling it again changes nothing.

    Returns
    -------
    The name, for ``attn_implementation=``.

    Raises
    ------
    MissingDependencyError (an ImportError): transformers is missing or older than 5.4.
    """
    _check_version()
    from transformers import AttentionInterface, AttentionMaskInterface

    from adasplash_core.integrations.hf_attention import entmax_attention
    from adasplash_core.integrations.hf_masks import entmax_mask

    AttentionInterface.register(NAME, entmax_attention)
    AttentionMaskInterface.register(NAME, entmax_mask)
    return NAME


def _check_version() -> None:
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError('The attention "entmax"', "transformers", "it is not installed", extra="hf") from error
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise MissingDependencyError(
            'The attention "entmax"', f"transformers {wanted} or newer", f"{version} is installed", extra="hf"
        )
