"""Adapters as other tools and older versions of PEFT write them open, and compute the same.

Each form is made of an adapter of PEFT: its config, the names of its tensors, and the files beside
them are rewritten as that tool has them.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import plain, spec_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import relative_error
from tiny_models import load_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import AdapterError
from qlora_kit.export.verify import verify_merge

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What Unsloth makes of the layers of a model that may also see: two alternatives of many words.
_PARTS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
UNSLOTH = (
    rf"(?:.*?(?:language|text).*?(?:{_PARTS}).*?(?:{'|'.join(ALL)}))"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{_PARTS})\.(?:(?:{'|'.join(ALL)})))"
)

Rewrite = Callable[[Path], None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@torch.no_grad()
def peft_adapter(base: Path, folder: Path, **options: Any) -> Tensor:
    """Save an adapter of PEFT with trained values; return its logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ALL}
    wrapped = get_peft_model(model, LoraConfig(**{**defaults, **options})).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


# ---------------------------------------------------------------- what tools write


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2))


def _keep(folder: Path, *names: str, **values: Any) -> None:
    """Keep only some fields of a config, as a version has them, and set others."""
    content = _config(folder)
    kept = {name: content[name] for name in names}
    _write_config(folder, {**kept, **values, "peft_type": "LORA"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    (folder / WEIGHTS).unlink()


def _beside(folder: Path, *names: str) -> None:
    """Write the files that trainers leave; nothing of them is to be opened."""
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"found": name}))
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")


def _unsloth(folder: Path) -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models",
               "unsloth_fixed": True}  # fmt: skip
    _write_config(
        folder,
        {
            **_config(folder), "auto_mapping": mapping, "target_modules": UNSLOTH,
            "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit", "lora_dropout": 0,
        },
    )  # fmt: skip
    _beside(folder, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def _llama_factory(folder: Path) -> None:
    _write_config(folder, {**_config(folder), "base_model_name_or_path": "", "revision": "main"})
    _beside(folder, "training_args.bin", "trainer_log.jsonl")
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text("{}")


def _axolotl(folder: Path) -> None:
    # It hands PEFT what its options hold, and they hold null.
    _write_config(folder, {**_config(folder), "fan_in_fan_out": None, "use_rslora": None})
    _pickled(folder)
    _beside(folder, "training_args.bin")


def _torchtune(folder: Path) -> None:
    _keep(folder, "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    _pickled(folder)


_OF_0_3 = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha",
           "lora_dropout", "modules_to_save", "r", "target_modules", "task_type")  # fmt: skip
_OF_0_5 = (*_OF_0_3, "auto_mapping", "init_lora_weights", "layers_pattern", "layers_to_transform",
           "revision")  # fmt: skip
_OF_0_8 = (*_OF_0_5, "alpha_pattern", "rank_pattern", "loftq_config", "megatron_config",
           "megatron_core", "use_rslora")  # fmt: skip
_OF_0_11 = (*_OF_0_8, "layer_replication", "use_dora")
_OF_0_14 = (*_OF_0_11, "eva_config", "exclude_modules", "lora_bias")


def _peft_0_2(folder: Path) -> None:
    _keep(folder, *_OF_0_3, enable_lora=None, merge_weights=False)
    _pickled(folder)


def _peft_0_5(folder: Path) -> None:
    _keep(folder, *_OF_0_5)
    _pickled(folder)


def _renamed(change: Callable[[str], str]) -> Rewrite:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = {change(name): tensor for name, tensor in tensors.items()}
        assert names.keys() != tensors.keys()
        save_file(names, folder / WEIGHTS)

    return rewrite


TOOLS: dict[str, Rewrite] = {
    "Unsloth": _unsloth,
    "LLaMA-Factory": _llama_factory,
    "Axolotl": _axolotl,
    "torchtune": _torchtune,
    "TRL": lambda folder: _beside(folder, "training_args.bin"),
    "PEFT 0.2": _peft_0_2,
    "PEFT 0.5": _peft_0_5,
    "PEFT 0.8": lambda folder: _keep(folder, *_OF_0_8),
    "PEFT 0.11": lambda folder: _keep(folder, *_OF_0_11),
    "PEFT 0.14": lambda folder: _keep(folder, *_OF_0_14),
    "a state dict as it stands": _renamed(lambda n: n.replace(".weight", ".default.weight")),
    "an adapter with a name": _renamed(lambda n: n.replace(".weight", ".my-legal_1.weight")),
    "no prefix": _renamed(lambda n: n.removeprefix("base_model.model.")),
    "torch.compile": _renamed(lambda n: f"_orig_mod.{n}"),
    "blocks compiled": _renamed(lambda n: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", n)),
    "FSDP": _renamed(
        lambda n: re.sub(
            r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", n
        )
    ),
    "DataParallel": _renamed(lambda n: f"module.{n}"),
    "wrapped by PEFT twice": _renamed(lambda n: f"base_model.model.{n}"),
}


@pytest.fixture(scope="module")
def original(
    save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor]:
    """An adapter of PEFT and its logits."""
    folder = tmp_path_factory.mktemp("original")
    return folder, peft_adapter(save_tiny(), folder)


@pytest.fixture
def copied(original: tuple[Path, Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "adapter"))


@pytest.mark.parametrize("tool", TOOLS)
def test_an_adapter_of_another_tool_computes_the_same(
    save_tiny: Callable[..., Path], original: tuple[Path, Tensor], copied: Path, tool: str
) -> None:
    TOOLS[tool](copied)
    loaded = load_folder(save_tiny())
    adapter = qk.load_adapter(loaded, copied)
    assert len(adapter.layers) == 14
    assert relative_error(logits(loaded.model), original[1]) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_embedding_and_head_of_axolotl(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, theirs = save_tiny(), tmp_path / "theirs"
    expected = peft_adapter(base, theirs, modules_to_save=["embed_tokens", "lm_head"])
    _axolotl(theirs)
    loaded = load_folder(base)
    qk.load_adapter(loaded, theirs)
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(theirs), spec_of(base, 16), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged")), expected) <= 1e-5


def test_biases_before_peft_wrapped_layers(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Up to PEFT 0.5 a layer with LoRA was a linear layer, and its bias had the layer's name."""
    base = save_tiny("qwen2.5-7b")
    expected = peft_adapter(base, tmp_path, bias="all")
    _renamed(lambda n: n.replace(".base_layer.", "."))(tmp_path)
    _keep(tmp_path, *_OF_0_5)
    loaded = load_folder(base)
    qk.load_adapter(loaded, tmp_path)
    assert relative_error(logits(loaded.model), expected) <= 1e-5


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64],
)
def test_every_floating_dtype_is_read(
    original: tuple[Path, Tensor], copied: Path, dtype: Any
) -> None:
    tensors = {name: each.to(dtype) for name, each in load_file(copied / WEIGHTS).items()}
    save_file(tensors, copied / WEIGHTS)
    stored = qk.read_adapter(copied)
    for path, pair in stored.tensors.items():
        for side, matrix in zip("AB", pair, strict=True):
            kept = tensors[f"base_model.model.{path}.lora_{side}.weight"]
            assert matrix.dtype == torch.float32
            assert torch.equal(matrix, kept.float())


# ---------------------------------------------------------------- what is wrong with some


def _only(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if part in name:
                tensors[name] = change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_only("q_proj.lora_A", lambda a: (a * 9).to(torch.int8)), "is torch.int8; expected float"),
        (_only("q_proj.lora_B", lambda b: b.to(torch.complex64)), "is torch.complex64; expected"),
        (_only("q_proj.lora_A", lambda a: a > 0), "is torch.bool; expected floating-point numbers"),
        (
            _only("q_proj.lora_A", lambda a: a[:0, 0]),
            r"is empty \(0,\), as of a model whose shards",
        ),
        (_only("q_proj.lora_A", lambda a: a.double() * 1e300), "holds NaN or infinity"),
        (_only("q_proj.lora_A", lambda a: a.repeat(9, 1)), r"A \(36, 64\).*expected rank 4"),
        (_only("q_proj.lora_A", lambda a: a[:, :9].contiguous()), r"q_proj \(64, 9\) is of shape"),
        (
            lambda t: t.update(
                {n.replace(".weight", ".b.weight"): x.clone() for n, x in [*t.items()]}
            ),
            "stands twice, as if of two adapters",
        ),
    ],
)
def test_tensors_that_are_no_matrices_of_numbers_are_refused(
    save_tiny: Callable[..., Path],
    copied: Path,
    change: Callable[[dict[str, Tensor]], None],
    says: str,
) -> None:
    tensors = load_file(copied / WEIGHTS)
    change(tensors)
    save_file(tensors, copied / WEIGHTS)
    with pytest.raises(AdapterError, match=says):
        qk.load_adapter(load_folder(save_tiny()), copied)


def test_an_emptied_state_dict_is_refused(copied: Path) -> None:
    """Early trainers that replaced `state_dict` saved nothing at all."""
    (copied / WEIGHTS).unlink()
    torch.save({}, copied / PICKLED)
    with pytest.raises(AdapterError, match=r"holds no tensors, as if emptied when it was saved"):
        qk.read_adapter(copied)


def test_a_huge_rank_costs_no_memory(copied: Path) -> None:
    _write_config(copied, {**_config(copied), "r": 65_536, "use_bdlora": {"nblocks": 64}})
    with pytest.raises(AdapterError, match="expected rank 65536"):
        qk.read_adapter(copied)
    _write_config(copied, {**_config(copied), "r": 4, "use_bdlora": {"nblocks": 65}})
    with pytest.raises(AdapterError, match=r"use_bdlora\.nblocks: found 65"):
        qk.read_adapter(copied)
    blocks = {"nblocks": 3, "target_modules_bd_a": ["q_proj"]}
    _write_config(copied, {**_config(copied), "use_bdlora": blocks})
    with pytest.raises(AdapterError, match=r"q_proj has 4 rows in 3 blocks \(use_bdlora\)"):
        qk.read_adapter(copied)


def test_a_name_that_stands_twice_in_the_header_is_refused(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    name = next(iter(load_file(copied / WEIGHTS)))
    again = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    header = header[:-1] + b"," + json.dumps(again).encode()[1:]
    (copied / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        qk.read_adapter(copied)


# ---------------------------------------------------------------- training goes on from them


def _started(base: Path, adapter: Path) -> Any:
    from qlora_kit.config import TrainConfig
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.opening.start import options_of_start, started_from

    options = options_of_start(adapter, str(base))
    config = TrainConfig.model_validate({**options, "adapter": adapter, "bits": 16})
    stored = started_from(config, spec_of(base, 16), LoraSpec.of(config))
    assert stored is not None
    return stored


# A pattern that takes for ever, if it is ever matched.
ENDLESS = "(([a-z_.0-9]+)+)+!"


@pytest.mark.parametrize(
    ("options", "values", "layers"),
    [
        ({}, {"target_modules": UNSLOTH}, 14),
        ({}, {"target_modules": ENDLESS, "exclude_modules": ENDLESS}, 14),
        ({}, {"target_modules": [ENDLESS]}, 14),
        ({}, {"target_modules": None}, 14),
        ({"layers_to_transform": [1], "exclude_modules": ["k_proj"]}, {}, 6),
        ({"exclude_modules": r".*layers\.0\..*"}, {}, 7),
        ({"target_modules": "all-linear"}, {}, 14),
    ],
)
def test_training_starts_from_the_layers_that_have_tensors(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    values: dict[str, Any],
    layers: int,
) -> None:
    peft_adapter(save_tiny(), tmp_path, **options)
    _write_config(tmp_path, {**_config(tmp_path), **values})
    assert len(_started(save_tiny(), tmp_path).tensors) == layers


def test_a_tensor_whose_name_is_an_endless_pattern_is_not_matched(
    save_tiny: Callable[..., Path], copied: Path
) -> None:
    _renamed(lambda n: n.replace("layers.0.mlp.up_proj", ENDLESS))(copied)
    _write_config(copied, {**_config(copied), "target_modules": "all-linear"})
    with pytest.raises(AdapterError, match=r"which is no path of a layer"):
        _started(save_tiny(), copied)
    with pytest.raises(AdapterError, match=r"is missing in"):
        qk.load_adapter(load_folder(save_tiny()), copied)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bias": "lora_only"}, r"has trained biases \(model\..*\.bias, bias\)"),
        ({"lora_bias": True}, r"has trained biases \(model\..*\.bias, lora_bias\)"),
        ({"modules_to_save": ["norm"]}, r"has layers that are trained whole"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_training_does_not_start_from_what_it_would_leave_out(
    save_tiny: Callable[..., Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    base = save_tiny("qwen2.5-7b")
    peft_adapter(base, tmp_path, **{"target_modules": ["q_proj", "v_proj"], **options})
    with pytest.raises(AdapterError, match=says):
        _started(base, tmp_path)
