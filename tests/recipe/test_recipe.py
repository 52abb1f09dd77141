"""The commands end to end on the built-in demo, as a user runs them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import RUN_FILES, run, run_well

from qlora_kit.data.samples import BUILT_IN
from qlora_kit.model.names import find_model
from qlora_kit.storage import staged_folder, write_text

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

SHORT = ("--max-steps", "4", "--save-steps", "2", "--eval-steps", "2", "--device", "cpu")
# Options of runs that need no rehearsal, and whose output no test looks at.
PLAIN = ("--no-rehearse", "--samples", "0")


@pytest.fixture(scope="module")
def short_run(few_rows: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on the demo, for tests that only read it."""
    output = tmp_path_factory.mktemp("runs") / "short"
    run_well("train", "--model", "demo", "--bits", "4", "--output", str(output), *SHORT)
    return output


@pytest.fixture
def own_run(short_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, for a test that changes it."""
    return shutil.copytree(short_run, tmp_path / "own" / "short")


@contextlib.contextmanager
def recorded_prompts() -> Iterator[list[list[int]]]:
    """Record the token ids that generation is given."""
    import qlora_kit.infer.generate as module

    seen: list[list[int]] = []
    original = module.generate

    def generate(
        base: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any, **more: Any
    ) -> Any:
        seen.extend(prompts)
        return original(base, tokenizer, prompts, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", generate)
        yield seen


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_the_files_others_expect(short_run: Path) -> None:
    assert {path.name for path in short_run.iterdir()} == RUN_FILES
    assert (short_run / "last").read_text() == "checkpoint-4\n"
    record = json.loads((short_run / "qlora_kit.json").read_text())
    assert (record["base"], record["bits"], record["quant_type"]) == ("demo", 4, "nf4")
    assert record["versions"]["bitsandbytes"]
    config = yaml.safe_load((short_run / "training_config.yaml").read_text())
    assert config["max_steps"] == 4
    card = (short_run / "README.md").read_text()
    assert card.startswith("---\n")
    assert "peft" in card
    assert "supervised tokens" in card


def test_the_log_has_a_row_a_step_and_a_row_an_evaluation(short_run: Path) -> None:
    rows = rows_of(short_run / "trainer_log.jsonl")
    assert [row["optimizer_step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["optimizer_step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert all(row["step_seconds"] > 0 and row["memory_bytes"] > 0 for row in rows if "loss" in row)


def test_the_header_says_what_is_trained_on_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, out, _ = run("train", "--output", str(output), "--max-steps", "1", capsys=capsys)
    assert code == 0
    for words in ("built-in sample data", "4-bit nf4", "parameters (", "CPU", "float32",
                  "supervised tokens", "loss ", "written:", "next:"):  # fmt: skip
        assert words in " ".join(out.split()), words
    assert f"qlora-kit export {output} --to" in out


def test_a_finished_run_says_so_a_longer_one_goes_on_and_another_takes_its_place(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("train", "--output", str(own_run), *SHORT, "--resume")
    code, out, _ = run(*again, capsys=capsys)
    assert code == 0
    assert "finished" in out
    code, out, _ = run(*again, "--max-steps", "6", capsys=capsys)
    assert code == 0
    rows = rows_of(own_run / "trainer_log.jsonl")
    assert [row["optimizer_step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    anew = ("--max-steps", "1", "--overwrite", *PLAIN)
    code, _, _ = run("train", "--output", str(own_run), *anew, capsys=capsys)
    assert code == 0
    rows = rows_of(own_run / "trainer_log.jsonl")
    assert [row["optimizer_step"] for row in rows if "loss" in row] == [1]


def test_a_refused_resume_changes_nothing(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in own_run.rglob("*") if p.is_file()}
    code, _, err = run(
        "train", "--output", str(own_run), *SHORT, "--resume", "--rank", "3", "--alpha", "5",
        capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert err.count("\n") == 2
    assert "rank was 16 and is now 3" in err
    assert {p: p.read_bytes() for p in own_run.rglob("*") if p.is_file()} == before


def test_a_full_folder_is_not_touched(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("train", "--output", str(own_run), capsys=capsys)
    assert code == 2
    assert "not empty; continue that run with --resume, replace it with --overwrite" in err


def test_overwrite_does_not_delete_what_is_not_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, _ = run("train", "--output", str(tmp_path), "--overwrite", capsys=capsys)
    assert code == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resume_and_overwrite_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = run("train", "--output", str(tmp_path), "--overwrite", "--resume", capsys=capsys)
    assert code == 2
    assert "contradict each other" in err
    assert (tmp_path / "thesis.tex").is_file()


def test_a_run_killed_before_its_adapter_was_written_is_finished_by_resume(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_run / "adapter_model.safetensors").unlink()
    code, out, _ = run("train", "--output", str(own_run), *SHORT, "--resume", capsys=capsys)
    assert code == 0
    assert "resuming from" in out
    assert (own_run / "adapter_model.safetensors").is_file()


def test_a_log_cut_short_by_a_kill_is_continued(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = own_run / "trainer_log.jsonl"
    log.write_text(log.read_text() + '{"optimizer_step": 5, "lo')
    (own_run / "adapter_model.safetensors").unlink()
    code, _, _ = run("train", "--output", str(own_run), *SHORT, "--resume", capsys=capsys)
    assert code == 0
    assert [row["optimizer_step"] for row in rows_of(log) if "loss" in row] == [1, 2, 3, 4]


def test_runs_are_numbered_where_no_output_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        code, _, _ = run("train", "--max-steps", "1", *PLAIN, capsys=capsys)
        assert code == 0
        assert (tmp_path / "runs" / f"demo-{number}" / "adapter_model.safetensors").is_file()


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = ("train", "--output", str(output), "--resume", "--max-steps", "1", *PLAIN)
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert "no checkpoint yet; starting from the beginning" in out


def test_evaluate_measures_a_run(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("evaluate", "--adapter", str(short_run), "--max-rows", "20", "--json")
    code, out, _ = run(*arguments, "--exact-match", capsys=capsys)
    result = json.loads(out)
    assert code == 0
    assert result["rows"] == 20
    assert 0 <= result["exact_match"] <= 1
    assert 0 < result["loss"] < 10
    _, text, _ = run("evaluate", "--adapter", str(short_run), "--max-rows", "5", capsys=capsys)
    assert "4-bit nf4" in text


def test_evaluate_takes_base_and_bits_from_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without the adapter's record, the model would be the demo, in 4 bits; and the demo would be
    # refused, because it has other weights.
    base, output = tmp_path / "base", tmp_path / "run"
    save_changed_demo(base)
    trained = ("train", "--model", str(base), "--bits", "8", "--output", str(output),
               "--max-steps", "1", *PLAIN, "--device", "cpu")  # fmt: skip
    assert run(*trained, capsys=capsys)[0] == 0

    def loss(*asked: str) -> float:
        arguments = ("evaluate", "--adapter", str(output), "--max-rows", "20", "--json")
        code, out, err = run(*arguments, *asked, capsys=capsys)
        assert code == 0, err
        return float(json.loads(out)["loss"])

    found = loss()
    assert found == loss("--model", str(base), "--bits", "8")
    assert found != loss("--model", str(base), "--bits", "4")
    _, text, _ = run("evaluate", "--adapter", str(output), "--max-rows", "5", capsys=capsys)
    assert "8-bit" in text


def save_changed_demo(folder: Path) -> None:
    """Save the demo with another last norm: the same names and shapes, another model."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(find_model("demo").folder or "", folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 0.5
    save_file(weights, file, {"format": "pt"})


def test_generate_answers(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*sampling: str) -> str:
        code, out, _ = run(
            "generate", "--adapter", str(short_run), "--prompt", "Spoken: two dollars\nWritten:",
            *sampling, "--max-new-tokens", "8", "--json", capsys=capsys,
        )  # fmt: skip
        assert code == 0
        return str(json.loads(out)["text"])

    greedy, warm = answer(), answer("--temperature", "2", "--seed", "1")
    assert greedy.strip()
    assert answer() == greedy
    assert answer("--seed", "1") == greedy, "without a temperature nothing is drawn"
    assert warm != greedy
    assert answer("--temperature", "2", "--seed", "1") == warm
    assert answer("--temperature", "2", "--seed", "2") not in (warm, greedy)
    # A share this small keeps only the likeliest token.
    assert answer("--temperature", "2", "--seed", "1", "--top-p", "0.001") == greedy


def test_export_writes_a_model_that_evaluates_like_the_adapter(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    code, out, _ = run("export", str(short_run), "--to", str(target), capsys=capsys)
    assert code == 0
    assert "merged into" in out
    said = out
    losses = []
    merged, base = ("--model", str(target), "--bits", "16"), ("--model", "demo")
    for of in (("--adapter", str(short_run)), merged, base):
        _, out, _ = run("evaluate", *of, "--max-rows", "50", "--json", capsys=capsys)
        losses.append(json.loads(out)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] > 1.01 * losses[0], "the base without the adapter evaluates as the merge"
    assert "generate --raw" in said, "the data were texts, and the demo has a template"
    answers = []
    for of in (("--adapter", str(short_run)), (*merged, "--raw")):
        _, out, _ = run(
            "generate", *of, "--prompt", "nine dollars", "--max-new-tokens", "8", "--json",
            capsys=capsys,
        )  # fmt: skip
        answers.append(json.loads(out)["text"])
    assert answers[0] == answers[1]
    code, _, err = run("export", str(short_run), "--to", str(target), capsys=capsys)
    assert code == 2
    assert "exists; pass --overwrite" in err


def test_an_export_into_a_run_is_refused(
    own_run: Path, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (own_run / "merged", own_run / "deep" / "merged"):
        code, _, err = run("export", str(own_run), "--to", str(target), capsys=capsys)
        assert code == 2
        assert err == (
            f"error: {target}: is inside the run {own_run}, which --overwrite deletes with all "
            "that is in it; expected a folder outside of it; name another --to\n"
        )
    code, _, err = run("quantize", "--model", "demo", "--to", str(own_run / "small"), capsys=capsys)
    assert (code, "name another --to" in err) == (2, True)
    code, _, err = run("train", "--output", str(own_run / "again"), *SHORT, capsys=capsys)
    assert (code, "name another --output" in err) == (2, True)
    code, _, err = run("export", str(own_run), "--to", str(tmp_path), "--overwrite", capsys=capsys)
    assert (code, "which is read for it; name another --to" in err) == (2, True)
    assert {path.name for path in own_run.iterdir()} == {path.name for path in short_run.iterdir()}


@pytest.mark.parametrize("where", ["merged", "deep/merged"])
@pytest.mark.parametrize("what", ["model", "run"])
def test_overwrite_deletes_no_model_and_no_other_run_with_a_run(
    own_run: Path, short_run: Path, capsys: pytest.CaptureFixture[str], where: str, what: str
) -> None:
    if what == "run":
        shutil.copytree(short_run, own_run / where)
    else:
        with staged_folder(own_run / where) as staging:
            write_text(staging / "model.txt", "weights")
    code, _, err = run("train", "--output", str(own_run), *SHORT, "--overwrite", capsys=capsys)
    assert code == 2
    assert err == (
        f"error: {own_run}: --overwrite deletes a run, but this holds {own_run / where}, which is "
        "none of its checkpoints; move that elsewhere, or name another --output\n"
    )
    assert any((own_run / where).iterdir())


def test_a_configuration_of_the_user_s_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("training_config.yaml").write_text("max_steps: 1\n")
    code, _, err = run("train", "--config", "training_config.yaml", *PLAIN, capsys=capsys)
    assert code == 0, err
    assert Path("runs/demo-1/adapter_model.safetensors").is_file()


def test_an_adapter_of_python_is_prompted_as_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import qlora_kit as qk

    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "one dollar"}, {"role": "assistant", "content": "$1.00"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    opened = qk.open_base()
    options = qk.TokenOptions(chat_template="vicuna", max_length=128)
    rows = qk.load_data(str(data), opened.tokenizer, options)
    adapter = qk.attach(opened.base, qk.LoraSpec(rank=2))
    prompted: list[str] = []
    for said in ({"template_hash": rows.template_hash}, {}, {"template_hash": None}):
        folder = tmp_path / f"adapter-{len(prompted)}"
        folder.mkdir()
        qk.save_adapter(adapter, folder, qk.BaseRecord.of(opened.base, **said))
        opened.tokenizer.save_pretrained(folder)
        with recorded_prompts() as prompts:
            code, _, err = run("generate", "--adapter", str(folder), "--prompt", "two dollars",
                               "--max-new-tokens", "1", capsys=capsys)  # fmt: skip
        assert (code, err) == (0, "")
        prompted.append(opened.tokenizer.decode(prompts[0]))
    assert prompted == ["<s>USER: two dollars ASSISTANT:"] * 2 + ["<s>two dollars"]


def test_random_weights_of_a_named_model_need_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.model import names

    known = dict(names.known_models())
    small = {**known["smollm2-135m"].architecture, "num_hidden_layers": 1, "hidden_size": 72,
             "num_attention_heads": 3, "num_key_value_heads": 3}  # fmt: skip
    known["smollm2-135m"] = names.ModelSource("smollm2-135m", "a/b", architecture=small)
    monkeypatch.setattr("qlora_kit.model.names.known_models", lambda: known)
    code, out, _ = run(
        "train", "--model", "smollm2-135m", "--weights", "random", "--max-steps", "1", "--output",
        str(tmp_path / "run"), "--data", str(BUILT_IN["test"]), capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert "the demo's tokenizer stands in" in out


def test_bits_that_a_quantised_checkpoint_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qlora_kit.model.names import find_model

    demo = find_model("demo").folder
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        demo, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(demo).save_pretrained(tmp_path / "quantised")
    common = ("train", "--model", str(tmp_path / "quantised"), "--max-steps", "1", "--output",
              str(tmp_path / "run"))  # fmt: skip
    code, _, err = run(*common, "--bits", "4", capsys=capsys)
    assert code == 2
    assert "quantized to 8 bits already" in err.replace("quantised", "quantized")
    code, out, _ = run(*common, capsys=capsys)
    assert code == 0
    assert "8-bit" in out


def test_rows_longer_than_the_models_positions_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "one " * 600, "completion": "two"}) + "\n")
    for command in (("train", "--output", str(tmp_path / "run")), ("evaluate",)):
        arguments = (*command, "--data", str(data), "--max-length", "4096")
        code, _, err = run(*arguments, capsys=capsys)
        assert code == 2
        assert "the model only 512 positions; pass --max-length 512 or less" in err
    assert not (tmp_path / "run").exists()


def test_the_recorded_commit_holds_for_the_recorded_base_only(tmp_path: Path) -> None:
    from qlora_kit.opening.adapters import stored_options

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    record = {"base": "owner/base", "bits": 8, "quant_type": "nf4", "double_quant": True}
    record |= {"weights": "pretrained", "revision": "abc123", "digest": "0" * 32}
    record |= {"compute_dtype": "float32", "dequantization_dtype": "float32"}
    (tmp_path / "qlora_kit.json").write_text(json.dumps(record))
    assert stored_options(tmp_path)["revision"] == "abc123"
    assert stored_options(tmp_path, "owner/base")["revision"] == "abc123"
    other = stored_options(tmp_path, "owner/other")
    assert (other["model"], other["bits"], other["revision"]) == ("owner/other", 8, None)
