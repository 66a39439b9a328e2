"""A trained run's model as a folder to hand on: weights, tokenizer and prompt contract, with certificate and model card."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from apprentice.errors import ContractError, ModelError, RunError, StorageError
from apprentice.pipeline.export.certificate import certify_export
from apprentice.pipeline.export.formats import ExportFormat, model_folder
from apprentice.pipeline.export.hub_upload import push_folder
from apprentice.pipeline.model_card import model_card
from apprentice.pretrained.architecture import family_of
from apprentice.run.contract import PromptContract, read_contract
from apprentice.run.equivalence import CERTIFICATE_FILE, EquivalenceCertificate
from apprentice.run.folder import Run, find_run
from apprentice.tasks.registry import select_tasks

TOLERANCE = 0.05  # nats a token


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export: `format` as `ExportFormat.parse` takes it, the largest mean divergence, and where it is pushed to."""

    format: str = "safetensors"
    tolerance: float = TOLERANCE
    push: str | None = None
    public: bool = False


def export_run(target: str, folder: str, *, storage: str = "./runs", options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Writes the model of the run `target` into the new `folder`, with a certificate of how far it is from the run's model.

    With `options.push` the folder is uploaded to the hub; one that this run was exported to before, in the same format, is uploaded
    as it is. Raises `RunError` if there is no such trained run, `StorageError` if `folder` holds something else, cannot be written
    or uploaded, and `ModelError` for a format that the model does not have, or beyond the tolerance; nothing is written then.
    """
    run = find_run(target, storage)
    if run is None:
        raise RunError(f"{target!r} is not a run in {storage}; `apprentice runs` lists them.")
    if not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    form, place = ExportFormat.parse(options.format), Path(folder)
    contract = read_contract(run.model)
    if contract is None:
        raise ContractError(f"the model of run {run.name!r} has no prompt contract; train it again.")
    certificate = _certificate_in(place) if options.push is not None else None
    same = (contract.weights_sha256, form.name)
    is_again = certificate is not None and (certificate.reference_sha256, certificate.format) == same
    if not is_again:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise StorageError(f"{folder} is there already and not empty; name a new folder.")
        certificate = _write(run, form, contract, place, options.tolerance)
    assert certificate is not None
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    result = {"folder": str(place), "run": str(run.folder), "bytes": size, "format": form.name}
    result |= {"equivalence": certificate.model_dump(mode="json")}
    if options.push is not None:
        result["url"] = push_folder(place, options.push, private=not options.public)
    return result


def _certificate_in(place: Path) -> EquivalenceCertificate | None:
    file = place / CERTIFICATE_FILE
    try:
        return EquivalenceCertificate.model_validate_json(file.read_bytes()) if file.is_file() else None
    except ValidationError:  # somebody else's file
        return None


def _write(run: Run, form: ExportFormat, contract: PromptContract, place: Path, tolerance: float) -> EquivalenceCertificate:
    """Writes the whole folder `place`, or nothing."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent, ignore_cleanup_errors=True) as scratch:
            part, model = Path(scratch) / "model", Path(scratch) / "of-run"
            form.write(run, contract, part, model)
            certificate = certify_export(run, form, contract, part, model, tolerance)
            if (exported := read_contract(part)) is not None:
                exported.without_places().write(part)
            if not certificate.mean_kl.value <= tolerance:
                raise ModelError(
                    f"as {form.name} the model is not the run's any more: the mean divergence is {certificate.mean_kl.value:.2e}"
                    f" nats a token on {certificate.rows} rows, above the tolerance of {tolerance:g}; choose a wider number format"
                    " or a larger --tolerance."
                )
            (part / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")
            source = part if form.kind == "safetensors" else model_folder(run, model)  # which would be copied a second time
            is_seq2seq = family_of(source) == "seq2seq"
            card = _card(run, contract, certificate, is_seq2seq=is_seq2seq)
            (part / "README.md").write_text(card, encoding="utf-8")
            if place.exists():
                place.rmdir()
            os.replace(part, place)
    except OSError as error:
        raise StorageError(f"{place} cannot be written ({error.strerror or error}); make room or name another folder.") from error
    return certificate


def _card(run: Run, contract: PromptContract, certificate: EquivalenceCertificate, *, is_seq2seq: bool) -> str:
    recipe = run.recipe()
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), find=run.tasks().find)
    report = run.report / "report.json"
    kind = "text2text-generation" if is_seq2seq else "text-generation"
    return model_card(
        recipe,
        contract,
        run.ledger_file.read_json() if run.ledger_file.exists() else {"examples": 0, "target_tokens": 0, "tasks": {}},
        run.export_file.read_json() if run.export_file.exists() else None,
        report.read_json() if report.exists() else None,
        tasks,
        held_out,
        kind,
        certificate.sentence(),
        run.status().get("time"),
    )
