"""Every option has one default and one home, and an error lists all faults at once."""

from __future__ import annotations

import datetime
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from support import slow

import qlora_kit as qk
from qlora_kit.cli import main
from qlora_kit.config import (
    ChatConfig,
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    Layer,
    Options,
    PlanConfig,
    QuantizeConfig,
    RunsConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
    field_names,
    read_config_file,
    resolve,
)
from qlora_kit.errors import ConfigError

# The names in PEERS.md for features that the kit has.
PEER_NAMES = {
    "model_name_or_path": "model",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "dtype",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "targets",
    "use_rslora": "rslora",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "resume_from_checkpoint": "resume",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "val_size": "validation_fraction",
}


@pytest.mark.parametrize(("peer", "own"), PEER_NAMES.items())
def test_the_names_of_peers_are_synonyms(peer: str, own: str) -> None:
    assert field_names(TrainConfig)[peer] == own


def test_later_layers_win_and_defaults_fill_the_rest() -> None:
    config = resolve(
        TrainConfig, [Layer("file", {"rank": 8, "alpha": 4}), Layer("", {"rank": "64"})]
    )
    assert (config.rank, config.alpha, config.learning_rate) == (64, 4, 2e-4)


def test_all_faults_are_told_at_once() -> None:
    flags = {"bits": "5", "rank": "0", "epochs": "many", "lora_rr": "3"}
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig, [Layer("", flags)])
    assert len(caught.value.faults) == 4
    assert "--lora-rr: unknown key; did you mean lora_r?" in caught.value.faults
    text = str(caught.value)
    assert "--bits: found 5; expected 4, 8 or 16" in text
    assert "--rank: found 0; expected greater than or equal to 1" in text


def test_a_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\nlearning_rat: 1e-4\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml: learning_rat: unknown key; did you mean learning_rate"
    ):
        resolve(TrainConfig, [read_config_file(file)])


def test_one_option_under_two_names_in_one_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank is given twice"):
        resolve(TrainConfig, [Layer("", {"rank": 8, "lora_r": 16})])


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"load_in_4bit": True}, "bits", 4),
        ({"load_in_8bit": True}, "bits", 8),
        ({"bf16": True, "fp16": False}, "dtype", "bfloat16"),
        ({"completion_only_loss": False}, "train_on", "all"),
        ({"optim": "paged_adamw_8bit"}, "optimizer", "paged-adamw8bit"),
        ({"dtype": "bf16"}, "dtype", "bfloat16"),
        ({"targets": "q_proj, v_proj"}, "targets", ("q_proj", "v_proj")),
        ({"targets": ["mlp"]}, "targets", ("mlp",)),
        ({"rank_pattern": "down_proj=8,q_proj=4"}, "rank_pattern", {"down_proj": 8, "q_proj": 4}),
        ({"learning_rate": "2e-4"}, "learning_rate", 2e-4),
    ],
)
def test_values_are_understood_as_peers_and_people_write_them(
    given: dict[str, Any], field: str, value: Any
) -> None:
    assert getattr(resolve(TrainConfig, [Layer("", given)]), field) == value


@pytest.mark.parametrize("content", ["- a\n- b\n", "rank: [1\n", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"expected|not valid YAML"):
        read_config_file(file)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert resolve(TrainConfig, [read_config_file(tmp_path / "empty.yaml")]) == TrainConfig()


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: no such file or directory"):
        read_config_file(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    "config_class", [TrainConfig, EvaluateConfig, GenerateConfig, ServeConfig, ExportConfig]
)
def test_every_option_has_a_help_text_and_a_name_of_its_own(config_class: Any) -> None:
    names: list[str] = []
    for name, field in config_class.model_fields.items():
        assert field.description, name
        names += [name, *typing.cast(dict[str, Any], field.json_schema_extra)["also"]]
    assert len(names) == len(set(names)), "a synonym stands for two options"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"load_in_4bit": False}, "false does not say how; give bits"),
        ({"rank_pattern": "x"}, "expected name=number"),
        ({"class_weights": "a=1,b=2,a=3"}, "found a=1,b=2,a=3; expected each name once"),
        ({"rank_pattern": "q_proj=0"}, "greater than or equal to 1"),
        ({"alpha_pattern": "q_proj=-1"}, "greater than 0"),
        ({"learning_rate": "inf"}, "finite"),
        ({"rank": 10**9}, "less than or equal to"),
        ({"seed": 10**20}, "less than or equal to"),
        ({"targets": " , "}, "at least 1 item"),
    ],
)
def test_a_value_that_would_fail_later_is_refused_at_once(
    given: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        resolve(TrainConfig, [Layer("", given)])


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nalpha: 8\nrank: 8\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: not valid YAML \(rank stands twice\)"):
        read_config_file(file)


# ---------------------------------------------------------------- values as files have them


def _read(folder: Path, text: str) -> TrainConfig:
    file = folder / "run.yaml"
    file.write_text(text)
    return resolve(TrainConfig, [read_config_file(file)])


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("resume_from_checkpoint: true", "resume", "latest"),
        ("resume_from_checkpoint: True", "resume", "latest"),
        ("resume_from_checkpoint: no", "resume", None),
        ("resume_from_checkpoint: false", "resume", None),
        ("resume: null", "resume", None),
        ("profile: true", "profile", 3),
        ("profile: false", "profile", None),
        ("profile: 5", "profile", 5),
        ("resume: runs/a/checkpoint-3", "resume", "runs/a/checkpoint-3"),
        ("max_steps: -1", "max_steps", None),
        ("report_to: no", "report_to", "none"),
        ("report_to: none", "report_to", "none"),
        ("report_to: []", "report_to", "none"),
        ("report_to:", "report_to", "none"),
        ("report_to: [tensorboard]", "report_to", "tensorboard"),
        ("data: [a.jsonl]", "data", "a.jsonl"),
        ("target_modules: [q_proj]", "targets", ("q_proj",)),
        ("output: 2024-01-01", "output", Path("2024-01-01")),
        ("output: 1_000", "output", Path("1_000")),
        ("output_dir: no", "output", Path("no")),
        ("model: 7", "model", "7"),
        ("revision: 1.10", "revision", "1.10"),
        ("revision: 0123456", "revision", "0123456"),
        ("chat_template: no", "chat_template", "no"),
        ("chat_template: null", "chat_template", None),
        ("chat_template: 'null'", "chat_template", "null"),
        ('seed: "7"', "seed", 7),
        ("seed: [7]", "seed", 7),
        ("rank: 010", "rank", 10),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("lr: 5e-5", "learning_rate", 5e-5),
        ("gradient_checkpointing: off", "recompute", False),
        ("bf16: yes", "dtype", "bfloat16"),
        ("vram: auto", "vram", "auto"),
        ("vram: 8000000000", "vram", 8 * 10**9),
        ("rank_pattern: {q_proj: 4}", "rank_pattern", {"q_proj": 4}),
        ("columns: {prompt: 1}", "columns", {"prompt": "1"}),
    ],
)
def test_a_file_means_what_its_writer_means(
    tmp_path: Path, line: str, field: str, value: Any
) -> None:
    assert getattr(_read(tmp_path, line + "\n"), field) == value


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("rank: true", "rank: found true; expected a whole number"),
        ("rank:", "rank: found null; expected a whole number"),
        ("rank: 1.5", "rank: found 1.5; expected a whole number"),
        ("rank: {a: 1}", "rank: found keys with values; expected a whole number"),
        ("learning_rate: 1:30", "learning_rate: found 1:30; expected a number"),
        ("learning_rate: yes", "learning_rate: found yes; expected a number"),
        ("vram: 10", "vram: found 10; expected a number with a unit, such as 4GB or 500MB"),
        ("validation: [a, b]", "validation: found [a, b]; expected one value"),
        ("targets: {a: b}", "targets: found keys with values; expected a list"),
        ("overwrite: maybe", "overwrite: found maybe; expected true or false"),
        ("bf16: auto", "bf16: found auto; expected true or false"),
        ("load_in_4bit: [true]", "load_in_4bit: found [true]; expected true or false"),
        ("output: ''", "output: found ''; expected a path"),
        ('output: "a\\0b"', "expected text, and this holds a NUL or half of a character"),
        ('model: "\\ud800"', "expected text, and this holds a NUL or half of a character"),
        (f"resume: {'x' * 300}", "expected a path of at most 3,072 bytes, and 255 in"),
        (f"output: a/{'x' * 300}", "expected a path of at most 3,072 bytes, and 255 in"),
        ("report_to: all", "report_to: found all; expected 'none', 'tensorboard' or 'wandb'"),
        ("seed: !!int x", "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
    ],
)
def test_what_a_file_cannot_mean_is_one_true_line(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, line + "\n")
    (told,) = caught.value.faults
    assert told.startswith(f"{tmp_path}/run.yaml")
    assert fault in told


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"resume": True}, "resume", "latest"),
        ({"resume": False}, "resume", None),
        ({"report_to": False}, "report_to", "none"),
        ({"output": datetime.date(2024, 1, 1)}, "output", Path("2024-01-01")),
        ({"model": 7}, "model", "7"),
        ({"max_steps": -1}, "max_steps", None),
        ({"vram": 8 * 10**9}, "vram", 8 * 10**9),
    ],
)
def test_values_of_python_mean_the_same(values: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(TrainConfig(**values), field) == value


@pytest.mark.parametrize(
    "values",
    [{"rank": True}, {"learning_rate": True}, {"vram": 10}, {"seed": 10**5000},
     {"rank_pattern": {"q_proj": True}}, {"epochs": False}],
)  # fmt: skip
def test_python_takes_no_boolean_for_a_number(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig, [Layer("", values)])
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r".*layers\.\d{1,2}\.self_attn\.q_proj", None),
        (r"q_proj,.*\.(up|down){1,2}_proj", ("q_proj", r".*\.(up|down){1,2}_proj")),
        (r"[a,b]_proj, v_proj", ("[a,b]_proj", "v_proj")),
        (r"a\,b,c", (r"a\,b", "c")),
        (r"a\{1,c", (r"a\{1", "c")),
        ("a),b", ("a)", "b")),
    ],
)
def test_brackets_and_braces_hold_together(text: str, parts: tuple[str, ...] | None) -> None:
    assert resolve(TrainConfig, [Layer("", {"targets": text})]).targets == (parts or (text,))


def test_a_pattern_of_ranks_may_hold_commas_and_an_equals_sign() -> None:
    pattern = r"layers\.\d{1,2}\.q_proj=8,(?=x)v_proj=4"
    found = resolve(TrainConfig, [Layer("", {"rank_pattern": pattern})]).rank_pattern
    assert found == {r"layers\.\d{1,2}\.q_proj": 8, "(?=x)v_proj": 4}


# Each kind of value that a reader of YAML knows, for each key; and all that look like one.
SCALARS = (
    "true", "", "-1", "7", "0.5", ".nan", "2024-01-01", "text", '"a\\nb"', '"\\0"', "[]", "[a, b]",
    "[[a]]", "{a: 1}", "!!binary aGVsbG8=", "!!set {a, b}", "9" * 5000,
    *slow(
        "No", "on", "y", "~", "null", "0", "+12", "010", "0x1F", "1_000", "1:30", "190:20:30",
        "1e-4", "1.e+3", ".inf", "-.inf", "2001-12-14t21:59:43.10-05:00", "=", "<<", "'true'",
        '"7"', '""', "' '", '"\\ud800"', "é", "'*'", "[7]", "[true]", "[~]", "[{a: b}]", "{}",
        "{a: b}", "{1: true}", "!!timestamp 2024-01-01", "!!float 1", "!!int 3", "!!str 7",
        "x" * 5000, "a/" * 3000, "|\n  a\n  b",
    ),
)  # fmt: skip
CLASSES = (
    TrainConfig, PlanConfig, CheckConfig, EvaluateConfig, GenerateConfig, ChatConfig, ExportConfig,
    QuantizeConfig, RunsConfig, ServeConfig, SweepConfig,
)  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar[:20])
def test_no_value_of_any_key_is_an_internal_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scalar: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in field_names(TrainConfig):
        Path("run.yaml").write_text(f"{key}: {scalar}\n")
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", "run.yaml", "--dry-run"])
        out, err = capsys.readouterr()
        if stopped.value.code == 0:
            assert out, key
            assert not err, key
        else:
            assert stopped.value.code == 2, (key, err)
            assert err.startswith("error: "), key
            assert err.count("\n") == 1, (key, err)


_YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates()
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=2),
    max_leaves=3,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@drawn(st.data())
def test_any_value_is_understood_or_is_one_line(data: st.DataObject) -> None:
    config_class: type[Options] = data.draw(st.sampled_from(CLASSES))
    key = data.draw(st.sampled_from(sorted(field_names(config_class))))
    required = {n: "x" for n, f in config_class.model_fields.items() if f.is_required()}
    required.pop(field_names(config_class)[key], None)
    value = data.draw(_YAML_VALUES)
    faults: Sequence[str] = ()
    try:
        assert resolve(config_class, [Layer("", {**required, key: value})])
    except ConfigError as error:
        faults = error.faults
    assert len(faults) <= 1
    assert all(fault.startswith("--") for fault in faults)


# ---------------------------------------------------------------- the model's own settings


def test_python_and_the_command_line_take_the_model_s_file_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = qk.configure(TrainConfig, model="smollm2-135m", lora_r=4)
    assert (config.batch_size, config.rank, config.alpha) == (8, 4, TrainConfig().alpha)
    with pytest.raises(SystemExit):
        main(["train", "--model", "smollm2-135m", "--rank", "4", "--dry-run"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert resolve(TrainConfig, [read_config_file(tmp_path / "run.yaml")]) == config


def test_given_values_win_over_layers_and_these_over_the_model_s_file() -> None:
    layers = [Layer("file", {"model": ["smollm2-135m"], "batch_size": 2, "rank": 3})]
    config = qk.configure(TrainConfig, layers, rank=5)
    assert (config.batch_size, config.rank) == (2, 5)
    assert config.gradient_accumulation_steps == 2, "of configs/smollm2-135m.yaml"
    assert qk.configure(EvaluateConfig, batch_size=3).batch_size == 3
    with pytest.raises(ConfigError, match="--rnk: unknown key"):
        qk.configure(TrainConfig, rnk=3)
