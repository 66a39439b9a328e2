"""Many adapters over one base: each request gets what its own merged model says, in any company; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from apprentice.errors import ModelError
from apprentice.inference.cpu_linear import can_pack, place_model
from apprentice.inference.decoding import generate, make_scheduler
from apprentice.inference.generation_request import GenerationRequest, Sampling
from apprentice.inference.lora import Lora, LoraLayers, read_lora
from apprentice.models.loading import load_model
from apprentice.run.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.conftest import NEEDS_BFLOAT16
from tests.models.adapters import merged, random_lora

PROMPTS = [[(11 * length + 7 * place) % 509 + 3 for place in range(length)] for length in (1, 5, 40, 13, 2, 27, 8, 60)]
TOKENS = 10


def t5() -> Any:
    config = T5Config(
        vocab_size=512, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, eos_token_id=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    if request.param == "llama":
        return load_model(tiny_model, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return t5().eval()


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters: of all layers, of a higher rank, and of some layers only."""
    place = tmp_path_factory.mktemp("adapters")
    some = "q_proj" if hasattr(model, "model") else ".q"
    return [
        random_lora(model, place / "a", 1),
        random_lora(model, place / "b", 2, rank=7),
        random_lora(model, place / "c", 3, rank=2, only=some),
    ]


def replies(model: Any, questions: list[tuple[list[int], Lora | None]], *, slots: int = 16, **more: Any) -> list[list[int]]:
    scheduler = make_scheduler(model, slots=slots, context=128)
    for number, (prompt, adapter) in enumerate(questions):
        sampling = Sampling(0.8, 0.9, seed=number) if number % 2 and more.get("sampled") else Sampling()
        scheduler.submit(number, GenerationRequest(prompt, TOKENS, sampling=sampling, adapter=adapter))
    ids: list[list[int]] = [[] for _ in questions]
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            ids[int(str(token.key))].append(token.id)
    return ids


def test_each_request_gets_what_its_merged_model_says(model: Any, folders: list[Path]) -> None:
    loras = [None, *(read_lora(folder, model) for folder in folders)]
    models = [model, *(merged(model, folder) for folder in folders)]
    questions = [(prompt, number % 4) for number, prompt in enumerate([*PROMPTS, *PROMPTS[::-1]])]
    together = replies(model, [(prompt, loras[which]) for prompt, which in questions])
    expected = [generate(models[which], [prompt], max_new_tokens=TOKENS, stop_ids=())[0] for prompt, which in questions]
    assert together == expected
    assert len({tuple(replies(model, [(PROMPTS[2], lora)])[0]) for lora in loras}) == 4  # they do say different things


def test_replies_alone_and_in_company_are_identical(model: Any, folders: list[Path]) -> None:
    loras = [None, *(read_lora(folder, model) for folder in folders)]
    questions = [(prompt, loras[number * 3 % 4]) for number, prompt in enumerate(PROMPTS)]
    together = replies(model, questions, sampled=True)
    for number, (prompt, lora) in enumerate(questions):
        waiting: list[tuple[list[int], Lora | None]] = [([3], None)] * number
        assert replies(model, [*waiting, (prompt, lora)], slots=1, sampled=True)[-1] == together[number]


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=pytest.mark.skipif(not can_pack(), reason=NEEDS_BFLOAT16))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_small_additions_to_bfloat16_outputs_are_kept_on_average(
    tiny_model: Path, tmp_path: Path, is_packed: bool, has_bias: bool
) -> None:
    """What two adapters add is much less than half a step of the base's outputs, which are about 8 here."""
    model: Any = load_model(tiny_model, torch.bfloat16)
    torch.manual_seed(2)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = torch.randn(layer.weight.shape).bfloat16()
    weight = layer.weight.detach().float()
    if has_bias:
        layer.bias = torch.nn.Parameter(torch.randn(weight.shape[0]).bfloat16(), requires_grad=False)
    bias = layer.bias.float() if has_bias else torch.zeros(())
    name = "model.layers.0.self_attn.q_proj"
    adapters = []
    for rank in (2, 3):
        down, up = torch.randn(rank, weight.shape[1]), torch.randn(rank, weight.shape[0]) * 2e-3
        adapters.append(Lora({name: (down.bfloat16(), up.bfloat16())}))
    layers = LoraLayers(place_model(model, "cpu") if is_packed else model)
    for both in (layers, LoraLayers(model)):  # the second one has nothing to add later, and leaves what the first adds
        with both.rows([adapters[0]], [1]):
            pass
    inputs, rows = torch.randn(2048, weight.shape[1]).bfloat16(), [1024, 512, 512]
    with torch.inference_mode(), layers.rows([adapters[0], None, adapters[1]], rows):
        outputs = model.get_submodule(name)(inputs).float()
    base, parts = inputs.float() @ weight.T + bias, inputs.split(rows)
    assert torch.equal(outputs[1024:1536], layer(parts[1]).float())  # rows without an adapter are as they are alone
    for start, part, adapter in ((0, parts[0], adapters[0]), (1536, parts[2], adapters[1])):
        down, up = (matrix.float() for matrix in adapter.layers[name])
        addition, span = part.float() @ down.T @ up, slice(start, start + len(part))
        assert float(((outputs[span] - base[span]) * addition).sum() / addition.pow(2).sum()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers in a way that is to go
def test_peft_says_the_same(tiny_model: Path, tmp_path: Path) -> None:
    model: Any = load_model(tiny_model, torch.float32)
    patterns = {"alpha_pattern": {"v_proj": 3.0, r"layers\.0\.mlp\.up_proj": 40.0}}
    for number, config in enumerate(({"use_rslora": True}, patterns)):
        folder = random_lora(model, tmp_path / str(number), number, **config)
        config_file = json.loads((folder / ADAPTER_CONFIG).read_text())
        ids = torch.tensor([PROMPTS[2]])
        with LoraLayers(model).rows([read_lora(folder, model)], [1]), torch.no_grad():
            ours = model(input_ids=ids).logits
        if "use_rslora" not in config_file:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config_file | {"target_modules": targets}))
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(load_model(tiny_model, torch.float32), folder)(input_ids=ids).logits
            bare = model(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert float((bare - theirs).abs().max()) > 0.1


def test_layers_that_lie_on_their_side_take_adapters_too(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
        shapes = {"A": (2, 16), "B": (48, 2)}
        tensors = {f"base_model.model.transformer.h.0.attn.c_attn.lora_{key}.weight": torch.randn(shapes[key]) for key in "AB"}
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}))
    ids = torch.tensor([[1, 2, 3]])
    layers = LoraLayers(model)
    with torch.no_grad(), layers.rows([read_lora(tmp_path, model)], [1]):
        ours = model(input_ids=ids).logits
    model.transformer.h[0].attn.c_attn.weight.data += (tensors[next(iter(tensors)).replace("_B", "_A")].T) @ tensors[
        next(iter(tensors)).replace("_A", "_B")
    ].T
    with torch.no_grad():
        torch.testing.assert_close(ours, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, None, "is PREFIX_TUNING, and only LoRA shares a base"),
        ({"init_lora_weights": "pissa"}, None, r"changes more than it adds \(pissa\)"),
        (
            {},
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.ones(64)),
            "lora_magnitude_vector' besides LoRA's two",
        ),
        ({}, ("model.layers.9.self_attn.q_proj.lora_A.weight", torch.ones(4, 64)), "does not fit this base: 'model.layers.9"),
        ({}, ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 63)), "does not fit this base"),
        ({}, ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.full((4, 64), torch.nan)), "not finite"),
        ({}, ("lm_head.lora_A.weight", torch.ones(4, 64)), "does not fit this base: 'lm_head'"),
    ],
)
def test_what_is_no_lora_of_this_base_is_refused(tiny_model: Path, tmp_path: Path, config: Any, change: Any, message: str) -> None:
    model = load_model(tiny_model, torch.float32)
    folder = random_lora(model, tmp_path / "a", 1, **config)
    assert config or read_lora(folder, model).layers
    if change is not None:
        save_file(load_file(folder / ADAPTER_WEIGHTS) | {f"base_model.model.{change[0]}": change[1]}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match=message):
        read_lora(folder, model)


def test_a_half_written_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, torch.float32)
    folder = random_lora(model, tmp_path / "a", 1)
    (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be read"):
        read_lora(folder, model)
