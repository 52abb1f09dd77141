"""What the tests share: real inputs where they are, and small models made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_models import MINILM, SMOLLM2, real_models_folder

from qlora_kit.model.environment import prepare_environment

PROJECT = Path(__file__).parent.parent

# No test may reach out: a hub that answers slowly would make the suite hang.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The GPU tests' allocator and cuBLAS read their settings once: before anything imports torch.
prepare_environment(deterministic=True)

# Models this small are faster on one thread: several wait for each other longer than they work,
# and `make test` has a process on every core.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


def assets_folder() -> Path | None:
    """Return the folder of real inputs, or None where it is not on this machine."""
    folder = Path(os.environ.get("QLORA_KIT_ASSETS", PROJECT.parent / "shared" / "assets"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real inputs; tests that need it skip without it, saying so."""
    folder = assets_folder()
    if folder is None:
        pytest.skip("real inputs not found; set QLORA_KIT_ASSETS to their folder")
    return folder


@pytest.fixture(scope="session")
def stories(assets: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters, with its tokenizer."""
    return assets / "models" / "stories260K"


def real_model(name: str) -> Path:
    """Return the folder of a model of `make real-models`; skip, saying so, without it."""
    folder = real_models_folder() / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}; `make real-models` fetches it")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a real Llama that follows instructions, with its ChatML template."""
    return real_model(SMOLLM2)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a real BERT encoder."""
    return real_model(MINILM)


# Numbers that shrink a real architecture to one that runs in milliseconds, its kind kept.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "original_max_position_embeddings": 32,
}


def tiny_numbers(name: str) -> dict[str, Any]:
    """Return the architecture of a model in `configs/`, shrunk but of the same kind."""
    from qlora_kit.model.names import known_models

    numbers = dict(known_models()[name].architecture or {})
    small = {key: value for key, value in TINY.items() if key in numbers or key.endswith("_id")}
    if "num_key_value_heads" in numbers:
        grouped = numbers["num_key_value_heads"] != numbers["num_attention_heads"]
        small["num_key_value_heads"] = 2 if grouped else 4
    rope = dict(numbers.get("rope_scaling") or {})
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = TINY["original_max_position_embeddings"]
    for factors in rope.keys() & {"short_factor", "long_factor"}:
        half = int(TINY["head_dim"] * numbers.get("partial_rotary_factor", 1.0)) // 2
        rope[factors] = rope[factors][:half]
    if rope:
        small["rope_scaling"] = rope
    return {**numbers, **small, "torch_dtype": "float32", "initializer_range": 0.2}


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny random model of a known architecture, once."""
    saved: dict[tuple[Any, ...], Path] = {}

    def save(name: str = "tinyllama", **changes: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = (name, *sorted((k, repr(v)) for k, v in changes.items()))
        if key not in saved:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = AutoConfig.for_model(**{**tiny_numbers(name), **changes})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                # Norms and biases that are not at their start show whether they are loaded.
                if parameter.dim() == 1:
                    parameter.data.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
            saved[key] = folder
        return saved[key]

    return save


# Options that a simulation does not read, and that differ between runs that are otherwise equal.
NOT_SIMULATED = {
    "output", "overwrite", "resume", "data", "validation", "max_steps", "save_steps", "eval_steps",
    "report_to", "samples", "vram", "ram",
}  # fmt: skip


def remembering(simulate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `simulate`, which answers at once where it is asked what it was asked before."""
    from qlora_kit.config import TrainConfig

    answers: dict[str, Any] = {}

    def of_key(value: Any) -> Any:
        if not isinstance(value, TrainConfig):
            return value
        return value.model_dump(exclude=NOT_SIMULATED), value.model_fields_set - NOT_SIMULATED

    def remembered(*arguments: Any, **named: Any) -> Any:
        key = repr(([of_key(value) for value in arguments], named))
        if key not in answers:
            answers[key] = simulate(*arguments, **named)
        return answers[key]

    return remembered


@pytest.fixture(scope="module")
def simulated_once() -> Iterator[None]:
    """Plans of a module simulate the same step once: for tests of what is not the simulation."""
    from qlora_kit.plan import planning, search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "take_survey", remembering(search.take_survey))
        patch.setattr(planning, "predict", remembering(planning.predict))
        yield


def load_folder(
    folder: Path, bits: int = 16, *, dtype: str = "float32", **quantization: Any
) -> Any:
    """Load a model folder on the CPU, as the kit does: a `Base`."""
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.model.hardware import choose_hardware
    from qlora_kit.model.load import BaseSpec, load_base
    from qlora_kit.model.names import find_model

    spec = BaseSpec(find_model(str(folder)), folder, Quantization(bits=bits, **quantization))
    return load_base(spec, choose_hardware("cpu", dtype))


def relative_error(found: Any, expected: Any) -> float:
    """Return ‖found − expected‖ / ‖expected‖, computed in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def mask_of(batch: Any) -> Any:
    """Return the attention mask that transformers expects of a padded batch: (B, T), 1 a token."""
    import torch

    columns = torch.arange(batch.input_ids.shape[1])
    return (columns < torch.tensor(batch.lengths).unsqueeze(1)).long()


def fill_lora(adapter: Any, seed: int = 7, std: float = 0.1) -> None:
    """Give B of every LoRA layer random values, as if it had been trained."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers.values():
        layer.lora_B.data.normal_(0, std, generator=generator)
