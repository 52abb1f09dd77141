"""The command line as a user meets it: help, errors of one line, exit codes, no early torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import run

from qlora_kit.config import TrainConfig

COMMANDS = (
    "check", "train", "sweep", "evaluate", "generate", "chat", "serve", "export", "runs", "models",
    "doctor",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(command, "--help", capsys=capsys)
    assert code == 0
    assert f"qlora-kit {command}" in out


def test_help_shows_each_option_once_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("train", "--help", capsys=capsys)
    assert "--rank N" in out
    assert "[default: 16]" in out
    assert "--lora-r" not in out, "synonyms parse but are not listed"


EARLY_ERRORS = {
    ("train", "--model", "deepseek-7bb"): (2, "did you mean deepseek-7b"),
    ("train", "--bits", "5"): (2, "--bits: found 5; expected 4, 8 or 16"),
    ("train", "--rnak", "4"): (2, "--rank"),
    ("train", "--config", "nowhere.yaml"): (2, "nowhere.yaml: no such file"),
    ("train", "--data", "nowhere.jsonl"): (2, "nowhere.jsonl"),
    ("train", "--resume"): (2, "name its folder with --output"),
    ("evaluate", "--adapter", "nowhere"): (2, "nowhere: no such folder"),
    ("generate",): (2, "--prompt: missing"),
    ("chat", "--adapter", "nowhere"): (2, "nowhere: no such folder"),
    ("chat", "--context", "1"): (2, "--context: found 1"),
    ("export", "nowhere", "--check-server", "vllm"): (2, "nowhere: no such folder"),
    ("export", "nowhere", "--to", "merged"): (2, "nowhere: no such folder"),
    ("export", "nowhere"): (2, "--to: missing"),
    ("export", "nowhere", "--to", "merged", "--max-shard-size", "lots"): (
        2,
        "expected a number with a unit",
    ),
    ("train", "--model", __file__): (2, "is a file; expected the folder of a model"),
    ("train", "--model", str(Path(__file__).parent)): (2, "no config.json"),
    ("train", "--output", f"{__file__}/run"): (2, "is a file; expected a folder"),
    ("runs",): (2, "runs: no such folder; expected a folder of runs"),
    ("runs", __file__): (2, "is a file; expected a folder of runs"),
    ("sweep",): (2, "--over: missing"),
    ("sweep", "--over", "rnak=4,8"): (2, "did you mean rank?"),
    ("nonsense",): (2, "No such command"),
}


@pytest.mark.parametrize("arguments", EARLY_ERRORS, ids=" ".join)
def test_a_user_error_is_one_line_and_exit_2_and_imports_no_torch(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    code, text = EARLY_ERRORS[arguments]
    script = (
        "import sys\n"
        "from qlora_kit.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    print('torch' if 'torch' in sys.modules else 'no torch', file=sys.stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "no torch\n"
    assert list(tmp_path.iterdir()) == [], "an error leaves nothing behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("train", "--help"),
        ("models",),
        ("train", "--dry-run"),
        ("sweep", "--over", "rank=4,8", "--dry-run"),
    ],
)
def test_what_needs_no_torch_imports_none(arguments: tuple[str, ...]) -> None:
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n"
        "from qlora_kit.cli import main\nmain(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr == "False"


def test_dry_run_prints_the_resolved_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora-alpha: 8\nrank: 2\n")
    arguments = (
        "train",
        "--model",
        "smollm2-135m",
        "--config",
        str(file),
        "--rank",
        "4",
        "--dry-run",
    )
    code, out, _ = run(*arguments, capsys=capsys)
    resolved = yaml.safe_load(out)
    assert code == 0
    assert set(resolved) == set(TrainConfig.model_fields)
    # flag over file over configs/smollm2-135m.yaml over defaults
    assert (resolved["rank"], resolved["alpha"], resolved["batch_size"]) == (4, 8, 8)
    assert resolved["max_length"] == TrainConfig().max_length
    _, out, _ = run(*arguments, "--json", capsys=capsys)
    assert json.loads(out) == resolved


def _changed(name: str) -> tuple[str, object]:
    """Return a flag's text and the value it must resolve to, different from the default."""
    special: dict[str, tuple[str, object]] = {
        "model": ("tinyllama", "tinyllama"),
        "revision": ("main", "main"), "weights": ("random", "random"), "bits": ("8", 8),
        "head_bits": ("4", 4),
        "quant_type": ("fp4", "fp4"),
        "device": ("cpu", "cpu"), "dtype": ("float32", "float32"),
        "targets": ("mlp", ["mlp"]), "rank_pattern": ("q_proj=2", {"q_proj": 2}),
        "alpha_pattern": ("q_proj=2", {"q_proj": 2.0}),
        "layers_to_transform": ("0,2", [0, 2]), "exclude_modules": ("v_proj", ["v_proj"]),
        "modules_to_save": ("lm_head", ["lm_head"]), "new_tokens": ("<a>", ["<a>"]),
        "init": ("pissa", "pissa"), "galore": ("lm_head", ["lm_head"]),
        "long_samples": ("drop", "drop"), "train_on": ("all", "all"),
        "chat_template": ("chatml", "chatml"),
        "format": ("qa", "qa"), "columns": ("text=a.b", {"text": "a.b"}),
        "scheduler": ("cosine", "cosine"), "optimizer": ("adamw8bit", "adamw8bit"),
        "kernels": ("plain", "plain"),
        "data": ("a.jsonl", "a.jsonl"), "data_weights": ("3,1", [3.0, 1.0]),
        "validation": ("b.jsonl", "b.jsonl"),
        "output": ("out", "out"), "resume": ("latest", "latest"),
        "allow_change": ("data,seed", ["data", "seed"]),
        "task": ("classify", "classify"), "labels": ("a,b", ["a", "b"]),
        "label_kind": ("multi", "multi"), "class_weights": ("a=2", {"a": 2.0}),
        "best_metric": ("accuracy", "accuracy"), "loss": ("ipo", "ipo"),
        "vram": ("10GB", 10**10), "ram": ("auto", "auto"), "report_to": ("wandb", "wandb"),
    }  # fmt: skip
    if name in special:
        return special[name]
    kinds = str(TrainConfig.model_fields[name].annotation)
    return ("0.25", 0.25) if "float" in kinds else ("7", 7)


# An adapter brings its own settings, see tests/recipe/test_preferring.py.
@pytest.mark.parametrize("name", [name for name in TrainConfig.model_fields if name != "adapter"])
def test_each_flag_changes_its_own_value_and_no_other(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--" + name.replace("_", "-")
    default = TrainConfig(model="tinyllama") if name != "model" else TrainConfig()
    before = default.model_dump(mode="json")
    if "bool" in str(TrainConfig.model_fields[name].annotation):
        value: object = not before[name]
        arguments = [flag if value else f"--no-{flag[2:]}"]
    else:
        text, value = _changed(name)
        arguments = [flag, text]
    if name != "model":
        # The demo's own settings would be in the way of comparing with the defaults.
        arguments += ["--model", "tinyllama"]
    _, out, _ = run("train", *arguments, "--dry-run", "--json", capsys=capsys)
    after = json.loads(out)
    settings = {"batch_size", "gradient_accumulation_steps"}  # of configs/tinyllama.yaml
    changed = {key for key in after if after[key] != before[key]} - (settings - {name})
    assert changed == {name}
    assert after[name] == value


def test_models_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("models", capsys=capsys)
    for name in ("deepseek-7b", "llama-3.1-70b", "demo"):
        assert f"\n{name} " in f"\n{out}"
    _, out, _ = run("models", "--json", capsys=capsys)
    assert json.loads(out)["deepseek-7b"]["hub_id"] == "deepseek-ai/deepseek-llm-7b-base"


def test_doctor_finds_this_machine_able(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("doctor", capsys=capsys)
    assert code == 0
    assert "4-bit on cpu" in out
    assert "8-bit on cpu" in out


def test_an_unexpected_error_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qlora_kit.recipe

    def broken(*_: object) -> dict[str, object]:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(qlora_kit.recipe, "train", broken)
    code, _, err = run("train", capsys=capsys)
    assert code == 1
    assert err.startswith("error: internal error: ZeroDivisionError")
    assert err.count("\n") == 1
