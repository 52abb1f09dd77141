"""Names of classes that a data set keeps beside its numbers become the names of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from pyarrow import parquet

from qlora_kit.config import TaskOptions
from qlora_kit.data.class_names import names_in_features, names_in_file
from qlora_kit.data.labels import Labels, labels_of, tags_in_words
from qlora_kit.data.samples import load_samples

NAMES = ["World", "Sports", "Business"]


def written(folder: Path, labels: list[Any], label: Any, column: str = "label") -> Path:
    """Write a parquet file as `datasets` does."""
    content = {"text": [f"text {n}" for n in range(len(labels))], column: labels}
    features = Features({"text": Value("string"), column: label})
    file = folder / "train.parquet"
    table = Dataset.from_dict(content, features=features).with_format("arrow")[:]
    parquet.write_table(table.cast(features.arrow_schema), file)
    return file


def labels_in(data: Path, **options: Any) -> Labels:
    return labels_of(load_samples(data, task="classify"), TaskOptions(**options))


def test_a_file_of_datasets_has_names_in_its_own_order(tmp_path: Path) -> None:
    file = written(tmp_path, [0, 1, 2, 1], ClassLabel(names=NAMES))
    samples = load_samples(file, task="classify")
    labels = labels_of(samples, TaskOptions())
    assert (labels.kind, list(labels.names)) == ("single", NAMES)
    assert [labels.target(sample) for sample in samples.items] == [[0], [1], [2], [1]]


def test_a_class_that_no_row_has_keeps_its_place(tmp_path: Path) -> None:
    labels = labels_in(written(tmp_path, [0, 2], ClassLabel(names=NAMES)))
    assert list(labels.names) == NAMES


def test_a_column_of_another_name_and_lists_of_classes(tmp_path: Path) -> None:
    several = Sequence(ClassLabel(names=NAMES))
    file = written(tmp_path, [[0, 2], [], [1]], several, "emotion")
    samples = load_samples(file, task="classify")
    labels = labels_of(samples, TaskOptions())
    assert (labels.kind, list(labels.names)) == ("multi", NAMES)
    assert [labels.target(sample) for sample in samples.items] == [[0, 2], [], [1]]


def test_numbers_of_tags_have_the_names_of_their_feature(tmp_path: Path) -> None:
    names = ["O", "B-LOC", "I-LOC"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))}
    )
    content = {"tokens": [["in", "New", "York"], ["Ann"]], "ner_tags": [[0, 1, 2], [0]]}
    table = Dataset.from_dict(content, features=features).with_format("arrow")[:]
    file = tmp_path / "train.parquet"
    parquet.write_table(table.cast(features.arrow_schema), file)
    samples = load_samples(file, task="tag")
    labels = labels_of(samples, TaskOptions(task="tag"))
    assert (labels.kind, list(labels.names)) == ("tags", names)
    assert [labels.target(sample) for sample in samples.items] == [[0, 1, 2], [0]]
    assert tags_in_words(labels, samples) == "scheme BIO, entities of 1 type"


def test_what_the_user_asks_for_goes_first(tmp_path: Path) -> None:
    file = written(tmp_path, [0, 1, 2], ClassLabel(names=NAMES))
    assert labels_in(file, labels=("a", "b", "c")).names == ("a", "b", "c")
    assert labels_in(file, label_kind="regression").kind == "regression"


def test_a_folder_may_say_it_for_all_its_files(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 3} for n in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_in(tmp_path).names == ("0", "1", "2")
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert list(labels_in(tmp_path).names) == NAMES
    # Its labels are texts, so they are no numbers of these classes.
    (tmp_path / "train.jsonl").write_text(
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}'
    )
    assert labels_in(tmp_path).names == ("x", "y")


def test_a_data_set_of_the_hub_has_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *names: DatasetDict({"train": rows}))
    samples = load_samples("owner/name", task="classify")
    assert list(labels_of(samples, TaskOptions()).names) == NAMES


@pytest.mark.parametrize(
    "feature",
    [
        None, [], "label", {"names": "ab"}, {"names": [1, 2]}, {"names": ["a", "a"]},
        {"names": ["1", "2"]}, {"names": ["a", " "]}, {"names": []},
        {"_type": "List", "feature": []},
    ],
)  # fmt: skip
def test_names_that_make_no_sense_are_no_names(feature: Any) -> None:
    assert names_in_features({"label": feature}) == {}
    assert names_in_features(feature) == {}


@pytest.mark.parametrize("stored", [b"\xff", b"{", b"[]", b'{"info": 3}', b'{"info": {}}'])
def test_damaged_features_do_not_keep_a_file_from_being_read(tmp_path: Path, stored: bytes) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
    file = tmp_path / "train.parquet"
    parquet.write_table(table.replace_schema_metadata({b"huggingface": stored}), file)
    assert names_in_file(file) == {}
    assert labels_in(file).names == ("0", "1")
