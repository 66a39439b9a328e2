"""Checks of a model folder against a contract: its files, and the prompts that transformers makes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_under
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ContractError
from apprentice.models.greedy import reply_greedily
from apprentice.pretrained.architecture import gives_rewards
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.run.contract import GoldenPrompt, weights_sha256
from apprentice.verify.contract_place import GREEDY_TOKENS, ContractPlace
from apprentice.verify.observations import Observation, compare_ids, compare_values, unseen


def check_folder(folder: Path, place: ContractPlace, *, trust: bool = False) -> Iterator[Observation]:
    """All observations of the model in `folder`. Raises `ModelError` if it has no tokenizer."""
    contract, tokenizer = place.contract, Tokenizer(folder)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if not has_weights:
        yield unseen("weights", "sha256", "the folder has no safetensors files")
    elif not contract.weights_sha256:
        yield unseen("weights", "sha256", "the contract names none")
    else:
        yield compare_values("weights", "sha256", contract.weights_sha256, weights_sha256(folder))
    yield compare_values("tokenizer", "sha256", contract.tokenizer_sha256, tokenizer.fingerprint)
    tokenizer = tokenizer.with_template(contract.chat_template)
    template = tokenizer.chat_template
    seen = hashlib.sha256(template.encode()).hexdigest() if template is not None else None
    yield compare_values("chat template", "sha256", contract.chat_template_sha256, seen)
    try:
        layout = _layout(place, tokenizer)
    except ContractError as error:
        yield Observation("prompt format", contract.layout, "drifted", str(error))
        return
    for golden in contract.golden:
        yield compare_ids(golden.instruction, golden.ids, _encode(layout, golden))
    yield compare_values("stops", "stop_ids", sorted(contract.stop_ids), sorted({*layout.stop_ids}))
    yield from _check_generation_stops(folder, contract.stop_ids)
    yield from _check_greedy_text(folder, place, has_weights=has_weights, trust=trust)


def _layout(place: ContractPlace, tokenizer: Tokenizer) -> Layout:
    contract = place.contract
    with suppress(ContractError):  # the prompts show then what differs
        return layout_under(contract, tokenizer)
    settings: dict[str, Any] = {"version": contract.layout_version, "control_tokens": contract.control_tokens}
    settings |= {"reasoning": contract.reasoning}
    layout = Layout(contract.layout, tokenizer, contract.system, contract.date, **settings)  # type: ignore[arg-type]
    return replace(layout, day=contract.date) if contract.layout_version == 1 else layout


def _encode(layout: Layout, golden: GoldenPrompt) -> list[int]:
    if not golden.history:
        return layout.encode_prompt(layout.prompt(golden.instruction, golden.input))
    turns = [
        {"role": role, "content": text} for turn in golden.history for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return layout.encode_chat([*turns, {"role": "user", "content": golden.instruction}])


def _check_generation_stops(folder: Path, stop_ids: tuple[int, ...]) -> Iterator[Observation]:
    """Where other software looks for the tokens that end a reply."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    missing = sorted(set(stop_ids) - ids)
    if missing:
        detail = f"{missing} end replies, and neither generation_config.json nor config.json names them (eos_token_id)"
        yield Observation("stops", "eos_token_id", "drifted", detail)
    else:
        yield Observation("stops", "eos_token_id", "same", f"{sorted(stop_ids)}")


def _check_greedy_text(folder: Path, place: ContractPlace, *, has_weights: bool, trust: bool) -> Iterator[Observation]:
    if not has_weights or not place.has_weights or folder.resolve() == place.folder.resolve():
        yield unseen("greedy text", "all", "two folders with weights are needed, the contract's and another")
        return
    if gives_rewards(folder):
        yield unseen("greedy text", "all", "the model gives rewards and no text")
        return
    ids = [golden.ids for golden in place.contract.golden]
    replies = reply_greedily(folder, ids, place.contract.stop_ids, GREEDY_TOKENS, trust=trust)
    for golden, one, other in zip(place.contract.golden, place.greedy_replies(trust=trust), replies, strict=True):
        yield replace(compare_ids(golden.instruction, one.ids, other.ids), check="greedy text")
