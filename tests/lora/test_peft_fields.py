"""Every field that PEFT writes of a LoRA adapter is honoured as in PEFT, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from data_fixtures import make_tokenizer
from merging import plain, spec_of
from peft import LoraConfig, PeftModel, get_peft_model
from support import PROJECT, relative_error
from tiny_models import load_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import qlora_kit as qk
from qlora_kit.errors import AdapterError
from qlora_kit.export.verify import verify_merge
from qlora_kit.lora import files
from qlora_kit.model.class_head import ClassHead

# PEFT warns of its own options.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
LLAMA, QWEN, GPT2, PHI = "tinyllama", "qwen2.5-7b", "gpt2", "phi"
ATTENTION = ["q_proj", "k_proj", "v_proj"]
# The fields that change what an adapter computes, or where it is; of each model what it is given.
HONOURED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": (QWEN, {"lora_bias": True, "target_modules": ATTENTION}),
    "lora_bias, of GPT-2": (GPT2, {"lora_bias": True, "use_rslora": True}),
    "lora_bias, with patterns": (
        QWEN,
        {
            "lora_bias": True, "target_modules": ATTENTION,
            "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"k_proj": 2},
        },
    ),
    "bias": (QWEN, {"bias": "all"}),
    "bias, of GPT-2": (GPT2, {"bias": "all"}),
    "bias, and that of the head": (PHI, {"bias": "all"}),
    "bias, of LoRA only": (QWEN, {"bias": "lora_only"}),
    "bias, of LoRA only, of GPT-2": (GPT2, {"bias": "lora_only"}),
    "bias and lora_bias": (
        QWEN, {"bias": "lora_only", "lora_bias": True, "target_modules": ATTENTION},
    ),
    "fan_in_fan_out": (GPT2, {"fan_in_fan_out": True}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "layers_pattern": (LLAMA, {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "exclude_modules": (LLAMA, {"exclude_modules": r".*layers\.0\..*"}),
    "use_bdlora": (
        LLAMA,
        {
            "use_bdlora": peft.BdLoraConfig(
                target_modules_bd_a=["q_proj", "k_proj"], target_modules_bd_b=["down_proj"],
                nblocks=2, match_strict=False,
            ),
        },
    ),
    "velora_config": (LLAMA, {"velora_config": {"num_groups": 4}}),
    "monteclora_config": (LLAMA, {"monteclora_config": peft.MontecloraConfig()}),
    "gaussian": (LLAMA, {"init_lora_weights": "gaussian"}),
    "orthogonal": (LLAMA, {"init_lora_weights": "orthogonal"}),
    "mica": (LLAMA, {"init_lora_weights": "mica"}),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "layer_replication": ([[0, 2], [1, 2]], "repeats blocks of the base"),
    "alora_invocation_tokens": ([5, 6], "only the tokens that follow its invocation"),
    "arrow_config": ({"top_k": 2}, "expected one adapter"),
    "kasa_config": ({"beta": 1e-4}, r"merge it in PEFT \(merge_and_unload\)"),
    "use_qalora": (True, "means of groups of inputs"),
    "enable_lora": ([True, False, True], "on whole layers"),
    "megatron_config": ({"hidden_size": 4}, "expected layers of transformers"),
    "init_lora_weights": ("pissa", r"'pissa'.*path_initial_model_for_weight_conversion"),
}


@torch.no_grad()
def peft_adapter(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Save an adapter of PEFT, whose trained parameters are not those of its start."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, config_of(base, **options)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


def config_of(base: Path, **options: Any) -> LoraConfig:
    is_gpt2 = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    named = ["c_attn", "c_fc"] if is_gpt2 else ["q_proj", "k_proj", "down_proj"]
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": named}
    return LoraConfig(**{**defaults, **options})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("form", HONOURED)
def test_a_field_that_is_honoured_computes_and_merges_as_in_peft(
    folder_of: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    kind, options = HONOURED[form]
    base, theirs = folder_of(kind), tmp_path / "theirs"
    expected = peft_adapter(base, theirs, **options)
    loaded = load_folder(base)
    before = logits(loaded.model)
    assert relative_error(before, expected) > 1e-2, "the adapter changes something"
    adapter = qk.load_adapter(loaded, theirs)
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(theirs), spec_of(base, 16), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged")), expected) <= 1e-5
    (tmp_path / "ours").mkdir()
    qk.save_adapter(adapter, tmp_path / "ours", qk.BaseRecord.of(loaded))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert relative_error(logits(again), expected) <= 1e-5
    assert torch.equal(logits(qk.detach(adapter).model), before), "detached, it is the base again"
    if qk.read_adapter(theirs).saved:
        with pytest.raises(AdapterError, match=r"replaces .*\.bias of the base \(modules_to_save"):
            qk.load_adapters(loaded, {"a": theirs})
    else:
        several = qk.load_adapters(loaded, {"a": theirs})
        several.set_adapter([None, "a"])
        mixed = logits(loaded.model)
        assert relative_error(mixed[0], before[0]) <= 1e-6
        assert relative_error(mixed[1], expected[1]) <= 1e-5
        several.set_adapter("a")
        assert relative_error(logits(loaded.model), expected) <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_are_merged_over_a_quantised_base(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    base = save_tiny(QWEN)
    peft_adapter(base, tmp_path / "theirs", bias="all", lora_bias=True, target_modules=ATTENTION)
    loaded = load_folder(base, bits)
    qk.load_adapter(loaded, tmp_path / "theirs")
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(tmp_path / "theirs"), spec_of(base, bits),
        make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged")), logits(loaded.model)) <= 1e-5


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only", "lora_bias": True}])
def test_biases_of_a_classifier_of_peft(
    tmp_path: Path, save_bert: Callable[[], Path], options: dict[str, Any]
) -> None:
    """A BERT, whose head is saved beside the biases of its layers and norms."""
    torch.manual_seed(0)
    base, theirs = save_bert(), tmp_path / "theirs"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        expected = wrapped(input_ids=IDS).logits
    wrapped.save_pretrained(theirs)
    spec = dataclasses.replace(
        spec_of(base, 16),
        loads="AutoModelForSequenceClassification",
        classes=ClassHead("single", ("a", "b", "c"), 0),
    )
    loaded = qk.load_base(spec, qk.choose_hardware("cpu", "float32"))
    qk.load_adapter(loaded, theirs)
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    stored = qk.read_adapter(theirs)
    assert {name for name in stored.saved if "classifier" in name} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    qk.merge_to(
        tmp_path / "merged", stored, spec, make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged), expected) <= 1e-5


@pytest.fixture
def save_bert(tmp_path: Path) -> Callable[[], Path]:
    from transformers import AutoConfig, AutoModel

    def save() -> Path:
        numbers = {
            "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96,
            "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
        }  # fmt: skip
        AutoModel.from_config(AutoConfig.for_model("bert", **numbers)).save_pretrained(
            tmp_path / "bert"
        )
        return tmp_path / "bert"

    return save


def test_a_bias_where_the_base_has_none_is_used_and_not_merged(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base, theirs = save_tiny(LLAMA), tmp_path / "theirs"
    expected = peft_adapter(base, theirs, lora_bias=True)
    loaded = load_folder(base)
    before = logits(loaded.model)
    adapter = qk.load_adapter(loaded, theirs)
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    assert torch.equal(logits(qk.detach(adapter).model), before)
    with pytest.raises(AdapterError, match=r"_proj\.bias \(lora_bias\), which the base has not"):
        qk.merge_to(
            tmp_path / "merged", qk.read_adapter(theirs), spec_of(base, 16), make_tokenizer()
        )


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        (
            {"lora_bias": True},
            {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(3)},
            r"q_proj has a bias of 3 numbers in lora_B and 64 outputs",
        ),
        (
            {"lora_bias": True},
            {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.full((64,), torch.nan)},
            r"lora_B\.bias holds NaN or infinity",
        ),
        (
            {"lora_bias": True},
            {"model.layers.9.self_attn.q_proj.lora_B.bias": torch.ones(64)},
            r"layers\.9\..* has a bias of 64 numbers in lora_B and no outputs",
        ),
        (
            {"bias": "all"},
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
            r"q_proj\.bias stands twice",
        ),
        (
            {"bias": "all"},
            {"model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(64).int()},
            r"expected one row of numbers",
        ),
        (
            {},
            {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(64)},
            r"unknown tensor .*lora_B\.bias",
        ),
    ],
)
def test_biases_that_do_not_fit_are_refused(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    change: dict[str, torch.Tensor],
    says: str,
) -> None:
    from safetensors.torch import load_file, save_file

    peft_adapter(save_tiny(QWEN), tmp_path, **options)
    file = tmp_path / "adapter_model.safetensors"
    changes = {f"base_model.model.{name}": tensor for name, tensor in change.items()}
    save_file({**load_file(file), **changes}, file)
    with pytest.raises(AdapterError, match=says):
        qk.read_adapter(tmp_path)


def test_biases_that_the_base_has_not_are_named(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    peft_adapter(save_tiny(QWEN), tmp_path, bias="lora_only", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"q_proj\.bias \(64,\) is missing in the base"):
        qk.load_adapter(load_folder(save_tiny(LLAMA)), tmp_path)


# ---------------------------------------------------------------- refused, and unset


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_the_result_is_refused_by_name(
    save_tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    value, says = REFUSED[name]
    peft_adapter(save_tiny(LLAMA), tmp_path)
    change_config(tmp_path, **{name: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {name} is set.*{says}"):
        qk.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("pissa_niter_4", "had its start B A subtracted"),
        ("OLoRA", "had its start B A subtracted"),
        ("corda", "had its start B A subtracted"),
        ("lora_ga", "had its start B A subtracted"),
        ("loftq", "its base is what LoftQ made of the weights"),
        ("of the future", "a start that the kit does not know"),
    ],
)
def test_a_start_that_changes_the_base_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, start: str, says: str
) -> None:
    peft_adapter(save_tiny(LLAMA), tmp_path)
    change_config(tmp_path, init_lora_weights=start)
    with pytest.raises(AdapterError, match=rf"init_lora_weights is set to '{start}'.*{says}"):
        qk.read_adapter(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_opens(
    save_tiny: Callable[..., Path], tmp_path: Path, start: str
) -> None:
    """PEFT subtracts the start again: an adapter of twice the rank, on the original base."""
    base, first, last = save_tiny(LLAMA), tmp_path / "first", tmp_path / "last"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, config_of(base, init_lora_weights=start)).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(first)
    wrapped.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        expected = logits(wrapped)
    wrapped.save_pretrained(last, path_initial_model_for_weight_conversion=str(first))
    assert qk.read_adapter(last).spec.rank == 8
    loaded = load_folder(base)
    qk.load_adapter(loaded, last)
    assert relative_error(logits(loaded.model), expected) <= 1e-5


def test_a_field_at_its_default_is_never_refused(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever the spelling: None, false, an empty list, an empty object, "none", absent."""
    peft_adapter(save_tiny(LLAMA), tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    needed = {"peft_type", "r", "lora_alpha", "target_modules", "peft_version"}
    for name in (content.keys() | files._UNSUPPORTED.keys()) - needed:
        for value in (None, False, "", "none", [], {}):
            (tmp_path / "adapter_config.json").write_text(json.dumps({**content, name: value}))
            qk.read_adapter(tmp_path)
        absent = {key: value for key, value in content.items() if key != name}
        (tmp_path / "adapter_config.json").write_text(json.dumps(absent))
        qk.read_adapter(tmp_path)


def test_the_documented_fields_are_those_that_peft_has() -> None:
    """A new field of a later PEFT has to be decided on, and written down."""
    text = (PROJECT / "docs" / "export.md").read_text()
    rows = re.findall(r"^\| `(\w+)`((?:, `\w+`)*) \| (\w+)", text, re.MULTILINE)
    said: dict[str, str] = {}
    for first, others, word in rows:
        said |= dict.fromkeys((first, *re.findall(r"`(\w+)`", others)), word)
    assert said.keys() == {field.name for field in dataclasses.fields(LoraConfig)}
    refused = {name for name, word in said.items() if word == "refused"}
    assert refused == said.keys() & files._UNSUPPORTED.keys()
    ignored = {name for name, word in said.items() if word == "ignored"}
    assert ignored == said.keys() & files._HARMLESS
