"""Private API of transformers that loading uses, with the version it was read in.

tests/models/test_compat.py fails where it is gone or means something else.
"""

from __future__ import annotations

from typing import Any


def set_implementations(config: Any, attention: str | None) -> None:
    """Sets the attention implementation of a model config, and the default one for experts (transformers 5.23).

    `attention` is transformers' name; None: sdpa if the model has it, else eager. A keyword of `from_pretrained` would not do: an
    `_attn_implementation` of the folder's config.json overrules it.
    """
    config._attn_implementation, config._experts_implementation = attention, None
