"""Classifiers of texts and taggers of words, of every family: what they compute, how they are
trained, saved, merged, opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import save
from peft import LoraConfig, PeftModel, get_peft_model
from support import relative_error
from tiny_models import fill_lora
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import qlora_kit as qk
from qlora_kit.config import LabelKind
from qlora_kit.data.labels import Labels
from qlora_kit.errors import ModelError
from qlora_kit.export.rows import some_rows
from qlora_kit.export.verify import verify_merge
from qlora_kit.model.class_head import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, ClassHead
from qlora_kit.model.hardware import Hardware
from qlora_kit.opening.tasks import classifier
from qlora_kit.plan.simulate import predict, simulated_run
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step.groups import set_groups
from qlora_kit.step.kernels import Kernels
from qlora_kit.step.recompute import set_recompute
from qlora_kit.step.settle import settle
from qlora_kit.tasks.classify import ClassifyObjective, LabelledBatch
from qlora_kit.tasks.tag import TagObjective

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "max_position_embeddings": 70, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_STILL = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, **_STILL},
    "roberta": {**_SIZES, **_STILL, "pad_token_id": 1, "bos_token_id": 0},
    "modernbert": {**_SIZES, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16},
    "deberta-v2": {
        **_SIZES, **_STILL, "relative_attention": True, "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64, "pooler_dropout": 0.0,
    },
    "distilbert": {
        "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 96,
        "max_position_embeddings": 70, "initializer_range": 0.2, "dropout": 0.0,
        "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0,
    },
    "electra": {**_SIZES, **_STILL, "embedding_size": 32},
    "llama": {**_SIZES, "num_key_value_heads": 2, "classifier_dropout": 0.0},
    "gpt2": {
        **_SIZES, "n_inner": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "classifier_dropout": 0.0,
    },
}  # fmt: skip
NAMES = ("bad", "so-so", "good")
# Its relative positions are read from a table that no module looks up, so it is not run in parts.
RUN_IN_PARTS = [kind for kind in KINDS if kind != "deberta-v2"]
ROWS = [
    {"input_ids": list(range(3, 20)), "labels": [1], "row": 0},
    {"input_ids": list(range(30, 41)), "labels": [2], "row": 1},
    {"input_ids": list(range(50, 63)), "labels": [0], "row": 2},
]
# A tag at some tokens; the first and the last of a row are among them.
TAGGED = [
    {**row, "labels": [(n // 2) % 3 if n % 2 == 0 else -100 for n in range(len(row["input_ids"]))]}
    for row in ROWS
]
TASKS: dict[LabelKind, tuple[str, type[Any], str, list[dict[str, Any]]]] = {
    "single": (SEQUENCE_CLASSIFICATION, AutoModelForSequenceClassification, "SEQ_CLS", ROWS),
    "tags": (TOKEN_CLASSIFICATION, AutoModelForTokenClassification, "TOKEN_CLS", TAGGED),
}
of_each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny random base, without any head, once."""
    saved: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in saved:
            torch.manual_seed(0)
            model = AutoModel.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data.add_(torch.randn_like(parameter) * 0.1)
            saved[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(saved[kind])
        return saved[kind]

    return folder


def spec_of(
    folder: Path, bits: int = 16, kind: LabelKind = "single", **changes: Any
) -> qk.BaseSpec:
    pad = json.loads((folder / "config.json").read_text()).get("pad_token_id", 0)
    head = ClassHead(kind, NAMES if kind != "regression" else ("score",), pad)
    loads = TASKS[kind if kind in TASKS else "single"][0]
    return qk.BaseSpec(
        qk.find_model(str(folder)), folder, qk.Quantization(bits), loads=loads, classes=head,
        **changes,
    )  # fmt: skip


def adapter_on(spec: qk.BaseSpec, **options: Any) -> qk.Adapter:
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    asked = {"rank": 4, "targets": ("all-linear",), **options}
    assert spec.classes is not None
    peft_type = TASKS.get(spec.classes.kind, TASKS["single"])[2]
    lora = qk.LoraSpec(whole=spec.trained_whole(), task_type=peft_type, **asked)
    return qk.attach(base, lora, seed=1)


def objective_of(adapter: qk.Adapter) -> ClassifyObjective:
    classes = adapter.base.spec.classes
    assert classes is not None
    kind = TagObjective if classes.kind == "tags" else ClassifyObjective
    return kind(adapter.base, classes.pad_token_id or 0)


def with_mask(batch: LabelledBatch) -> dict[str, torch.Tensor]:
    columns = torch.arange(batch.input_ids.shape[1])
    mask = (columns < torch.tensor(batch.lengths).unsqueeze(1)).long()
    return {"input_ids": batch.input_ids, "attention_mask": mask}


def without_padding(logits: torch.Tensor, batch: LabelledBatch) -> torch.Tensor:
    """The logits of texts, or those of the tokens that are no padding."""
    return logits if logits.dim() == 2 else logits[with_mask(batch)["attention_mask"].bool()]


def twin_of(adapter: qk.Adapter) -> Any:
    """The same classifier in transformers, the deltas added to weights that require a gradient."""
    spec = adapter.base.spec
    assert spec.folder is not None
    assert spec.classes is not None
    twin = TASKS[spec.classes.kind][1].from_pretrained(
        spec.folder, num_labels=len(spec.classes.names), pad_token_id=spec.classes.pad_token_id,
        dtype=torch.float32, attn_implementation="eager",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for path, whole in adapter.whole.items():
            twin.get_submodule(path).weight.copy_(whole.weight)
            if whole.bias is not None:
                twin.get_submodule(path).bias.copy_(whole.bias)
        for path, layer in adapter.layers.items():
            weight = layer.frozen.weight.dequantize(torch.float32) + layer.delta()
            twin.get_submodule(path).weight.copy_(
                weight.T if layer.frozen.is_transposed else weight
            )
    return twin


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
@of_each_task
@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_loss_and_gradients_are_those_of_a_plain_twin(
    folder_of: Callable[[str], Path], task: LabelKind, kind: str, bits: int
) -> None:
    adapter = adapter_on(spec_of(folder_of(kind), bits, task))
    fill_lora(adapter, std=0.05)
    objective, twin = objective_of(adapter), twin_of(adapter)
    batch = objective.batch(TASKS[task][3])
    set_recompute(adapter.base.model, True)
    groups = set_groups(adapter.base.model)
    assert (groups == 0) is (kind in ("modernbert", "gpt2"))
    adapter.base.model.train()
    loss = objective.loss_sum(batch)
    loss.backward()
    expected = twin(**with_mask(batch), labels=batch.targets).loss * batch.weight
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert adapter.layers
    assert adapter.whole
    for path, whole in adapter.whole.items():
        theirs = twin.get_submodule(path)
        assert relative_error(whole.weight.grad, theirs.weight.grad) <= 1e-4, path
        if whole.bias is not None:
            assert relative_error(whole.bias.grad, theirs.bias.grad) <= 1e-4, path
    for path, layer in adapter.layers.items():
        wide = twin.get_submodule(path).weight.grad * layer.scaling
        wide = wide.T if layer.frozen.is_transposed else wide
        if wide.norm() > 1e-6:  # the key's bias of softmax, for one, has no gradient
            assert relative_error(layer.lora_A.grad, layer.lora_B.T @ wide) <= 1e-3, path
            assert relative_error(layer.lora_B.grad, wide @ layer.lora_A.T) <= 1e-3, path


@pytest.mark.parametrize("kind", KINDS)
@of_each_task
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_opens_in_peft_head_included_and_one_of_peft_here(
    folder_of: Callable[[str], Path], tmp_path: Path, task: LabelKind, kind: str
) -> None:
    folder = folder_of(kind)
    adapter = adapter_on(spec_of(folder, kind=task))
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(TASKS[task][3])
    adapter.base.model.eval()
    with torch.no_grad():
        expected = adapter.base.model(**batch.inputs).logits
    ours = save(adapter, tmp_path / "ours")
    record = json.loads((ours / "qlora_kit.json").read_text())
    assert (record["labels"], record["label_kind"]) == (list(NAMES), task)
    pad = adapter.base.spec.classes.pad_token_id  # type: ignore[union-attr]
    plain = TASKS[task][1].from_pretrained(
        folder, num_labels=3, pad_token_id=pad, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(plain, ours).eval()
    with torch.no_grad():
        found = theirs(**with_mask(batch)).logits
        assert (
            relative_error(without_padding(found, batch), without_padding(expected, batch)) <= 1e-5
        )
    theirs.save_pretrained(tmp_path / "theirs")
    again = qk.load_base(spec_of(folder, kind=task), qk.choose_hardware("cpu"))
    qk.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert relative_error(again.model(**batch.inputs).logits, expected) <= 1e-6


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", RUN_IN_PARTS)
@of_each_task
def test_a_merge_is_verified_and_opens_with_its_labels(
    folder_of: Callable[[str], Path], tmp_path: Path, task: LabelKind, kind: str, bits: int
) -> None:
    spec = spec_of(folder_of(kind), bits, task)
    adapter = adapter_on(spec)
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(TASKS[task][3])
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    pad = spec.classes.pad_token_id or 0  # type: ignore[union-attr]
    rows = some_rows(TASKS[task][3], 1000, pad, "rows", spec)
    reports = []
    qk.merge_to(
        tmp_path / "merged", stored, spec, make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: reports.append(verify_merge(merge, made, rows)),
    )  # fmt: skip
    written, without = (reports[0].variant(name) for name in ("written", "base"))
    assert written is not None
    assert without is not None
    assert written.logit_error <= 1e-5
    assert written.mean_kl <= 1e-6
    assert without.mean_kl > 1e-4, "without the adapter it is another model"
    assert reports[0].tokens == batch.weight
    merged = TASKS[task][1].from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    adapter.base.model.eval()
    with torch.no_grad():
        expected = without_padding(adapter.base.model(**batch.inputs).logits, batch)
        found = without_padding(merged(**with_mask(batch)).logits, batch)
        assert relative_error(found, expected) <= 1e-5
    assert merged.config.id2label == dict(enumerate(NAMES))
    assert merged.config.architectures == [type(merged).__name__]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_merge_that_is_packed_again_opens_in_transformers(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    spec = spec_of(folder_of(kind), 4)
    adapter = adapter_on(spec)
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(ROWS)
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    qk.merge_to(
        tmp_path / "packed", stored, spec, make_tokenizer(), dtype=torch.float32, requantize=True
    )
    packed = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "packed", dtype=torch.float32
    )
    layers = {type(module).__name__ for module in packed.base_model.modules()}
    heads = {type(module).__name__ for module in packed.classifier.modules()}
    assert "Linear4bit" in layers
    assert "Linear4bit" not in heads
    ours = qk.load_base(spec_of(tmp_path / "packed", 4), qk.choose_hardware("cpu")).model
    with torch.no_grad():
        expected = ours(**batch.inputs).logits
        # In training mode bitsandbytes computes 4 bits exactly; nothing here drops out.
        assert relative_error(packed.train()(**with_mask(batch)).logits, expected) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_training_as_in_peft(folder_of: Callable[[str], Path]) -> None:
    """Twenty steps from the same start, head and LoRA, give the same losses."""
    folder = folder_of("bert")
    adapter = adapter_on(spec_of(folder), targets=("attention",))
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype=torch.float32
    )
    twin = get_peft_model(
        plain,
        LoraConfig(r=4, lora_alpha=32, task_type="SEQ_CLS", target_modules=list(adapter.layers)),
    ).train()
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            for side in "AB":
                own = getattr(layer, f"lora_{side}")
                named[f"base_model.model.{path}.lora_{side}.default.weight"].copy_(own)
        head = "base_model.model.classifier.modules_to_save.default"
        named[f"{head}.weight"].copy_(adapter.whole["classifier"].weight)
        named[f"{head}.bias"].copy_(adapter.whole["classifier"].bias)
    theirs = [parameter for parameter in named.values() if parameter.requires_grad]
    objective = objective_of(adapter)
    batch = objective.batch(ROWS)
    adapter.base.model.train()
    ours = list(adapter.parameters().values())
    assert sum(each.numel() for each in ours) == sum(each.numel() for each in theirs)
    optimizers = [torch.optim.AdamW(each, lr=1e-3) for each in (ours, theirs)]
    losses: list[tuple[float, float]] = []
    for _ in range(20):
        own = objective.loss_sum(batch) / len(ROWS)
        other = twin(**with_mask(batch), labels=batch.targets).loss
        for loss, optimizer in zip((own, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((own.item(), other.item()))
    assert losses[-1][0] < 0.7 * losses[0][0], "it did learn"
    assert all(own == pytest.approx(other, rel=1e-5) for own, other in losses)


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_loss_of_each_kind_of_label_is_that_of_transformers(
    folder_of: Callable[[str], Path], architecture: str, kind: LabelKind
) -> None:
    adapter = adapter_on(spec_of(folder_of(architecture), kind=kind))
    labels: dict[str, list[list[float]]] = {
        "single": [[1], [2], [0]], "multi": [[0, 2], [], [1]], "regression": [[0.5], [-1.0], [2.0]],
    }  # fmt: skip
    rows = [{**row, "labels": own} for row, own in zip(ROWS, labels[kind], strict=True)]
    objective = objective_of(adapter)
    batch = objective.batch(rows)
    adapter.base.model.eval()
    with torch.no_grad():
        found = objective.loss_sum(batch) / batch.weight
        expected = adapter.base.model(**with_mask(batch), labels=batch.targets).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_count_rows(folder_of: Callable[[str], Path]) -> None:
    adapter = adapter_on(spec_of(folder_of("bert")))
    plain = objective_of(adapter)
    weighed = ClassifyObjective(adapter.base, 0, class_weights=(2.0, 1.0, 0.5))
    batch = plain.batch(ROWS)
    adapter.base.model.eval()
    losses = plain.measured(batch).losses
    wanted = losses @ torch.tensor([1.0, 0.5, 2.0])
    assert weighed.loss_sum(batch).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_encoder_writes_no_text(folder_of: Callable[[str], Path]) -> None:
    spec = qk.BaseSpec(qk.find_model(str(folder_of("bert"))), folder_of("bert"), qk.Quantization(4))
    with pytest.raises(
        ModelError, match=r"bert: reads whole texts .*; expected .*; train a classifier"
    ):
        spec.skeleton()


def test_a_base_without_its_layers_is_still_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of("bert")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layer.1.attention.self.query.weight" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing tensors .*query\.weight"):
        qk.load_base(spec_of(tmp_path), qk.choose_hardware("cpu"))


@of_each_task
@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "llama"])
def test_a_plan_for_a_gpu_chooses_kernels_as_a_run_does(
    folder_of: Callable[[str], Path], kind: str, task: LabelKind
) -> None:
    expected = {
        "modernbert": ("nf4", "lora", "rotary"),
        "llama": ("nf4", "lora", "norm", "rotary", "gate"),
    }.get(kind, ("nf4", "lora"))
    spec, head = spec_of(folder_of(kind), 4, task), classifier(Labels(task, NAMES), 0)
    lora = qk.LoraSpec(
        targets=("all-linear",), whole=spec.trained_whole(), task_type=head.peft_type
    )
    gpu = Hardware(torch.device("meta"), torch.bfloat16, "stands in for a GPU")
    subject = Subject(spec, lora, gpu, RowSizes(24), head)
    config = qk.TrainConfig(eval_batch_size=1)
    with simulated_run(subject, config, spec.skeleton()) as run:
        assert settle(run.model, config, gpu).kernels == Kernels(expected)
    assert predict(subject, config).peak.bytes > 0


def test_the_names_in_a_checkpoint_are_read_once(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder_of("bert"), tmp_path / "bert"))
    spec = spec_of(copy)
    whole = spec.trained_whole()
    (copy / "model.safetensors").unlink()
    assert spec.trained_whole() == whole
    with pytest.raises(ModelError, match="no weights"):
        spec_of(copy).trained_whole()


def test_weights_of_tags_count_words(folder_of: Callable[[str], Path]) -> None:
    adapter = adapter_on(spec_of(folder_of("llama"), kind="tags"))
    plain = objective_of(adapter)
    weighed = TagObjective(adapter.base, 0, class_weights=(2.0, 1.0, 0.5))
    batch = plain.batch(TAGGED)
    adapter.base.model.eval()
    with torch.no_grad():
        logits, targets = plain.logits(batch), batch.targets
        is_word = targets != -100
        losses = -logits[is_word].log_softmax(1).gather(1, targets[is_word].unsqueeze(1)).squeeze(1)
        wanted = losses @ torch.tensor([2.0, 1.0, 0.5])[targets[is_word]]
        assert plain.loss_sum(batch).item() == pytest.approx(losses.sum().item(), rel=1e-6)
        assert weighed.loss_sum(batch).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert batch.weight == len(losses) == sum(batch.counts)
