"""LoRA on the stacked experts of a mixture: PEFT's numbers, PEFT's files, and the merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import relative_error
from tiny_models import MIXTURES, OTHERS, fill_lora, load_folder, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.config import TrainConfig
from qlora_kit.errors import AdapterError, ConfigError, QloraKitError
from qlora_kit.export.merge import Merge
from qlora_kit.export.merge_report import MergeReport
from qlora_kit.export.verify import verify_merge
from qlora_kit.layers import experts
from qlora_kit.layers.projections import projections, router_paths, stacks
from qlora_kit.layers.weight import PlainWeight
from qlora_kit.lora.several import load_adapters
from qlora_kit.lora.stacked import folded
from qlora_kit.step.reducers import apply, resolve

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {**MIXTURES, **{k: OTHERS[k] for k in ("mixtral", "gpt-oss")}}
# The first has a stack a layer for gate and up; the last has transposed stacks with biases.
QUICK = ("qwen3-moe", "gpt-oss")
# What rounding to fp16 makes of layers as widely spread as these; the gate of gpt-oss has a cube.
FP16 = {"qwen3-moe": 2e-3, "gpt-oss": 5e-3}
BOTH = ("attention", "experts")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(tmp_path_factory.mktemp(kind), KINDS[kind])
        return made[kind]

    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def attached(folder: Path, bits: int, **options: Any) -> qk.Adapter:
    spec = qk.LoraSpec(**{"rank": 4, "targets": BOTH, **options})
    adapter = qk.attach(load_folder(folder, bits), spec)
    fill_lora(adapter)
    return adapter


@torch.no_grad()
def unpacked_twin(folder: Path, adapter: qk.Adapter) -> Any:
    """Return transformers' own model with the weights that the base multiplies with."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = adapter.base.model
    for path, each in projections(model).items():
        weight = each.frozen.weight.dequantize(torch.float32)
        if not each.is_expert:
            twin.get_submodule(path).weight.copy_(weight)
            continue
        stack, _, number = path.rpartition(".")
        is_transposed = stacks(model)[stack].is_transposed
        twin.get_parameter(stack)[int(number)].copy_(weight.T if is_transposed else weight)
    return twin


def in_peft(folder: Path, adapter: qk.Adapter, saved: Path, **options: Any) -> Any:
    """Open a saved adapter of the kit in PEFT, on the weights that the base multiplies with."""
    return PeftModel.from_pretrained(unpacked_twin(folder, adapter), saved, **options).eval()


def reported(tmp_path: Path, adapter: qk.Adapter, spec: qk.BaseSpec, **options: Any) -> MergeReport:
    """Merge and verify an adapter; return the report."""
    found: list[MergeReport] = []

    def check(merge: Merge, made: Path) -> None:
        found.append(verify_merge(merge, made))

    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    options = {"dtype": torch.float32, "check": check, **options}
    qk.merge_to(tmp_path / "merged", stored, spec, make_tokenizer(), **options)
    return found[0]


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", QUICK)
def test_forward_and_gradients_are_those_of_peft(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, bits: int
) -> None:
    folder = folder_of(kind)
    adapter = attached(folder, bits, alpha=3)
    saved = save(adapter, tmp_path / "adapter")
    twin = in_peft(folder, adapter, saved, is_trainable=True)
    assert relative_error(logits(adapter.base.model), logits(twin)) <= 1e-5
    target = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(3))
    for model in (adapter.base.model, twin):
        (model(input_ids=IDS).logits * target).sum().backward()
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert len(theirs) == len(adapter.parameters())
    for path, layer in adapter.layers.items():
        for side, own in (("A", layer.lora_A.grad), ("B", layer.lora_B.grad)):
            assert own is not None
            name = f"base_model.model.{path}.lora_{side}.default.weight"
            assert relative_error(own, theirs[name]) <= 1e-5
    for path, stack in adapter.stacks.items():
        inner = ".base_layer" if path.endswith("gate_up_proj") else ""
        module = f"base_model.model.{path.rpartition('.')[0]}{inner}"
        assert stack.lora_A.grad is not None
        assert stack.lora_B.grad is not None
        for side, own in zip("AB", folded(stack.lora_A.grad, stack.lora_B.grad), strict=True):
            assert relative_error(own, theirs[f"{module}.lora_{side}.default.weight"]) <= 1e-5


@pytest.mark.parametrize("kind", ["mixtral", *(kind for kind in MIXTURES if kind != "qwen3-moe")])
def test_other_mixtures_open_in_peft_and_merge_too(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = folder_of(kind)
    adapter = attached(folder, 4)
    saved = save(adapter, tmp_path / "saved")
    assert (
        relative_error(logits(adapter.base.model), logits(in_peft(folder, adapter, saved))) <= 1e-5
    )
    reported(tmp_path, adapter, spec_of(folder))
    assert difference(adapter, plain(tmp_path / "merged")) <= 1e-5


def test_an_expert_that_no_token_chose_has_a_gradient_of_zeros(
    folder_of: Callable[[str], Path],
) -> None:
    adapter = attached(folder_of("qwen3-moe"), 4)
    router: Any = adapter.base.model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        # Expert 1 is nobody's choice: with the same scores, the first two experts are taken.
        router.weight.zero_()
        router.weight[[0, 2]] = torch.randn(1, router.weight.shape[1]) * 0
    adapter.base.model(input_ids=IDS).logits.square().sum().backward()
    found = [
        [float(grad.abs().max()) for grad in stack.lora_B.grad]
        for path, stack in adapter.stacks.items()
        if "layers.0" in path and stack.lora_B.grad is not None
    ]
    assert len(found) == 2
    for norms in found:
        assert sum(norm > 0 for norm in norms) == 2
        assert sum(norm == 0 for norm in norms) == 2


@pytest.mark.parametrize(("kind", "runs"), [("qwen3-moe", 2), ("olmoe", 2), ("qwen2-moe", 3)])
def test_recomputation_stops_before_experts_and_changes_no_gradient(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, runs: int
) -> None:
    """Of a shared expert that is added after them, they run once more."""
    adapter = attached(folder_of(kind), 4)
    model, own, seen = adapter.base.model, experts._Call.output, []

    def output(call: Any, number: int, *inputs: Any) -> Tensor:
        seen.append(number)
        return own(call, number, *inputs)

    monkeypatch.setattr(experts._Call, "output", output)
    logits(model)
    once = len(seen)
    found = []
    for options in ({"recompute": True}, {"recompute": False}, {"keep_layers": 1}):
        seen.clear()
        config = TrainConfig(device="cpu", mlp_tile_tokens=0, **options)
        apply(model, resolve(config, adapter.base.hardware), adapter.base.hardware)
        model.train()
        model(input_ids=IDS).logits.square().sum().backward()
        found.append([p.grad.clone() for p in adapter.parameters().values() if p.grad is not None])
        for parameter in adapter.parameters().values():
            parameter.grad = None
        if config.recompute and not config.keep_layers:
            assert len(seen) == runs * once
        elif not config.recompute:
            assert len(seen) == 2 * once
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# ---------------------------------------------------------------- the same files


@pytest.mark.parametrize(
    ("targets", "parameters"),
    [
        (("experts",), ["experts.down_proj", "experts.gate_up_proj"]),
        (("q_proj", "down_proj"), ["experts.down_proj"]),
        (
            ("v_proj", r".*\.1\.mlp\.experts\..*"),
            [
                "model.layers.1.mlp.experts.down_proj",
                "model.layers.1.mlp.experts.gate_up_proj",
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning:peft.*")
def test_the_kit_writes_what_peft_opens_and_reads_it_back(
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    targets: tuple[str, ...],
    parameters: list[str],
) -> None:
    folder = folder_of("qwen3-moe")
    adapter = attached(
        folder, 16, targets=targets, rslora=True, rank_pattern={"experts.down_proj": 2}
    )
    saved = save(adapter, tmp_path / "adapter")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_parameters"] == parameters
    expected = logits(adapter.base.model)
    assert relative_error(logits(in_peft(folder, adapter, saved)), expected) <= 1e-5
    again = load_folder(folder)
    loaded = qk.load_adapter(again, saved)
    assert torch.equal(logits(again.model), expected)
    for name, parameter in adapter.parameters().items():
        assert torch.equal(loaded.parameters()[name], parameter)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("qwen2-moe", ["shared_expert"]), ("deepseek-v3", ["mlp", "shared_experts"])],
)
def test_peft_does_not_take_a_shared_expert_for_the_experts(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, modules: list[str]
) -> None:
    folder = folder_of(kind)
    adapter = attached(folder, 16, targets=("all-linear",), dropout=0.1)
    saved = save(adapter, tmp_path / "adapter")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"{module}.{name}_proj.weight" for module in modules for name in ("down", "gate", "up")
    ]
    expected = logits(adapter.base.model)
    assert relative_error(logits(in_peft(folder, adapter, saved)), expected) <= 1e-5
    again = load_folder(folder)
    qk.load_adapter(again, saved)
    assert torch.equal(logits(again.model), expected)


PEFTS: dict[str, dict[str, Any]] = {
    "parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    # PEFT takes the names of layers that the experts were before they were stacked.
    "old names": {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]},
    "one alone": {"target_modules": [], "target_parameters": ["gate_up_proj"]},
    "patterns": {
        "target_modules": ["k_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"gate_up_proj": 5},
        "use_rslora": True,
    },
}


@torch.no_grad()
def saved_by_peft(base: Path, folder: Path, **options: Any) -> tuple[Path, Tensor]:
    """Save an adapter with PEFT, with a B that is not zero; return it and its logits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped.save_pretrained(folder)
    return folder, wrapped(input_ids=IDS).logits


@pytest.mark.parametrize("form", PEFTS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
def test_an_adapter_of_peft_computes_and_merges_as_in_peft(
    folder_of: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    base = folder_of("qwen3-moe")
    folder, expected = saved_by_peft(base, tmp_path / "theirs", **PEFTS[form])
    loaded = load_folder(base)
    before = logits(loaded.model)
    adapter = qk.load_adapter(loaded, folder)
    assert adapter.stacks
    assert relative_error(logits(loaded.model), expected) <= 1e-5
    qk.merge_to(
        tmp_path / "merged", qk.read_adapter(folder), spec_of(base, 16), make_tokenizer(),
        dtype=torch.float32, check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged")), expected) <= 1e-5
    assert torch.equal(logits(qk.detach(adapter).model), before)


# ---------------------------------------------------------------- the merge


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", QUICK)
def test_a_merge_is_verified_expert_by_expert(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, bits: int
) -> None:
    folder = folder_of(kind)
    adapter = attached(folder, bits, alpha=8)
    idle = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        adapter.stacks[idle].lora_B[2].zero_()
    report = reported(tmp_path, adapter, spec_of(folder, bits))
    assert difference(adapter, plain(tmp_path / "merged")) <= 1e-5
    of_experts = [layer for layer in report.layers if ".experts." in layer.path]
    assert len(of_experts) == 2 * 2 * 4
    assert len(report.layers) == len(of_experts) + 2 * 4
    assert report.layers[-1].path == f"{idle}.2"
    assert report.layers[0].delta > 0, "the worst of the trained comes first"
    assert f"1 of 16 layers of experts have no delta, such as {idle}.2" in report.verdict.text[-1]
    half = tmp_path / "half"
    half.mkdir()
    reported(half, adapter, spec_of(folder, bits), dtype=torch.float16)
    assert difference(adapter, plain(half / "merged")) <= FP16[kind]
    # Merged in memory, it computes the same.
    expected = logits(adapter.base.model)
    assert relative_error(logits(qk.merge(adapter).model), expected) <= 1e-5


def test_a_wrong_expert_in_the_files_is_named(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("qwen3-moe")
    adapter = attached(folder, 4)

    def spoil(merge: Merge, made: Path) -> None:
        tensors = load_file(made / "model.safetensors")
        tensors["model.layers.0.mlp.experts.down_proj"][3, 5, 7] += 0.5
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        verify_merge(merge, made)

    with pytest.raises(QloraKitError, match=r"layers\.0\.mlp\.experts\.down_proj\.3\.weight"):
        reported(tmp_path, adapter, spec_of(folder), check=spoil)


# ---------------------------------------------------------------- what is asked for


def test_what_the_targets_of_a_mixture_mean(folder_of: Callable[[str], Path]) -> None:
    base = load_folder(folder_of("qwen2-moe"), 4)
    names = {}
    for target in ("all-linear", "mlp", "experts", "down_proj"):
        adapter = qk.attach(base, qk.LoraSpec(rank=2, targets=(target,)))
        endings = {path.split(".", 3)[-1] for path in (*adapter.layers, *adapter.stacks)}
        names[target] = endings
        assert adapter.trainable == sum(p.numel() for p in adapter.parameters().values())
        assert (
            qk.attach(qk.detach(adapter), qk.LoraSpec(rank=2, targets=(target,))).trainable
            == adapter.trainable
        )
        qk.detach(adapter)
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    stacked = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert names == {
        "all-linear": attention | shared,
        "mlp": shared,
        "experts": stacked,
        "down_proj": {"mlp.experts.down_proj", "mlp.shared_expert.down_proj"},
    }


def test_routers_are_neither_quantised_nor_trained(folder_of: Callable[[str], Path]) -> None:
    base = load_folder(folder_of("qwen2-moe"), 4)
    found = router_paths(base.model)
    assert [path.split(".", 3)[-1] for path in found] == ["mlp.gate", "mlp.shared_expert_gate"] * 2
    assert not [path for path in projections(base.model) if path.startswith(tuple(found))]
    for path in found:
        weight: Any = base.model.get_submodule(path).weight
        values = weight.values if isinstance(weight, PlainWeight) else weight
        assert values.dtype == torch.float32
        assert not values.requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ("mlp",)}, r"'mlp' matches no linear layer; expected attention, experts, all"),
        ({"targets": ("gate",)}, r"'gate' names a router, which stays frozen; .*leave it out"),
        (
            {"targets": ("experts.down_proj.999",)},
            r"names an expert of model\.layers\.0\.mlp\.experts\.down_proj, whose 4 are",
        ),
        ({"targets": ("gate_proj",)}, r"'gate_proj' matches no linear .*one of .*gate_up_proj"),
        (
            {"targets": ("experts",), "dropout": 0.1},
            r"--lora-dropout: 0\.1, and --targets names",
        ),
        (
            {"targets": ("experts",), "rank_pattern": {"down_proj.3": 2}},
            r"--rank-pattern: 'down_proj\.3' names no targeted layer; expected one of gate_up_proj",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused_in_one_line(
    folder_of: Callable[[str], Path], options: dict[str, Any], says: str
) -> None:
    base = load_folder(folder_of("qwen3-moe"))
    with pytest.raises(ConfigError, match=says) as caught:
        qk.attach(base, qk.LoraSpec(**options))
    assert len(caught.value.faults) == 1


def change_files(
    folder: Path, config: dict[str, Any], change: Callable[[dict[str, Tensor]], Any]
) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        (
            {"target_parameters": ["mlp.gate.weight"]}, lambda t: None,
            r"target_parameters names mlp\.gate\.weight, which is no stack of experts; expected ga",
        ),
        (
            {"target_parameters": ["experts.down_proj"]}, lambda t: None,
            r"tensors of model\.layers\.0\.mlp\.experts\.base_layer, and target_parameters does",
        ),
        (
            {"target_parameters": ["experts.up_proj", "experts.down_proj"]}, lambda t: None,
            r"layers\.0\.mlp\.experts\.up_proj has 4 experts, and 0 in",
        ),
        (
            {"target_parameters": None}, lambda t: None,
            r"tensors of model\.layers\.0\.mlp\.experts, and target_parameters does not say",
        ),
        (
            {"target_parameters": ["expert.down_proj"]}, lambda t: None,
            r"target_parameters names expert\.down_proj, and there is no tensor of it",
        ),
        (
            {}, lambda t: [t.pop(key) for key in list(t) if "1.mlp.experts.base_layer" in key],
            r"names model\.layers\.1\.mlp\.experts\.gate_up_proj, and its tensors .* are missing",
        ),
        (
            {}, lambda t: [t.pop(key) for key in list(t) if "1.mlp.experts" in key],
            r"targets model\.layers\.1\.mlp\.experts\.down_proj, and its tensors are missing",
        ),
        (
            {}, lambda t: t.update({KEY.format("A"): torch.ones(15, 48)}),
            r"experts\.down_proj has A \(15, 48\) and B \(64, 16\); expected rank 4 for each of it",
        ),
        (
            {},
            lambda t: t.update(
                {KEY.format("A"): torch.ones(12, 48), KEY.format("B"): torch.ones(64, 12)}
            ),
            r"its model\.layers\.0\.mlp\.experts\.down_proj has 3 experts, and 4 in",
        ),
        (
            {}, lambda t: t.update({KEY.format("A"): torch.ones(16, 47)}),
            r"layer model\.layers\.0\.mlp\.experts\.down_proj\.0 \(64, 47\) is of shape \(64, 48\)",
        ),
        (
            {}, lambda t: t[KEY.format("A")][5].fill_(float("nan")),
            r"experts\.down_proj\.1 holds NaN or infinity",
        ),
        ({"lora_dropout": 0.1}, lambda t: None, "lora_dropout is 0.1 with target_parameters"),
    ],
)  # fmt: skip
def test_files_that_are_no_whole_adapter_are_refused_in_one_line(
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], Any],
    says: str,
) -> None:
    folder = folder_of("qwen3-moe")
    saved = save(attached(folder, 16), tmp_path / "adapter")
    change_files(saved, config, change)
    with pytest.raises(AdapterError, match=says) as caught:
        qk.load_adapter(load_folder(folder), saved)
    assert "\n" not in caught.value.faults[0]


def test_one_of_several_adapters_trains_no_experts(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("qwen3-moe")
    saved = save(attached(folder, 16), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"trains experts \(model\.layers.*use it by itself"):
        load_adapters(load_folder(folder), {"one": saved})
