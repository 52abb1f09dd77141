"""Every option has one default and one home, and every fault is told at once."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.config import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    Layer,
    TrainConfig,
    field_names,
    read_config_file,
    resolve,
)
from qlora_kit.errors import ConfigError

# The names of PEERS.md that mean something the kit has.
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
    "config_class", [TrainConfig, EvaluateConfig, GenerateConfig, ExportConfig]
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
