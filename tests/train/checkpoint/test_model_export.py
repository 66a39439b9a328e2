"""From a checkpoint to folders that transformers and peft load alone."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from apprentice.data.encoding.prompt_contract import layout_beside, layout_over
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.window import Probe
from apprentice.errors import TrainingError
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable_parameters
from apprentice.models.weights import streamed_weights
from apprentice.models.weights.streamed_weights import StreamedWeights
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import read_contract, weights_sha256
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint import model_export, model_writer
from apprentice.train.checkpoint.fidelity import compare_scores, score_examples
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.model_export import export_model
from apprentice.train.checkpoint.model_writer import StreamedWriter
from apprentice.train.state import State
from tests.support.checkpoints import save
from tests.support.object_store import BUCKET, object_store

IDS = torch.tensor([[5, 6, 7, 8]])
PROBE = Probe(
    "validation",
    (
        Tokenized([9, 40, 41, 42, 7, 2], 4, 0, None),
        Tokenized([9, 30, 31, 32, 33, 34, 35, 2], 2, 0, None, untrained=((4, 6),)),  # a conversation
    ),
)
TARGETS = ((0, (4, 5)), (1, (2, 3, 6, 7)))  # example → the places of its target tokens


@pytest.fixture(autouse=True)
def _streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of tiny models are streamed too, but not a reward model's head."""
    monkeypatch.setattr(streamed_weights, "LEAST_NUMBERS", 256)


def recipe(model: Path, method: str, objective: str = "sft") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "exported",
            "seed": 4,
            "model": {"base": str(model)},
            "data": {"tasks": ["t"], "max_length": 512},
            "tuning": {"method": method, "rank": 4, "virtual_tokens": 4, "width": 8},
            "training": {"steps": 3, "objective": objective},
        }
    )


def trained(folder: Path, made: Recipe, dtype: str) -> tuple[Run, Checkpoint, Any]:
    """A checkpoint with weights that are not those of the base, and the model that has them."""
    method = TUNING_METHODS[made.tuning.method]
    model: Any = method.wrap(load_model(made.model.base, torch.float32, head=made.head), made.tuning, made.seed).eval()
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in trainable_parameters(model).items()
    }
    load_trainable(model, weights)
    run = Run(Folder.at(folder / "run"))
    tensors = ((f"weight/{name}", value) for name, value in weights.items())
    return run, save(run.checkpoints, tensors, State(step=3), {"dtype": dtype}), model


def told(model: Any) -> torch.Tensor:
    """The log-probabilities of the probe's target tokens, by a plain forward pass."""
    rows = []
    for number, places in TARGETS:
        ids = torch.tensor([PROBE.examples[number].ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :]
        rows += [logits[place - 1].float().log_softmax(-1)[ids[0, place]] for place in places]
    return torch.stack(rows)


def layout_of(model: Path) -> Layout:
    return Layout("chat", Tokenizer(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "adapter"])
def test_export_model(tiny_model: Path, tmp_path: Path, method: str) -> None:
    made = recipe(tiny_model, method)
    run, checkpoint, model = trained(tmp_path, made, "float32")
    export_model(made, run, checkpoint, layout_of(tiny_model), PROBE)
    assert run.is_trained
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        base = load_model(tiny_model, torch.float32)(input_ids=IDS).logits
        alone = load_model(run.model.local, torch.float32)(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(run.model.local)(input_ids=IDS).logits  # with transformers alone
    assert (expected[:, -4:] - base).abs().max() > 0.01
    torch.testing.assert_close(plain, expected if TUNING_METHODS[method].merge else base, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)
    contract = read_contract(run.model.local)
    assert contract is not None
    assert (contract.run, contract.layout, contract.base) == ("exported", "chat", str(tiny_model))
    assert layout_beside(run.model.local).encode_prompt("a") == layout_of(tiny_model).encode_prompt("a")
    assert run.adapter.exists() == (method != "full")
    if method != "full":
        words = read_contract(run.adapter)
        assert words is not None
        assert (words.base_sha256, words.weights_sha256) == (weights_sha256(tiny_model), weights_sha256(run.adapter.local))
        assert layout_over("exported", run.adapter.local, layout_of(tiny_model), weights_sha256(tiny_model)).name == "chat"
    if method in ("lora", "prefix", "prompt"):
        with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run.adapter.local)
        with torch.no_grad():
            torch.testing.assert_close(with_peft(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert sorted(child.name for child in run.folder.children() if child.name.startswith(".")) == []
    facts = run.export_file.read_json()
    assert {name: facts[name] for name in ("version", "step", "rows", "examples", "count", "of", "dtype")} == {
        "version": 1,
        "step": 3,
        "rows": "validation",
        "examples": 2,
        "count": 6,
        "of": "log-probabilities",
        "dtype": "float32",
    }
    assert 0 <= facts["mean"] <= facts["largest"] < 1e-4


def test_export_does_not_take_flash_attention_where_it_is_installed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models are on the CPU in float32."""
    made = recipe(tiny_model, "full")
    run, checkpoint, _ = trained(tmp_path, made, "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object() if name == "flash_attn" else find_spec(name))
    export_model(made, run, checkpoint, layout_of(tiny_model), PROBE)
    assert run.is_trained


def test_bfloat16_runs_are_saved_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe(tiny_model, "lora")
    run, checkpoint, model = trained(tmp_path, made, "bfloat16")
    export_model(made, run, checkpoint, layout_of(tiny_model), PROBE)
    alone = AutoModelForCausalLM.from_pretrained(run.model.local)
    assert alone.dtype == torch.bfloat16
    apart = (told(alone) - told(model)).abs()  # the trained weights in float32
    facts = run.export_file.read_json()
    assert facts["dtype"] == "bfloat16"
    assert (facts["mean"], facts["largest"]) == pytest.approx((float(apart.mean()), float(apart.max())), rel=1e-2)
    assert facts["largest"] > facts["mean"] > 1e-4
    merge = TUNING_METHODS["lora"].merge
    assert merge is not None
    merged = merge(model, torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, merged[name].bfloat16()) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_loses_the_adapter_is_not_published(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    made = recipe(tiny_model, "lora")
    run, checkpoint, _ = trained(tmp_path, made, dtype)
    monkeypatch.setattr(StreamedWeights, "merge_on_read", lambda *_: None)
    with pytest.raises(TrainingError, match=r"log-probabilities are .* from the trained model's; do not use it"):
        export_model(made, run, checkpoint, layout_of(tiny_model), PROBE)
    assert not run.export_file.exists()
    assert not run.model.exists()


def test_what_does_not_load_again_is_not_published(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tiny_model, "full")
    run, checkpoint, _ = trained(tmp_path, made, "float32")

    def loads_something_else(base: Any, dtype: torch.dtype, **_: Any) -> Any:
        return load_model(tiny_model, dtype)

    monkeypatch.setattr(model_writer, "load_model", loads_something_else)
    with pytest.raises(TrainingError, match="is not the same in the exported model"):
        export_model(made, run, checkpoint, layout_of(tiny_model), PROBE)
    assert not run.export_file.exists()
    assert not run.model.exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_decoder_is_held_against_what_was_trained(t5_folder: Path, tmp_path: Path, method: str, dtype: str) -> None:
    made = recipe(t5_folder, method)
    run, checkpoint, model = trained(tmp_path, made, dtype)
    export_model(made, run, checkpoint, Layout("plain", Tokenizer(t5_folder), "seq2seq"), PAIRS)
    alone, apart = load_model(run.model.local, torch.float32 if dtype == "float32" else torch.bfloat16), []
    for example in PAIRS.examples:
        prompt, reply = (
            torch.tensor([part]) for part in (example.ids[: example.prompt_length], example.ids[example.prompt_length :])
        )
        inputs = {"input_ids": prompt, "decoder_input_ids": torch.cat([torch.tensor([[0]]), reply[:, :-1]], dim=1)}
        with torch.no_grad():
            logits = [one(**inputs, use_cache=False).logits.float().log_softmax(-1) for one in (alone, model)]
        apart.append((logits[0] - logits[1])[0].gather(1, reply.T).abs().flatten())
    facts = run.export_file.read_json()
    assert facts["count"] == len(torch.cat(apart)) == 5
    expected = (float(torch.cat(apart).mean()), float(torch.cat(apart).max()))
    assert (facts["mean"], facts["largest"]) == pytest.approx(expected, rel=0.05, abs=1e-5)


BETTER, WORSE = [9, 40, 41, 7, 2], [9, 40, 41, 8, 8, 2]
REWARDED = Probe("validation", (Tokenized(BETTER, 3, 0, None, rejected=Tokenized(WORSE, 3, 0, None)),))
PAIRS = Probe("training", (Tokenized([40, 41, 42, 2, 7, 8, 2], 4, 0, None), Tokenized([30, 31, 2, 33, 2], 3, 0, None)))


@pytest.fixture(scope="module")
def t5_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "bare"
    shutil.copytree(tiny_model, folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(vocab_size=512, eos_token_id=2, decoder_start_token_id=0, **sizes)).save_pretrained(
            folder
        )
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reward_model_is_held_against_what_was_trained(tiny_model: Path, tmp_path: Path, method: str) -> None:
    made = recipe(tiny_model, method, objective="reward")
    run, checkpoint, model = trained(tmp_path, made, "bfloat16")
    export_model(made, run, checkpoint, layout_of(tiny_model), REWARDED)
    alone = load_model(run.model.local, torch.bfloat16, head=0)
    with torch.no_grad():
        rewards = [[float(one(input_ids=torch.tensor([ids])).logits) for ids in (BETTER, WORSE)] for one in (alone, model)]
    apart = [abs(one - other) for one, other in zip(*rewards, strict=True)]
    facts = run.export_file.read_json()
    assert (facts["of"], facts["count"], facts["examples"]) == ("rewards", 2, 1)
    assert (facts["mean"], facts["largest"]) == pytest.approx((sum(apart) / 2, max(apart)), rel=0.1, abs=1e-3)
    assert facts["largest"] > 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize(("method", "objective"), [(name, "sft") for name in TUNING_METHODS] + [("lora", "reward")])
@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_streamed_and_whole_exports_are_the_same_to_the_byte(
    tiny_model: Path, t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: str, objective: str
) -> None:
    if (family, objective) == ("seq2seq", "reward"):
        return
    base, probe = (tiny_model, PROBE) if family == "causal" else (t5_folder, PAIRS)
    probe = REWARDED if objective == "reward" else probe
    layout = layout_of(base) if family == "causal" else Layout("plain", Tokenizer(base), "seq2seq")
    made = recipe(base, method, objective)
    run, checkpoint, _ = trained(tmp_path, made, "bfloat16")
    for way, obstacle in (("streamed", None), ("whole", "a reason")):
        monkeypatch.setattr(model_export, "find_split_obstacle", lambda _, obstacle=obstacle: obstacle)
        export_model(made, run, checkpoint, layout, probe)
        for name in ("model", "adapter", "export.json"):
            if (run.folder / name).exists():
                (run.folder / name).local.rename(tmp_path / f"{way}-{name}")
    assert files_of(tmp_path / "streamed-model") == files_of(tmp_path / "whole-model") != {}
    assert files_of(tmp_path / "streamed-adapter") == files_of(tmp_path / "whole-adapter")
    assert (tmp_path / "streamed-export.json").read_text() == (tmp_path / "whole-export.json").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
def test_an_export_goes_to_an_object_store_without_a_copy_on_the_disk(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    largest_files: list[int] = []
    publish = model_export._publish

    def publish_and_look(source: Path, *rest: Any, **options: Any) -> None:
        largest_files.append(sum(file.stat().st_size for file in source.glob("*.safetensors")))
        publish(source, *rest, **options)

    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(model_export, "_publish", publish_and_look)
        for method, objective in (("lora", "sft"), ("prefix", "sft"), ("lora", "reward")):
            made = recipe(tiny_model, method, objective)
            here, checkpoint, _ = trained(tmp_path / f"{method}-{objective}", made, "bfloat16")
            stored = Run(Folder.at(f"s3://{BUCKET}/{method}-{objective}"))
            (stored.model / "old.safetensors").write_bytes(b"of an export before")
            for run in (here, stored):
                export_model(made, run, checkpoint, layout_of(tiny_model), PROBE if objective == "sft" else REWARDED)
            assert files_of(here.model.local) == files_of(stored.model.download(tmp_path / "down" / f"{method}-{objective}"))
            assert files_of(here.adapter.local) == files_of(stored.adapter.download(tmp_path / "down" / f"{method}-{objective}-a"))
            assert largest_files[-1] == 0
            assert largest_files[1] > 0  # on a disk
        with monkeypatch.context() as patch:
            patch.setattr(StreamedWeights, "merge_on_read", lambda *_: None)
            with pytest.raises(TrainingError, match="do not use it"):
                export_model(made, stored, checkpoint, layout_of(tiny_model), REWARDED)
            assert stored.is_trained  # the earlier export is as it was
        monkeypatch.setattr(StreamedWriter, "reload_and_score", None)
        with pytest.raises(TypeError):
            export_model(made, stored, checkpoint, layout_of(tiny_model), REWARDED)
        assert not stored.is_trained  # its weights are not known to be right


def test_questions_alone_are_compared_by_their_own_tokens(tiny_model: Path) -> None:
    model = load_model(tiny_model, torch.float32)
    ids = [9, 40, 41, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = torch.stack([logits[place, ids[place + 1]] for place in range(3)])
    torch.testing.assert_close(score_examples(model, [Tokenized(ids, 4, 0, None)]), expected)


@pytest.mark.parametrize(
    ("dtype", "apart", "refused"),
    [
        (torch.float32, [0.0, 0.004], False),
        (torch.float32, [0.0, 0.006], True),  # any token
        (torch.bfloat16, [0.0, 0.4], False),  # the mean
        (torch.bfloat16, [0.2, 0.4], True),
        (torch.float32, [0.0, float("nan")], True),
    ],
)
def test_how_far_is_too_far(dtype: torch.dtype, apart: list[float], refused: bool) -> None:
    expected = torch.tensor([-1.0, -2.0])
    with pytest.raises(TrainingError, match="do not use it") if refused else nullcontext():
        compare_scores(expected, expected + torch.tensor(apart), dtype, rewards=False)


def test_rewards_are_compared_in_proportion() -> None:
    facts = compare_scores(torch.tensor([1000.0]), torch.tensor([1001.0]), torch.float32, rewards=True)
    assert facts["largest"] == 1.0
    with pytest.raises(TrainingError, match="rewards are"):
        compare_scores(torch.tensor([1.0]), torch.tensor([1.01]), torch.float32, rewards=True)
