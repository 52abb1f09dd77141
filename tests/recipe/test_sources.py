"""Sequence to sequence end to end, as a user runs it: check, train, resume, evaluate, export."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import as_if_killed_at, run
from t5_models import save_t5, t5_tokenizer

LETTERS = "abcdefghijklmnopqrst"
STEPS = (
    "--task", "seq2seq", "--batch-size", "4", "--gradient-accumulation-steps", "1",
    "--learning-rate", "0.003", "--max-length", "32", "--targets", "all-linear",
)  # fmt: skip


def model_in(folder: Path, kind: str) -> Path:
    tokenizer = t5_tokenizer(" ".join(LETTERS))
    # As T5's own: more embeddings than tokens.
    save_t5(folder, kind, vocab_size=len(tokenizer) + 4)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 v1.1 with a tokenizer."""
    return model_in(tmp_path_factory.mktemp("t5"), "t5-v1.1")


def pairs_in(folder: Path, name: str, pairs: Sequence[Sequence[str]]) -> str:
    """Write two line-aligned files, of texts and of the same words in reverse."""
    asked, answered = folder / f"{name}.en", folder / f"{name}.de"
    asked.write_text("".join(f"{' '.join(pair)}\n" for pair in pairs))
    answered.write_text("".join(f"{' '.join(reversed(pair))}\n" for pair in pairs))
    return f"{asked}+{answered}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    some = random.Random(1).sample(list(itertools.product(LETTERS, repeat=3)), 40)
    return pairs_in(tmp_path_factory.mktemp("data"), "train", [words[: 2 + len(words[0]) % 2]
                    if words[0] < "k" else words for words in some])  # fmt: skip


def trained(
    model: Path, data: str, output: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> Path:
    code, _, err = run(
        "train", "--model", str(model), "--data", data, "--validation", data,
        "--output", str(output), *STEPS, *more, capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    return output


def test_from_two_files_to_a_merged_model(
    model: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "12", "--eval-steps", "6")
    assert json.loads((own / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    memory = json.loads((own / "memory.json").read_text())["rehearsal"]
    assert abs(memory["difference"]) < 0.02
    card = (own / "README.md").read_text(encoding="utf-8")
    assert "AutoPeftModelForSeq2SeqLM" in card
    samples = json.loads((own / "samples.json").read_text())["samples"]
    assert all(sample["after"] is not None for sample in samples)
    first = samples[0]
    assert " ".join(reversed(first["expected"].split())) + "</s>" == first["prompt"]
    assert "after" in (own / "report.html").read_text(encoding="utf-8")
    assert not (own / "chat_template.jinja").exists()

    predictions = tmp_path / "predictions.jsonl"
    code, out, err = run(
        "evaluate", "--adapter", str(own), "--data", data, "--json", "--max-new-tokens", "8",
        "--metrics", "exact_match,squad,bleu,chrf", "--predictions", str(predictions),
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert {"exact_match", "squad_f1", "bleu", "chrf", "token_accuracy"} <= found.keys()
    assert found["rows"] == 40
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(written) == 40
    assert all("</s>" not in each["answer"] and "<pad>" not in each["answer"] for each in written)
    log = [json.loads(line) for line in (own / "trainer_log.jsonl").read_text().splitlines()]
    last = [row for row in log if "validation_loss" in row or "eval_loss" in row][-1]
    assert found["loss"] in (pytest.approx(value, rel=1e-4) for value in last.values())

    merged = tmp_path / "merged"
    code, out, err = run("export", str(own), "--to", str(merged), "--json", capsys=capsys)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert next(v for v in report["variants"] if v["variant"] == "written")["mean_kl"] < 1e-4
    code, out, err = run(
        "evaluate", "--model", str(merged), "--bits", "16", "--data", data, "--json", capsys=capsys
    )
    assert code == 0, err
    assert json.loads(out)["loss"] == pytest.approx(found["loss"], abs=1e-3)
    answers = []
    for where in (("--adapter", str(own)), ("--model", str(merged), "--bits", "16")):
        code, out, err = run("generate", *where, "--prompt", "a b c", "--json", capsys=capsys)
        assert code == 0, err
        answers.append(json.loads(out)["text"])
    assert answers[0] == answers[1]


def test_a_resumed_run_has_the_bits_of_the_unbroken_one_and_may_be_profiled(
    model: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max-steps", "6", "--lora-dropout", "0.1", "--samples", "0")
    # T5 has dropout of its own as well.
    model = shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.1}))
    whole = trained(model, data, tmp_path / "whole", capsys, *more)
    parts = trained(model, data, tmp_path / "parts", capsys, *more, "--save-steps", "3")
    as_if_killed_at(parts, 3)
    again = ("train", "--output", str(parts), "--resume", "--profile", "1")
    code, _, err = run(*again, capsys=capsys)
    assert code == 0, err
    assert json.loads((parts / "profile" / "summary.json").read_text())["steps"] == [6]
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert any("EncDecAttention" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_quantised_model_is_trained_on(
    model: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        "quantize", "--model", str(model), "--to", str(tmp_path / "packed"), capsys=capsys
    )
    assert code == 0, err
    trained(tmp_path / "packed", data, tmp_path / "run", capsys, "--max-steps", "2")


def test_check_shows_sources_and_targets(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "a b", "input": "c", "output": "c b a"},
        {"instruction": "a b c d e f g h i j k l", "output": "a"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(
        "check", "--task", "seq2seq", "--model", str(model), "--data", str(file),
        "--max-length", "8", "--rows", "2", "--train-on", "all", "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["training"]["rows_truncated"] == 1
    assert found["lengths"]["longest"] == 13, "of the longer of source and target"
    assert found["ends"]["rows"] == 2
    assert "--train-on has no effect: a source is read as it is" in err


SHAPES = {
    "pair": '{"prompt": "a b", "completion": "b a"}',
    "alpaca": '{"instruction": "a b", "input": "", "output": "b a"}',
    "chat": '{"messages": [{"role": "user", "content": "a b"}, '
    '{"role": "assistant", "content": "b a"}]}',
    "with a system": '{"system": "c", "question": "a b", "answer": "b a"}',
    "squad": '{"context": "a", "question": "b", "answers": {"text": ["b a", "a"], "answer_start": '
    "[0, 1]}}",
    "gsm8k": '{"question": "a b", "answer": "b a #### 3"}',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_of_a_question_and_its_answer(
    model: Path, tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from qlora_kit.config import RecordOptions, TokenOptions
    from qlora_kit.data.samples import load_samples
    from qlora_kit.data.source_rows import SourceRows, source_tokens
    from qlora_kit.data.tokens import tokenize

    file = tmp_path / "rows.jsonl"
    file.write_text(SHAPES[shape])
    columns = {"answer": "answers.text"} if shape == "squad" else {}
    samples = load_samples(file, options=RecordOptions(columns=columns), task="seq2seq")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tokenize(samples, tokenizer, TokenOptions(), makes=SourceRows, cache=False).rows
    (row,) = rows
    cut = source_tokens(row["labels"])
    source, target = row["input_ids"][:cut], row["input_ids"][cut:]
    wanted = {"with a system": "c a b", "squad": "b"}.get(shape, "a b")
    answer = "b a #### 3" if shape == "gsm8k" else "b a"
    assert source == tokenizer(wanted)["input_ids"]
    assert target == tokenizer(answer)["input_ids"]
    assert target[-1] == source[-1] == tokenizer.eos_token_id


CHAT = json.dumps(
    {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]}
)
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
CALL = json.dumps({
    "messages": [{"role": "user", "content": "a"},
                 {"role": "assistant", "content": "", "tool_calls": CALLS}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
})  # fmt: skip


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (CHAT, (), "3 turns before the answer (user, assistant, user); expected one of the user's"),
        (CALL, (), "tools; expected a question and an answer with --task seq2seq"),
        ('{"text": "a b"}', (), "keys text; expected one of"),
        (None, ("--task", "causal"), "--task causal: the model is an encoder-decoder"),
        (None, ("--task", "classify"), "keys prompt, completion; expected one of"),
        (None, ("--dtype", "float16"), "--dtype float16: t5 computes values"),
        (None, ("--long-samples", "split"), "--long-samples split: a target is of a whole source"),
        (None, ("--long-samples", "error", "--max-length", "2"), "3 tokens; expected at most 2"),
        (None, ("--long-samples", "drop", "--max-length", "2"), "have a source or a target longer"),
        (None, ("--vram", "8GB"), "--vram: settings are not chosen for an encoder-decoder"),
        (None, ("--ram", "8GB"), "--ram: settings are not chosen for an encoder-decoder"),
        (None, ("--keep-layers", "1"), "--keep-layers 1: an encoder-decoder has layers of two"),
        (None, ("--targets", "q_proj"), "'q_proj' matches no linear layer"),
        (None, ("--format", "text"), "--format text: no format of --task seq2seq"),
        (None, ("--best-metric", "bleu"), "--best-metric bleu: is not measured here"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    more: tuple[str, ...],
    message: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content or '{"prompt": "a b", "completion": "b a"}')
    code, _, err = run(
        "train", "--model", str(model), "--data", str(file), "--validation", str(file),
        "--output", str(tmp_path / "run"), *STEPS, "--max-steps", "1", *more, capsys=capsys,
    )  # fmt: skip
    assert code == 2, err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_a_language_model_has_no_encoder(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a b", "completion": "b a"}')
    code, _, err = run(
        "train", "--model", str(stories), "--data", str(file), "--output", str(tmp_path / "run"),
        "--task", "seq2seq", capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert "--task seq2seq: the model has no encoder beside its decoder; expected" in err


def test_several_adapters_are_refused(
    model: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trained(model, data, tmp_path / "run", capsys, "--max-steps", "1", "--samples", "0")
    named = ("--adapters", f"one={own},two={own}")
    for command in (
        ("evaluate", *named, "--data", data),
        ("generate", *named, "--prompt", "a"),
    ):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2
        assert "--adapters: 2 adapters, and rows of one batch cannot have different ones" in err


def test_a_prompt_of_several_turns_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    file.write_text(json.dumps({"prompt": turns}))
    code, _, err = run("generate", "--model", str(model), "--prompts", str(file), capsys=capsys)
    assert code == 2
    assert "3 turns before the answer" in err


def test_the_plan_of_a_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--device", "cpu", "--batch-size", "1", "--json")
    code, out, err = run(
        "plan", "--model", "flan-t5-small", "--max-length", "16", *more, capsys=capsys
    )
    assert code == 0, err
    assert json.loads(out)["predicted_peak_bytes"] > 77e6 * 0.5
    code, _, err = run("plan", "--model", "t5-small", "--vram", "8GB", *more, capsys=capsys)
    assert code == 2
    assert "--vram: settings are not chosen for an encoder-decoder" in err


@pytest.mark.slow
def test_a_random_t5_learns_to_reverse_pairs_it_has_not_seen(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = list(itertools.product(LETTERS, repeat=2))
    random.Random(0).shuffle(pairs)
    data, test = (pairs_in(tmp_path, name, part) for name, part in
                  (("train", pairs[:340]), ("test", pairs[340:])))  # fmt: skip
    own = tmp_path / "run"
    measure = ("--data", test, "--metrics", "exact_match", "--max-new-tokens", "6", "--json")
    code, out, _ = run("evaluate", "--model", str(model), "--bits", "16", *measure, capsys=capsys)
    assert code == 0
    assert json.loads(out)["exact_match"] < 0.05
    code, _, err = run(
        "train", "--model", str(model), "--bits", "16", "--data", data, "--output", str(own),
        *STEPS, "--batch-size", "32", "--max-steps", "900", "--rank", "32", "--alpha", "64",
        "--no-recompute", "--save-steps", "900", "--eval-steps", "900", "--no-rehearse",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    code, out, _ = run("evaluate", "--adapter", str(own), *measure, capsys=capsys)
    assert code == 0
    assert json.loads(out)["exact_match"] > 0.9
