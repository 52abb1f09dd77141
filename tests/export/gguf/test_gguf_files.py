"""Damaged GGUF files are refused, and so is what is not known to be right as GGUF."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, make_tokenizer
from gguf_models import FAMILIES, exported, save_family, save_trained
from merging import spec_of
from node_llama_cpp import ask_llama_cpp, gguf_in, job
from tiny_models import OTHERS, save_model
from transformers import AutoTokenizer

from qlora_kit.errors import (
    AdapterError,
    ConfigError,
    InputError,
    ModelError,
    OutputError,
    StorageError,
    VerificationError,
)
from qlora_kit.export.gguf.families import Architecture
from qlora_kit.export.gguf.model_file import GgufFile
from qlora_kit.export.gguf.modelfile import modelfile, turns_of
from qlora_kit.export.gguf.pre_tokenizers import pre_tokenizer_name
from qlora_kit.export.gguf.vocabulary import Vocabulary
from qlora_kit.storage import verify_folder


@pytest.fixture(scope="module")
def adapter(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained(stories, tmp_path_factory.mktemp("adapter") / "mine", bits=4)


# ---------------------------------------------------------------- what is in the folder


def test_the_folder_is_whole(adapter: Path, tmp_path: Path) -> None:
    target = exported(adapter, tmp_path / "out", gguf_type="q8_0")
    verify_folder(target)
    names = {path.name for path in target.iterdir()}
    assert names == {
        "mine-q8_0.gguf", "Modelfile", "README.md", "merge_report.json", "merge_report.png",
        "manifest.json",
    }  # fmt: skip
    text = (target / "Modelfile").read_text()
    assert text.startswith("FROM ./mine-q8_0.gguf\n")
    assert 'PARAMETER stop "</s>"' in text
    assert "PARAMETER num_ctx 512" in text
    assert "gguf q8_0" in (target / "README.md").read_text()


# ---------------------------------------------------------------- damage


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: _flip(path, -2000), "differs from what was merged"),
        (lambda path: _flip(path, 0), "cannot be read back"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "cannot be read back"),
        (lambda path: _flip(path, path.read_bytes().index(b"llama.rope.freq_base") + 25), "freq"),
        (lambda path: _flip(path, path.read_bytes().index(b"blk.0.attn_q") + 4), "missing|read"),
    ],
)
def test_a_damaged_file_is_refused(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    write = GgufFile.write

    def write_and_damage(self: GgufFile, folder: Path, tensors: Any) -> tuple[int, int]:
        written = write(self, folder, tensors)
        damage(folder / self.file)
        return written

    monkeypatch.setattr(GgufFile, "write", write_and_damage)
    with pytest.raises(VerificationError, match=said):
        exported(adapter, tmp_path / "out", gguf_type="f32")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_damaged_adapter_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.export.gguf.adapter_file import AdapterFile

    write = AdapterFile.write

    def write_and_damage(self: AdapterFile, folder: Path) -> int:
        size = write(self, folder)
        _flip(gguf_in(folder), -600)
        return size

    monkeypatch.setattr(AdapterFile, "write", write_and_damage)
    with pytest.raises(VerificationError, match="differs from the adapter"):
        exported(adapter, tmp_path / "out", form="gguf-adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(StorageError, match=r"mine-f32\.gguf"):
            exported(adapter, tmp_path / "out", gguf_type="f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"form": "merged", "gguf_type": "f16"}, ConfigError, "--gguf-type f16"),
        ({"form": "gguf", "dtype": "float32"}, ConfigError, "--dtype float32"),
        ({"form": "gguf", "requantize": True}, ConfigError, "--requantize"),
        ({"form": "gguf-adapter", "gguf_type": "q8_0"}, ConfigError, "q8_0 packs rows of 32"),
        ({"form": "gguf-adapter", "base": "original"}, ConfigError, "--base original"),
        ({"form": "adapter", "verify_threshold": 0.1}, ConfigError, "--verify-threshold"),
    ],
)
def test_options_that_do_not_go_together(
    adapter: Path, tmp_path: Path, options: dict[str, Any], error: type[InputError], said: str
) -> None:
    with pytest.raises(error, match=said):
        exported(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        exported(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("gemma2", {"attn_logit_softcapping": None}, "attention has no softcap"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "every 6th block"),
        ("llama", {"hidden_act": "gelu"}, "computes gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "scaled by dynamic"),
        ("qwen3", {"attention_bias": True}, "is a bias"),
    ],
)  # fmt: skip
def test_features_that_llama_cpp_does_not_compute(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    folder = save_model(tmp_path / "base", {**FAMILIES[name], **changes})
    with pytest.raises(ModelError, match=said):
        Architecture.of(name, spec_of(folder).skeleton())


@pytest.mark.parametrize("name", ["gpt2", "granite", "mixtral"])
def test_other_families_are_refused_with_the_list(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "base", OTHERS[name])
    with pytest.raises(ModelError, match=r"expected a causal language model of Llama, Mistral"):
        Architecture.of(name, spec_of(folder).skeleton())


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**FAMILIES["llama"])
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match="is a LlamaForSequenceClassification"):
        Architecture.of("mine", model)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"variant": {"dora": True}}, "lengths of DoRA"),
        ({"modules_to_save": ("lm_head",)}, "trained lm_head"),
        ({"targets": ("q_proj", "embed_tokens")}, "LoRA on the embedding"),
    ],
)
def test_parts_of_an_adapter_that_llama_cpp_cannot_use(
    stories: Path, tmp_path: Path, spec: dict[str, Any], said: str
) -> None:
    from qlora_kit.lora.spec import Variant

    if "variant" in spec:
        spec = {"variant": Variant(**spec["variant"])}
    adapter = save_trained(stories, tmp_path / "adapter", **spec)
    with pytest.raises(AdapterError, match=said):
        exported(adapter, tmp_path / "out", form="gguf-adapter")


# ---------------------------------------------------------------- tokenizers


def test_a_vocabulary_larger_than_the_model_is_refused(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="has the token 512, and the model 512 rows"):
        Vocabulary.of(tokenizer, "mine", 512, [2])


def test_kinds_of_tokenizers_that_are_not_known_are_refused() -> None:
    with pytest.raises(ModelError, match="of the kind BPE without bytes"):
        Vocabulary.of(make_tokenizer("spaces"), "mine", 512, [2])


def test_pre_tokenizers_are_found(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "deepseek-llm-7b")
    assert pre_tokenizer_name(tokenizer, "mine") == "deepseek-llm"
    assert pre_tokenizer_name(make_tokenizer(), "mine") == "gpt-2"


def test_unknown_splitting_rules_are_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    rules = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    with pytest.raises(ModelError, match=r"not known to have \(Punctuation \+ ByteLevel\)"):
        pre_tokenizer_name(tokenizer, "mine")


def test_added_tokens_are_found_in_a_text(stories: Path, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "llama", stories)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Tokens in the place of others, so that the model has rows for them.
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 511, "content": "<|end|>", "special": True}
    )
    vocab = content["model"]["vocab"]
    del vocab[next(text for text, index in vocab.items() if index == 511)]
    (base / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = save_trained(base, tmp_path / "adapter")
    target = exported(adapter, tmp_path / "out", gguf_type="f16")
    text = "Hello there<|end|> you"
    (found,) = ask_llama_cpp(tmp_path, job(target, text=text, special=True))
    assert 511 in found["tokens"]
    assert found["tokens"] == tokenizer.encode(text, add_special_tokens=False)


# ---------------------------------------------------------------- Ollama


def _with_template(template: str) -> Any:
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_becomes_one_in_go() -> None:
    turns = turns_of(_with_template(CHATML), adds_bos=False)
    assert turns is not None
    assert turns.in_go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}'
        '{{ "<|im_end|>\\n" }}{{ else if eq .Role "user" }}{{ "<|im_start|>user\\n" }}'
        '{{ .Content }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ else if eq .Role '
        '"assistant" }}{{ .Content }}{{ "<|im_end|>\\n" }}{{ end }}{{ end }}'
    )
    text = modelfile("a.gguf", turns, ["<|im_end|>"], 100_000, raw=False)
    assert text.splitlines()[-2:] == ['PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 8192"]


@pytest.mark.parametrize(
    ("name", "start", "system"),
    [
        (
            "Qwen-Qwen2.5-7B-Instruct.jinja",
            "<|im_start|>system\nYou are Qwen",
            ("<|im_start|>system\n", "<|im_end|>\n"),
        ),
        (
            "meta-llama-Llama-3.1-8B-Instruct.jinja",
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date",
            None,
        ),
    ],
)
def test_real_templates(
    assets: Path, name: str, start: str, system: tuple[str, str] | None
) -> None:
    tokenizer = _with_template((assets / "templates" / name).read_text())
    turns = turns_of(tokenizer, adds_bos=True)
    assert turns is not None
    assert turns.start.startswith(start)
    assert turns.system is not None
    assert system is None or turns.system == system


def test_the_reasoning_that_a_template_takes_out_is_none_of_ollamas(assets: Path) -> None:
    name = "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"
    tokenizer = _with_template((assets / "templates" / name).read_text())
    assert turns_of(tokenizer, adds_bos=False) is None


def test_a_template_that_does_more_is_left_out_and_said_so() -> None:
    counts = (
        "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert turns_of(_with_template(counts), adds_bos=False) is None
    text = modelfile("a.gguf", None, [], 512, raw=False)
    assert "not one that could be written for Ollama" in text
    assert 'TEMPLATE "' not in text


def test_a_token_that_is_no_beginning_stays(smollm2: Path) -> None:
    # Its template begins with the token that it names BOS, and its tokenizer puts none before.
    turns = turns_of(AutoTokenizer.from_pretrained(smollm2), adds_bos=False)
    assert turns is not None
    assert turns.start.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert turns.system == ("<|im_start|>system\n", "<|im_end|>\n")
