"""`qlora-kit sweep`: one base, the bits of runs alone, ranking, failures, resuming."""

from __future__ import annotations

import gc
import html
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import PROJECT, as_if_killed_at, run, slow

from qlora_kit import recipe
from qlora_kit.cli.commands import COMMANDS
from qlora_kit.cli.options import configure
from qlora_kit.config import SweepConfig
from qlora_kit.events import Event, LoadProgress, Notice, RunFinished, silent
from qlora_kit.opening.trials import trials_of
from qlora_kit.recipe.sweeping import Sweep
from qlora_kit.report.log import NAME, read_log

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

SHORT = (
    "--max-steps", "4", "--save-steps", "2", "--eval-steps", "4", "--device", "cpu",
    "--no-rehearse", "--samples", "0",
)  # fmt: skip
SIX = ("--over", "learning_rate=1e-3,4e-3", "--over", "rank=4,8,16")


def sweep_of(output: Path, *more: str) -> list[str]:
    return ["sweep", "--output", str(output), *SHORT, *more]


def weights_of(run_folder: Path) -> bytes:
    return (run_folder / "adapter_model.safetensors").read_bytes()


def losses_of(run_folder: Path) -> list[Any]:
    return [row.get("loss", row.get("eval_loss")) for row in read_log(run_folder / NAME)]


def trials_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("trial-*"))


def records_in(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["trials"]
    return found


def held_by_tensors() -> int:
    """Return the bytes of all tensors that this process holds."""
    import torch

    gc.collect()
    held = {}
    for each in gc.get_objects():
        # A plan's tensors without values are of classes of their own.
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


class Heard:
    """Listens to a sweep: which bases are loaded, and what is held when a run is done."""

    def __init__(self) -> None:
        self.loads, self.held, self.notices = 0, list[int](), list[str]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, LoadProgress) and event.done == event.total:
            self.loads += 1
        if isinstance(event, RunFinished):
            self.held.append(held_by_tensors())
        if isinstance(event, Notice):
            self.notices.append(event.text)


def swept(output: Path, *more: str) -> tuple[dict[str, Any], Heard]:
    """Do a sweep in this process, as the command does; return its outcome and what was heard."""
    (command,) = (each for each in COMMANDS if each.name == "sweep")
    given = command.make_context("sweep", sweep_of(output, *more)[1:]).params
    heard = Heard()
    return recipe.sweep(configure(SweepConfig, given), heard), heard


@pytest.fixture(scope="module")
def six(few_rows: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Heard]:
    """A sweep of six trials, for tests that only read it."""
    folder = tmp_path_factory.mktemp("sweeps") / "six"
    return folder, *swept(folder, *SIX)


Six = tuple[Path, dict[str, Any], Heard]


# ---------------------------------------------------------------- one base, the bits of runs alone


def test_six_trials_load_one_base(six: Six) -> None:
    folder, outcome, heard = six
    assert (heard.loads, outcome["bases_loaded"]) == (1, 1)
    assert [each["state"] for each in records_in(folder)] == ["finished"] * 6
    names = [path.name for path in trials_in(folder)]
    assert names[0] == "trial-01-learning_rate=1e-3_rank=4"
    assert names[5] == "trial-06-learning_rate=4e-3_rank=16"


def test_memory_does_not_grow_from_trial_to_trial(six: Six) -> None:
    _, _, heard = six
    # Trials 1 and 4, and 3 and 6, have the same ranks, so the same tensors while they run.
    first, second = heard.held[:3], heard.held[3:]
    assert [abs(b - a) < 100_000 for a, b in zip(first, second, strict=True)] == [True] * 3


@pytest.mark.parametrize("number", [6, *slow(2)])
def test_a_trial_has_the_bits_of_the_same_run_alone(
    six: Six, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = trials_in(six[0])[number - 1]
    values = records_in(six[0])[number - 1]["values"]
    alone = tmp_path / "alone"
    flags = ("--learning-rate", values["learning_rate"], "--rank", values["rank"])
    code, _, err = run("train", "--output", str(alone), *SHORT, *flags, capsys=capsys)
    assert code == 0, err
    assert weights_of(alone) == weights_of(trial)
    assert losses_of(alone) == losses_of(trial)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"):
        last = Path("checkpoint-4") / name
        assert (alone / last).read_bytes() == (trial / last).read_bytes()


def test_the_winning_command_trains_the_winner_in_a_process_of_its_own(
    six: Six, tmp_path: Path
) -> None:
    folder, outcome, _ = six
    program, *arguments = shlex.split(outcome["command"])
    assert program == "qlora-kit"
    at = arguments.index("--output") + 1
    assert arguments[at] == str(folder.with_name("six-best"))
    arguments[at] = str(tmp_path / "best")
    # The built-in data of this process are shortened; the other process is given the same.
    from qlora_kit.data.samples import BUILT_IN

    code = (
        "import sys; from pathlib import Path; from qlora_kit.data.samples import BUILT_IN\n"
        f"BUILT_IN['train'] = Path({str(BUILT_IN['train'])!r})\n"
        "from qlora_kit.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = folder / outcome["best"]
    assert weights_of(tmp_path / "best") == weights_of(best)
    assert losses_of(tmp_path / "best") == losses_of(best)


@pytest.mark.slow
@pytest.mark.parametrize(
    "over",
    [
        ("recompute=true,false", "lora_dropout=0.2,0"),
        ("packing=true,false", "mlp_tile_tokens=0,16"),
        ("unpacked_layers=2,0", "keep_layers=1,0"),
        ("targets=mlp;q_proj,v_proj;all-linear",),
        ("optimizer=adamw8bit,adamw", "seed=1,2"),
    ],
    ids=lambda over: over[0].partition("=")[0],
)
def test_what_a_trial_leaves_in_the_model_does_not_reach_the_next(
    over: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for each in over for word in ("--over", each)]
    outcome, heard = swept(tmp_path / "sweep", *flags)
    assert heard.loads == 1
    for record, folder in zip(outcome["trials"], trials_in(tmp_path / "sweep"), strict=True):
        alone = tmp_path / f"alone-{folder.name}"
        values: list[str] = []
        for key, value in record["values"].items():
            name = key.replace("_", "-")
            switched = {"true": [f"--{name}"], "false": [f"--no-{name}"]}
            values += switched.get(value, [f"--{name}", value])
        code, _, err = run("train", "--output", str(alone), *SHORT, *values, capsys=capsys)
        assert code == 0, err
        assert weights_of(alone) == weights_of(folder), folder.name
        assert losses_of(alone) == losses_of(folder), folder.name


def test_trials_with_one_base_come_behind_each_other(tmp_path: Path) -> None:
    config = config_of(over=("rank=2,4", "bits=4,8,16"))
    whole = Sweep(config, tmp_path, trials_of(config), silent, {})
    assert [trial.number for trial in whole.left()] == [1, 4, 2, 5, 3, 6]


@pytest.mark.slow
def test_another_base_is_loaded_once_for_its_trials(tmp_path: Path) -> None:
    outcome, heard = swept(
        tmp_path / "sweep", "--over", "rank=2,4", "--over", "bits=4,8", "--max-steps", "1"
    )
    assert (heard.loads, outcome["bases_loaded"]) == (2, 2)
    begun = [text.split(":")[0] for text in heard.notices if text.startswith("trial")]
    order = [text for text in begun if text.endswith("of 4")]
    assert order == [f"trial {number} of 4" for number in (1, 3, 2, 4)]
    bits = [
        json.loads((each / "qlora_kit.json").read_text())["bits"]
        for each in trials_in(tmp_path / "sweep")
    ]
    assert bits == [4, 8, 4, 8]


# ---------------------------------------------------------------- the folder, the order, the page


def test_each_trial_is_an_ordinary_run(
    six: Six, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Path(shutil.copytree(trials_in(six[0])[0], tmp_path / "trial"))
    code, out, _ = run("train", "--output", str(trial), "--resume", capsys=capsys)
    assert (code, "this run is finished" in out) == (0, True)
    more = ("--max-rows", "2", "--device", "cpu")
    code, _, err = run("evaluate", "--adapter", str(trial), *more, capsys=capsys)
    assert code == 0, err


def test_trials_are_ranked_by_what_their_logs_say(six: Six) -> None:
    folder, outcome, _ = six
    measured = {
        path.name: min(row["eval_loss"] for row in read_log(path / NAME) if "eval_loss" in row)
        for path in trials_in(folder)
    }
    assert outcome["best"] == min(measured, key=lambda name: measured[name])
    assert outcome["ranked_by"] == "validation loss"
    assert {each["name"]: each["figures"]["validation"] for each in outcome["trials"]} == measured
    page = (folder / "sweep.html").read_text()
    assert page.count("data:image/png") == 2
    rows = [line for line in page.splitlines() if line.startswith("<tr><td")]
    assert [f"{value:.4f}" in row for value, row in zip(sorted(measured.values()), rows,
                                                        strict=True)] == [True] * 6  # fmt: skip
    assert shlex.split(outcome["command"])[0] in page
    assert "<script" not in page


@pytest.mark.slow
def test_other_metrics_rank_the_higher_first(tmp_path: Path) -> None:
    data = tmp_path / "mood.tsv"
    lines = [f"{mood} day {n}\t{mood}" for n in range(40) for mood in ("good", "bad")]
    data.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    outcome, _ = swept(
        tmp_path / "sweep", "--task", "classify", "--data", str(data), "--validation", str(data),
        "--best-metric", "accuracy", "--over", "learning_rate=1e-6,1e-2", "--batch-size", "8",
    )  # fmt: skip
    first, second = (each["figures"]["validation"] for each in outcome["trials"])
    assert first <= second
    assert outcome["ranked_by"] == "validation accuracy"
    assert outcome["best"].startswith("trial-02" if second > first else "trial-01")


@pytest.mark.slow
def test_without_validation_rows_the_training_loss_ranks_and_says_so(tmp_path: Path) -> None:
    outcome, heard = swept(
        tmp_path / "sweep", "--validation-fraction", "0", "--over", "lr=1e-3,4e-3",
        "--max-steps", "1",
    )  # fmt: skip
    assert outcome["ranked_by"] == "training loss"
    assert any("there are no validation rows" in text for text in heard.notices)


@pytest.mark.slow
def test_trials_that_are_measured_on_other_rows_are_told(tmp_path: Path) -> None:
    _, heard = swept(tmp_path / "sweep", "--over", "seed=1,2", "--max-steps", "1")
    assert any("not measured on the same rows" in text for text in heard.notices)


# ---------------------------------------------------------------- failures


def test_a_trial_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    over = ("--over", "learning_rate=1e30,1e-3", "--max-grad-norm", "0", "--max-steps", "8")
    code, out, err = run(*sweep_of(folder, *over), capsys=capsys)
    assert code == 0, err
    failed, finished = records_in(folder)
    assert (failed["state"], failed["exit_code"], finished["state"]) == ("failed", 4, "finished")
    assert failed["fault"] in html.unescape((folder / "sweep.html").read_text())
    assert "trial 1 of 2 failed" in out
    # Numbers that are not finite would be so again.
    code, out, _ = run("sweep", "--output", str(folder), "--resume", capsys=capsys)
    assert (code, "this sweep is finished" in out) == (0, True)


@pytest.mark.slow
def test_where_no_trial_finishes_the_exit_code_is_that_of_the_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = ("--over", "learning_rate=1e30,1e31", "--max-grad-norm", "0", "--max-steps", "8")
    code, _, err = run(*sweep_of(tmp_path / "sweep", *over), capsys=capsys)
    assert code == 4
    assert [line for line in err.splitlines() if line.startswith("error: no trial has finished")]


# ---------------------------------------------------------------- resumed


def test_a_finished_sweep_says_so_and_trains_nothing(
    six: Six, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(six[0], tmp_path / "six"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trial-*/*")}
    code, out, _ = run("sweep", "--output", str(folder), "--resume", capsys=capsys)
    assert (code, "this sweep is finished; nothing to do" in out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trial-*/*")} == before


def test_a_sweep_goes_on_where_it_was(
    six: Six, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill leaves it in trial 5: half of it is trained, and trial 6 has not begun."""
    folder = Path(shutil.copytree(six[0], tmp_path / "six"))
    *_, fifth, sixth = trials_in(folder)
    shutil.rmtree(sixth)
    as_if_killed_at(fifth, 2)
    (fifth / "adapter_model.safetensors").unlink()
    content = json.loads((folder / "sweep.json").read_text())
    for record, state in zip(content["trials"][4:], ("running", "waiting"), strict=True):
        record.update(state=state, figures=None)
    (folder / "sweep.json").write_text(json.dumps(content))
    before = {path.name: weights_of(path) for path in trials_in(six[0])}
    code, out, err = run("sweep", "--output", str(folder), "--resume", capsys=capsys)
    assert code == 0, err
    assert out.count("training: 4 optimiser steps") == 2
    assert "from step 3" in out
    assert {path.name: weights_of(path) for path in trials_in(folder)} == before
    without = [{**each["figures"], "seconds": 0} for each in records_in(folder)]
    assert without == [{**each["figures"], "seconds": 0} for each in records_in(six[0])]


def test_a_sweep_goes_on_as_it_was_begun(six: Six, capsys: pytest.CaptureFixture[str]) -> None:
    again = ("--output", str(six[0]), "--resume", "--over", "rank=4,8", "--seed", "7")
    code, _, err = run("sweep", *again, capsys=capsys)
    assert code == 2
    assert [line.split(":")[1] for line in err.splitlines()] == [" --resume"] * 2
    assert "seed was 42 and is now 7" in err


# ---------------------------------------------------------------- what is searched


def config_of(**given: Any) -> SweepConfig:
    return configure(SweepConfig, given)


def test_a_random_search_draws_no_trial_twice_and_the_same_each_time() -> None:
    over = ("learning_rate=1e-5..1e-3", "rank=4,8", "alpha=10..12", "lora_dropout=0..0.5")
    config = config_of(over=over, search="random", trials="40")
    trials = trials_of(config)
    assert trials == trials_of(config)
    assert trials != trials_of(config.model_copy(update={"seed": 7}))
    assert len({repr(each.values) for each in trials}) == 40
    rates = sorted(float(each.values["learning_rate"]) for each in trials)
    assert (rates[0] >= 1e-5, rates[-1] <= 1e-3) == (True, True)
    # Drawn by factors: half of them lie below the geometric mean of the ends.
    assert 10 <= sum(rate < 1e-4 for rate in rates) <= 30
    assert {each.values["rank"] for each in trials} == {"4", "8"}


def test_as_many_draws_as_combinations_give_all_of_them() -> None:
    trials = trials_of(config_of(over=("rank=4,8", "bits=4,8"), search="random", trials="4"))
    assert len({repr(each.values) for each in trials}) == 4


def test_a_file_says_what_is_varied_as_flags_do(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("over: {lr: [1e-4, 3e-4], targets: [[q_proj, v_proj], mlp]}\n")
    by_file = trials_of(configure(SweepConfig, {"config_file": str(file)}))
    by_flags = trials_of(config_of(over=("lr=1e-4,3e-4", "targets=q_proj,v_proj;mlp")))
    assert [each.name for each in by_file] == [each.name for each in by_flags]
    assert by_file[0].name == "trial-01-learning_rate=1e-4_targets=q_proj+v_proj"


def test_a_dry_run_prints_a_command_for_each_trial(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--over", "targets=q_proj,v_proj;all-linear", "--no-packing", "--dry-run", "--json")
    code, out, _ = run("sweep", "--rank", "4", "--data", "my file.jsonl", *more, capsys=capsys)
    assert code == 0
    first, second = json.loads(out)["runs"].values()
    assert "--data 'my file.jsonl'" in first
    for command, targets in ((first, ["q_proj", "v_proj"]), (second, ["all-linear"])):
        _, *arguments = shlex.split(command)
        _, printed, _ = run(*arguments, "--dry-run", capsys=capsys)
        resolved = yaml.safe_load(printed)
        assert (resolved["targets"], resolved["packing"]) == (targets, False)
        assert (resolved["rank"], resolved["learning_rate"]) == (4, 0.002), "of configs/demo.yaml"


MANY = "{}=" + ",".join(map(str, range(1, 33)))
BAD: dict[tuple[str, ...], str] = {
    (): "--over: missing; expected an option and its values",
    ("--over", "rank"): "expected KEY=a,b, such as learning_rate=1e-4,3e-4",
    ("--over", "=4,8"): "expected KEY=a,b",
    ("--over", "rank="): "rank has an empty value",
    ("--over", "rank=4,,8"): "rank has an empty value",
    ("--over", "rnak=4,8"): "--over rnak: unknown key; did you mean rank?",
    ("--over", "over=4,8"): "--over over: unknown key",
    ("--over", "rank=4,eight"): "--over rank: found eight; expected a whole number",
    ("--over", "rank=0,8"): "--over rank: found 0; expected greater than or equal to 1",
    ("--over", "rank=4,4"): "--over rank: 4 and 4 are the same",
    ("--over", "lr=1e-4,0.0001"): "--over learning_rate: 1e-4 and 0.0001 are the same",
    ("--over", "rank=4,8", "--over", "lora_r=2"): "--over lora_r: rank is given twice",
    ("--over", "rank=4,8", "--rank", "2"): "rank is given for the whole sweep too",
    ("--over", "output=a,b"): "--over output: cannot be varied",
    ("--over", "resume=a,b"): "--over resume: cannot be varied",
    ("--over", "best_metric=loss,accuracy"): "the trials are ranked by it",
    ("--over", "deterministic=true,false"): "it holds for the whole process",
    ("--over", "load_in_4bit=true"): "is a switch; expected what it stands for; write bits=4",
    ("--over", "bits=4,5"): "--over bits: found 5; expected 4, 8 or 16",
    ("--over", "model=demo,deepseek-7bb"): "did you mean deepseek-7b",
    ("--over", "lr=1e-5..1e-3"): "is a range, which has no combinations",
    ("--over", "rank=4,8", "--trials", "2"): "a grid has all of its 2 combinations",
    ("--over", "rank=4,8", "--trials", "0"): "--trials: found 0",
    ("--over", "rank=4,8", "--search", "random"): "--trials: missing",
    ("--over", "rank=4,8", "--search", "random", "--trials", "3"): "there are 2 combinations",
    ("--over", "rank=8..4", "--search", "random", "--trials", "1"): "the smaller number first",
    ("--over", "rank=0..4", "--search", "random", "--trials", "1"): "--over rank: found 0",
    ("--over", "rank=4,8", "--search", "bayes"): "--search: found bayes",
    ("--over", MANY.format("rank"), "--over", MANY.format("alpha")): "1,024 combinations; expected",
    ("--over", "rank=4,8", "--devices", "2"): "--devices 2: a sweep trains one trial after another",
    ("--over", "rank=4,8", "--shard-base"): "--shard-base: a sweep trains in one process",
    ("--over", "rank=4,8", "--resume", "checkpoint-2"): "a sweep has no checkpoint of its own",
    ("--over", "rank=4,8", "--allow-change", "seed"): "--allow-change: a sweep goes on as it was",
    ("--over", "targets=mlp;no_such_layer"): "'no_such_layer' matches no linear layer",
    ("--over", "data=no.jsonl;demo.jsonl"): "no.jsonl",
    ("--over", "max_length=1,64"): "--over max_length: found 1",
    ("--over", "packing=true,maybe"): "--over packing: found maybe; expected true or false",
}  # fmt: skip


@pytest.mark.parametrize("given", BAD, ids=" ".join)
def test_what_cannot_be_searched_is_one_line_before_any_trial(
    given: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("sweep", "--output", "out", "--device", "cpu", *given, capsys=capsys)
    assert code == 2, out + err
    assert BAD[given] in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [], "an error leaves nothing behind"


def _with_a_stranger(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def _with_a_merge(folder: Path) -> None:
    merged = trials_in(folder)[0] / "merged"
    merged.mkdir()
    (merged / "manifest.json").write_text("{}")


def _without_its_options(folder: Path) -> None:
    (folder / "sweep.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "flag", "says"),
    [
        (lambda folder: None, (), "not empty; continue that sweep with --resume"),
        (lambda folder: None, ("--resume", "--overwrite"), "contradict each other"),
        (_with_a_stranger, ("--overwrite",), "this holds"),
        (_with_a_merge, ("--overwrite",), "this holds"),
        (_without_its_options, ("--overwrite",), "holds no sweep.yaml"),
    ],
)
def test_only_a_sweep_is_replaced(
    six: Six,
    spoil: Callable[[Path], None],
    flag: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(six[0], tmp_path / "six"))
    spoil(folder)
    code, _, err = run(*sweep_of(folder, "--over", "rank=2"), *flag, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err
    assert len(trials_in(folder)) == 6


def test_a_sweep_is_replaced_where_that_is_asked_for(
    six: Six, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(six[0], tmp_path / "six"))
    more = ("--over", "rank=2", "--overwrite", "--max-steps", "1")
    code, _, err = run(*sweep_of(folder, *more), capsys=capsys)
    assert code == 0, err
    assert [path.name for path in trials_in(folder)] == ["trial-01-rank=2"]


def test_a_run_and_a_sweep_are_not_taken_for_each_other(
    six: Six, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(six[0], tmp_path / "six"))
    code, _, err = run("train", "--output", str(folder), "--resume", capsys=capsys)
    assert (code, "holds a sweep" in err) == (2, True)
    trial = trials_in(folder)[0]
    more = ("--resume", "--over", "rank=2")
    code, _, err = run("sweep", "--output", str(trial), *more, capsys=capsys)
    assert (code, "holds a run; expected a sweep" in err) == (2, True)


def test_a_second_sweep_is_kept_out(six: Six, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_kit.storage import only_writer

    with only_writer(six[0]):
        code, _, err = run("sweep", "--output", str(six[0]), "--resume", capsys=capsys)
    assert (code, "another qlora-kit process writes here" in err) == (3, True)
