"""Several sources are read and tokenised one by one; their rows lie one source after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import make_tokenizer

import qlora_kit as qk
from qlora_kit.data.chat_template import choose_template
from qlora_kit.data.joined_rows import join, mixed, renderer_of, tokenize_sources
from qlora_kit.data.row_arrays import Part
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Shape
from qlora_kit.data.source_figures import source_figures
from qlora_kit.data.sources import load_training, load_validation, source_names
from qlora_kit.data.survey import survey
from qlora_kit.data.text_rows import TextRows
from qlora_kit.data.tokens import Tokenized, split_validation, tokenize
from qlora_kit.errors import ConfigError, DataError


def write(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def questions(path: Path, count: int, word: str = "one") -> str:
    return write(
        path, *({"question": f"{word} {i}", "answer": f"{i} dollars"} for i in range(count))
    )


def texts(path: Path, count: int, words: int = 1) -> str:
    return write(path, *({"text": f"story {i} " + "to play " * words} for i in range(count)))


def joined(config: qk.TrainConfig, tokenizer: Any = None) -> tuple[Samples, Tokenized]:
    samples, tokenizer = load_training(config), tokenizer or make_tokenizer()
    choose_template(tokenizer, config.chat_template)
    return samples, join(samples, tokenize_sources(samples, tokenizer, config, TextRows))


# ---------------------------------------------------------------- reading


def test_each_source_is_read_with_options_of_its_own(tmp_path: Path) -> None:
    asked = write(tmp_path / "a.jsonl", {"q": "one", "a": "$1.00"}, {"q": "broken"})
    config = qk.TrainConfig(
        data=[
            {"path": asked, "columns": {"question": "q", "answer": "a"}, "skip_bad_lines": True},
            {"path": questions(tmp_path / "b.jsonl", 3), "format": "qa"},
            texts(tmp_path / "c.jsonl", 2),
        ]
    )
    samples = load_training(config)
    assert [part.shape for part in samples.parts] == [Shape.QA, Shape.QA, Shape.TEXT]
    assert [len(part.items) for part in samples.parts] == [1, 3, 2]
    assert (samples.shape, samples.skipped, len(samples.items)) == ("mixed", 1, 6)
    assert [samples.part_of(index) for index in range(6)] == [0, 1, 1, 1, 2, 2]
    assert any("q" in text for text in samples.notices)


def test_one_source_with_options_is_that_source_read_with_them(tmp_path: Path) -> None:
    asked = write(tmp_path / "a.jsonl", {"q": "one", "a": "$1.00"})
    columns = {"question": "q", "answer": "a"}
    own = load_training(qk.TrainConfig(data={"path": asked, "columns": columns}))
    of_run = load_training(qk.TrainConfig(data=asked, columns=columns))
    assert own == of_run
    assert own.parts == ()


def test_faults_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    broken = write(tmp_path / "b.jsonl", {"question": "one", "answer": ""})
    with pytest.raises(DataError) as raised:
        load_training(qk.TrainConfig(data=[str(tmp_path / "none.jsonl"), broken]))
    first, second = raised.value.faults
    assert "none.jsonl: no such file" in first
    assert 'b.jsonl:1: "answer" is empty' in second


@pytest.mark.parametrize("again", ["a.jsonl", "./a.jsonl", "link.jsonl"])
def test_a_source_stands_once_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    monkeypatch.chdir(tmp_path)
    questions(Path("a.jsonl"), 2)
    Path("link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(ConfigError, match=f"--data: {again} stands twice; expected each source"):
        load_training(qk.TrainConfig(data=["a.jsonl", again]))
    # Read by other columns it is other data: a translation in both directions.
    other = {"path": again, "columns": {"question": "answer", "answer": "question"}}
    assert len(load_training(qk.TrainConfig(data=["a.jsonl", other])).parts) == 2


def test_names_of_sources_are_short_and_differ() -> None:
    sources = ["x/a.jsonl", "y/a.jsonl", "owner/name:en", "[b].txt"]
    parts = [Samples((), Shape.TEXT, source) for source in sources]
    assert source_names(parts) == ("a.jsonl-1", "a.jsonl-2", "name_en", "_b_.txt")


def test_validation_parts_of_sources_are_joined_and_their_lack_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        questions(tmp_path / name / "train.jsonl", 4)
        questions(tmp_path / name / "validation.jsonl", 2, name)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    found = load_validation(qk.TrainConfig(data=folders))
    assert found is not None
    assert [len(part.items) for part in found.parts] == [2, 2]
    alone = questions(tmp_path / "alone.jsonl", 3)
    found = load_validation(qk.TrainConfig(data=[folders[0], alone]))
    assert found is not None
    assert f"nothing is measured on {alone}" in found.notices[-1]
    assert load_validation(qk.TrainConfig(data=[alone, questions(tmp_path / "b.jsonl", 1)])) is None


# ---------------------------------------------------------------- rows


def test_rows_of_sources_are_those_of_each_alone(tmp_path: Path) -> None:
    config = qk.TrainConfig(
        data=[questions(tmp_path / "a.jsonl", 5), texts(tmp_path / "b.jsonl", 3, words=40)],
        max_length=32,
    )
    samples, found = joined(config)
    tokenizer = make_tokenizer()
    choose_template(tokenizer)
    alone = [tokenize(part, tokenizer, config) for part in samples.parts]
    ids = [row["input_ids"] for part in alone for row in part.rows]
    assert [row["input_ids"] for row in found.rows] == ids
    # Long texts are split and long chats cut, each as its own shape asks for.
    assert alone[1].counts.rows_split == 3
    places = [samples.items[row["row"]].place for row in found.rows]
    assert places == [
        part.items[row["row"]].place
        for part, made in zip(samples.parts, alone, strict=True)
        for row in made.rows
    ]
    assert [len(each.rows) for each in found.sources] == [len(part.rows) for part in alone]
    assert found.counts.tokens == sum(part.counts.tokens for part in alone)
    assert found.counts.rows_read == 8
    assert found.origin["template"] == alone[0].origin["template"]


def test_files_without_weights_have_the_rows_of_one_file(tmp_path: Path) -> None:
    first, second = questions(tmp_path / "a.jsonl", 4), questions(tmp_path / "b.jsonl", 3, "two")
    both = tmp_path / "both.jsonl"
    both.write_text(Path(first).read_text() + Path(second).read_text())
    _, found = joined(qk.TrainConfig(data=[first, second]))
    tokenizer = make_tokenizer()
    choose_template(tokenizer)
    whole = tokenize(load_training(qk.TrainConfig(data=str(both))), tokenizer, qk.TokenOptions())
    assert found.rows.content_hash() == whole.rows.content_hash()
    assert found.origin["data"] != whole.origin["data"], "a run is not resumed with the other"


def test_dropped_samples_keep_their_number(tmp_path: Path) -> None:
    long = write(tmp_path / "b.jsonl", {"text": "a"}, {"text": "to play " * 99})
    config = qk.TrainConfig(
        data=[texts(tmp_path / "a.jsonl", 3), long], max_length=64, long_samples="drop"
    )
    samples, found = joined(config)
    assert [samples.items[index].place for index in found.dropped] == [f"{long}:2"]


@pytest.mark.parametrize("sizes", [(300, 40), (150, 60)])
def test_the_same_share_of_each_source_is_held_out(tmp_path: Path, sizes: tuple[int, int]) -> None:
    data = [questions(tmp_path / "a.jsonl", sizes[0]), texts(tmp_path / "b.jsonl", sizes[1])]
    samples, found = joined(qk.TrainConfig(data=[*data, texts(tmp_path / "c.jsonl", 19, 2)]))
    kept, held = split_validation(found, 0.1, 7)
    assert held is not None
    assert [len(each.rows) for each in held.sources] == [sizes[0] // 10, sizes[1] // 10, 0]
    for part in (kept, held):
        assert sum(each.counts.tokens for each in part.sources) == part.counts.tokens
        for number, each in enumerate(part.sources):
            own = [part.rows[index]["row"] for index in each.rows]
            assert {samples.part_of(index) for index in own} <= {number}
            assert each.counts.rows_kept == len(own)
    everything = sorted(row["row"] for part in (kept, held) for row in part.rows)
    assert everything == [*range(sum(sizes) + 19)]
    figures = source_figures(mixed(kept, (2, 1, 1)), held)
    assert [bool(each.validation) for each in figures] == [True, True, False]
    assert sum(each.share for each in figures) == pytest.approx(1)
    assert figures[2].epochs_to_see_all == 1
    assert "no validation rows" in figures[2].described(9)


def test_few_rows_are_not_held_out(tmp_path: Path) -> None:
    data = [questions(tmp_path / "a.jsonl", 150), texts(tmp_path / "b.jsonl", 49)]
    _, found = joined(qk.TrainConfig(data=data))
    assert split_validation(found, 0.1, 7) == (found, None)


def test_an_epoch_without_a_row_of_a_source_is_refused(tmp_path: Path) -> None:
    data = [texts(tmp_path / "a.jsonl", 3), texts(tmp_path / "b.jsonl", 30, 2)]
    _, found = joined(qk.TrainConfig(data=data))
    with pytest.raises(
        ConfigError, match=r"--data-weights: an epoch, .*a\.jsonl has been seen once, has 3 rows"
    ):
        mixed(found, (100, 1))
    assert mixed(found, (1, 1)).rows.rows_an_epoch == 6
    alike = mixed(found, ()).rows
    assert (alike.mixture, alike.rows_an_epoch) == (None, len(found.rows))
    ends = [each.rows.stop for each in found.sources]
    assert [alike.source_of(end - 1) for end in ends] == [*range(len(ends))]
    assert alike.source_names == tuple(each.name for each in found.sources)


# ---------------------------------------------------------------- a template of its own


def test_a_source_may_have_its_own_template_and_the_run_keeps_its_own(tmp_path: Path) -> None:
    first, second = questions(tmp_path / "a.jsonl", 4), questions(tmp_path / "b.jsonl", 3)
    config = qk.TrainConfig(data=[first, {"path": second, "chat_template": "vicuna"}])
    tokenizer = make_tokenizer()
    samples, found = joined(config, tokenizer)
    said = [tokenizer.decode(found.rows[each.rows[0]]["input_ids"]) for each in found.sources]
    assert "### Response:" in said[0]
    assert "ASSISTANT:" in said[1]
    assert "### Response:" in tokenizer.chat_template
    _, plain = joined(qk.TrainConfig(data=[first, second]))
    assert found.template_hash == plain.template_hash
    assert found.origin["data"] != plain.origin["data"]
    # Prompts are tried with the template that each row was made with.
    tried = survey(Part(samples, found), None, tokenizer, config, seed=1, shown_rows=0).prompts
    assert tried is not None
    assert (tried.tried, tried.differing) == (7, 0)
    text = renderer_of(samples, tokenizer, config)(4).prompt_text(samples.items[4].messages[:-1])  # type: ignore[union-attr]
    assert text.endswith("ASSISTANT:")


def test_the_error_of_a_template_names_its_source(tmp_path: Path) -> None:
    source = {"path": questions(tmp_path / "b.jsonl", 3), "chat_template": "vicunna"}
    with pytest.raises(ConfigError, match=r"b\.jsonl: --chat-template vicunna: .* mean vicuna"):
        joined(qk.TrainConfig(data=[questions(tmp_path / "a.jsonl", 4), source]))


def test_a_survey_tells_what_became_of_the_rows_of_each_source(tmp_path: Path) -> None:
    config = qk.TrainConfig(
        data=[
            questions(tmp_path / "a.jsonl", 5, "to play " * 40),
            texts(tmp_path / "b.jsonl", 3, 40),
        ],
        max_length=32,
        train_on="all",
    )
    tokenizer = make_tokenizer()
    samples, found = joined(config, tokenizer)
    surveyed = survey(Part(samples, found), None, tokenizer, config, seed=1, shown_rows=0)
    outcomes = {(row.place.rpartition(":")[0][-7:], row.outcome) for row in surveyed.longest}
    assert outcomes <= {("a.jsonl", "truncated"), ("b.jsonl", "split")}
    assert [each["name"] for each in surveyed.as_json()["sources"]] == ["a.jsonl", "b.jsonl"]
