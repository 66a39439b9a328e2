"""Formats of an export: which files they write of a run's model, and how these are read again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ModelError, RunError
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.run.contract import PromptContract
from apprentice.run.folder import Run
from apprentice.storage import Folder


@dataclass(frozen=True)
class ExportFormat:
    """A format: `safetensors`, `adapter` (without its base), or `gguf` with a format of numbers."""

    kind: str
    numbers: str = ""

    @classmethod
    def parse(cls, text: str) -> ExportFormat:
        """The format that `text` names: safetensors, adapter, gguf (in float16), gguf:q8_0 and so on. Raises `ModelError`."""
        kind, _, numbers = text.partition(":")
        if kind == "gguf":
            from apprentice.models.gguf_file import NUMBER_FORMATS

            if (numbers or "f16") in NUMBER_FORMATS:
                return cls(kind, numbers or "f16")
            raise ModelError(f"GGUF numbers of format {numbers!r} are not written here; choose {', '.join(NUMBER_FORMATS)}.")
        if kind not in ("safetensors", "adapter") or numbers:
            raise ModelError(f"{text!r} is no format of an export; choose safetensors, adapter, gguf or gguf:q8_0.")
        return cls(kind)

    @property
    def name(self) -> str:
        """The format as one word."""
        return f"{self.kind}:{self.numbers}" if self.numbers else self.kind

    @property
    def read_by(self) -> str:
        """Program that reads the files again."""
        return {"safetensors": "bytes", "adapter": "peft", "gguf": "transformers (gguf_file)"}[self.kind]

    def write(self, run: Run, contract: PromptContract, part: Path, model: Path) -> None:
        """Writes the run's model into the new folder `part`; `model` is free for a copy of it that is on an object store.

        Raises `RunError` for an adapter of a run that has none, `ModelError` for GGUF of an architecture without one.
        """
        if self.kind == "safetensors":
            _copy(run.model, part)
            layout_beside(part)  # what was copied has the weights that the contract was written for
        elif self.kind == "adapter":
            if not run.adapter.exists():
                raise RunError(
                    f"run {run.name!r} has no adapter: tuning.method {run.recipe().tuning.method} trains the model itself; export"
                    " --format safetensors."
                )
            _copy(run.adapter, part)
        else:
            self._write_gguf(run, contract, part, model_folder(run, model))

    def _write_gguf(self, run: Run, contract: PromptContract, part: Path, source: Path) -> None:
        from apprentice.models.gguf_file import write_gguf

        part.mkdir()
        write_gguf(source, part / f"{run.name}-{self.numbers}.gguf", self.numbers, run.name)
        template = Tokenizer(source).chat_template
        contract.for_other_weights().model_copy(update={"chat_template": template}).write(part)

    def is_of_weights(self, file: Path) -> bool:
        """Whether `file` holds exported weights."""
        return file.suffix == (".gguf" if self.kind == "gguf" else ".safetensors")

    def load(self, run: Run, part: Path) -> Any:
        """The model in the written folder `part`, in float32, read as others read it."""
        from apprentice.models.gguf import load_gguf
        from apprentice.models.loading import load_adapted

        if self.kind == "gguf":
            return load_gguf(next(part.glob("*.gguf")))
        recipe = run.recipe()
        return load_adapted(recipe.model.base, part, trust=recipe.model.trust)


def model_folder(run: Run, place: Path) -> Path:
    """The run's model on this machine; from an object store it is copied to `place`, once."""
    if run.model.is_local:
        return run.model.local
    return place if place.is_dir() else run.model.download(place)


def _copy(source: Folder, target: Path) -> None:
    if source.is_local:
        shutil.copytree(source.local, target)
    else:
        source.download(target)
