"""Several adapters on one base: each row computes as if its adapter were there alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from safetensors.torch import load_file, save_file
from support import relative_error, run, run_well
from tiny_models import fill_lora, load_folder

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ConfigError

IDS = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(0))
SPECS = {
    "a": qk.LoraSpec(rank=4, targets=("attention",)),
    "b": qk.LoraSpec(rank=8, alpha=4, targets=("mlp", "q_proj")),
    "c": qk.LoraSpec(rank=2, targets=("all-linear",), rslora=True),
}


@pytest.fixture(scope="module")
def folders(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three adapters of one base, on different layers and of different rank."""
    base, saved = load_folder(save_tiny(), 4), {}
    for seed, (name, spec) in enumerate(SPECS.items()):
        adapter = qk.attach(base, spec, seed=seed)
        fill_lora(adapter, seed=seed)
        saved[name] = tmp_path_factory.mktemp(name)
        qk.save_adapter(adapter, saved[name], qk.BaseRecord.of(base))
        qk.detach(adapter)
    return saved


@pytest.fixture
def base(save_tiny: Callable[..., Path]) -> Any:
    return load_folder(save_tiny(), 4)


@torch.no_grad()
def logits(base: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return base.model(input_ids=ids).logits  # type: ignore[no-any-return]


def alone(base: Any, folder: Path | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    if folder is None:
        return logits(base, ids)
    adapter = qk.load_adapter(base, folder)
    found = logits(base, ids)
    qk.detach(adapter)
    return found


def test_switching_is_loading_another_adapter(base: Any, folders: dict[str, Path]) -> None:
    expected = {name: alone(base, folder) for name, folder in folders.items()}
    without = logits(base)
    adapters = qk.load_adapters(base, folders)
    assert torch.equal(logits(base), without), "none is chosen yet"
    for name in ("b", "a", "c", "b"):
        adapters.set_adapter(name)
        assert relative_error(logits(base), expected[name]) <= 1e-6
        assert relative_error(logits(base), without) > 1e-2
    adapters.set_adapter(None)
    assert torch.equal(logits(base), without)
    assert torch.equal(logits(adapters.detach()), without)


def test_each_row_of_a_mixed_batch_has_its_own(base: Any, folders: dict[str, Path]) -> None:
    names = ["c", "a", None, "b", "a", "c"]
    expected = [
        alone(base, folders[name] if name else None, IDS[row : row + 1])
        for row, name in enumerate(names)
    ]
    adapters = qk.load_adapters(base, folders)
    adapters.set_adapter(names)
    found = logits(base)
    for row, each in enumerate(expected):
        assert relative_error(found[row : row + 1], each) <= 1e-5, row


def test_evaluation_measures_every_row_with_its_adapter(
    base: Any, folders: dict[str, Path]
) -> None:
    lengths = (12, 5, 9, 12, 7, 3)  # so that batches are formed in another order
    rows = [
        {"input_ids": IDS[n, :length].tolist(), "labels": IDS[n, :length].tolist(), "row": n}
        for n, length in enumerate(lengths)
    ]
    names = ["c", "a", "b", "b", "a", None]
    total = 0.0
    for row, name in zip(rows, names, strict=True):
        adapter = qk.load_adapter(base, folders[name]) if name else None
        measured = qk.evaluate(base, [row])
        total += measured.loss * measured.weight
        if adapter is not None:
            qk.detach(adapter)
    adapters = qk.load_adapters(base, folders)
    mixed = qk.evaluate(base, rows, batch_size=4, per_row=qk.PerRow(adapters, names))
    assert mixed.loss * mixed.weight == pytest.approx(total, rel=1e-5)


def test_rows_are_told_apart_by_their_adapter(base: Any, folders: dict[str, Path]) -> None:
    from qlora_kit.infer.evaluate import evaluate_mixed

    rows = [
        {"input_ids": IDS[n].tolist(), "labels": [*[-100] * n, *IDS[n, n:].tolist()], "row": n}
        for n in range(6)
    ]
    names = ["c", "a", "a", "b", "a", None]
    adapters = qk.load_adapters(base, folders)
    mixed = evaluate_mixed(base, rows, qk.PerRow(adapters, names), batch_size=4)
    assert mixed.total == qk.evaluate(base, rows, batch_size=4, per_row=qk.PerRow(adapters, names))
    for name in ("a", "b", "c", None):
        own = [row for row, each in zip(rows, names, strict=True) if each == name]
        adapters.set_adapter(name)
        alone = qk.evaluate(base, own)
        found = mixed.by_adapter[name]
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.metrics == alone.metrics
        assert found.weight == alone.weight
        assert found.rows == len(own)
    assert mixed.total.weight == sum(11 - max(n - 1, 0) for n in range(6))


def test_generation_answers_every_prompt_with_its_adapter(
    base: Any, folders: dict[str, Path]
) -> None:
    tokenizer, sampling = make_tokenizer(), qk.Sampling(max_new_tokens=6)
    prompts = [IDS[row, : 3 + row].tolist() for row in range(6)]
    names = ["c", "a", None, "b", "a", "c"]
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        adapter = qk.load_adapter(base, folders[name]) if name else None
        expected += qk.generate(base, tokenizer, [prompt], sampling)
        if adapter is not None:
            qk.detach(adapter)
    per_row = qk.PerRow(qk.load_adapters(base, folders), names)
    found = list(qk.generate(base, tokenizer, prompts, sampling, batch_size=4, per_row=per_row))
    assert found == expected


def test_a_base_that_was_trained_in_tiles_has_them_back(
    base: Any, folders: dict[str, Path]
) -> None:
    from qlora_kit.layers.mlp import TiledMLP
    from qlora_kit.step.tiles import set_mlp_tiles

    expected = alone(base, folders["b"])
    assert set_mlp_tiles(base.model, 4, torch.float32) > 0
    adapters = qk.load_adapters(base, folders)
    adapters.set_adapter("b")
    assert relative_error(logits(base), expected) <= 1e-6
    adapters.detach()
    assert isinstance(base.model.model.layers[0].mlp, TiledMLP)
    assert relative_error(alone(base, folders["b"]), expected) <= 1e-5


def test_memory_grows_by_the_adapters_only(base: Any, folders: dict[str, Path]) -> None:
    def held() -> int:
        tensors = [*base.model.parameters(), *base.model.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    before = held()
    adapters = qk.load_adapters(base, folders)
    assert held() == before, "the base is there once, whatever is on it"
    on_disk = (load_file(folder / "adapter_model.safetensors") for folder in folders.values())
    assert adapters.bytes == sum(t.nbytes for tensors in on_disk for t in tensors.values())


def test_what_cannot_be_is_refused(
    base: Any, folders: dict[str, Path], tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    other = load_folder(save_tiny("tinyllama", initializer_range=0.1), 4)
    with pytest.raises(AdapterError, match="trained on other weights"):
        qk.load_adapters(other, folders)
    adapters = qk.load_adapters(base, folders)
    with pytest.raises(ConfigError, match="no adapter is named 'd'; expected one of a, b, c"):
        adapters.set_adapter("d")
    adapters.set_adapter(["a", "b"])
    with pytest.raises(ConfigError, match="2 names for a batch of 6 rows"):
        logits(base)
    for again in (qk.load_adapters, lambda base, _: qk.attach(base, SPECS["a"])):
        with pytest.raises(ConfigError, match="carries an adapter already"):
            again(base, folders)
    adapters.detach()
    saved = {**load_file(folders["a"] / "adapter_model.safetensors"),
             "base_model.model.lm_head.weight": torch.ones(96, 64)}  # fmt: skip
    save_file(saved, tmp_path / "adapter_model.safetensors")
    config = json.loads((folders["a"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "modules_to_save": ["lm_head"]})
    )
    with pytest.raises(AdapterError, match=r"replaces lm_head\.weight of the base"):
        qk.load_adapters(base, {"a": folders["a"], "s": tmp_path})
    tags = shutil.copytree(folders["b"], tmp_path / "tags")
    for name, more in (
        ("adapter_config.json", {"task_type": "TOKEN_CLS"}),
        ("qlora_kit.json", {"labels": ["O", "B-X"], "label_kind": "tags"}),
    ):
        content = json.loads((tags / name).read_text())
        (tags / name).write_text(json.dumps({**content, **more}))
    with pytest.raises(AdapterError, match="adapter t: for task tag, and a for task causal; exp"):
        qk.load_adapters(base, {"a": folders["a"], "t": tags})


# ---------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def runs(
    simulated_once: None, few_rows: None, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    outputs = []
    for steps in (2, 5):
        outputs.append(tmp_path_factory.mktemp("runs") / f"run-{steps}")
        arguments = ["train", "--output", str(outputs[-1]), "--max-steps", str(steps)]
        run_well(*arguments, "--samples", "0", "--device", "cpu")
    return outputs


def test_answers_of_several_adapters_are_measured_and_written(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    given = ("--max-rows", "5", "--max-new-tokens", "8", "--metrics", "squad,chrf")
    file = tmp_path / "p.jsonl"
    named = ("evaluate", *several, *given, "--predictions", str(file))
    code, out, err = run(*named, "--json", capsys=capsys)
    assert code == 0, err
    found, rows = json.loads(out), [json.loads(line) for line in file.read_text().splitlines()]
    assert found["predictions"] == str(file)
    assert [row["adapter"] for row in rows] == ["short"] * 5 + ["long"] * 5
    assert [row["place"] for row in rows[:5]] == [row["place"] for row in rows[5:]]
    assert [row["answer"] for row in rows[:5]] != [row["answer"] for row in rows[5:]]
    for name, folder, own in (("short", runs[0], rows[:5]), ("long", runs[1], rows[5:])):
        _, out, _ = run("evaluate", "--adapter", str(folder), *given, "--json", capsys=capsys)
        alone = json.loads(out)
        for figure in ("squad_exact_match", "squad_f1", "chrf", "chrf_signature"):
            assert found["adapters"][name][figure] == alone[figure]
        assert sum(row["squad_f1"] for row in own) / 5 == pytest.approx(alone["squad_f1"])
    _, out, _ = run(*named, "--overwrite", capsys=capsys)
    assert out.count("SQuAD F1 ") == 2
    assert out.count("chrF signature") == 1


def test_the_commands_take_several(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    code, out, err = run("evaluate", *several, "--max-rows", "20", "--json", capsys=capsys)
    assert code == 0, err
    together = json.loads(out)["adapters"]
    for name, folder in (("short", runs[0]), ("long", runs[1])):
        single = ("evaluate", "--adapter", str(folder), "--max-rows", "20", "--json")
        _, out, _ = run(*single, capsys=capsys)
        assert together[name]["loss"] == pytest.approx(json.loads(out)["loss"], rel=1e-6)
    assert together["long"]["loss"] < together["short"]["loss"]
    prompt = ("--prompt", "Spoken: two dollars\nWritten:", "--max-new-tokens", "8")
    code, out, err = run("generate", *several, *prompt, capsys=capsys)
    assert code == 0, err
    assert "short: " in out
    assert "long: " in out


@pytest.mark.parametrize(
    "given",
    [
        ("--adapter", "a=x", "--adapter", "a=y"),
        ("--adapter", "x", "--adapter", "y"),
        ("--adapter", "x", "--adapter", "a=y"),
    ],
)
def test_names_that_are_missing_or_twice_are_refused(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("evaluate", *given, capsys=capsys)
    assert code == 2
    assert "several adapters need a name each" in err


# ---------------------------------------------------------------- rows that name their adapter

ROWS = [
    {"prompt": "Spoken: two dollars\nWritten:", "completion": " $2.00", "adapter": "long"},
    {"prompt": "Spoken: nine dollars\nWritten:", "completion": " $9.00", "adapter": "short"},
    {"prompt": "Spoken: six dollars\nWritten:", "completion": " $6.00"},
    {"prompt": "Spoken: ten dollars\nWritten:", "completion": " $10.00", "adapter": "long"},
]


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "mixed.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_rows_that_name_their_adapter_are_measured_with_it(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    given = ("--exact-match", "--metrics", "chrf", "--max-new-tokens", "8", "--batch-size", "4",
             "--json")  # fmt: skip
    answers = tmp_path / "answers.jsonl"
    mixed = ("evaluate", *several, "--data", write_rows(tmp_path, ROWS), *given)
    code, out, err = run(*mixed, "--predictions", str(answers), capsys=capsys)
    assert code == 0, err
    found = json.loads(out)
    assert "not read" not in err
    assert found["total"]["rows"] == 4
    parts = {**found["adapters"], "base": found["base"]}
    assert {name: part["rows"] for name, part in parts.items()} == {
        "long": 2, "short": 1, "base": 1,
    }  # fmt: skip
    for name, part in parts.items():
        wanted = None if name == "base" else name
        own = [row for row in ROWS if row.get("adapter") == wanted]
        plain = [{key: row[key] for key in ("prompt", "completion")} for row in own]
        folder = {"short": runs[0], "long": runs[1]}.get(name)
        on = () if folder is None else ("--adapter", str(folder))
        file = write_rows(tmp_path, plain, f"{name}.jsonl")
        code, out, err = run("evaluate", *on, "--data", file, *given, capsys=capsys)
        assert code == 0, err
        alone = json.loads(out)
        assert part["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert part["exact_match"] == alone["exact_match"]
        assert part["chrf"] == alone["chrf"] > 0
        assert part["chrf_signature"] == alone["chrf_signature"]
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["adapter"] for row in written] == [row.get("adapter") for row in ROWS]
    assert [row["references"] for row in written] == [[row["completion"].strip()] for row in ROWS]
    assert len({part["chrf"] for part in parts.values()} | {found["total"]["chrf"]}) > 1
    tokens = [part["supervised_tokens"] for part in parts.values()]
    losses = [part["loss"] * part["supervised_tokens"] for part in parts.values()]
    assert found["total"]["loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-6)
    # A file whose rows name adapters is still such a file if only its first rows are measured.
    late = write_rows(tmp_path, [ROWS[2], ROWS[0]], "late.jsonl")
    few = ("evaluate", *several, "--data", late, "--max-rows", "1", "--json")
    code, out, err = run(*few, capsys=capsys)
    assert code == 0, err
    assert json.loads(out)["adapters"] == {}
    assert json.loads(out)["base"]["rows"] == 1


def test_what_rows_name_is_shown_to_people(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"--adapter={name}={runs[0]}" for name in ("short", "long", "idle")]
    file = write_rows(tmp_path, [{**row, "expert": row.get("adapter")} for row in ROWS])
    code, out, err = run(
        "evaluate", *named, "--data", file, "--adapter-field", "expert", capsys=capsys
    )
    assert code == 0, err
    assert "no row asks for it" in out
    assert "the base alone" in out


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("other", "\"adapter\": no adapter is named 'other'; expected one of short, long, or none"),
        ("two words", '"adapter": names no adapter; expected one of short, long'),
        (3, '"adapter" is a number; expected a string'),
    ],
)
def test_an_unknown_name_in_a_row_is_one_line_with_its_place(
    runs: list[Path],
    tmp_path: Path,
    command: str,
    value: Any,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_rows(tmp_path, [ROWS[0], {**ROWS[1], "adapter": value}])
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    flag = "--data" if command == "evaluate" else "--prompts"
    code, _, err = run(command, *several, flag, file, capsys=capsys)
    assert code == 2
    assert err.count("error: ") == 1
    assert f"{file}:2: {says}" in err
    assert "two words" not in err


def test_a_file_of_prompts_is_answered_by_what_each_asks_for(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    given = ("--max-new-tokens", "6", "--json")

    def ask(*arguments: str) -> Any:
        code, out, err = run("generate", *arguments, *given, capsys=capsys)
        assert code == 0, err
        return json.loads(out)

    file = write_rows(tmp_path, ROWS)
    found = ask(*several, "--prompts", file)["answers"]
    assert [each["adapter"] for each in found] == ["long", "short", None, "long"]
    assert [each["place"] for each in found] == [f"{file}:{line}" for line in (1, 2, 3, 4)]
    for row, answer in zip(ROWS, found, strict=True):
        folder = {"short": runs[0], "long": runs[1]}.get(row.get("adapter", ""))
        on = () if folder is None else ("--adapter", str(folder))
        # The base has its adapter's tokenizer and template either way: those of the demo.
        assert answer["text"] == ask(*on, "--prompt", row["prompt"])["text"]
    plain = write_rows(tmp_path, [{"prompt": row["prompt"]} for row in ROWS[:2]], "plain.jsonl")
    crossed = ask(*several, "--prompts", plain)["answers"]
    assert [each["adapter"] for each in crossed] == ["short", "long", "short", "long"]
    alone = ask("--adapter", str(runs[1]), "--prompts", plain)["answers"]
    assert [each["text"] for each in alone] == [each["text"] for each in crossed[1::2]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, ':1: keys text; expected "prompt"'),
        ({"prompt": ""}, ':1: "prompt" is empty'),
        ({"prompt": 3}, ':1: "prompt" is a number'),
        ({"prompt": [{"role": "user", "content": "x"}]}, ":1: turns, and no chat template is used"),
    ],
)
def test_a_record_that_is_no_prompt_is_refused(
    tmp_path: Path, row: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("generate", "--prompts", write_rows(tmp_path, [row]), capsys=capsys)
    assert code == 2
    assert says in err


def test_prompt_and_prompts_are_one_or_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path, ROWS)
    code, _, err = run("generate", "--prompt", "x", "--prompts", file, capsys=capsys)
    assert code == 2
    assert "--prompt: both are given" in err
    code, _, err = run("generate", "--prompts", str(tmp_path / "none.jsonl"), capsys=capsys)
    assert code == 2
    assert "none.jsonl" in err


def test_adapters_of_different_bases_are_told_by_name(
    base: Any,
    folders: dict[str, Path],
    tmp_path: Path,
    save_tiny: Callable[..., Path],
) -> None:
    other = load_folder(save_tiny("llama-2-7b"), 4)
    adapter = qk.attach(other, SPECS["a"])
    fill_lora(adapter)
    qk.save_adapter(adapter, tmp_path, qk.BaseRecord.of(other))
    with pytest.raises(
        AdapterError, match=r"adapter d: trained on .*, and a on .*one base"
    ) as told:
        qk.load_adapters(base, {"a": folders["a"], "d": tmp_path})
    assert len(told.value.faults) == 1
    qk.load_adapters(base, {"a": folders["a"]}).detach()


def test_an_adapter_that_was_trained_on_other_bits_is_said_by_name(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    several = [f"--adapter=short={runs[0]}", f"--adapter=long={runs[1]}"]
    code, _, err = run(
        "evaluate", *several, "--bits", "8", "--max-rows", "2", "--json", capsys=capsys
    )
    assert code == 0, err
    for name in ("short", "long"):
        assert f"adapter {name}: trained on 4 bits and used on 8: expect other numbers" in err


def test_an_adapter_of_another_template_is_said_by_name(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    other = shutil.copytree(runs[1], tmp_path / "other")
    record = json.loads((other / "qlora_kit.json").read_text())
    (other / "qlora_kit.json").write_text(json.dumps({**record, "template_hash": "0" * 64}))
    several = [f"--adapter=short={runs[0]}", f"--adapter=other={other}"]
    code, _, err = run("evaluate", *several, "--max-rows", "2", "--json", capsys=capsys)
    assert code == 0, err
    assert "adapter other: trained with another chat template than short" in err
