"""The sources that --data may name, and their notices: files, folders, aligned files, the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.config import RecordOptions
from qlora_kit.data.samples import load_held_out, load_samples
from qlora_kit.data.shapes import Conversation, Message, Shape
from qlora_kit.errors import ConfigError, DataError, HubError


def _write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _texts(data: Path | str, split: Any = "train") -> list[str]:
    return [sample.text for sample in load_samples(data, split).items]  # type: ignore[union-attr]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval"])
def test_a_folder_has_a_file_for_each_split(tmp_path: Path, name: str) -> None:
    for split in ("train", name, "test"):
        _write(tmp_path / f"{split}.jsonl", split)
    (tmp_path / "README.md").write_text("not data")
    assert _texts(tmp_path) == ["train"]
    assert _texts(tmp_path, "validation") == [name]
    assert _texts(tmp_path, "test") == ["test"]
    held_out = load_held_out(tmp_path)
    assert held_out is not None
    assert held_out.notices == (f"{tmp_path / name}.jsonl: 1 text record (text)",)
    assert load_samples(tmp_path).source == str(tmp_path)


def test_what_is_measured_is_never_what_was_learnt_from(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", "t")
    assert load_held_out(tmp_path) is None
    with pytest.raises(DataError, match=r"a folder with a train file; expected a test file in it"):
        load_samples(tmp_path, "test")
    _write(tmp_path / "val.jsonl", "v")
    assert _texts(tmp_path, "test") == ["v"]


def test_a_file_is_all_of_every_split_and_brings_no_validation(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", "a")
    assert _texts(path) == _texts(path, "test") == _texts(str(path), "validation") == ["a"]
    assert load_held_out(path) is None
    assert load_held_out(None) is None


def test_shards_are_read_in_order_and_all_of_them(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        _write(tmp_path / f"train-0000{number}-of-00003.jsonl", str(number))
    assert _texts(tmp_path) == ["0", "1", "2"]
    assert load_samples(tmp_path).notices == (f"{tmp_path} (3 files): 3 text records (text)",)
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(DataError, match=r"2 train files .*; expected one, or every shard of one"):
        load_samples(tmp_path)


def test_two_files_of_a_split_are_not_guessed_between(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", "a")
    (tmp_path / "train.csv").write_text("text\nb\n")
    with pytest.raises(
        DataError, match=r"2 train files \(train\.csv, train\.jsonl\); expected one"
    ):
        load_samples(tmp_path)


def test_mixed_shards_name_both_lines(tmp_path: Path) -> None:
    one = _write(tmp_path / "train-00000-of-00002.jsonl", "a")
    other = tmp_path / "train-00001-of-00002.jsonl"
    other.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(DataError) as caught:
        load_samples(tmp_path)
    assert str(caught.value).startswith(
        f"{other}:1: a record of shape qa; expected text as in {one}:1;"
    )


def test_a_folder_without_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder; expected a train file in it, such as train\.j"):
        load_samples(tmp_path)


# ---------------------------------------------------------------- line-aligned files


def test_line_aligned_files_are_questions_and_answers(tmp_path: Path) -> None:
    one, other = tmp_path / "train.en", tmp_path / "train.de.gz"
    one.write_text("a dog\n")
    other.write_bytes(gzip.compress(b"ein Hund\n"))
    samples = load_samples(f"{one}+{other}")
    turns = (Message("user", "a dog"), Message("assistant", "ein Hund"))
    assert samples.items == [Conversation(turns, f"{one}:1")]
    assert samples.notices == (f"{one}+{other}: 1 qa record (question, answer)",)
    swapped = load_samples(f"{other}+{one}", options=RecordOptions(format="qa"))
    assert [m.content for m in swapped.items[0].messages] == ["ein Hund", "a dog"]  # type: ignore[union-attr]
    with pytest.raises(DataError) as caught:
        load_samples(tmp_path)
    assert f"pass --data {other}+{one}, or the other way round" in str(caught.value)
    with pytest.raises(
        DataError, match=r'suffix "\.en"; .* name two line-aligned ones as FILE\+FILE'
    ):
        load_samples(one)
    with pytest.raises(DataError, match=r"train\.fr: no such file"):
        load_samples(f"{one}+{tmp_path / 'train.fr'}")


def test_a_file_with_a_plus_in_its_name_is_that_file(tmp_path: Path) -> None:
    assert _texts(_write(tmp_path / "c++.jsonl", "a")) == ["a"]


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], Any]:
    """Return data sets by id and configuration, which stand in for the hub."""
    import datasets

    sets: dict[tuple[str, str | None], Any] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked: sets[asked])
    return sets


def _set(**splits: str) -> dict[str, Any]:
    import datasets

    return {
        name: datasets.Dataset.from_list([{"question": text, "answer": "b"}])
        for name, text in splits.items()
    }


def _question(name: str, split: Any) -> str:
    return load_samples(name, split).items[0].messages[0].content  # type: ignore[union-attr]


def test_hub_data_sets_have_splits(hub: dict[tuple[str, str | None], Any]) -> None:
    hub["owner/name", None] = _set(test="t", train="a", valid="v")
    samples = load_samples("owner/name")
    assert samples.shape is Shape.QA
    assert samples.items[0].place == "owner/name train record 1"
    assert samples.source == "owner/name"
    assert samples.notices == ("owner/name (train): 1 qa record (question, answer)",)
    assert _question("owner/name", "test") == "t"
    held_out = load_held_out("owner/name")
    assert held_out is not None
    assert held_out.items[0].place == "owner/name valid record 1"


def test_hub_data_sets_may_have_configurations(hub: dict[tuple[str, str | None], Any]) -> None:
    hub["owner/name", "main"] = _set(train="a")
    assert _question("owner/name:main", "train") == "a"
    assert load_held_out("owner/name:main") is None
    with pytest.raises(DataError, match="owner/name:main: no test split, only train; expected one"):
        load_samples("owner/name:main", "test")


def test_a_hub_record_that_cannot_be_decoded_is_one_line(
    hub: dict[tuple[str, str | None], Any],
) -> None:
    def rows() -> Any:
        yield {"text": "a"}
        raise ImportError("SECRET")

    hub["owner/name", None] = {"train": rows()}
    with pytest.raises(DataError) as caught:
        load_samples("owner/name")
    assert str(caught.value) == (
        "owner/name train record 2: cannot be decoded (ImportError); expected text; choose another "
        "data set"
    )
    hub["owner/name", None] = {"train": []}
    with pytest.raises(DataError, match="owner/name train: no records; expected at least one"):
        load_samples("owner/name")


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*asked: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(HubError) as caught:
        load_samples("owner/name")
    assert str(caught.value) == (
        "owner/name: no such file, and not loadable from the hub (no route); expected a data file "
        "or a hub id; check name, network and access"
    )


def test_a_hub_out_of_reach_is_one_line_for_real() -> None:
    # The tests run with HF_HUB_OFFLINE=1, so this is what the client itself says.
    with pytest.raises(HubError, match=r"^owner-of-none/no-such-name: no such file, and not load"):
        load_samples("owner-of-none/no-such-name")


# ---------------------------------------------------------------- what is told


def test_notices_say_what_was_recognised_skipped_and_looks_wrong(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": "i", "output": "o {{name}}", "input": "x", "id": 1}] * 2
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    samples = load_samples(path, options=RecordOptions(skip_bad_lines=True))
    assert samples.skipped == 1
    told, skipped, placeholders = samples.notices
    assert told == f"{path}: 2 alpaca records (instruction, input, output); not read: id"
    assert skipped.startswith(
        f"{path}: 1 of 3 records skipped for a fault; the first: {path}:3: not"
    )
    assert placeholders == (
        f"{path}: 2 of 2 records hold a placeholder ({{{{name}}}}) that nothing fills in; replace "
        "it, or it is learnt"
    )
    assert samples.first(1).notices == samples.notices


def test_notices_say_which_column_is_which(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("query,prompt\na,b\n")
    columns = {"prompt": "prompt", "completion": "query"}
    samples = load_samples(path, options=RecordOptions(columns=columns))
    assert samples.notices == (f"{path}: 1 pair record (prompt, completion from query)",)


def test_columns_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="--columns: no field promt"):
        load_samples("missing.jsonl", options=RecordOptions(columns={"promt": "a"}))


def test_the_built_in_samples_are_told_by_the_recipe_alone() -> None:
    options = RecordOptions(format="text", columns={"text": "x"})
    samples = load_samples(None, "train", options)
    assert samples.notices == ()
    assert samples.source == "built-in sample data"


def test_training_takes_a_folder_whole_and_tells_both_parts(tmp_path: Path) -> None:
    from qlora_kit.config import TrainConfig
    from qlora_kit.events import Event, Notice
    from qlora_kit.recipe.rows import read_data

    (tmp_path / "train.csv").write_text("body,id\na,1\nb,2\n")
    (tmp_path / "valid.csv").write_text("body,id\nc,3\n")
    told: list[Event] = []
    config = TrainConfig.model_validate({"data": str(tmp_path), "columns": "text=body"})
    samples, validation = read_data(config, told.append)
    assert validation is not None
    assert (len(samples.items), len(validation.items)) == (2, 1)
    assert told == [
        Notice(f"{tmp_path}/train.csv: 2 text records (text from body); not read: id"),
        Notice(f"{tmp_path}/valid.csv: 1 text record (text from body); not read: id"),
    ]
