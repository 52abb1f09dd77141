"""Encoder-decoders of every kind: what they compute, how they are saved, merged and opened."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from merging import save
from peft import LoraConfig, PeftModel, get_peft_model
from support import recorded_peak, relative_error
from t5_models import KINDS, ROWS, SIZES, objective_of, save_t5, t5_adapter, t5_spec, t5_tokenizer
from tiny_models import fill_lora
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import qlora_kit as qk
from qlora_kit.config import TokenOptions
from qlora_kit.data.batch import TokenRows, TokenTable, widest_batch
from qlora_kit.data.encode import LOSS_WEIGHTS
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Message, Shape
from qlora_kit.data.source_rows import SourceRows
from qlora_kit.data.tokens import tokenize
from qlora_kit.errors import DataError, ModelError
from qlora_kit.export.rows import built_in_rows, some_rows
from qlora_kit.export.verify import verify_merge
from qlora_kit.infer.generate import generate_all
from qlora_kit.layers import kernels
from qlora_kit.layers.projections import projections
from qlora_kit.model.encoder_decoder import SEQ2SEQ_LM, is_head_tied
from qlora_kit.model.hardware import Hardware
from qlora_kit.model.head import head_of
from qlora_kit.model.load import is_tied
from qlora_kit.plan.simulate import predict, simulated_run
from qlora_kit.plan.subject import RowSizes, Subject
from qlora_kit.step.groups import set_groups
from qlora_kit.step.kernels import Kernels
from qlora_kit.step.norms import set_norms
from qlora_kit.step.recompute import set_recompute
from qlora_kit.step.settle import settle
from qlora_kit.tasks.seq2seq import SEQ2SEQ, Seq2SeqObjective, SourceBatch
from qlora_kit.train.optimizer_step import OptimizerStep

# transformers says so of every T5 whose head is its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny random model once."""
    saved: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in saved:
            saved[kind] = save_t5(tmp_path_factory.mktemp(kind), kind)
        return saved[kind]

    return folder


def plain(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def inputs_of(batch: SourceBatch) -> dict[str, torch.Tensor]:
    """What transformers is given for a batch: masks of all, and the labels to shift itself."""
    sizes = torch.tensor(batch.lengths)
    columns = torch.arange(batch.source_ids.shape[1])
    labels = torch.full(batch.written_ids.shape, -100).flatten()
    labels[batch.positions] = batch.targets
    return {
        "input_ids": batch.source_ids,
        "attention_mask": (columns < sizes[:, :1]).long(),
        "labels": labels.view(batch.written_ids.shape),
    }


def twin_of(adapter: qk.Adapter, *, merged: bool) -> Any:
    """The same model in transformers, with the weights that the base has once unpacked."""
    assert adapter.base.spec.folder is not None
    twin = plain(adapter.base.spec.folder)
    with torch.no_grad():
        for path, each in projections(adapter.base.model).items():
            weight = each.frozen.weight.dequantize(torch.float32)
            if merged and path in adapter.layers:
                weight = weight + adapter.layers[path].delta()
            twin.get_submodule(path).weight.copy_(weight)
    return twin


def at_targets(logits: torch.Tensor, batch: SourceBatch) -> torch.Tensor:
    """The logits (N, V) that predict targets; behind these, paddings may differ."""
    return logits.flatten(0, 1)[batch.positions]


@torch.no_grad()
def own_logits(base: qk.Base, batch: SourceBatch) -> torch.Tensor:
    given = {"input_ids": batch.source_ids, "attention_mask": batch.mask}
    with base.in_evaluation():
        found = base.model(**given, decoder_input_ids=batch.written_ids).logits
    return at_targets(found, batch)


@torch.no_grad()
def their_logits(model: Any, batch: SourceBatch) -> torch.Tensor:
    return at_targets(model(**inputs_of(batch)).logits, batch)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_found_where_the_checkpoint_has_it(
    folder_of: Callable[[str], Path], kind: str
) -> None:
    base = t5_adapter(folder_of(kind)).base
    scaled = kind == "t5"
    assert head_of(base.model).scale == pytest.approx(64**-0.5 if scaled else 1.0)
    assert is_tied(base.model) is is_head_tied(base.model) is scaled
    embedding = base.model.get_input_embeddings()
    assert base.model.encoder.embed_tokens is base.model.decoder.embed_tokens is embedding
    assert base.parameters == sum(each.numel() for each in plain(folder_of(kind)).parameters())


def test_a_scaled_t5_whose_file_has_another_head_keeps_it(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of("t5")
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for scale, tied in ((1.0, True), (1.5, False)):
        head = {"lm_head.weight": tensors["shared.weight"] * scale}
        save_file({**tensors, **head}, tmp_path / "model.safetensors")
        base = qk.load_base(t5_spec(tmp_path), qk.choose_hardware("cpu"))
        assert is_tied(base.model) is tied
        assert head_of(base.model).scale == pytest.approx(64**-0.5)
        ids = torch.tensor([[5, 6, 1]])
        with torch.no_grad():
            found, expected = (
                model(input_ids=ids, decoder_input_ids=ids).logits
                for model in (base.model, plain(tmp_path))
            )
        assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_targets_find_both_halves(folder_of: Callable[[str], Path], kind: str) -> None:
    found = projections(t5_spec(folder_of(kind)).skeleton())
    groups = {path: each.group for path, each in found.items()}
    assert set(groups.values()) == {"attention", "mlp"}
    mlps = 2 if kind == "t5" else 3
    for half, attentions in (("encoder", 1), ("decoder", 2)):
        own = {path: group for path, group in groups.items() if path.startswith(half)}
        count = {group: [*own.values()].count(group) for group in ("attention", "mlp")}
        assert count == {"attention": 2 * 4 * attentions, "mlp": 2 * mlps}
    assert all(("DenseReluDense" in path) == (group == "mlp") for path, group in groups.items())


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [True, False])
def test_loss_and_gradients_are_those_of_a_plain_twin(
    folder_of: Callable[[str], Path], kind: str, bits: int, recompute: bool
) -> None:
    adapter = t5_adapter(folder_of(kind), bits)
    fill_lora(adapter, std=0.05)
    objective, twin = objective_of(adapter), twin_of(adapter, merged=True)
    batch = objective.batch(ROWS)
    assert batch.mask is not None
    assert batch.weight == 7 + 12 + 2
    set_recompute(adapter.base.model, recompute)
    assert set_groups(adapter.base.model) > 0
    adapter.base.model.train()
    loss = objective.loss_sum(batch)
    loss.backward()
    expected = twin(**inputs_of(batch)).loss * batch.weight
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for path, layer in adapter.layers.items():
        wide = twin.get_submodule(path).weight.grad * layer.scaling
        assert wide.norm() > 1e-6, path
        assert relative_error(layer.lora_A.grad, layer.lora_B.T @ wide) <= 1e-4, path
        assert relative_error(layer.lora_B.grad, wide @ layer.lora_A.T) <= 1e-4, path


def test_tokens_of_targets_have_their_own_weights(folder_of: Callable[[str], Path]) -> None:
    adapter = t5_adapter(folder_of("t5"), 16)
    fill_lora(adapter, std=0.05)
    objective, twin = objective_of(adapter), twin_of(adapter, merged=True)
    generator = torch.Generator().manual_seed(5)
    rows = [
        {**row, LOSS_WEIGHTS: torch.rand(len(row["input_ids"]), generator=generator).tolist()}
        for row in ROWS
    ]
    rows[1][LOSS_WEIGHTS] = None
    batch = objective.batch(rows)
    weights = [
        1.0 if row[LOSS_WEIGHTS] is None else row[LOSS_WEIGHTS][at]
        for row in rows
        for at, label in enumerate(row["labels"])
        if label != -100
    ]
    assert batch.weight == pytest.approx(sum(weights))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            their_logits(twin, batch), batch.targets, reduction="none"
        )
    expected = float((losses * torch.tensor(weights)).sum())
    assert objective.loss_sum(batch).item() == pytest.approx(expected, rel=1e-5)
    sums = objective.row_sums(batch, objective.measured(batch))
    assert float(sums.loss.sum() / sums.weight.sum()) == pytest.approx(expected / batch.weight)


def test_a_target_has_the_weight_of_its_record_and_its_turn() -> None:
    tokenizer = t5_tokenizer("a b c")
    marks = ({"loss_weight": 0.5}, {"loss_weight": 2.0}, {"is_learnt": False}, {})
    items = [
        Conversation((Message("user", "a"), Message("assistant", "b c", **each)), f"x:{n}", (),
                     loss_weight=0.5)
        for n, each in enumerate(marks)
    ]  # fmt: skip
    samples = Samples(items, Shape.CHAT, "data.jsonl")
    made = tokenize(samples, tokenizer, TokenOptions(), makes=SourceRows, cache=False)
    found = {row["row"]: row[LOSS_WEIGHTS] for row in made.rows}
    source = made.rows[0]["labels"].count(-100)
    target = len(made.rows[0]["labels"]) - source
    assert found == {
        0: [0.0] * source + [0.25] * target,
        1: None,
        3: [0.0] * source + [0.5] * target,
    }
    nothing = Samples(items[2:3], Shape.CHAT, "data.jsonl")
    with pytest.raises(DataError, match="all have the weight 0"):
        tokenize(nothing, tokenizer, TokenOptions(), makes=SourceRows, cache=False)


def test_rows_alone_and_together_have_the_same_sums(folder_of: Callable[[str], Path]) -> None:
    adapter = t5_adapter(folder_of("t5"))
    objective = objective_of(adapter)
    with adapter.base.in_evaluation():
        together = objective.batch(ROWS)
        sums = objective.row_sums(together, objective.measured(together))
        for number, row in enumerate(ROWS):
            alone = objective.batch([row])
            assert alone.mask is None
            own = objective.row_sums(alone, objective.measured(alone))
            assert float(own.loss) == pytest.approx(float(sums.loss[number]), rel=1e-5)
            assert float(own.weight) == float(sums.weight[number])
        assert float(sums.loss.sum()) == pytest.approx(objective.loss_sum(together).item())


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_opens_in_peft_and_one_of_peft_here(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, bits: int
) -> None:
    folder = folder_of(kind)
    adapter = t5_adapter(folder, bits)
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(ROWS)
    expected = own_logits(adapter.base, batch)
    ours = save(adapter, tmp_path / "ours")
    config = json.loads((ours / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    theirs = PeftModel.from_pretrained(twin_of(adapter, merged=False), ours).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    assert relative_error(their_logits(theirs, batch), expected) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = qk.load_base(t5_spec(folder, bits), qk.choose_hardware("cpu"))
    back = qk.load_adapter(again, tmp_path / "theirs")
    assert relative_error(own_logits(back.base, batch), expected) <= 1e-6


def test_the_same_training_as_in_peft(folder_of: Callable[[str], Path]) -> None:
    """Twenty steps from the same start give the same losses."""
    adapter = t5_adapter(folder_of("t5"), 4, targets=("attention",))
    config = LoraConfig(
        r=4, lora_alpha=32, task_type="SEQ_2_SEQ_LM", target_modules=list(adapter.layers)
    )
    twin = get_peft_model(twin_of(adapter, merged=False), config).train()
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            for side in "AB":
                own = getattr(layer, f"lora_{side}")
                named[f"base_model.model.{path}.lora_{side}.default.weight"].copy_(own)
    objective = objective_of(adapter)
    batch = objective.batch(ROWS)
    adapter.base.model.train()
    trained = [each for each in named.values() if each.requires_grad]
    optimizers = [
        torch.optim.AdamW(each, lr=2e-3) for each in (adapter.parameters().values(), trained)
    ]
    losses: list[tuple[float, float]] = []
    for _ in range(20):
        own_loss = objective.loss_sum(batch) / batch.weight
        other = twin(**inputs_of(batch)).loss
        for loss, optimizer in zip((own_loss, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((own_loss.item(), other.item()))
    assert losses[-1][0] < 0.7 * losses[0][0], "it did learn"
    assert all(own_ == pytest.approx(other_, rel=1e-4) for own_, other_ in losses)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_that_transformers_generates(
    folder_of: Callable[[str], Path], kind: str
) -> None:
    adapter = t5_adapter(folder_of(kind))
    fill_lora(adapter, std=0.05)
    tokenizer = t5_tokenizer("one two three four five six seven eight nine ten")
    sources = [[*list(row["input_ids"][:3]), 1] for row in ROWS] + [[7, 8, 9, 20, 21, 22, 1]]
    sampling = qk.Sampling(max_new_tokens=12, temperature=0.0)
    found = generate_all(adapter.base, tokenizer, sources, sampling, batch_size=3)
    twin = twin_of(adapter, merged=True)
    for text, ids in zip(found, sources, strict=True):
        out = twin.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(out[0, 1:], skip_special_tokens=True)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_verified_and_opens_in_transformers(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, bits: int
) -> None:
    spec = t5_spec(folder_of(kind), bits)
    adapter = t5_adapter(folder_of(kind), bits)
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(ROWS)
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    rows = some_rows(ROWS, 1000, 0, "rows", spec)
    reports = []
    qk.merge_to(
        tmp_path / "merged", stored, spec, t5_tokenizer("one two"), dtype=torch.float32,
        check=lambda merge, made: reports.append(verify_merge(merge, made, rows)),
    )  # fmt: skip
    written, without = (reports[0].variant(name) for name in ("written", "base"))
    assert written is not None
    assert without is not None
    assert written.logit_error <= 1e-5
    assert written.mean_kl <= 1e-6
    assert without.mean_kl > 1e-4, "without the adapter it is another model"
    assert reports[0].tokens == batch.weight
    with adapter.base.in_evaluation():
        measured = objective_of(adapter).measured(batch)
    own = reports[0].variant("adapter")
    assert own is not None
    assert own.loss == pytest.approx(-float(measured.logprobs.double().mean()), rel=1e-5)
    merged = plain(tmp_path / "merged")
    found = their_logits(merged, batch)
    assert relative_error(found, own_logits(adapter.base, batch)) <= 1e-5
    numbers = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert numbers["tie_word_embeddings"] is (kind == "t5")
    assert merged.generation_config.decoder_start_token_id == 0
    # The kit opens its own merge as transformers does.
    again = qk.load_base(t5_spec(tmp_path / "merged"), qk.choose_hardware("cpu"))
    assert relative_error(own_logits(again, batch), found) <= 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_is_packed_again_opens_in_transformers(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, bits: int
) -> None:
    spec, adapter = t5_spec(folder_of(kind), bits), t5_adapter(folder_of(kind), bits)
    fill_lora(adapter, std=0.05)
    batch = objective_of(adapter).batch(ROWS)
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    rows = some_rows(ROWS, 1000, 0, "rows", spec)
    reports = []
    qk.merge_to(
        tmp_path / "packed", stored, spec, t5_tokenizer("one two"), dtype=torch.float32,
        requantize=True, check=lambda merge, made: reports.append(verify_merge(merge, made, rows)),
    )  # fmt: skip
    packed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layers = {path: type(module).__name__ for path, module in packed.named_modules()}
    # transformers leaves T5's `wo` as it is, and so does the export; the head is never packed.
    whole = {path for path, name in layers.items() if name == "Linear"}
    assert whole == {path for path in layers if path.endswith("DenseReluDense.wo")} | {"lm_head"}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in layers.values()
    ours = qk.load_base(t5_spec(tmp_path / "packed", bits), qk.choose_hardware("cpu"))
    written = reports[0].variant("written")
    assert written is not None
    with ours.in_evaluation():
        measured = Seq2SeqObjective(ours).measured(batch)
    assert written.loss == pytest.approx(-float(measured.logprobs.double().mean()), rel=1e-4)
    if bits == 4:
        # In training mode bitsandbytes computes 4 bits exactly; nothing here drops out.
        found = their_logits(packed.train(), batch)
        assert relative_error(found, own_logits(ours, batch)) <= 1e-5


def test_built_in_rows_have_sources_and_targets(folder_of: Callable[[str], Path]) -> None:
    found = built_in_rows(t5_tokenizer("the a of"), t5_spec(folder_of("t5")))
    assert isinstance(found.batch, SourceBatch)
    assert all(source == target > 0 for source, target in found.batch.lengths)


# ---------------------------------------------------------------- memory


def _rows_of(lengths: list[tuple[int, int]]) -> TokenRows:
    return TokenRows(
        [
            {"input_ids": [5] * (source + target), "row": row,
             "labels": [-100] * source + [5] * target}
            for row, (source, target) in enumerate(lengths)
        ]
    )  # fmt: skip


def test_the_widest_batch_has_the_longest_source_and_the_longest_target() -> None:
    lengths = [(4, 4), (30, 3), (20, 20), (2, 31), (5, 5)]
    assert _rows_of(lengths).source_lengths() == lengths
    table = TokenTable(datasets.Dataset.from_list(list(_rows_of(lengths))))
    assert table.source_lengths() == lengths
    assert table.select([3, 1]).source_lengths() == [lengths[3], lengths[1]]
    assert widest_batch(lengths, 1) == (2,)
    assert widest_batch(lengths, 2) == (1, 3)
    assert widest_batch(lengths, 3) == (1, 3, 2)
    assert set(widest_batch(lengths, 9)) == set(range(5))
    held_out = _rows_of([(7, 9), (8, 2)])
    sizes = RowSizes.of_sources(_rows_of(lengths), held_out, qk.TrainConfig(batch_size=2))
    assert (sizes.tokens, sizes.answer_tokens) == (30, 31)
    assert (sizes.evaluation_tokens, sizes.evaluation_answer_tokens) == (8, 9)
    assert sizes.supervised_of(2) == 34
    alone = RowSizes.of_sources(_rows_of(lengths), None, qk.TrainConfig(batch_size=1))
    assert (alone.tokens, alone.answer_tokens, alone.supervised_of(1)) == (20, 20, 20)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([(60, 8), (50, 6)], 2), ([(8, 60), (7, 50)], 2), ([(40, 40)], 1), ([(48, 10), (9, 40)], 2)],
)
def test_the_plan_knows_both_lengths(
    tmp_path: Path, lengths: list[tuple[int, int]], rows: int, bits: int
) -> None:
    folder = save_t5(tmp_path, "t5", d_model=128, d_ff=256, d_kv=32)
    adapter = t5_adapter(folder, bits)
    token_rows = _rows_of(lengths)
    config = qk.TrainConfig(
        batch_size=rows, gradient_accumulation_steps=1, device="cpu", mlp_tile_tokens=0
    )
    step: list[int] = []

    def before(taken: OptimizerStep) -> None:
        from qlora_kit.plan.rehearsal import rehearse

        step.append(rehearse(taken, 1, has_sources=True).peak_bytes)

    qk.train_adapter(
        adapter, token_rows, config.model_copy(update={"max_steps": 1}), task=SEQ2SEQ,
        before_first_step=before,
    )  # fmt: skip
    sizes = RowSizes.of_sources(token_rows, None, config)
    subject = Subject(
        t5_spec(folder, bits), adapter.spec, qk.choose_hardware("cpu"), sizes, SEQ2SEQ
    )
    predicted = predict(subject, config)
    expected = max(predicted.device[each].bytes for each in ("forward", "backward", "optimizer"))
    assert step[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_for_a_gpu_chooses_kernels_as_a_run_does(tmp_path: Path, kind: str) -> None:
    spec = t5_spec(save_t5(tmp_path, kind), 4)
    lora = qk.LoraSpec(targets=("all-linear",), task_type=SEQ2SEQ.peft_type)
    gpu = Hardware(torch.device("meta"), torch.bfloat16, "stands in for a GPU")
    subject = Subject(spec, lora, gpu, RowSizes(24, answer_tokens=16), SEQ2SEQ)
    config = qk.TrainConfig(eval_batch_size=1)
    with simulated_run(subject, config, spec.skeleton()) as run:
        found = settle(run.model, config, gpu)
    assert found.kernels == Kernels(("nf4", "lora", "norm", "loss"))
    assert found.applied.tiled_mlps == 0
    assert predict(subject, config).peak.bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_the_kernel_of_norms_agrees(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = t5_adapter(save_t5(tmp_path, kind))
    fill_lora(adapter)
    model: Any = adapter.base.model.train()
    objective = objective_of(adapter)
    batch = objective.batch(ROWS)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = objective.loss_sum(batch)
        grads = torch.autograd.grad(loss, list(adapter.parameters().values()))
        return loss.detach(), dict(zip(adapter.parameters(), grads, strict=True))

    loss, grads = step()
    assert set_norms(model, True, torch.float32) == 12
    monkeypatch.setattr(kernels, "_DEVICES", {"cpu"})
    kernels.use(["norm"])
    try:
        found, found_grads = step()
    finally:
        kernels.use(())
    assert relative_error(found, loss) <= 1e-6
    assert all(relative_error(found_grads[each], grads[each]) <= 2e-5 for each in grads)
    assert not all(torch.equal(found_grads[each], grads[each]) for each in grads)


def test_recompute_of_both_halves_saves_memory(tmp_path: Path) -> None:
    adapter = t5_adapter(save_t5(tmp_path, "t5", num_layers=4, num_decoder_layers=4))
    objective = objective_of(adapter)
    batch = objective.stand_in(2, 64, answer_tokens=64)
    adapter.base.model.train()
    peaks = []
    for is_on in (True, False):
        set_recompute(adapter.base.model, is_on)
        peaks.append(recorded_peak(lambda: objective.loss_sum(batch).backward()))
    assert peaks[0] < 0.5 * peaks[1]


@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small"])
def test_known_models_have_their_parameters(name: str) -> None:
    source = qk.find_model(name)
    spec = qk.BaseSpec(source, None, qk.Quantization(4), random=True, loads=SEQ2SEQ_LM)
    skeleton = spec.skeleton()
    assert sum(each.numel() for each in skeleton.parameters()) == source.parameters
    assert is_head_tied(skeleton) is (name == "t5-small")


# ---------------------------------------------------------------- what is refused


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    numbers = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    AutoConfig.for_model("bart", **numbers).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"bart: an encoder-decoder that is not known here; expe"):
        t5_spec(tmp_path).skeleton()


@pytest.mark.parametrize(
    ("change", "loads", "message"),
    [
        ({"decoder_start_token_id": None}, SEQ2SEQ_LM, "no decoder_start_token_id; expected"),
        ({}, "AutoModelForCausalLM", "t5: an encoder-decoder, which reads .*; pass --task seq2seq"),
        ({}, "AutoModelForSequenceClassification", "t5: an encoder-decoder, which reads"),
    ],
)
def test_a_model_that_is_no_such_is_one_line(
    tmp_path: Path, change: dict[str, Any], loads: str, message: str
) -> None:
    numbers = copy.deepcopy({"model_type": "t5", **SIZES, **change})
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    spec = qk.BaseSpec(
        qk.find_model(str(tmp_path)), tmp_path, qk.Quantization(4), True, loads=loads
    )
    with pytest.raises(ModelError, match=message):
        spec.skeleton()


def test_float16_is_refused(folder_of: Callable[[str], Path]) -> None:
    spec = t5_spec(folder_of("t5"))
    hardware = replace(qk.choose_hardware("cpu"), dtype=torch.float16)
    with pytest.raises(ModelError, match=r"--dtype float16: t5 computes .*; expected bfloat16"):
        qk.load_base(spec, hardware)


@pytest.mark.parametrize("kind", ["t5", "t5-v1.1"])
def test_a_16_bit_checkpoint_computes_in_float32_and_bfloat16(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    plain(folder_of(kind)).to(torch.bfloat16).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "decoder_input_ids": ids}
    with torch.no_grad():
        expected = plain(tmp_path)(**given).logits
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 5e-2)):
            base = qk.load_base(t5_spec(tmp_path), qk.choose_hardware("cpu", dtype))
            assert relative_error(base.model(**given).logits, expected) <= tolerance
