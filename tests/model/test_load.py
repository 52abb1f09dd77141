"""Loading a base: every form of checkpoint loads, every fault is named, and memory stays small."""

from __future__ import annotations

import json
import pickle
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import relative_error, run_python, slow
from tiny_models import TINY, load_folder, tiny_numbers, write_random
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.errors import ModelError
from qlora_kit.events import LoadProgress, Notice
from qlora_kit.layers.projections import projections
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model.architecture import architecture_from, build_skeleton, read_architecture
from qlora_kit.model.checkpoint import open_checkpoint
from qlora_kit.model.hardware import choose_hardware
from qlora_kit.model.load import BaseSpec, Placement, load_base, stored_quantization
from qlora_kit.model.names import ModelSource, known_models
from qlora_kit.model.random_weights import RandomWeights

Tensors = dict[str, Tensor]
NORM = "model.layers.1.input_layernorm.weight"
LINEAR = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
IDS = torch.tensor([[1, 7, 30, 41, 52, 63, 2]])


@pytest.fixture
def tiny(save_tiny: Callable[..., Path]) -> Path:
    return save_tiny("tinyllama")


def write_as(folder: Path, target: Path, form: str, tensors: Tensors | None = None) -> Path:
    """Write the model of `folder` into `target` as ".safetensors" or ".bin", in 1 or 3 files."""
    suffix, _, shards = form.partition(" ")
    tensors = load_file(folder / "model.safetensors") if tensors is None else tensors
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((folder / "config.json").read_text())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(tensors)
    parts = [names] if not shards else [names[start::3] for start in range(3)]
    files = [f"{stem}.{suffix}"] if not shards else [f"{stem}-{n}-of-3.{suffix}" for n in (1, 2, 3)]
    for file, part in zip(files, parts, strict=True):
        content = {name: tensors[name] for name in part}
        if suffix == "safetensors":
            save_file(content, target / file)
        else:
            torch.save(content, target / file)
    if shards:
        weight_map = {name: f for f, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return target


def changed(folder: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """Write the model of `folder` into `target` with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    return write_as(folder, target, "safetensors", tensors)


@torch.no_grad()
def logits(base: Any) -> Tensor:
    return base.model(input_ids=IDS).logits


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("form", ["safetensors", "safetensors sharded", "bin", "bin sharded"])
def test_every_form_of_checkpoint_gives_the_same_base(
    tiny: Path, tmp_path: Path, form: str, bits: int
) -> None:
    expected = load_folder(tiny, bits)
    found = load_folder(write_as(tiny, tmp_path, form), bits)
    assert torch.equal(logits(found), logits(expected))
    assert found.digest == expected.digest
    assert found.parameters == sum(
        t.numel() for t in load_file(tiny / "model.safetensors").values()
    )
    assert {each.frozen.weight.bits for each in projections(found.model).values()} == {bits}
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_bin_files_from_before_zip_archives_are_read(tiny: Path, tmp_path: Path) -> None:
    write_as(tiny, tmp_path, "bin")
    tensors = load_file(tiny / "model.safetensors")
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load_folder(tmp_path)), logits(load_folder(tiny)))


class Canary:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "sung"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(
    tiny: Path, tmp_path: Path, legacy: bool
) -> None:
    canary = tmp_path / "canary"
    folder = write_as(tiny, tmp_path / "model", "bin")
    content = {**load_file(tiny / "model.safetensors"), "code": Canary(canary)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: not a checkpoint of plain tensors"):
        load_folder(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary does sing


@pytest.mark.parametrize(
    # Protocol 2 is the one that torch writes.
    "content",
    [b"", b"not a pickle", pickle.dumps({"a": 1}, 2), pickle.dumps([1, 2], 2)],
)
def test_a_bin_file_of_something_else_is_refused(
    tiny: Path, tmp_path: Path, content: bytes
) -> None:
    write_as(tiny, tmp_path, "bin")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: not a checkpoint of plain tensors"):
        load_folder(tmp_path)


def test_a_bin_file_of_other_values_is_refused(tiny: Path, tmp_path: Path) -> None:
    write_as(tiny, tmp_path, "bin")
    torch.save({"step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a checkpoint of plain tensors"):
        load_folder(tmp_path)


def test_safetensors_go_before_bin(tiny: Path, tmp_path: Path) -> None:
    write_as(tiny, tmp_path, "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert torch.equal(logits(load_folder(tmp_path)), logits(load_folder(tiny)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_quantised_by_bitsandbytes_loads_as_it_is(
    save_tiny: Callable[..., Path], tmp_path: Path, bits: int, stored: torch.dtype
) -> None:
    import bitsandbytes.functional as bnb

    # On AVX-512, bitsandbytes itself unpacks widths that are no multiple of 64 wrongly.
    tiny = save_tiny(intermediate_size=128)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    )
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=stored, quantization_config=config)
    theirs.save_pretrained(tmp_path)
    quantization = stored_quantization(read_architecture(tmp_path))
    assert quantization == Quantization(bits=bits)
    base = load_folder(tmp_path, bits)
    layers = projections(base.model)
    assert len(layers) == 14
    for path, projection in layers.items():
        layer = projection.frozen
        weight = theirs.get_submodule(path).weight
        if bits == 4:
            expected = bnb.dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
        found = layer.weight.dequantize(expected.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    again = load_folder(write_as(tmp_path, tmp_path / "bin", "bin sharded"), bits)
    assert torch.equal(logits(again), logits(base))
    assert again.digest == base.digest


def test_another_quantisation_is_refused() -> None:
    architecture = architecture_from(tiny_numbers("tinyllama"))
    assert stored_quantization(architecture) is None
    architecture.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="quantised by gptq; expected bitsandbytes"):
        stored_quantization(architecture)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tiny: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(tiny, tmp_path, lambda t: t.update({key: torch.full((8,), 99.0)}))
    assert torch.equal(logits(load_folder(folder)), logits(load_folder(tiny)))


def test_a_stored_copy_of_a_tied_head_is_accepted(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    tied = save_tiny("phi-4-mini")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    folder = changed(tied, tmp_path, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert torch.equal(logits(load_folder(folder)), logits(load_folder(tied)))


def test_progress_is_announced_to_the_end(tiny: Path) -> None:
    seen: list[Any] = []
    spec = BaseSpec(ModelSource("tiny", folder=tiny), tiny, Quantization())
    load_base(spec, choose_hardware("cpu"), seen.append)
    steps = [event for event in seen if isinstance(event, LoadProgress)]
    assert len(steps) == len(load_file(tiny / "model.safetensors"))
    assert steps[-1] == LoadProgress(len(steps), len(steps))


def test_an_embedding_that_cannot_be_on_the_host_is_announced(tiny: Path) -> None:
    spec = BaseSpec(ModelSource("tiny", folder=tiny), tiny, Quantization())
    for asked, said in ((True, ["all of it runs on the CPU"]), (None, []), (False, [])):
        seen: list[Any] = []
        load_base(spec, choose_hardware("cpu"), seen.append, Placement(asked))
        told = [event.text.partition(": ")[2] for event in seen if isinstance(event, Notice)]
        assert told == said


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", [NORM, LINEAR, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(
    tiny: Path, tmp_path: Path, name: str, value: float, bits: int
) -> None:
    folder = changed(tiny, tmp_path, lambda t: t[name].view(-1)[17].fill_(value))
    with pytest.raises(ModelError, match=f"^{name}: holds NaN or infinity"):
        load_folder(folder, bits)


def test_missing_and_surplus_tensors_are_listed(tiny: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[NORM], tensors[LINEAR]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)

    with pytest.raises(ModelError) as caught:
        load_folder(changed(tiny, tmp_path, change))
    missing, surplus = caught.value.faults
    assert "missing tensors in the checkpoint (2)" in missing
    assert f"{LINEAR}, {NORM}" in missing
    assert "surplus tensors in the checkpoint (1): model.layers.7.mlp.up_proj.weight" in surplus


@pytest.mark.parametrize("name", [NORM, LINEAR, EMBEDDING])
def test_a_tensor_of_another_shape_is_refused_by_name(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    folder = changed(tiny, tmp_path, lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(ModelError, match=rf"^{name}: shape \(.*\) in the checkpoint; expected \("):
        load_folder(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_safetensors_file_is_refused(tiny: Path, tmp_path: Path, kept: int) -> None:
    write_as(tiny, tmp_path, "safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete safetensors file"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: missing"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected a file in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected a file in the same folder"),
        ('{"weight_map": {"a": 5}}', "not an index"),
        ('{"weight_map": {"a": ["b"]}}', "not an index"),
        ('{"weight_map": {}}', "not an index"),
        ('{"weight_map": []}', "not an index"),
        ("[]", "not an index"),
        ("{", "not an index"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(
    tiny: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load_folder(tmp_path)


def test_a_folder_without_weights_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no weights; expected .*--weights random"):
        load_folder(tmp_path)


def test_models_that_would_stay_unquantised_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "jetmoe"}))
    with pytest.raises(ModelError, match=r"jetmoe: .* would stay unquantised"):
        load_folder(tmp_path)


# ---------------------------------------------------------------- random weights


def random_base(name: str, **numbers: Any) -> Any:
    source = ModelSource(name, architecture={**tiny_numbers(name), **numbers})
    return load_base(BaseSpec(source, None, Quantization(), random=True), choose_hardware("cpu"))


def test_random_weights_are_the_same_in_any_order() -> None:
    skeleton = build_skeleton(architecture_from(tiny_numbers("qwen2.5-7b")))
    first, second = (RandomWeights(skeleton, 3, torch.device("cpu")) for _ in range(2))
    other = RandomWeights(skeleton, 4, torch.device("cpu"))
    forward = {name: first.read(name) for name in first.names}
    backward = {name: second.read(name) for name in reversed(second.names)}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    assert all(torch.equal(forward[name], first.read(name)) for name in forward)
    assert not torch.equal(forward[LINEAR], other.read(LINEAR))
    assert not torch.equal(forward[LINEAR], forward[LINEAR.replace("up", "gate")])
    assert forward[LINEAR].std().item() == pytest.approx(0.2, rel=0.05)


def test_a_random_base_is_the_same_twice() -> None:
    first, second = random_base("tinyllama"), random_base("tinyllama")
    assert first.digest == second.digest
    assert torch.equal(logits(first), logits(second))
    assert random_base("tinyllama", initializer_range=0.1).digest != first.digest


@pytest.mark.parametrize("name", ["tinyllama", "gemma-2-9b", "qwen2.5-7b", "qwen3-8b", "phi"])
def test_random_vectors_start_as_the_architecture_starts_them(name: str) -> None:
    numbers = {**TINY, "model_type": "phi"} if name == "phi" else tiny_numbers(name)
    numbers.pop("torch_dtype", None)
    config = architecture_from(numbers)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    source = RandomWeights(build_skeleton(config), 0, torch.device("cpu"))
    vectors = [each for each in source.names if expected[each].dim() == 1]
    assert len(vectors) >= 5
    for each in vectors:
        assert torch.equal(source.read(each).float(), expected[each]), each


def test_random_weights_load_where_layers_have_biases() -> None:
    source = ModelSource("biased", architecture=tiny_numbers("qwen2.5-7b"))
    base = load_base(BaseSpec(source, None, Quantization(4), random=True), choose_hardware("cpu"))
    biases = {name for name, _ in base.model.named_buffers() if name.endswith("q_proj.bias")}
    assert len(biases) == TINY["num_hidden_layers"]


# ---------------------------------------------------------------- memory

LOAD = textwrap.dedent(
    """
    from qlora_kit.model.hardware import choose_hardware
    from qlora_kit.model.load import BaseSpec, load_base
    from qlora_kit.model.names import ModelSource
    from qlora_kit.layers.quantize import Quantization

    folder, numbers, bits = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    tiny = {**numbers, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    hardware, quantization = choose_hardware("cpu"), Quantization(bits=bits)
    # Modules that are imported at the first load are no memory of the load.
    source = ModelSource("warm", architecture=tiny)
    load_base(BaseSpec(source, None, quantization, random=True), hardware)
    with Peak() as peak:
        base = load_base(BaseSpec(ModelSource("it", folder=folder), folder, quantization), hardware)
    held = {t.data_ptr(): t.nbytes for t in base.model.state_dict().values()}
    print(json.dumps({"grown": peak.grown, "held": sum(held.values())}))
    """
)


def load_memory(folder: Path, suffix: str, bits: int, **sizes: int) -> tuple[int, int, int]:
    """Write and load a random Llama; return bytes of the files, held, and at the peak."""
    numbers = {"model_type": "llama", "num_attention_heads": 8, "dtype": "bfloat16", **sizes}
    on_disk = write_random(folder, suffix, numbers)
    found = json.loads(run_python(LOAD, folder, json.dumps(numbers), bits).splitlines()[-1])
    return on_disk, found["held"], found["grown"]


@pytest.mark.parametrize("suffix", ["safetensors", *slow("bin")])
def test_loading_takes_little_more_than_what_it_leaves(tmp_path: Path, suffix: str) -> None:
    on_disk, held, peak = load_memory(
        tmp_path, suffix, 4,
        hidden_size=512, intermediate_size=1536, num_hidden_layers=7, vocab_size=8192,
    )  # fmt: skip
    largest = 8192 * 512 * 2
    assert on_disk > 60e6
    assert held < 0.5 * on_disk
    assert 0.5 * held < peak <= held + 3 * largest


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_a_gigabyte_takes_little_more_than_what_it_leaves(
    tmp_path: Path, suffix: str, bits: int
) -> None:
    on_disk, held, peak = load_memory(
        tmp_path, suffix, bits,
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=26, vocab_size=32000,
    )  # fmt: skip
    largest = 32000 * 1024 * 2
    assert on_disk > 1e9
    assert 0.5 * held < peak <= held + 3 * largest


def test_the_skeleton_of_a_7b_takes_no_memory() -> None:
    code = """
from qlora_kit.model.architecture import architecture_from, build_skeleton
from qlora_kit.model.names import known_models
source = known_models()["deepseek-7b"]
with Peak() as peak:
    skeleton = build_skeleton(architecture_from(source.architecture))
print(sum(p.numel() for p in skeleton.parameters()), peak.grown)
"""
    parameters, grown = map(int, run_python(code).split())
    assert parameters == known_models()["deepseek-7b"].parameters
    assert grown < 300e6


def test_quantised_weights_stay_near_the_originals(tiny: Path) -> None:
    exact = logits(load_folder(tiny))
    errors = {bits: relative_error(logits(load_folder(tiny, bits)), exact) for bits in (4, 8)}
    assert errors[8] < 0.1 < errors[4] < 1


def test_open_checkpoint_reads_each_tensor_alone(tiny: Path, tmp_path: Path) -> None:
    expected = load_file(tiny / "model.safetensors")
    for form in ("safetensors sharded", "bin sharded"):
        source = open_checkpoint(write_as(tiny, tmp_path / form, form))
        assert sorted(source.names) == sorted(expected)
        assert all(torch.equal(source.read(name), expected[name]) for name in expected)


def test_what_bitsandbytes_left_unquantised_stays_so(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["o_proj", "lm_head"]
    )
    AutoModelForCausalLM.from_pretrained(
        save_tiny(), quantization_config=config, dtype=torch.float32
    ).save_pretrained(tmp_path)
    layers = projections(load_folder(tmp_path, 4).model)
    bits = {path.rsplit(".", 1)[-1]: each.frozen.weight.bits for path, each in layers.items()}
    assert bits["o_proj"] == 16
    assert bits["q_proj"] == bits["down_proj"] == 4


def test_a_checkpoint_quantised_by_something_else_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(save_tiny(), tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised by gptq; expected bitsandbytes or none"):
        load_folder(tmp_path / "gptq", 4)
