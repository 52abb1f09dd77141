"""llama.cpp, and where it can transformers' reader, compute of a GGUF file what was merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from gguf_models import FAMILIES, exported, save_family, save_trained
from merging import spec_of
from node_llama_cpp import ask_llama_cpp, furthest, gguf_in, job, logprobs
from tiny_models import save_model
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.gguf import families
from qlora_kit.export.gguf.families import Architecture
from qlora_kit.export.gguf.model_file import GgufFile, Origin
from qlora_kit.export.gguf.pre_tokenizers import _BY_RULES
from qlora_kit.export.gguf.vocabulary import Vocabulary

# What transformers' own reader has no word for, so it takes its defaults or fails.
NOT_READ_BY_TRANSFORMERS = {
    "llama-biases": "biases",
    "llama3": "factors of positions",
    "qwen2-yarn": "scaled positions",
    "gemma2-caps": "softcaps",
    "phi4-mini": "factors of positions",
}
# llama.cpp looks GELU up in a table of fp16 values.
BOUNDS = {"gemma2": 5e-3, "gemma2-caps": 5e-3, "gemma3": 5e-3}
TEXT = 'Once upon a time, there was a 3rd, BIG dog!\n\nHe said:  "I\'ve  Ünïcode 🚀 1234"'


@torch.no_grad()
def expected_logprobs(folder: Path, ids: list[int], **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    found: Tensor = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


def base_in_gguf(base: Path, folder: Path) -> Path:
    """Write a base as it is, without an adapter."""
    skeleton = spec_of(base, 16).skeleton()
    architecture = Architecture.of(base.name, skeleton)
    vocabulary = Vocabulary.of(AutoTokenizer.from_pretrained(base), base.name, 512, [2])
    file = GgufFile("base.gguf", architecture, vocabulary, "f32", Origin(str(base), "none"))
    parameters = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    file.write(folder, [(name, parameters[name]) for name in architecture.parameters])
    return folder / "base.gguf"


def some_ids(count: int, size: int = 420) -> list[int]:
    drawn = torch.randint(3, size, (count - 1,), generator=torch.Generator().manual_seed(0))
    return [1, *drawn.tolist()]


@pytest.fixture(scope="module")
def of_stories(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of an adapter on a pretrained model, in a folder: the adapter, fp32, GGUF."""
    folder = tmp_path_factory.mktemp("stories")
    adapter = save_trained(stories, folder / "adapter", bits=4)
    exported(adapter, folder / "merged", "merged", dtype="float32")
    for kind in ("f32", "q8_0"):
        exported(adapter, folder / kind, "gguf", gguf_type=kind, verify_tokens=256)
    return folder


def _splitting(name: str) -> Any:
    """Return a tokenizer with known splitting rules, whose tokens are its own."""
    tokenizer = make_tokenizer()
    if name == "gpt-2":
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        rules = next(rule for rule, known in _BY_RULES.items() if known == name)
        words = pre_tokenizers.Split(Regex(rules), "isolated")
        steps = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        content["model"]["ignore_merges"] = name == "llama-bpe"
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_rules_are_recognised_whatever_the_tokens(tmp_path: Path) -> None:
    jobs, expected = [], []
    skeleton = spec_of(save_model(tmp_path / "base", FAMILIES["llama"]), 16).skeleton()
    architecture = Architecture.of("mine", skeleton)
    parameters = skeleton.state_dict()
    for name in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        tokenizer = _splitting(name)
        vocabulary = Vocabulary.of(tokenizer, "mine", 512, [1])
        assert vocabulary.pre == name
        file = GgufFile(f"{name}.gguf", architecture, vocabulary, "f16", Origin("mine", "none"))
        zeros = ((each, torch.zeros(parameters[each].shape)) for each in architecture.parameters)
        file.write(tmp_path, zeros)
        jobs.append(job(tmp_path / file.file, text=TEXT))
        expected.append(tokenizer.encode(TEXT, add_special_tokens=False))
    assert [each["tokens"] for each in ask_llama_cpp(tmp_path, *jobs)] == expected
    assert len({tuple(each) for each in expected}) > 1, "the rules differ on this text"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(stories: Path, tmp_path: Path, name: str) -> None:
    base = save_family(tmp_path / "base", name, stories)
    adapter = save_trained(base, tmp_path / "adapter")
    merged = exported(adapter, tmp_path / "merged", "merged", dtype="float32")
    target = exported(adapter, tmp_path / "gguf", "gguf", gguf_type="f32")
    ids = some_ids(30)
    expected = expected_logprobs(merged, ids)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    (found,) = ask_llama_cpp(tmp_path, job(target, text=TEXT, ids=ids, logprobs=True))
    assert found["tokens"] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert furthest(found, expected) <= BOUNDS.get(name, 1e-4)
    if name not in NOT_READ_BY_TRANSFORMERS:
        read = expected_logprobs(target, ids, gguf_file=gguf_in(target).name)
        assert torch.equal(read, expected)


def test_greedy_text_of_a_pretrained_model_is_transformers_own(
    of_stories: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(of_stories / "adapter")
    ids = tokenizer.encode("Once upon a time, there was")
    model = AutoModelForCausalLM.from_pretrained(of_stories / "merged", dtype=torch.float32)
    text = model.generate(
        torch.tensor([ids]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    (found,) = ask_llama_cpp(
        tmp_path, job(of_stories / "f32", ids=ids, generate=100, logprobs=True)
    )
    assert found["generated"] == text
    assert furthest(found, expected_logprobs(of_stories / "merged", ids)) <= 1e-4


@pytest.mark.slow
def test_a_model_that_follows_instructions_answers_alike(smollm2: Path, tmp_path: Path) -> None:
    adapter = save_trained(smollm2, tmp_path / "adapter", std=0.002)
    merged = exported(adapter, tmp_path / "merged", "merged", dtype="float32")
    target = exported(adapter, tmp_path / "gguf", "gguf", gguf_type="f32")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    asked = [{"role": "user", "content": "What is the capital of France? Then tell me of it."}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    answer = model.generate(
        torch.tensor([ids]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    (found,) = ask_llama_cpp(
        tmp_path,
        job(target, text=text, special=True, ids=ids, generate=100, logprobs=True),
    )
    assert found["tokens"] == ids
    assert found["generated"] == answer
    # Relative to the largest: what is less likely has fewer digits.
    expected = expected_logprobs(merged, ids)
    assert furthest(found, expected) <= 1e-4 * float(expected.abs().max())


def test_without_the_permutation_it_is_another_model(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "_swapped", lambda tensor, heads, groups: tensor)
    adapter = save_trained(stories, tmp_path / "adapter")
    merged = exported(adapter, tmp_path / "merged", "merged", dtype="float32")
    target = exported(adapter, tmp_path / "gguf", "gguf", gguf_type="f32")
    ids = some_ids(30)
    (found,) = ask_llama_cpp(tmp_path, job(target, ids=ids, logprobs=True))
    assert furthest(found, expected_logprobs(merged, ids)) > 0.5


def test_8_bits_are_as_far_as_the_report_says(of_stories: Path, tmp_path: Path) -> None:
    report = json.loads((of_stories / "q8_0" / "merge_report.json").read_text())
    (form,) = report["forms"]
    assert form["form"] == report["dtype"] == "gguf q8_0"
    assert 0 < form["largest_error"] <= 1
    assert form["tensors"] == 47
    (written,) = (each for each in report["variants"] if each["variant"] == "written")
    ids = some_ids(200)
    (found,) = ask_llama_cpp(tmp_path, job(of_stories / "q8_0", ids=ids, logprobs=True))
    expected = expected_logprobs(of_stories / "merged", ids)
    terms = expected.exp() * (expected - logprobs(found, 512))
    divergence = float(terms[expected > -14].sum()) / len(ids)
    # llama.cpp multiplies by vectors of 8 bits too, which adds about as much again.
    assert 0 < divergence <= 4 * written["mean_kl"]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bits_are_rounded_once(of_stories: Path, tmp_path: Path, kind: str) -> None:
    target = exported(of_stories / "adapter", tmp_path / "gguf", "gguf", gguf_type=kind)
    (form,) = json.loads((target / "merge_report.json").read_text())["forms"]
    # Half a unit of the last place is half of what is allowed.
    assert form["largest_error"] <= 0.501
    assert form["relative_error"] < (3e-4 if kind == "f16" else 3e-3)


@pytest.mark.parametrize("name", ["stories", "qwen2", "gemma3", "phi4-mini"])
def test_an_adapter_on_the_base_is_the_merged_model(
    stories: Path, tmp_path: Path, name: str
) -> None:
    base = stories if name == "stories" else save_family(tmp_path / "base", name, stories)
    pattern: dict[str, Any] = {"rank_pattern": {"layers.1.mlp.down_proj": 8}}
    adapter = save_trained(base, tmp_path / "adapter", **pattern)
    lora = exported(adapter, tmp_path / "lora", "gguf-adapter")
    merged = exported(adapter, tmp_path / "merged", "gguf", gguf_type="f32")
    plain = base_in_gguf(base, tmp_path)
    ids = some_ids(30)
    wanted = {"ids": ids, "logprobs": True}
    together, whole, alone = ask_llama_cpp(
        tmp_path,
        job(plain, lora=str(gguf_in(lora)), **wanted),
        job(merged, **wanted),
        job(plain, **wanted),
    )
    rows = logprobs(whole, 512)
    assert furthest(together, rows) <= BOUNDS.get(name, 1e-4)
    assert furthest(alone, rows) > 0.05, "without the adapter it is another model"


def test_a_head_that_is_no_longer_the_embedding_is_written(stories: Path, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "llama3", stories)
    adapter = save_trained(base, tmp_path / "adapter", targets=("q_proj", "lm_head"))
    merged = exported(adapter, tmp_path / "merged", "merged", dtype="float32")
    target = exported(adapter, tmp_path / "gguf", "gguf", gguf_type="f32")
    ids = some_ids(30)
    (found,) = ask_llama_cpp(tmp_path, job(target, ids=ids, logprobs=True))
    assert furthest(found, expected_logprobs(merged, ids)) <= 1e-4
    with pytest.raises(AdapterError, match="LoRA on lm_head, which shares"):
        exported(adapter, tmp_path / "lora", "gguf-adapter")


def test_gemma_2_has_no_other_head(stories: Path, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "gemma2", stories)
    adapter = save_trained(base, tmp_path / "adapter", targets=("q_proj", "lm_head"))
    with pytest.raises(ModelError, match="its head differs from its embedding"):
        exported(adapter, tmp_path / "gguf", "gguf")


def test_what_llama_cpp_generates_ends_where_the_model_ends(of_stories: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(gguf_in(of_stories / "f32")).fields
    tokenizer = AutoTokenizer.from_pretrained(of_stories / "adapter")
    said = {key: field.contents() for key, field in fields.items()}
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert said["general.type"] == "model"
    assert said["general.base_model.0.name"] == "stories260K"
    assert said["general.file_type"] == 0


def test_both_readers_open_the_whole_vocabulary(of_stories: Path) -> None:
    target = gguf_in(of_stories / "f32")
    read = AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name)
    own = AutoTokenizer.from_pretrained(of_stories / "adapter")
    assert read.encode(TEXT) == own.encode(TEXT)
    assert qk.read_adapter(of_stories / "adapter").tensors
