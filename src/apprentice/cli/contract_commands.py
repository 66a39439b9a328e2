"""Commands about the prompt contract: verify, contract-schema."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from apprentice.cli.completion import complete_run
from apprentice.cli.options import Json, Storage, Trust, screen_for, table_of


def verify(
    target: Annotated[str, typer.Argument(help="Address of an OpenAI-compatible server, or a model folder.", metavar="URL|FOLDER")],
    contract: Annotated[
        str, typer.Option(help="The contract: apprentice.json, the folder it lies in, or a run.", autocompletion=complete_run)
    ],
    model: Annotated[str | None, typer.Option(help="The model's name at the server; the first it lists by default.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the server's key.")] = "OPENAI_API_KEY",
    storage: Storage = "./runs",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Replay a contract's golden prompts at any server or folder, and say what has drifted; exit code 1 if something has."""
    from apprentice import pipeline

    screen = screen_for(json)
    result = pipeline.verify_contract(target, contract, model=model, key=os.environ.get(key_env), storage=storage, trust=trust)
    if not json:
        columns = ["check", "subject", "verdict", "detail"]
        rows = [[_one_line(finding[column]) for column in columns] for finding in result["findings"]]
        screen.show(table_of(columns, rows))
    counts = [
        sum(finding["verdict"] == verdict for finding in result["findings"]) for verdict in ("same", "drifted", "cannot be seen")
    ]
    screen.result(result, f"{result['kind']}: {counts[0]} the same, {counts[1]} drifted, {counts[2]} cannot be seen")
    if result["drifted"]:
        screen.error(
            f"{result['drifted']} things are not as the contract says; serve the folder as it was exported, with its tokenizer and"
            " chat template.",
            beside_result=True,
        )
        raise typer.Exit(1)


def _one_line(text: str, most: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def contract_schema() -> None:
    """Print the JSON Schema of the prompt contract, apprentice.json, for programs that read or write it."""
    import json

    from apprentice.run.contract import PromptContract

    screen_for(False).result({}, json.dumps(PromptContract.model_json_schema(), indent=2))
