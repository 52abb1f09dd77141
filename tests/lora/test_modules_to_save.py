"""Embeddings, heads, norms and linear layers that are trained whole, as PEFT's modules_to_save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_fixtures import make_tokenizer
from merging import plain, spec_of
from peft import PeftModel
from support import relative_error
from tiny_models import OTHERS, load_folder, save_model
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import ConfigError
from qlora_kit.export.verify import verify_merge
from qlora_kit.lora.attach import count_trainable
from qlora_kit.model.load import Placement
from qlora_kit.tasks import CAUSAL
from qlora_kit.train.loop import Saving

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
ROWS = [
    {"input_ids": row.tolist(), "labels": row.tolist(), "row": index}
    for index, row in enumerate(IDS.repeat(2, 1))
]
NAMED = [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("model.norm",), ("norm",),
         ("mlp.down_proj", "lm_head")]  # fmt: skip


def a_spec(*names: str, **others: Any) -> qk.LoraSpec:
    return qk.LoraSpec(rank=4, targets=("attention",), modules_to_save=names, **others)


def options(**changes: Any) -> qk.TrainConfig:
    values = {"batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-3, **changes}
    return qk.TrainConfig(**values)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", NAMED)
def test_forward_gradients_file_and_merge_are_those_of_peft(
    save_tiny: Callable[..., Path], tmp_path: Path, tied: bool, names: tuple[str, ...]
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=tied)
    base = load_folder(folder)
    before = logits(base.model)
    adapter = qk.attach(base, a_spec(*names))
    assert relative_error(logits(base.model), before) <= 1e-6, "it starts as the base"
    assert adapter.trainable == count_trainable(base.spec.skeleton(), adapter.spec)
    start = {name: p.detach().clone() for name, p in adapter.whole_parameters().items()}
    qk.train_adapter(adapter, ROWS, options(max_steps=2))
    for name, parameter in adapter.whole_parameters().items():
        assert parameter.dtype == torch.float32
        assert relative_error(parameter, start[name]) > 1e-4, name
    trained = logits(base.model)
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(adapter, tmp_path / "adapter", qk.BaseRecord.of(base))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    assert relative_error(logits(theirs.eval()), trained) <= 1e-5
    predicted = theirs(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(predicted, IDS[:, 1:].flatten(), reduction="sum").backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for parameter in adapter.parameters().values():
        parameter.grad = None
    objective = CAUSAL.objective(base, 0, 5, None)
    objective.loss_sum(objective.batch(ROWS[:2])).backward()
    for name, parameter in adapter.whole_parameters().items():
        path, _, leaf = name.rpartition(".")
        own = wanted[f"base_model.model.{path}.modules_to_save.default.{leaf}"]
        assert relative_error(parameter.grad, own) <= 1e-4, name

    again = load_folder(folder)
    qk.load_adapter(again, tmp_path / "adapter")
    assert relative_error(logits(again.model), trained) <= 1e-5
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(tmp_path / "adapter"), spec_of(folder, 16),
        make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    merged = plain(tmp_path / "merged")
    assert bool(merged.config.tie_word_embeddings) == tied, "a pair that is tied stays so"
    assert relative_error(logits(merged), trained) <= 1e-5
    with adapter.disabled():
        assert torch.equal(logits(base.model), before)
    assert torch.equal(logits(qk.detach(adapter).model), before)


@pytest.mark.parametrize("kind", ["gpt2", "cohere", "granite", "qwen2-tied"])
def test_other_kinds_of_models_keep_their_formula(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path / "base", OTHERS[kind])
    base = load_folder(folder, 4)
    before = logits(base.model)
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    spec = qk.LoraSpec(rank=4, targets=("attention",), modules_to_save=(embedding, "lm_head"))
    adapter = qk.attach(base, spec)
    assert relative_error(logits(base.model), before) <= 1e-6
    qk.train_adapter(adapter, ROWS, options(max_steps=2))
    trained = logits(base.model)
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(adapter, tmp_path / "adapter", qk.BaseRecord.of(base))
    again = load_folder(folder, 4)
    qk.load_adapter(again, tmp_path / "adapter")
    assert relative_error(logits(again.model), trained) <= 1e-5
    assert relative_error(logits(qk.merge(adapter).model), trained) <= 1e-5


def test_a_scaled_embedding_is_trained(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("gemma-2-9b"))
    before = logits(base.model)
    adapter = qk.attach(base, a_spec("embed_tokens"))
    assert relative_error(logits(base.model), before) <= 1e-6
    qk.train_adapter(adapter, ROWS, options(max_steps=2))
    trained = logits(base.model)
    assert relative_error(logits(qk.merge(adapter).model), trained) <= 1e-5


def test_norms_compute_in_the_dtype_of_the_model(save_tiny: Callable[..., Path]) -> None:
    base = load_folder(save_tiny("tinyllama"), dtype="bfloat16")
    before = logits(base.model)
    adapter = qk.attach(base, a_spec("norm", "embed_tokens", "lm_head"))
    assert relative_error(logits(base.model), before) <= 2e-2
    qk.train_adapter(adapter, ROWS, options(max_steps=2))
    assert all(each.dtype == torch.float32 for each in adapter.whole_parameters().values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    save_tiny: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=tied)
    found = []
    for resumes in (False, True):
        adapter = qk.attach(load_folder(folder, 4), a_spec("embed_tokens", "lm_head", "norm"))
        (tmp_path / "second").mkdir(exist_ok=True)
        saving = Saving(tmp_path, qk.BaseRecord.of(adapter.base))
        if resumes:
            saving = Saving(tmp_path / "second", saving.record, tmp_path / "checkpoint-2")
        qk.train_adapter(adapter, ROWS, options(max_steps=4, save_steps=2), saving=saving)
        found.append({name: p.detach().clone() for name, p in adapter.parameters().items()})
    assert ("lm_head.weight" in found[0]) != tied
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "changes", "says"),
    [
        (("nowhere",), {}, r"'nowhere' names no layer .*expected the end of a path, such as embed"),
        (("layers.0",), {}, r"'layers\.0' names model\.layers\.0, which holds several layers"),
        (("down_proj",), {"targets": ("down_proj",)}, r"down_proj is named by --targets down_proj"),
        (("rotary_emb",), {}, r"which is no linear layer, embedding of tokens, head or norm"),
        (("embed_tokens",), {"new_tokens": ("<a>",)}, r"of which --new-tokens trains rows only"),
    ],
)
def test_wrong_names_are_one_line(
    save_tiny: Callable[..., Path], names: tuple[str, ...], changes: dict[str, Any], says: str
) -> None:
    spec = qk.LoraSpec(**{"targets": ("attention",), "modules_to_save": names, **changes})
    with pytest.raises(ConfigError, match=says) as caught:
        count_trainable(spec_of(save_tiny("tinyllama")).skeleton(), spec)
    assert len(caught.value.faults) == 1
    with pytest.raises(ConfigError, match=says):
        qk.attach(load_folder(save_tiny("tinyllama"), 4), spec)


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("gpt2", "c_attn", "which is stored transposed; expected LoRA on such layers"),
        ("gpt2", "wpe", "which is no linear layer, embedding of tokens, head or norm"),
        ("mixtral", "experts", "expert"),
        ("mixtral", "gate", "a router, which stays frozen"),
    ],
)
def test_layers_that_cannot_be_trained_whole_are_refused(
    tmp_path: Path, kind: str, name: str, says: str
) -> None:
    skeleton = spec_of(save_model(tmp_path / "base", OTHERS[kind])).skeleton()
    with pytest.raises(ConfigError, match=says):
        count_trainable(skeleton, qk.LoraSpec(modules_to_save=(name,)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_few_bits_is_not_trained(save_tiny: Callable[..., Path], tied: bool) -> None:
    spec = spec_of(save_tiny("tinyllama", tie_word_embeddings=tied))
    base = qk.load_base(spec, qk.choose_hardware("cpu"), placement=Placement(head_bits=8))
    with pytest.raises(ConfigError, match="trains lm_head whole, and --head-bits 8 holds it"):
        qk.attach(base, a_spec("lm_head"))
