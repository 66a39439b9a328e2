"""The chat templates that TRL ships in its package, each over a stand-in tokenizer that has the template's control tokens.

`python -m tests.support.chat_templates` prints the table of docs/guides/chat_templates.md.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import Tokenized, encode
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.tasks.schema import Example

# The end token of the models that a template belongs to, by the start of its name; others end with ChatML's.
END_TOKENS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<eos>",
    "gemma": "<eos>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|endoftext|>",
    "smolvlm": "<end_of_utterance>",
}
ORDINARY = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>")  # added to the vocabulary, but not as special tokens
_CONTROL = re.compile(
    r"<[|｜][^<>\s'\"{}+]+[|｜]>|<\|?(?:turn|channel)\|?>|<(?:start_of_turn|end_of_turn|end_of_utterance|bos|eos|sop|image)>"
    r"|</?think>|</?s>|\[gMASK\]"
)
SAID = (("Why?", "Because."), ("And then?", "So."))
EXAMPLE = Example("t", "c", SAID[1][0], "", SAID[1][1], history=(SAID[0],))
MESSAGES = [{"role": role, "content": text} for turn in SAID for role, text in zip(("user", "assistant"), turn, strict=True)]
HEAD = (
    "| template | before an answer | answers learnt | an answer ends with | generation stops at | transformers' mask |\n"
    "|---|---|---|---|---|---|"
)


def sources() -> dict[str, Path]:
    """Name → file of every template; nothing is imported of TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {file.stem: file for file in sorted(folder.glob("*.jinja"))}


def stand_in(name: str, source: str, folder: Path) -> Tokenizer:
    """A tokenizer whose tokens are bytes, and the control tokens of the template `source`."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = next((token for start, token in END_TOKENS.items() if name.startswith(start)), "<|im_end|>")
    swallows = name.startswith("phi3")  # its turns' marks take the newline behind them along
    backend.add_tokens(
        [
            AddedToken(token, special=token not in ORDINARY, normalized=False, rstrip=swallows and token not in (end, "<s>"))
            for token in dict.fromkeys([*_CONTROL.findall(source), end, "<s>"])
        ]
    )
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token="<s>")
    inner.chat_template = source
    inner.save_pretrained(folder)
    return Tokenizer(folder)


@dataclass(frozen=True)
class Tried:
    """What became of a conversation under one template, ours and as transformers encodes it."""

    name: str
    layout: Layout
    ours: Tokenized
    theirs: list[int]
    marked: list[int] = field(repr=False)  # 1 where the template marks what the assistant wrote; empty if it marks nothing

    def text(self, ids: Any) -> str:
        return self.layout.tokenizer.decode(list(ids), skip_special=False)

    @property
    def trained(self) -> list[str]:
        """What is trained on, stretch by stretch."""
        mask = np.arange(len(self.ours.ids)) >= self.ours.prompt_length
        for start, stop in self.ours.untrained:
            mask[start:stop] = False
        return self._stretches(self.ours.ids, mask.astype(int).tolist())

    @property
    def their_mask(self) -> list[str]:
        return self._stretches(self.theirs, self.marked)

    def _stretches(self, ids: list[int], mask: list[int]) -> list[str]:
        edges = np.flatnonzero(np.diff([0, *mask, 0]))
        return [self.text(ids[start:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def mask(self) -> str:
        """How the mask of transformers differs from what is trained on."""
        if not self.marked:
            return "none"
        if len(self.their_mask) != len(self.trained):
            return "differs"
        around = [whole.partition(part) for whole, part in zip(self.their_mask, self.trained, strict=True)]
        if not all(part for _, part, _ in around):
            return "differs"
        before, after = (list(dict.fromkeys(entry[side] for entry in around if entry[side])) for side in (0, 2))
        more = [f"before: {_code(*before)}"] * bool(before) + [f"behind: {_code(*after)}"] * bool(after)
        return "; ".join(more) or "equal"

    @property
    def row(self) -> str:
        """Its row in the documentation's table."""
        turns = self.layout.turns
        assert turns is not None
        before = [f"without {_code(turns.withdrawn)}"] * bool(turns.withdrawn) + [_code(turns.lead)] * bool(turns.lead)
        ends = dict.fromkeys([turns.inner_end, turns.end])
        stops = sorted(self.text([id]) for id in self.layout.stop_ids)
        learnt = "the last" if self.ours.truncated else "all"
        return f"| {self.name} | {', '.join(before)} | {learnt} | {_code(*ends)} | {_code(*stops)} | {self.mask} |"


def _code(*texts: str) -> str:
    return ", ".join(f"`{text}`".replace("\n", "↵").replace("|", "&#124;") for text in texts).replace("` `", "`␣`")


def tried(name: str, folder: Path) -> Tried:
    source = sources()[name].read_text(encoding="utf-8")
    layout = Layout("chat", stand_in(name, source, folder))
    [ours] = encode(layout, [(EXAMPLE, ())], 10_000)
    assert ours is not None
    messages: list[Any] = MESSAGES
    if layout.turns is not None and layout._takes_parts:
        messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
    marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
    encoded = layout.tokenizer._inner.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks, date_string=layout.date
    )
    return Tried(name, layout, ours, list(encoded["input_ids"]), list(encoded.get("assistant_masks", [])) if marks else [])


def main() -> None:
    print(HEAD)
    for name in sources():
        with tempfile.TemporaryDirectory() as folder:
            print(tried(name, Path(folder)).row)


if __name__ == "__main__":
    main()
