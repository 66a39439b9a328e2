"""Recording stand-ins for vLLM's classes of arguments, which refuse names that vLLM 0.29 does not have.

The names in `vllm_signatures.json` are read off the installed package by `names_of_installed`;
`tests/model_pool/test_vllm_split.py` compares them in the environment that has it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


class _Recording(SimpleNamespace):
    """Keeps its keyword arguments as attributes."""

    known = ""

    def __init__(self, **arguments: Any) -> None:
        if unknown := sorted(arguments.keys() - set(NAMES[self.known])):
            raise TypeError(f"vLLM's {self.known} has no {', '.join(unknown)}")
        super().__init__(**arguments)


class AsyncEngineArgs(_Recording):
    """As vLLM's, for the endpoint's engine."""

    known = "AsyncEngineArgs"


class SamplingParams(_Recording):
    """As vLLM's."""

    known = "SamplingParams"


def names_of_installed() -> dict[str, Any]:
    """The names that the installed vLLM has, in the form of `NAMES`."""
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {
        "version": vllm.__version__,
        "AsyncEngineArgs": sorted(field.name for field in dataclasses.fields(AsyncEngineArgs)),
        "LLM": sorted(inspect.signature(vllm.LLM).parameters.keys() - {"kwargs"}),
        "SamplingParams": sorted(inspect.signature(vllm.SamplingParams).parameters),
    }
