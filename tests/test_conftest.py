"""The rules that conftest.py itself brings: no unexpected skip in CI, and a tiny model that is always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import UNEXPECTED_SKIP, pytest_collection_modifyitems

CONFTEST = Path(__file__).with_name("conftest.py")


def run_pytest(folder: Path, body: str, *options: str, ci: bool) -> subprocess.CompletedProcess[str]:
    """Runs one test with `body` in a checkout of its own, which has no ../shared/data."""
    tests = folder / "checkout" / "tests"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST.read_text())
    (tests / "test_one.py").write_text(f"import pytest\n\ndef test_one():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tests)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"CI": "true" if ci else ""}, cwd=folder)


@pytest.mark.parametrize(
    ("body", "ci", "code"),
    [
        ("assert 1 == 1", True, 0),
        ("pytest.skip('felt like it')", False, 0),
        ("pytest.skip('felt like it')", True, UNEXPECTED_SKIP),
        ("pytest.importorskip('no_such_module_anywhere')", True, UNEXPECTED_SKIP),
        ("pytest.skip('needs a GPU')", True, 0),
        ("pytest.skip('needs ../shared/data')", True, 0),
        ("pytest.xfail('known')", True, 0),
    ],
)
def test_only_expected_skips_pass_in_ci(tmp_path: Path, body: str, ci: bool, code: int) -> None:
    done = run_pytest(tmp_path, body, ci=ci)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("UNEXPECTED SKIP" in done.stdout) == bool(code)


@pytest.mark.parametrize("body", ["pytest.skip('felt like it')", "pass\n\npytest.importorskip('no_such_module_anywhere')"])
def test_a_skip_in_a_process_of_several_is_counted_once(tmp_path: Path, body: str) -> None:
    done = run_pytest(tmp_path, body, "-n", "2", ci=True)
    assert (done.returncode, done.stdout.count("UNEXPECTED SKIP")) == (UNEXPECTED_SKIP, 1), done.stdout + done.stderr


def test_files_of_long_tests_come_first_where_processes_share_them() -> None:
    def item(path: str, *markers: str, fixtures: tuple[str, ...] = ()) -> Any:
        return SimpleNamespace(path=Path(path), fixturenames=fixtures, get_closest_marker=lambda name: name in markers or None)

    items = [item("a"), item("b"), item("b"), item("c", fixtures=("ray_cluster",)), item("d", "slow", "cluster"), item("d")]
    for config, order in ((SimpleNamespace(), "abbcdd"), (SimpleNamespace(workerinput={}), "ddcbba")):
        pytest_collection_modifyitems(cast(Any, config), items)
        assert "".join(str(item.path) for item in items) == order


def test_missing_data_is_no_excuse_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "shared" / "data").mkdir(parents=True)
    done = run_pytest(tmp_path, "pytest.skip('needs ../shared/data')", ci=True)
    assert done.returncode == UNEXPECTED_SKIP
    assert "UNEXPECTED SKIP" in done.stdout


def test_tiny_model_loads_and_speaks_its_tokens(tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    assert (len(tokenizer), model.config.vocab_size, model.config.hidden_size) == (512, 512, 64)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüß dich"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a tiny apprentice.<|im_end|>\n<|im_start|>user\nGrüß dich<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert tokenizer.decode(ids) == text


def test_ray_cluster_has_four_cpus(ray_cluster: None) -> None:
    import ray

    assert ray.cluster_resources()["CPU"] == 4
    assert ray.get(ray.remote(lambda x: x + 1).remote(41)) == 42
