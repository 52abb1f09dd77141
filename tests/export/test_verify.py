"""Every export is verified: the report is right, and every fault is caught and named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import make_tokenizer
from merging import difference, plain, save, spec_of
from safetensors.torch import load_file, save_file
from support import run, run_well
from tiny_models import mask_of

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ConfigError, VerificationError
from qlora_kit.export import merge as merging
from qlora_kit.export.merge import Merge
from qlora_kit.export.merge_report import MergeReport, check_threshold
from qlora_kit.export.rows import VerificationRows, built_in_rows, some_rows
from qlora_kit.export.verify import verify_merge
from qlora_kit.model.tokenizer import load_tokenizer

ARCHITECTURES = ("tinyllama", "qwen2.5-7b", "qwen3-8b", "phi-4-mini", "gemma-2-9b")


def adapter_of(spec: qk.BaseSpec, size: float = 0.02) -> qk.Adapter:
    """Attach an adapter whose B has values of a given size."""
    base = qk.load_base(spec, qk.choose_hardware("cpu"))
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, size, generator=generator)
    return adapter


def random_rows(count: int = 4, length: int = 20) -> VerificationRows:
    generator = torch.Generator().manual_seed(5)
    lengths = [length - index for index in range(count)]
    rows = []
    for number, each in enumerate(lengths):
        ids = torch.randint(3, 96, (each,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "row": number})
    return some_rows(rows, 10_000, 0, "random tokens")


def verified(
    adapter: qk.Adapter,
    folder: Path,
    rows: VerificationRows | None = None,
    tamper: Callable[[Path], None] | None = None,
    **changes: Any,
) -> MergeReport:
    """Merge, let `tamper` change the written files, and verify them."""
    stored = qk.read_adapter(save(adapter, folder / "adapter"))
    found: list[MergeReport] = []

    def check(merge: Merge, made: Path) -> None:
        if tamper is not None:
            tamper(made)
        found.append(verify_merge(merge, made, rows))

    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    qk.merge_to(target, stored, adapter.base.spec, make_tokenizer(), check=check, **changes)
    return found[0]


@torch.no_grad()
def loss_of(model: Any, rows: VerificationRows) -> float:
    """Return the mean loss at the supervised tokens, computed by the model itself."""
    batch = rows.batch
    logits = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
    logprobs = logits.float().flatten(0, 1)[batch.positions].log_softmax(-1)
    targets = batch.labels.flatten()[batch.positions + 1]
    return float(-logprobs.gather(1, targets.unsqueeze(1)).mean())


# ---------------------------------------------------------------- the numbers are right


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_report_measures_what_the_models_themselves_compute(
    save_tiny: Callable[..., Path], tmp_path: Path, name: str, bits: int
) -> None:
    adapter, rows = adapter_of(spec_of(save_tiny(name), bits)), random_rows()
    report = verified(adapter, tmp_path, rows)
    losses = {each.variant: each.loss for each in report.variants}
    assert losses["adapter"] == pytest.approx(loss_of(adapter.base.model, rows), rel=1e-5)
    assert losses["written"] == pytest.approx(loss_of(plain(tmp_path / "merged"), rows), rel=1e-5)
    base = qk.detach(adapter)
    assert losses["base"] == pytest.approx(loss_of(base.model, rows), rel=1e-5)
    assert losses["merged_over_quantized"] == pytest.approx(losses["adapter"], rel=1e-5)
    original = qk.load_base(spec_of(base.spec.folder, 16), base.hardware)
    qk.load_adapter(replace(original, digest=base.digest), tmp_path / "adapter")
    assert losses["merged_over_original"] == pytest.approx(loss_of(original.model, rows), rel=1e-5)


def test_the_divergence_is_that_of_its_definition(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, rows = adapter_of(spec_of(save_tiny())), random_rows()
    written = verified(adapter, tmp_path, rows, dtype=torch.bfloat16).variant("written")
    batch = rows.batch
    models = (adapter.base.model, plain(tmp_path / "merged"))
    with torch.no_grad():
        trained, merged = (
            m(input_ids=batch.input_ids, attention_mask=mask_of(batch))
            .logits.flatten(0, 1)[batch.positions]
            .double()
            for m in models
        )
    divergence = torch.nn.functional.kl_div(
        merged.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert written is not None
    assert written.mean_kl == pytest.approx(float(divergence.mean()), rel=1e-2)
    assert written.max_kl == pytest.approx(float(divergence.max()), rel=1e-2)
    agreement = (trained.argmax(-1) == merged.argmax(-1)).double().mean()
    assert written.top1_agreement == pytest.approx(float(agreement))
    error = (merged - trained).norm() / trained.norm()
    assert written.logit_error == pytest.approx(float(error), rel=1e-2)
    assert written.logit_error > 1e-4, "bfloat16 rounds"


def test_the_norms_of_a_layer_are_those_of_its_weights(stories: Path, tmp_path: Path) -> None:
    adapter = adapter_of(spec_of(stories))
    report = verified(adapter, tmp_path)
    assert [layer.ratio for layer in report.layers] == sorted(
        (layer.ratio for layer in report.layers), reverse=True
    )
    assert {layer.path for layer in report.layers} == set(adapter.layers)
    original = load_file(stories / "model.safetensors")
    for layer in report.layers:
        module = adapter.layers[layer.path]
        weight = original[f"{layer.path}.weight"]
        error = weight - module.frozen.weight.dequantize(torch.float32)
        assert layer.quantization_error == pytest.approx(float(error.norm()), rel=1e-5)
        assert layer.delta == pytest.approx(float(module.delta().norm()), rel=1e-5)
        assert layer.kept == pytest.approx(1.0, abs=1e-3)
    assert not report.variants, "no rows, no predictions"


def test_a_merge_in_fp16_is_within_a_thousandth(stories: Path, tmp_path: Path) -> None:
    rows = built_in_rows(load_tokenizer(stories))
    report = verified(adapter_of(spec_of(stories)), tmp_path, rows)
    written = report.variant("written")
    assert written is not None
    assert 0 < written.logit_error <= 1e-3
    assert written.top1_agreement == 1.0


def test_an_unquantised_base_has_one_way_to_merge(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    report = verified(adapter_of(spec_of(save_tiny(), 16)), tmp_path, random_rows())
    assert {each.variant for each in report.variants} == {
        "adapter", "base", "merged_over_quantized", "written"
    }  # fmt: skip
    assert report.verdict.requantizing is None
    assert report.layers[0].quantization_error is None


# ---------------------------------------------------------------- the verdict is right


def test_a_small_delta_is_lost_by_quantising_again(stories: Path, tmp_path: Path) -> None:
    rows = built_in_rows(load_tokenizer(stories))
    report = verified(adapter_of(spec_of(stories), 5e-4), tmp_path, rows)
    assert report.verdict.requantizing == "loses"
    assert "Do not quantise the merged weights" in " ".join(report.verdict.text)
    kept = [layer.requantized_kept for layer in report.layers]
    assert all(share is not None and share < 0.2 for share in kept), kept


def test_a_large_delta_stays_when_quantised_again(stories: Path, tmp_path: Path) -> None:
    rows = built_in_rows(load_tokenizer(stories))
    report = verified(adapter_of(spec_of(stories), 0.02), tmp_path, rows)
    assert report.verdict.requantizing == "keeps"
    again, without = report.variant("requantized"), report.variant("base")
    assert again is not None
    assert without is not None
    assert again.mean_kl < 0.5 * without.mean_kl


def test_the_base_with_the_lower_loss_on_the_task_is_named(stories: Path, tmp_path: Path) -> None:
    """On rows that it predicts much better than chance, the original base counts as the better."""
    adapter = adapter_of(spec_of(stories), 1e-4)
    tokenizer = load_tokenizer(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside. "
    ids = tokenizer(text * 6)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids, "row": 0}]
    report = verified(adapter, tmp_path, some_rows(rows, 400, 0, "stories"))
    original = report.variant("merged_over_original")
    assert original is not None
    clearly_better = original.loss_change < -2 * original.loss_change_error
    assert report.verdict.merge_into == ("original" if clearly_better else "quantized")
    sure = replace(original, loss_change=-1.0, loss_change_error=0.01)
    worse = replace(original, loss_change=+1.0, loss_change_error=0.01)
    from qlora_kit.export.verdict import judge

    stored = qk.read_adapter(tmp_path / "adapter")
    merge = Merge(stored, adapter.base.spec)
    task = some_rows(rows, 400, 0, "stories")
    others = [each for each in report.variants if each is not original]
    assert judge(merge, task, [*others, sure], report.layers).merge_into == "original"
    assert judge(merge, task, [*others, worse], report.layers).merge_into == "quantized"
    # A lower loss on text of no task decides nothing.
    prompts = replace(task, of_task=False)
    assert judge(merge, prompts, [*others, sure], report.layers).merge_into == "quantized"


# ---------------------------------------------------------------- over the original base


def test_over_the_original_base(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    adapter = adapter_of(spec_of(save_tiny()))
    report = verified(adapter, tmp_path, random_rows(), over="original", dtype=torch.float32)
    assert report.merged_over == "original"
    written, original = report.variant("written"), report.variant("merged_over_original")
    assert written is not None
    assert original is not None
    assert written.loss == pytest.approx(original.loss, rel=1e-5)
    assert written.mean_kl > 1e-3
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(save_tiny() / "model.safetensors")
    for path, layer in adapter.layers.items():
        expected = base[f"{path}.weight"] + layer.delta()
        torch.testing.assert_close(weights[f"{path}.weight"], expected)


def test_there_is_no_original_base_of_a_quantised_checkpoint(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from qlora_kit.export.quantized import quantize_to

    quantize_to(tmp_path / "q", spec_of(save_tiny(), 16), qk.Quantization(4), make_tokenizer())
    adapter = adapter_of(spec_of(tmp_path / "q"))
    with pytest.raises(ConfigError, match="is stored quantised and has no other weights"):
        verified(adapter, tmp_path, over="original")
    report = verified(adapter, tmp_path, random_rows(), dtype=torch.float32)
    assert "merged_over_original" not in {each.variant for each in report.variants}
    assert difference(adapter, plain(tmp_path / "merged")) <= 1e-5


# ---------------------------------------------------------------- what is wrong is caught


LAYER = "model.layers.1.mlp.up_proj"


def _written(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return tamper


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_written(lambda t: t[f"{LAYER}.weight"][3].neg_()), rf"{LAYER}\.weight: what was written"),
        (_written(lambda t: t[f"{LAYER}.weight"][0, :1].add_(0.01)), rf"{LAYER}\.weight: what"),
        (_written(lambda t: t["model.norm.weight"].mul_(1.01)), r"model\.norm\.weight: what was"),
        (_written(lambda t: t["model.embed_tokens.weight"][7].zero_()), r"embed_tokens\.weight"),
        (_written(lambda t: t["lm_head.weight"][95].zero_()), r"lm_head\.weight: what was"),
        (_written(lambda t: t[f"{LAYER}.weight"].fill_(math.nan)), rf"{LAYER}\.weight: what"),
        (_written(lambda t: t.pop(f"{LAYER}.weight")), rf"missing tensors .*{LAYER}\.weight"),
        (_written(lambda t: t.update(more=torch.ones(2))), "surplus tensors .*: more"),
    ],
)
@pytest.mark.parametrize("with_rows", [False, True])
def test_a_sabotaged_merge_is_caught_and_named(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    tamper: Callable[[Path], None],
    says: str,
    with_rows: bool,
) -> None:
    adapter = adapter_of(spec_of(save_tiny()))
    with pytest.raises(VerificationError, match=says) as refused:
        verified(adapter, tmp_path, random_rows() if with_rows else None, tamper)
    assert refused.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "nothing is left"


def test_a_merge_that_forgets_a_layer_is_caught(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One delta is never added, which is a defect of a merge loop and not of a disk."""
    real = merging.merged_tensors

    def forgetful(stream: Any, stored: Any, *rest: Any) -> Any:
        kept = {path: pair for path, pair in stored.tensors.items() if path != LAYER}
        return real(stream, replace(stored, tensors=kept), *rest)

    monkeypatch.setattr(merging, "merged_tensors", forgetful)
    with pytest.raises(VerificationError, match=rf"^{LAYER}\.weight: what was written"):
        verified(adapter_of(spec_of(save_tiny())), tmp_path)


def test_a_delta_that_rounding_takes_away_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapter_of(spec_of(save_tiny()), 1e-6)
    # The base has bfloat16's values, and the delta is below half of their last place.
    stored = qk.read_adapter(save(adapter, tmp_path / "adapter"))
    assert stored.record is not None
    record = stored.record.model_copy(update={"dequantization_dtype": "bfloat16"})
    rounded = replace(stored, record=record)
    with pytest.raises(VerificationError, match="of its delta is left after rounding to bfloat16"):
        qk.merge_to(
            tmp_path / "merged", rounded, adapter.base.spec, make_tokenizer(),
            dtype=torch.bfloat16, check=lambda merge, made: verify_merge(merge, made) and None,
        )  # fmt: skip
    assert not (tmp_path / "merged").exists()


def test_a_delta_of_nothing_is_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"A or B of every layer is zero.*changes nothing"):
        verified(adapter_of(spec_of(save_tiny()), 0.0), tmp_path)


def test_the_threshold(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    report = verified(adapter_of(spec_of(save_tiny())), tmp_path, random_rows(), over="original")
    written = report.variant("written")
    assert written is not None
    check_threshold(report, None)
    check_threshold(report, written.mean_kl * 1.01)
    with pytest.raises(VerificationError, match=r"expected at most .* pass --base quantized"):
        check_threshold(report, written.mean_kl * 0.99)
    unmeasured = replace(report, variants=())
    with pytest.raises(VerificationError, match="nothing was measured"):
        check_threshold(unmeasured, 1.0)


# ---------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def trained(simulated_once: None, few_rows: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "short"
    arguments = ["train", "--output", str(output), "--max-steps", "6", "--device", "cpu"]
    run_well(*arguments, "--samples", "0", "--no-rehearse")
    return output


def test_the_command_writes_report_picture_and_card(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    code, out, err = run("export", str(trained), "--to", str(target), capsys=capsys)
    assert code == 0, err
    for words in ("merge report, in fp32, on validation rows of the run", "over original",
                  "written", "‖ΔW‖", "verdict", "Merge into the quantised base"):  # fmt: skip
        assert words in " ".join(out.split()), words
    report = json.loads((target / "merge_report.json").read_text())
    assert report["rows"] == "validation rows of the run"
    assert report["verdict"]["requantizing"] in ("keeps", "loses")
    assert (target / "merge_report.png").read_bytes().startswith(b"\x89PNG")
    card = (target / "README.md").read_text()
    assert "## Merge report" in card
    assert report["verdict"]["text"][0] in card
    manifest = json.loads((target / "manifest.json").read_text())["sha256"]
    assert {"README.md", "merge_report.json", "merge_report.png"} <= manifest.keys()


def test_a_merge_above_the_threshold_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("export", str(trained), "--to", str(tmp_path / "merged"), "--base", "original",
                 "--verify-threshold", "1e-9")  # fmt: skip
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 5
    assert err.count("error: ") == 1
    assert "from the adapter on its quantised base; expected at most 1e-09" in err
    assert list(tmp_path.iterdir()) == []


def test_rows_can_be_named_and_left_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "Spoken: two\nWritten:", "completion": " 2"}) + "\n")
    for name, extra, rows in (
        ("a", ("--data", str(data)), "mine.jsonl"),
        ("b", ("--verify-tokens", "0"), None),
    ):
        target = tmp_path / name
        code, _, err = run("export", str(trained), "--to", str(target), *extra, capsys=capsys)
        assert code == 0, err
        assert json.loads((target / "merge_report.json").read_text())["rows"] == rows


def test_an_adapter_without_its_run_is_verified_on_prompts(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "adapter"
    alone.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"):
        shutil.copy(trained / name, alone)
    code, out, err = run("export", str(alone), "--to", str(tmp_path / "m"), "--json", capsys=capsys)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["rows"] == "built-in prompts"
    assert "only rows of the task can tell" in report["verdict"]["text"][0]


def test_a_run_whose_data_is_gone_or_elsewhere_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, data in enumerate((str(tmp_path / "gone.jsonl"), "somebody/their-data")):
        moved = tmp_path / f"run-{number}"
        shutil.copytree(trained, moved)
        config = moved / "training_config.yaml"
        config.write_text(config.read_text().replace("data: null", f"data: {data}"))
        target = tmp_path / f"merged-{number}"
        code, out, err = run("export", str(moved), "--to", str(target), capsys=capsys)
        assert code == 0, err
        assert "the validation rows of the run are not used" in " ".join(out.split())
