"""`benchmarks/throughput.py`: its measurements on a tiny model, and its comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import PROJECT

from qlora_kit.step.parts import PARTS

SCRIPT = PROJECT / "benchmarks" / "throughput.py"
# The peers' kernel for AVX-512 unpacks widths that are no multiple of 64 wrongly.
NUMBERS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model that is a bare config.json."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(NUMBERS))
    return str(path)


def settings_of(model: str, side: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": model, "scaled": False, "weights": "random", "bits": 4, "rank": 4,
        "targets": "attention", "setting": "default", "batch_size": 1, "length": 64,
        "dtype": "float32", "side": side, "shapes": [[2, 24]], "warmup": 1, "steps": 1,
        "matmul_size": 64, "profile": True, **changes,
    }  # fmt: skip


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    from throughput import measure

    figures: dict[str, Any] = {}
    measure(settings, figures.update)
    return figures


# transformers 5.17, on which the peers are measured too, has only the older name.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_all_sides_begin_at_one_loss_and_tell_their_time_by_part(model: str) -> None:
    sides = ("ours", "ours fastest", "peft")
    found = {side: measured(settings_of(model, side))["2 x 24"] for side in sides}
    # Only the first: each library draws the matrices of LoRA itself.
    losses = [each["losses"][0] for each in found.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for side, of in found.items():
        parts = of["profile"]["parts"]
        assert all(parts[part]["seconds"] > 0 for part in PARTS if part != "copies"), (side, parts)
        assert of["tokens_per_second"] == pytest.approx(48 / of["step_seconds"])
        rate = of["flop"] / of["step_seconds"]
        assert of["share_of_matmul_rate"] == pytest.approx(rate / of["matmul"]["flop_per_second"])
    # By hand, of the frozen linears: q and o, k and v, and the three of the MLP, in two layers.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    attention = 2 * 2 * 24 * 64
    head = 256 * 64
    assert found["ours"]["flop"] == 48 * (6 * linear + 4 * head + 4.5 * attention)
    assert found["ours fastest"]["flop"] == 48 * (4 * linear + 4 * head + 3.5 * attention)
    assert found["ours"]["flop"] == found["peft"]["flop"]
    assert not found["ours fastest"]["recomputes"]


def test_the_bare_step_makes_the_products_of_a_step_and_no_others(model: str) -> None:
    from bare_step import bare_seconds
    from clocks import CpuClock
    from torch.utils.flop_counter import FlopCounterMode

    def flop(**options: Any) -> int:
        with FlopCounterMode(display=False) as counted:
            found = bare_seconds(settings_of(model, "ours"), 2, 24, CpuClock(), rounds=1, **options)
        assert set(found) == {"linear products", "head products", "attention", "unpacking"}
        assert all(seconds > 0 for seconds in found.values())
        return int(counted.get_total_flops())

    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    down = 2 * 64 * 128
    head = 256 * 64
    # torch's counter does not know the attention kernel of a CPU.
    assert flop() == 48 * (6 * linear - 2 * down + 4 * head)
    assert flop(recompute=False) == 48 * (4 * linear + 4 * head)


def test_what_cannot_be_measured_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import speed_sides

    assert measured(settings_of(model, "unsloth")) == {"left_out": "not installed: unsloth"}
    monkeypatch.setattr(speed_sides.importlib.util, "find_spec", lambda name: object())
    (reason,) = measured(settings_of(model, "unsloth")).values()
    assert reason.startswith("reads checkpoints only")


def run_of(seconds: float, loss: float, **more: Any) -> dict[str, Any]:
    figures = {
        "step_seconds": seconds, "tokens_per_second": 48 / seconds, "losses": [loss, loss - 1],
        "share_of_matmul_rate": 0.5, "recomputes": True, "host_bytes": 1e6 * seconds,
    }  # fmt: skip
    return {"2 x 24": {**figures, **more}}


def test_ratios_are_medians_of_rounds_and_only_of_equal_losses() -> None:
    from throughput import summarized, tables

    runs = {
        "ours": [run_of(1.0, 5.0), run_of(2.0, 5.0), run_of(4.0, 5.0)],
        "peft": [run_of(2.0, 5.0001), run_of(3.0, 5.0001), run_of(12.0, 5.0001)],
        "trl": [run_of(2.0, 5.1)] * 3,
        "unsloth": [{"left_out": "not installed: unsloth"}],
        "peft + liger": [{"2 x 24": {"failed": "OutOfMemoryError: 80 GiB"}}],
    }
    rows = {row["side"]: row for row in summarized(runs, "2 x 24", "float32")}
    assert rows["peft"]["seconds_ratio"] == 2.0, "of 2, 1.5 and 3"
    assert rows["peft"]["host_ratio"] == 2.0
    assert rows["ours"]["step_seconds"] == 2.0
    assert rows["trl"]["not_compared"] == "the first loss is 5.10000, not 5.00000"
    assert "seconds_ratio" not in rows["trl"]
    assert rows["unsloth"]["not_measured"] == "not installed: unsloth"
    assert rows["peft + liger"]["not_measured"] == "OutOfMemoryError: 80 GiB"
    settings = {"bits": 4, "rank": 4, "targets": "attention", "dtype": "float32",
                "matmul_size": 64}  # fmt: skip
    lines = "\n".join(
        tables("tiny", {"settings": settings, "summary": {"2 x 24": list(rows.values())}})
    )
    assert "not compared: the first loss is 5.10000, not 5.00000" in lines
    assert "over the rate of a 64 x 64 product in float32 in the same process" in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sides", "ours,theirs"), "no side theirs; expected some of ours"),
        (("--shapes", "2by3"), "expected rows x tokens"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_comparison_runs_in_processes_of_its_own(model: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", model, "--shapes", "2x24", "--rounds", "2",
         "--steps", "2", "--json", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "seconds of one recorded step, by part" in done.stdout
    (found,) = json.loads(file.read_text())["models"].values()
    rows = {row["side"]: row for row in found["summary"]["2 x 24"]}
    assert rows["trl"]["seconds_ratio"] > 0
    assert all(rows[side]["host_bytes"] > 0 for side in ("ours", "peft", "trl"))
    assert len(found["runs"]["ours"]) == 2
