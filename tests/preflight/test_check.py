"""What `check` says before anything is reserved: of memory, and of a model and a recipe that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from apprentice.data.corpus import make_corpus
from apprentice.data.sources import parquet_conversion
from apprentice.errors import ContractError, ModelError, RecipeError, ResourcesError, ServingError, StorageError
from apprentice.models import loading
from apprentice.preflight import check, cluster_checks
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from tests.pipeline.test_chain import trained
from tests.support.chat_templates import sources
from tests.support.preferences import write_pairs
from tests.support.recipes import tiny_recipe
from tests.support.stand_ins import tiny_model_of


def test_the_memory_of_each_worker_is_estimated_on_gpus_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_checks, "node_resources", lambda: [{"CPU": 8.0, "GPU": 2.0}])
    monkeypatch.setattr(loading, "count_parameters", lambda folder: 2**30)
    changes = {"training__resources": {"cpus": 1, "gpus": 1}, "training__deepspeed": {"stage": 1}, "model__dtype": "bfloat16"}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}, **changes))
    # 2 bytes of weights and 4 of gradients a number, and half of 12 for the optimizer at stage 1 with two workers
    assert check.run_check("resources", recipe) == (
        "2 workers of 1 CPUs, 1 GPUs and about 13.4 GiB each (weights 2.0, gradients 4.0, optimizer 6.0,"
        " activations 0.0, buffers 1.4, process 0.0, checkpoint 0.0, with 2 rows at once); 8 CPUs there"
    )
    on_cpus = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}, **changes | {"training__resources": {}}))
    finding = check.run_check("resources", on_cpus)
    assert "about 18.5 GiB each" in finding
    assert "activations 0.0, buffers 0.0, process 0.4, checkpoint 6.1, with" in finding


def test_rows_are_converted_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `check` converted is what the index is made from; where a point fails nothing stays behind."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    preferred = {"data__tasks": [{"preferences": str(pairs)}], "data__hold_out": [], "data__formats": {}}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, **preferred, data__max_length=96, training__objective="dpo"))
    probe_names: list[str] = []
    inner = parquet_conversion._write

    def write(tables: Any, target: Any, origin: Any) -> None:
        probe_names.append(target.name)
        inner(tables, target, origin)

    def no(_: Any) -> str:
        raise ResourcesError("no")

    monkeypatch.setattr(parquet_conversion, "_write", write)
    monkeypatch.setattr(check, "CHECKS_WITHOUT_RAY", {"sources": check.CHECKS_WITHOUT_RAY["sources"]})
    monkeypatch.setattr(check, "CHECKS_WITH_RAY", {"resources": no})
    with pytest.raises(ResourcesError):
        check.check_before_writing(recipe, lambda: None)
    assert not (tmp_path / "runs").exists()
    assert len(probe_names) == 1
    monkeypatch.setattr(check, "CHECKS_WITH_RAY", {})
    check.check_before_writing(recipe, lambda: None)
    make_corpus(recipe, Run(Folder.at(tmp_path / "runs" / "tiny")), parallel=False)
    assert len(probe_names) == 2
    (tmp_path / "file").write_text("")
    nowhere = recipe.model_copy(update={"storage": str(tmp_path / "file")})
    with pytest.raises(
        StorageError, match=r"^.*/file/cache/converted cannot be made \(Not a directory\); choose another `storage`"
    ):
        check.run_check("sources", nowhere)


def test_parameters_are_counted_from_the_header(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    assert loading.count_parameters(tiny_model) == model.num_parameters()


def model_point(folder: Path, model: Path, **changes: Any) -> str:
    """What `check` says of the model and the layout."""
    folder.mkdir()
    return check.run_check("model", load_recipe(tiny_recipe(folder, model, **changes)))


def test_a_model_and_a_layout_that_do_not_fit_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    assert "layout chat, an answer ends with" in model_point(tmp_path / "fits", tiny_model)
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({key: config[key] for key in config if key != "chat_template"}))
    with pytest.raises(ContractError, match=r"has no chat template; use layout `plain` or `alpaca`, or give data.chat_template"):
        model_point(tmp_path / "without", bare)
    assert "layout plain" in model_point(tmp_path / "plain", bare, data__layout="plain")
    template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    assert "layout chat" in model_point(tmp_path / "given", bare, data__chat_template=template)
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('Turns begin with the user') }}{% endif %}" + template
    with pytest.raises(ContractError, match=r"refuses a question after data.system: Turns begin with the user\. Leave out"):
        model_point(tmp_path / "strict", bare, data__chat_template=strict, data__system="Be brief.")
    with pytest.raises(RecipeError, match=r"data.packing.target_length is for encoder-decoders"):
        model_point(tmp_path / "sided", tiny_model, data__packing={"length": 256, "target_length": 64})
    short = tiny_model_of("gpt_neox", tiny_model, tmp_path / "short")
    with pytest.raises(RecipeError, match=r"data.max_length 600 is more than the 512 positions of .*short; lower it"):
        model_point(tmp_path / "long", short, data__max_length=600, data__packing={"length": 1024})


def test_a_model_whose_rows_cannot_be_shared_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    shares = {"training__workers": 4, "training__sequence_parallel": 4}
    with pytest.raises(ModelError, match=r"^training\.sequence_parallel 4 does not divide the 2 attention heads of llama"):
        check.run_check("model", load_recipe(tiny_recipe(tmp_path, tiny_model, **shares)))
    halved = {"training__workers": 4, "training__sequence_parallel": 2}
    assert "layout" in check.run_check("model", load_recipe(tiny_recipe(tmp_path, tiny_model, **halved)))


def test_layers_that_are_not_compiled_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    t5 = tiny_model_of("t5_v1.1", tiny_model, tmp_path / "t5-tiny")
    with pytest.raises(ModelError, match=r"^training\.compile is for causal models without experts, and t5 is an encoder-decoder"):
        check.run_check("model", load_recipe(tiny_recipe(tmp_path, t5, training__compile=True)))
    assert "layout" in check.run_check("model", load_recipe(tiny_recipe(tmp_path, tiny_model, training__compile=True)))


def test_what_a_chat_template_does_otherwise_is_said(tmp_path: Path, tiny_model: Path) -> None:
    templates = {name: sources()[name].read_text() for name in ("qwen3_5_think", "deepseekv3")}
    line = model_point(tmp_path / "closed", tiny_model, data__chat_template=templates["qwen3_5_think"])
    assert line.endswith(r"'<|im_end|>', '\n</think>\n\n' belongs to the prompt, of a conversation only the last answer is learnt")
    ends = templates["deepseekv3"].replace("<｜end▁of▁sentence｜>", "<|im_end|>")
    line = model_point(tmp_path / "open", tiny_model, data__chat_template=ends)
    assert line.endswith(r"prompts go without the template's '<think>\n'")


def test_an_engine_that_could_not_decode_what_is_trained_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    engine = {"serving": {"engine": "vllm"}}
    assert "layout chat" in model_point(tmp_path / "lora", tiny_model, **engine)
    refusal = r"engine vllm would leave out what tuning.method prefix trains, which cannot .*; use serving.engine transformers, or"
    with pytest.raises(ServingError, match=refusal):
        model_point(tmp_path / "prefix", tiny_model, tuning={"method": "prefix"}, **engine)
    with pytest.raises(ServingError, match=r"engine vllm decodes causal models only"):
        model_point(tmp_path / "t5", tiny_model_of("t5_v1.1", tiny_model, tmp_path / "t5-tiny"), data__layout="plain", **engine)


def test_a_chain_whose_base_has_another_layout_or_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    trained(tmp_path, tiny_model)
    chain = {"name": "second", "storage": str(tmp_path / "runs")}
    base = Path("run:first")
    assert f"{tiny_model} → run:first, layout chat" in model_point(tmp_path / "fits", base, model__base="run:first", **chain)
    with pytest.raises(ContractError, match=r"data.layout is 'plain', but run:first was trained with 'chat'; say layout: chat"):
        model_point(tmp_path / "plain", base, model__base="run:first", data__layout="plain", **chain)
    other = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    with pytest.raises(ContractError, match=r"data.chat_template is not the one that run:first was trained with; leave it out"):
        model_point(tmp_path / "template", base, model__base="run:first", data__chat_template=other, **chain)
    file = tmp_path / "runs" / "first" / "model" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(ContractError, match=r"the tokenizer in .* is not the one of the contract"):
        model_point(tmp_path / "tokenizer", base, model__base="run:first", **chain)
