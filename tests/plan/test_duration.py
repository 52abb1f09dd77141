"""The time of a step: from counted operations and rates, in words, and beside the measured time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run

import qlora_kit as qk
from qlora_kit.data.batch import TokenRows
from qlora_kit.model.ceilings import Ceilings
from qlora_kit.model.hardware import Hardware
from qlora_kit.plan.duration import (
    CALL_FACTOR,
    CPU_SHARE,
    GPU_SHARE,
    SHARE_OF_COPIES_SEEN,
    Pace,
    Seconds,
    StepWork,
    about,
    seconds_of,
    step_seconds,
)
from qlora_kit.plan.ledger import Ledger, Operation, Work
from qlora_kit.plan.run import StepTimes
from qlora_kit.plan.simulate import predict
from qlora_kit.plan.subject import RowSizes, Subject, UsualRows

GPU = Hardware(torch.device("meta"), torch.bfloat16, "planned")
CPU_RATES = Ceilings(
    device="a CPU",
    flop_per_second={"float32": 1e11, "bfloat16": 2e11},
    bytes_per_second=((1, 1e10),),
    unpacked_per_second={"float32": 2e10},
    link_bytes_per_second=None,
    call_seconds=1e-6,
    is_measured=True,
)
GPU_RATES = Ceilings(
    device="a GPU",
    flop_per_second={"float32": 1e13, "bfloat16": 1e14},
    bytes_per_second=((1, 1e12),),
    unpacked_per_second={},
    link_bytes_per_second=1e10,
    call_seconds=1e-6,
    is_measured=True,
)


def work_of(*operations: Operation, crossing_bytes: int = 0) -> Work:
    work = Work(crossing_bytes=crossing_bytes)
    work.operations.update(operations)
    return work


# ---------------------------------------------------------------- what is counted


def counted(code: Callable[[], object]) -> Work:
    with Ledger("cpu") as ledger, ledger.counted() as work:
        code()
    return work


def test_a_product_has_its_operations_and_all_its_bytes() -> None:
    a, b = torch.zeros(8, 16), torch.zeros(16, 32)
    work = counted(lambda: a @ b)
    assert work.operations == {
        Operation("product", "float32", 2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32)): 1
    }
    assert work.flop == 2 * 8 * 16 * 32


def test_views_and_empty_tensors_are_no_operations() -> None:
    x = torch.zeros(8, 16)
    assert not counted(lambda: (x.T, x.view(-1), x[1:], torch.empty(9), x.detach())).operations


def test_an_operation_in_place_counts_and_an_expanded_tensor_has_few_bytes() -> None:
    x, row = torch.zeros(8, 16), torch.zeros(1, 16)
    (found,) = counted(lambda: x.add_(row.expand(8, 16))).operations
    assert found.bytes == 4 * (2 * 8 * 16 + 16)


def test_a_weight_that_is_unpacked_is_told_apart() -> None:
    weight = qk.Quantization(4).freeze(torch.randn(64, 64))
    kinds = {each.kind for each in counted(lambda: weight.dequantize(torch.float32)).operations}
    assert "unpacking" in kinds


def test_attention_of_a_cpu_is_a_product() -> None:
    q, k, v = (torch.zeros(1, 2, 8, 16, requires_grad=True) for _ in range(3))

    def attend() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()

    products = [each for each in counted(attend).operations if each.kind == "product"]
    assert len(products) == 2
    assert all(each.dtype == "float32" for each in products)


# ---------------------------------------------------------------- the time of work


def test_an_operation_takes_as_long_as_its_arithmetic_or_its_bytes() -> None:
    heavy = Operation("product", "bfloat16", 10**9, 10**6)
    wide = Operation("product", "float32", 10**6, 10**9)
    on_cpu = seconds_of(work_of(heavy, wide, wide), CPU_RATES)
    best = 10**9 / 2e11 + 2 * 10**9 / 1e10
    assert on_cpu.all == pytest.approx(best / CPU_SHARE + 3 * CALL_FACTOR * 1e-6)
    assert on_cpu.bound == "device"


def test_a_weight_is_unpacked_at_its_own_rate() -> None:
    operation = Operation("unpacking", "float32", 0, 10**9)
    on_cpu = seconds_of(work_of(operation), CPU_RATES)
    assert on_cpu.all == pytest.approx(0.05 / CPU_SHARE, rel=1e-3)
    assert seconds_of(work_of(operation), GPU_RATES).device == pytest.approx(1e-3 / GPU_SHARE)


@pytest.mark.parametrize(
    ("count", "flop", "crossing", "bound"),
    [(10, 10**12, 0, "device"), (10**4, 10**9, 0, "host"), (10, 10**9, 10**10, "link")],
)
def test_a_gpu_takes_as_long_as_the_slowest_of_three(
    count: int, flop: int, crossing: int, bound: str
) -> None:
    operations = [Operation("product", "bfloat16", flop, 1000)] * count
    found = seconds_of(work_of(*operations, crossing_bytes=crossing), GPU_RATES)
    assert found.bound == bound
    assert found.all == pytest.approx(
        {
            "device": count * flop / 1e14 / GPU_SHARE,
            "host": count * CALL_FACTOR * 1e-6,
            "link": (1 + SHARE_OF_COPIES_SEEN) * crossing / 1e10,
        }[bound]
    )


def test_a_step_has_all_its_micro_batches_and_one_update() -> None:
    one = work_of(Operation("product", "bfloat16", 10**12, 1000))
    update = work_of(Operation("pass", "float32", 0, 10**9))
    found = step_seconds(StepWork(one, update, 2.5, 100), GPU_RATES)
    assert found.device == pytest.approx((2.5 * 0.01 + 0.001) / GPU_SHARE)


# ---------------------------------------------------------------- the work of a simulated step


def subject_of(folder: Path, rows: RowSizes, hardware: Hardware = GPU) -> Subject:
    spec = qk.BaseSpec(qk.find_model(str(folder)), folder, qk.Quantization(4))
    return Subject(spec, qk.LoraSpec(), hardware, rows)


def step_of(subject: Subject, **options: Any) -> StepWork:
    given = {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_batch_size": 1, **options}
    return predict(subject, qk.TrainConfig(**given)).step


def test_every_counted_operation_is_in_the_time(save_tiny: Callable[..., Path]) -> None:
    step = step_of(subject_of(save_tiny("deepseek-7b"), RowSizes(32)))
    one = step.micro_batch
    assert one.flop == sum(each.flop * count for each, count in one.operations.items())
    assert {each.kind for each in one.operations} == {"product", "fused unpacking", "pass"}
    assert (step.micro_batches, step.tokens) == (2, 2 * 2 * 32)
    assert step.update.operations.total() > 0
    assert step.update.flop == 0


def test_recomputing_adds_a_forward(save_tiny: Callable[..., Path]) -> None:
    subject = subject_of(save_tiny("deepseek-7b"), RowSizes(32))
    with_it, without = (
        step_of(subject, recompute=on).micro_batch.operations.total() for on in (True, False)
    )
    assert 1.1 * without < with_it < 1.6 * without


def test_short_rows_make_a_short_step(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("deepseek-7b")
    usual = UsualRows(rows=8, tokens=10, supervised=5, width=12)
    cpu = Hardware(torch.device("cpu"), torch.float32, "planned")
    config = {"batch_size": 2, "gradient_accumulation_steps": 2}
    short = step_of(subject_of(folder, RowSizes(60, usual=usual), cpu), **config)
    long = step_of(subject_of(folder, RowSizes(60), cpu), **config)
    assert short.tokens == 2 * 2 * 10
    assert short.micro_batch.flop < 0.3 * long.micro_batch.flop


def test_the_peak_is_that_of_the_longest_rows_all_the_same(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("deepseek-7b")
    usual = UsualRows(rows=8, tokens=10, supervised=5, width=12)
    config = qk.TrainConfig(batch_size=2, gradient_accumulation_steps=2, eval_batch_size=1)
    found, alone = (
        predict(subject_of(folder, RowSizes(60, usual=each)), config) for each in (usual, None)
    )
    assert found.device == alone.device
    assert found.host == alone.host


def rows_of(lengths: list[int]) -> TokenRows:
    rows = []
    for index, length in enumerate(lengths):
        labels = [-100] * (length - 3) + [5] * 3
        rows.append({"input_ids": [5] * length, "labels": labels, "row": index})
    return TokenRows(rows)


def test_means_are_taken_over_the_batches_of_an_epoch() -> None:
    config = qk.TrainConfig(batch_size=2)
    found = UsualRows.of(rows_of([10, 20, 30, 40]), config)
    # Rows of like length share a batch: 10 with 20 and 30 with 40.
    assert found == UsualRows(rows=4, tokens=25, supervised=3, width=30)
    sources = UsualRows.of(rows_of([10, 20, 30, 40]), config, has_sources=True)
    assert (sources.width, sources.answer_width) == (27, 3)


# ---------------------------------------------------------------- in words, and beside the measured


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "about 0.012 s"), (0.449, "about 0.45 s"), (47.4, "about 47 s"),
        (89, "about 89 s"), (754, "about 13 min"), (11_520, "about 3.2 h"),
        (400_000, "about 4.6 days"),
    ],
)  # fmt: skip
def test_a_time_has_no_more_digits_than_are_known(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_a_pace_is_told_for_the_run_or_for_1000_steps() -> None:
    step = Seconds(device=2.0, host=0.5)
    run = Pace(step, 4096, 57, GPU_RATES)
    assert run.rows()[0] == ("57 steps", "about 1.9 min: about 2 s a step, 2,000 tokens/s")
    assert "78% of the rates measured on this device" in run.rows()[1][1]
    found = Pace(step, 4096, None, GPU_RATES).as_json()
    assert found["seconds_per_1000_steps"] == 2000
    assert found["steps"] is None
    json.dumps(found)


def row_of(step: int, seconds: float, tokens: int) -> dict[str, Any]:
    return {"optimizer_step": step, "step_seconds": seconds, "tokens": tokens}


def test_measured_steps_leave_the_first_out_and_are_held_against_their_own_tokens() -> None:
    plan: Any = SimpleNamespace(pace=Pace(Seconds(1.0), 100, 5, CPU_RATES))
    rows = [row_of(1, 90, 100), row_of(2, 50, 100), row_of(3, 3, 200), row_of(4, 3, 300)]
    rows.insert(2, {"optimizer_step": 2, "eval_loss": 1.0})
    found = StepTimes.of(rows, plan, first_step=1)
    assert found == StepTimes(measured_seconds=3, steps=2, predicted_seconds=2.5)
    assert found.rows() == (
        ("predicted step", "about 2.5 s"),
        ("measured step", "3 s, mean of 2 after the first 2 (+20%)"),
    )
    assert StepTimes.of(rows, plan, first_step=3) is None
    without = StepTimes.of(rows, None, first_step=1)
    assert without is not None
    assert without.rows() == (("measured step", "3 s, mean of 2 after the first 2"),)


def test_a_plan_for_a_card_that_is_not_here_tells_its_time(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", "--model", str(stories), "--max-length", "64", "--device", "cuda")
    code, out, err = run(*asked, "--card", "RTX 3060", capsys=capsys)
    assert code == 0, err
    told = " ".join(out.split())
    assert "1,000 steps about" in told
    assert "from the card's data sheet, not measured" in told
    code, out, err = run(*asked, "--card", "RTX 3060", "--max-steps", "7", "--json", capsys=capsys)
    assert code == 0, err
    found = json.loads(out)["time"]
    assert found["steps"] == 7
    assert found["run_seconds"] == pytest.approx(7 * found["step_seconds"], rel=0.1)
    assert found["ceilings"]["is_measured"] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is here is measured")
def test_without_a_card_there_is_no_time_and_a_reason(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", "--model", str(stories), "--max-length", "64", "--device", "cuda")
    code, out, err = run(*asked, "--json", capsys=capsys)
    assert code == 0, err
    assert "no GPU here to measure" in json.loads(out)["time"]["why_not"]


def test_a_card_for_a_plan_of_a_cpu_is_refused(
    stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", "--model", str(stories), "--device", "cpu", "--card", "RTX 3060")
    code, _, err = run(*asked, capsys=capsys)
    assert code == 2
    assert "this plan is for a CPU" in err
