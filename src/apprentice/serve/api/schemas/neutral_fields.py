"""Request fields of OpenAI's and other servers' clients, with the values that ask for nothing: no reason to refuse a request."""

from __future__ import annotations

from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "top_k": (-1, 0),
}
# Of chats, where these fields say something as soon as there are functions.
NEUTRAL_CHAT = {key: values for key, values in NEUTRAL.items() if key not in ("tool_choice", "parallel_tool_calls")}
NEUTRAL_STREAM: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
NEUTRAL_TURN: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}
