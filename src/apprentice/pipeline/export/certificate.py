"""Certificate of an export: the run's model and the exported one side by side on the run's validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apprentice.data.stream import make_corpus
from apprentice.data.window import WindowRenderer
from apprentice.errors import ModelError
from apprentice.pipeline.export.formats import ExportFormat, model_folder
from apprentice.pretrained.architecture import gives_rewards
from apprentice.run.contract import PromptContract
from apprentice.run.equivalence import NOTHING, EquivalenceCertificate, digests_of, mean_with_interval
from apprentice.run.folder import Run

ROWS, TOKENS = 64, 8192  # at most, of the validation rows


def certify_export(
    run: Run, form: ExportFormat, contract: PromptContract, part: Path, model: Path, tolerance: float
) -> EquivalenceCertificate:
    """The certificate of what `form` wrote to `part`; `model` is free for a copy of the run's model.

    The weights of a `safetensors` export are the run's own bytes, which need no comparison. Raises `ModelError` for a reward model
    in another format, `DataError` where none of the run's rows can be read.
    """
    facts: dict[str, Any] = {"format": form.name, "read_by": form.read_by, "run": run.name, "tolerance": tolerance}
    facts |= {"reference_sha256": contract.weights_sha256, "files": digests_of(part, form.is_of_weights)}
    if form.read_by == "bytes":
        nothing = {"mean_kl": NOTHING, "log_likelihood_change": NOTHING, "token_accuracy_change": NOTHING}
        return EquivalenceCertificate.model_validate(facts | nothing | {"rows_from": "none", "rows": 0, "tokens": 0})
    from apprentice.models.loading import load_float32
    from apprentice.models.model_comparison import compare_models

    source = model_folder(run, model)
    if gives_rewards(source):
        raise ModelError(
            f"the model of run {run.name!r} gives rewards and no text, which {form.name} is not compared by; export"
            " --format safetensors."
        )
    corpus = make_corpus(run.recipe(), run, parallel=False)
    probe = WindowRenderer(corpus).probe(1, ROWS, TOKENS)
    reference, exported = load_float32(source, trust=run.recipe().model.trust), form.load(run, part)
    rows = list(compare_models(reference, exported, probe.examples))
    tokens = [row.tokens for row in rows]
    means = {
        "mean_kl": mean_with_interval([row.divergence for row in rows], tokens),
        "log_likelihood_change": mean_with_interval([row.log_likelihood for row in rows], tokens),
        "token_accuracy_change": mean_with_interval([row.hits for row in rows], tokens),
    }
    counts = {"rows_from": probe.rows, "rows": len(rows), "tokens": sum(tokens)}
    return EquivalenceCertificate.model_validate(facts | means | counts)
