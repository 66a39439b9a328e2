"""`apprentice verify`: a server or a folder against a prompt contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apprentice.errors import ContractError, EvaluationError
from apprentice.pretrained.hub import local_folder
from apprentice.run.folder import find_run
from apprentice.run.identity import CONTRACT_FILE


def verify_contract(
    target: str, contract: str, *, model: str | None = None, key: str | None = None, storage: str = "./runs", trust: bool = False
) -> dict[str, Any]:
    """Verifies the server or the model folder `target` against `contract`: its file, the folder that it lies in, or a run.

    `model` is the model's name at a server, `key` its API key. Returns `findings`, how many `drifted`, and what the `target` is.
    Raises `ContractError` without a contract, `EvaluationError` for a server that does not answer or refuses everything,
    `ModelError` for a folder without a tokenizer.
    """
    from apprentice.verify.contract_place import ContractPlace
    from apprentice.verify.folder_checks import check_folder
    from apprentice.verify.server_checks import check_server
    from apprentice.verify.servers import connect, find_server

    place = ContractPlace.at(_contract_path(contract, storage))
    if target.startswith(("http://", "https://")):
        with connect(target, key) as client:
            server = find_server(client, model)
            kind, findings = server.name, list(check_server(server, place, trust=trust))
        if not server.has_answered:
            raise EvaluationError(
                f"{target} refuses every request for the model {server.model!r}, so nothing can be seen; check the address, the key"
                " and --model."
            )
    elif Path(target).is_dir():
        kind, findings = "folder", list(check_folder(Path(target), place, trust=trust))
    else:
        raise ContractError(f"{target} is neither the address of a server (http://…) nor a model folder; name one of these.")
    drifted = sum(finding.verdict == "drifted" for finding in findings)
    return {"target": target, "kind": kind, "drifted": drifted, "findings": [finding.to_json() for finding in findings]}


def _contract_path(contract: str, storage: str) -> Path:
    if Path(contract).exists() and ((Path(contract) / CONTRACT_FILE).exists() or Path(contract).is_file()):
        return Path(contract)
    run = find_run(contract, storage)
    if run is None or not run.is_trained:
        raise ContractError(f"{contract} is no contract ({CONTRACT_FILE}), no folder with one and no trained run in {storage}.")
    return local_folder(str(run.model))
