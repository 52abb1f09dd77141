"""The merged model computes the same as the trained one, and plain transformers opens it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from safetensors import safe_open
from support import run_python
from tiny_models import write_random

import qlora_kit as qk
from qlora_kit.config import parse_size
from qlora_kit.errors import AdapterError, ModelError, OutputError

ARCHITECTURES = ("tinyllama", "qwen2.5-7b", "qwen3-8b", "phi-4-mini", "gemma-2-9b", "smollm2-135m")


def train_something(spec: qk.BaseSpec, targets: tuple[str, ...] = ("all-linear",)) -> qk.Adapter:
    """Attach an adapter and give it a delta of the size training gives."""
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=targets), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.02, generator=generator)
    return adapter


def export(adapter: qk.Adapter, folder: Path, **changes: Any) -> Path:
    stored = qk.read_adapter(save(adapter, folder / "adapter"))
    target = folder / "merged"
    qk.merge_to(target, stored, adapter.base.spec, make_tokenizer(), **changes)
    return target


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_merged_equals_attached(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int, dtype: torch.dtype, bound: float
) -> None:
    # These weights have a usual size; other tests here have large weights, which amplify rounding.
    adapter = train_something(spec_of(save_tiny("tinyllama", initializer_range=0.05), bits))
    merged = plain(export(adapter, tmp_path, dtype=dtype))
    assert difference(adapter, merged) <= bound


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_equals_attached_on_a_pretrained_model(
    stories: Path, tmp_path: Path, bits: int
) -> None:
    adapter = train_something(spec_of(stories, bits))
    assert difference(adapter, plain(export(adapter, tmp_path / "16"))) <= 1e-3
    assert difference(adapter, plain(export(adapter, tmp_path / "32", dtype=torch.float32))) <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_architecture_merges(
    save_tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    adapter = train_something(spec_of(save_tiny(name)), targets=("attention", "mlp"))
    target = export(adapter, tmp_path, dtype=torch.float32)
    assert difference(adapter, plain(target)) <= 1e-5


def test_the_delta_is_in_the_merged_model(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    adapter = train_something(spec_of(save_tiny()))
    merged = plain(export(adapter, tmp_path, dtype=torch.float32))
    qk.detach(adapter)
    assert difference(adapter, merged) > 0.05, "without the adapter the output is another"


def test_the_files_are_those_others_read(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    adapter = train_something(spec_of(save_tiny()))
    target = export(adapter, tmp_path, shard_bytes=50_000)
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        assert (target / shard).stat().st_size < 60_000
        with safe_open(target / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                assert index["weight_map"][name] == shard
                assert file.get_tensor(name).dtype == torch.float16
                total += file.get_tensor(name).nbytes
    assert total == index["metadata"]["total_size"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).is_file()
    ends = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    assert make_tokenizer().eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_it_opens_without_bitsandbytes_and_without_the_kit(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    target = export(train_something(spec_of(save_tiny())), tmp_path)
    script = (
        "import sys\n"
        "sys.modules['bitsandbytes'] = sys.modules['qlora_kit'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(target)!r})\n"
        f"AutoTokenizer.from_pretrained({str(target)!r})\n"
        "print(model.dtype, sum(p.numel() for p in model.parameters()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.float16 ")


def test_an_already_quantised_base_merges(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    stored = tmp_path / "stored"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        save_tiny(), quantization_config=config, dtype=torch.float32
    ).save_pretrained(stored)
    adapter = train_something(spec_of(stored))
    target = export(adapter, tmp_path, dtype=torch.float32)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert difference(adapter, plain(target)) <= 1e-5


# ---------------------------------------------------------------- refusals


def test_another_base_of_the_same_shape_is_refused_and_nothing_is_left(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    stored = qk.read_adapter(save(train_something(spec_of(save_tiny())), tmp_path / "adapter"))
    other = spec_of(save_tiny("tinyllama", initializer_range=0.1))
    with pytest.raises(AdapterError, match="trained on other weights than"):
        qk.merge_to(tmp_path / "merged", stored, other, make_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_of_another_shape_is_refused_before_anything_is_read(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    stored = qk.read_adapter(save(train_something(spec_of(save_tiny())), tmp_path / "adapter"))
    with pytest.raises(AdapterError, match=r"is of shape .* in the base"):
        qk.merge_to(tmp_path / "merged", stored, spec_of(save_tiny("llama-2-7b")), make_tokenizer())


def test_a_value_beyond_float16_is_refused_by_name(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = train_something(spec_of(save_tiny()))
    layer = adapter.layers["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*does not fit float16"):
        export(adapter, tmp_path)
    assert not (tmp_path / "merged").exists()
    export(adapter, tmp_path, dtype=torch.bfloat16)


def test_an_existing_folder_is_replaced_only_when_asked(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = train_something(spec_of(save_tiny()))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export(adapter, tmp_path)
    assert (tmp_path / "merged" / "mine").read_text() == "mine"
    with pytest.raises(OutputError, match="replaces a model that the kit wrote, but this holds no"):
        export(adapter, tmp_path, overwrite=True)
    assert (tmp_path / "merged" / "mine").read_text() == "mine"
    shutil.rmtree(tmp_path / "merged")
    first = export(adapter, tmp_path, dtype=torch.float32)
    assert "float32" in (first / "config.json").read_text()
    second = export(adapter, tmp_path, overwrite=True)
    assert "float16" in (second / "config.json").read_text()


def test_the_adapter_is_never_what_overwrite_replaces(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = train_something(spec_of(save_tiny()))
    folder = save(adapter, tmp_path / "runs" / "mine")
    for target in (folder, tmp_path / "runs", save_tiny()):
        with pytest.raises(OutputError, match="which is read for it"):
            qk.merge_to(
                target, qk.read_adapter(folder), adapter.base.spec, make_tokenizer(), overwrite=True
            )
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("7B", 7)],
)
def test_sizes_are_in_powers_of_ten_unless_they_say_i(text: str, bytes_: int) -> None:
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["4", "GB", "4 XB", "-1GB", ""])
def test_a_size_without_number_or_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number with a unit"):
        parse_size(text)


MERGE = textwrap.dedent(
    """
    import torch
    from transformers import AutoTokenizer
    from qlora_kit.config import parse_size
    from qlora_kit.export.merge import merge_to
    from qlora_kit.lora.stored import StoredAdapter
    from qlora_kit.lora.spec import LoraSpec
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.model.names import find_model
    from qlora_kit.layers.quantize import Quantization

    folder, path = Path(sys.argv[1]), "model.layers.0.self_attn.q_proj"
    spec = BaseSpec(find_model(str(folder)), folder, Quantization(4))
    size = spec.architecture().hidden_size
    pair = {path: (torch.ones(2, size), torch.ones(size, 2))}
    stored = StoredAdapter(folder / "none", LoraSpec(rank=2, targets=(path,)), pair, None, None)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    with Peak() as peak:
        merged = merge_to(folder / "merged", stored, spec, tokenizer, shard_bytes=20_000_000)
    print(json.dumps({"grown": peak.grown, "bytes": merged.bytes, "shards": merged.shards}))
    """
)


def test_a_merge_takes_a_shard_and_a_few_tensors_of_memory(tmp_path: Path) -> None:
    numbers = {"model_type": "llama", "num_attention_heads": 8, "dtype": "bfloat16",
               "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16,
               "vocab_size": 8192}  # fmt: skip
    write_random(tmp_path, "safetensors", numbers)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = json.loads(run_python(MERGE, tmp_path, tmp_path / "tokenizer"))
    largest = 8192 * 512 * 4
    assert found["bytes"] > 120e6
    assert found["shards"] > 5
    assert found["grown"] < 20_000_000 + 3 * largest
