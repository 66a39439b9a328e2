"""A contract to verify against, and what lies beside it: a tokenizer, which encodes texts, and weights, which give greedy text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_under
from apprentice.data.encoding.prompt_format import Layout, user_text
from apprentice.errors import ContractError
from apprentice.models.greedy import GreedyReply, reply_greedily
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.run.contract import GoldenPrompt, PromptContract, read_contract
from apprentice.run.identity import CONTRACT_FILE

GREEDY_TOKENS = 16


@dataclass(frozen=True)
class ContractPlace:
    """A contract, and the folder in which it lies."""

    contract: PromptContract
    folder: Path

    @classmethod
    def at(cls, path: Path) -> ContractPlace:
        """The contract that is the file `path`, or lies in the folder `path`. Raises `ContractError` if there is none."""
        folder = path if path.is_dir() else path.parent
        if path.is_file() and path.name != CONTRACT_FILE:
            raise ContractError(f"{path} is not named {CONTRACT_FILE}; name the contract's file, its folder, or a run.")
        contract = read_contract(folder)
        if contract is None:
            raise ContractError(f"{path} holds no prompt contract ({CONTRACT_FILE}); name the file, its folder, or a run.")
        return cls(contract, folder)

    @cached_property
    def layout(self) -> Layout | None:
        """The contract's layout; None where no tokenizer lies beside it. Raises `ContractError` if it is another one."""
        if not (self.folder / "tokenizer.json").is_file():
            return None
        return layout_under(self.contract, Tokenizer(self.folder))

    def messages(self, golden: GoldenPrompt) -> list[Mapping[str, Any]]:
        """A golden prompt as messages, the system prompt among them, as a client sends them."""
        system = [("system", self.contract.system)] if self.contract.system else []
        turns = [turn for pair in golden.history for turn in zip(("user", "assistant"), pair, strict=True)]
        question = ("user", user_text(golden.instruction, golden.input))
        return [{"role": role, "content": text} for role, text in [*system, *turns, question]]

    def text(self, golden: GoldenPrompt) -> str | None:
        """A golden prompt as the text that a client sends to be continued; None without a tokenizer. Control tokens stand in it."""
        return None if self.layout is None else Layout.shown(self.layout.prompt(golden.instruction, golden.input))

    @property
    def has_weights(self) -> bool:
        """Whether weights lie beside the contract."""
        return any(self.folder.glob("*.safetensors"))

    def greedy_replies(self, *, trust: bool = False) -> list[GreedyReply]:
        """The greedy reply to each golden prompt, by the weights beside the contract, in float32."""
        ids = [golden.ids for golden in self.contract.golden]
        return reply_greedily(self.folder, ids, self.contract.stop_ids, GREEDY_TOKENS, trust=trust)
