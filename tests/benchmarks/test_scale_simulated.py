"""`benchmarks/scale_simulated.py`: rings by hand, one GPU as the plan has it, what stops paying."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import PROJECT, run

from qlora_kit.model.cards import ceilings_of_card
from qlora_kit.model.ceilings import Ceilings
from qlora_kit.plan.duration import GPU_SHARE, step_seconds
from qlora_kit.plan.ledger import Operation, Work

H100 = ceilings_of_card("H100")


def loaded(name: str, patch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, PROJECT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simulated() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROJECT / "benchmarks"))
        loaded("scale_model", patch)
        yield loaded("scale_simulated", patch)


@pytest.fixture(scope="module")
def scale(simulated: Any) -> Any:
    return sys.modules["scale_model"]


def cluster(scale: Any, **changes: float) -> Any:
    links = {"gpus_per_node": 8, "inside": 100.0, "between": 10.0, "hop_inside": 1.0}
    return scale.Cluster(**{**links, "hop_between": 5.0, **changes})


# ---------------------------------------------------------------- rings


def test_a_ring_in_a_node_and_over_nodes(scale: Any) -> None:
    links = cluster(scale)
    assert links.gather_seconds(4000, 1) == 0
    # Each of four GPUs has 1,000 bytes and gets 3,000 over three hops.
    assert links.gather_seconds(4000, 4) == 3000 / 100 + 3
    # The slower link sets the rate; of 15 hops one leads to the other node.
    assert links.gather_seconds(4000, 16) == 3750 / 10 + 14 + 5
    assert links.sum_seconds(4000, 16) == 2 * links.gather_seconds(4000, 16)
    # A network faster than the links of the node does not make them faster.
    assert cluster(scale, between=1e9).gather_seconds(4000, 16) == 3750 / 100 + 14 + 5


def test_a_rings_bytes(scale: Any) -> None:
    assert [scale.sent_bytes(960, gpus) for gpus in (1, 2, 4, 32)] == [0, 480, 720, 930]


def test_rows_of_a_step_stay_the_same(scale: Any) -> None:
    run_of = scale.Run("demo", rows=24, micro_batch=4, tokens=64)
    shares = {gpus: run_of.share(gpus) for gpus in (1, 2, 4, 6, 12, 24, 48)}
    assert shares == {
        1: (6, 4), 2: (3, 4), 4: (2, 4), 6: (1, 4), 12: (1, 2), 24: (1, 1), 48: (1, 1),
    }  # fmt: skip


# ---------------------------------------------------------------- waits


def amounts(scale: Any, forward: float, backward: float, layers: int) -> Any:
    """Return the amounts of a GPU whose layers take these seconds of `flat()`."""

    def work(seconds: float) -> Work:
        flop = round(seconds * GPU_SHARE * 1e6)
        return Work(operations=Counter({Operation("product", "bfloat16", flop, 0): 1}))

    passes = {"forward": work(forward), "backward": work(backward)}
    return scale.Amounts(layers, work(10), work(1), passes, 10_000, 600, 80, 40)


def flat() -> Ceilings:
    return Ceilings("a card", {"bfloat16": 1e6, "float32": 1e6}, ((1, 1e6),), {}, 1e9, None, False)


@pytest.mark.parametrize(
    ("gather", "waits"),
    [
        (2.0, 2 * 2.0),  # hidden behind the layers but for the first of each pass
        (4.0, 4.0 + 9 * (4 - 3) + 4.0),  # longer than a layer of forward
        (7.0, 7.0 + 9 * (7 - 3) + 7.0 + 9 * (7 - 6)),  # and than one of backward
    ],
)
def test_gathers_hide_behind_layers(scale: Any, gather: float, waits: float) -> None:
    one = amounts(scale, forward=3, backward=6, layers=10)
    assert scale._gather_waits(one, gather, flat()) == pytest.approx(waits, rel=1e-5)


def test_memory_of_a_part_of_the_base(scale: Any) -> None:
    one = amounts(scale, 3, 6, layers=10)  # 6,000 of 10,000 bytes are the layers
    assert scale._peak_bytes(one, 1) == 10_000
    # A quarter of ten layers, and two whole ones.
    assert scale._peak_bytes(one, 4) == 10_000 - 6_000 + 1_500 + 1_200
    few = amounts(scale, 3, 6, layers=2)  # never more than the whole base
    assert scale._peak_bytes(few, 2) == 10_000


def test_several_gpus_keep_their_gradients(scale: Any) -> None:
    run_of, links = scale.Run("demo", 2, 1, 64), cluster(scale)
    single = scale.Run("demo", 1, 1, 64).step(scale.REPLICATED, 1, links, H100)
    several = run_of.step(scale.REPLICATED, 2, links, H100)
    assert single.micro_batches == several.micro_batches == 1
    more = several.peak_bytes - single.peak_bytes
    assert 0 < more <= run_of.amounts(2).trained_bytes, "backward makes some of them by its peak"


# ---------------------------------------------------------------- one GPU


def test_one_gpu_is_as_planned(scale: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        "plan", "--model", "demo", "--device", "cuda", "--card", "H100", "--batch-size", "2",
        "--gradient-accumulation-steps", "3", "--max-length", "96", "--eval-batch-size", "1",
        "--rank", "16", "--alpha", "32", "--targets", "attention", "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    plan = json.loads(out)
    step = scale.Run("demo", 6, 2, 96).step(scale.REPLICATED, 1, cluster(scale), H100)
    assert float(f"{step.seconds:.1e}") == plan["time"]["step_seconds"]
    phases = plan["phase_peaks_bytes"]
    assert step.peak_bytes == max(phases[name] for name in ("forward", "backward", "optimizer"))


def test_the_layers_that_are_left_out_are_as_counted(
    scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scale._DERIVED, "seven", ("smollm2-135m", {"num_hidden_layers": 7}))
    config = scale.config_of("seven", 2, 128, 2)
    whole = scale._of_depth(scale.subject_of(config), config, 7)
    found = scale._counted("seven", 2, 128, keeps_gradients=True)
    assert found.micro_batch == whole.micro_batch
    assert (found.peak_bytes, found.trained_bytes) == (whole.peak_bytes, whole.trained_bytes)
    # torch clips gradients in groups, so clipping is not the same for each layer.
    assert found.update.operations.total() == pytest.approx(
        whole.update.operations.total(), rel=0.02
    )


def test_one_gpu_sends_nothing_in_any_form(scale: Any) -> None:
    run_of = scale.Run("demo", 4, 2, 64)
    steps = [run_of.step(form, 1, cluster(scale), H100) for form in scale.FORMS]
    assert steps[0] == steps[1] == steps[2]
    assert (steps[0].sent_bytes, steps[0].gather_seconds, steps[0].sum_seconds) == (0, 0, 0)


# ---------------------------------------------------------------- many GPUs


def test_bytes_of_a_70b(scale: Any) -> None:
    one = scale.Run("llama-3.1-70b", 8, 1, 256).amounts(2)
    assert one.trained_bytes == 4 * 80 * 16 * (16384 + 9216 + 9216 + 16384)
    weights = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    packed = weights / 2 + weights / 64 + 4 * weights / 64 / 256
    assert one.layer_bytes == pytest.approx(packed, rel=1e-4)
    links = cluster(scale, gpus_per_node=2)
    sent = {
        form: scale.Run("llama-3.1-70b", 8, 1, 256).step(form, 4, links, H100).sent_bytes
        for form in scale.FORMS
    }
    trained = 2 * 3 / 4 * one.trained_bytes
    assert one.head_bytes == 2 * 128256 * 8192
    # Two micro-batches a GPU, each with a gather in forward and one in backward, and the head once.
    gathered = 2 * (2 * 80 * one.layer_bytes + one.head_bytes)
    assert sent[scale.REPLICATED] == trained
    assert sent[scale.SHARDED] == trained + 3 / 4 * gathered
    assert sent[scale.TWO_DIMENSIONS] == trained + 1 / 2 * gathered


def test_more_gpus_never_pay_better(scale: Any) -> None:
    run_of, links = scale.Run("demo", 8, 2, 64), scale.Cluster(2, 1e11, 1e9, 1e-6, 1e-5)
    one = run_of.step(scale.REPLICATED, 1, links, H100).seconds
    shares = {
        form: [
            one / (gpus * run_of.step(form, gpus, links, H100).seconds)
            for gpus in (1, 2, 4, 8, 16, 32)
        ]
        for form in scale.FORMS
    }
    for found in shares.values():
        assert found[0] == 1
        assert all(after <= before for before, after in itertools.pairwise(found))
        assert found[4] <= 0.5, "twice as many GPUs as rows"
    slower = zip(shares[scale.SHARDED], shares[scale.TWO_DIMENSIONS], strict=True)
    assert all(sharded <= inside for sharded, inside in slower)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_the_shapes_have_as_many_parameters_as_published(
    scale: Any, model: str, parameters: int
) -> None:
    spec = scale.subject_of(scale.config_of(model, 1, 64, 1)).spec
    one, two = (
        sum(math.prod(each.shape) for each in spec.skeleton(depth).parameters()) for depth in (1, 2)
    )
    layers = spec.architecture().num_hidden_layers
    assert one + (layers - 1) * (two - one) == parameters


# ---------------------------------------------------------------- the command


def step(gpus: int, efficiency: float, *, fits: bool = True) -> dict[str, Any]:
    return {"gpus": gpus, "efficiency": efficiency, "fits": fits, "lost_to": "gathers"}


def test_where_a_form_stops_paying(simulated: Any) -> None:
    assert simulated._end([step(1, 1.0), step(2, 0.9), step(4, 0.4)]) == "1 to 2, then gathers"
    assert simulated._end([step(1, 1.0, fits=False), step(2, 0.9)]) == "2 to 2"
    assert simulated._end([step(1, 1.0, fits=False)]) == "does not fit"
    never = simulated._end([step(1, 1.0, fits=False), step(2, 0.3)])
    assert never == "fits from 2, never pays: gathers"


def test_what_the_time_is_lost_to(simulated: Any, scale: Any) -> None:
    of_a_step = scale.Run("demo", rows=8, micro_batch=2, tokens=64)

    def taking(compute: float, gather: float, total: float) -> Any:
        return scale.Step(1, 1, compute, gather, total, 0, 0)

    one = taking(80, 0, 0)
    assert simulated.lost_to(of_a_step, one, one, 1) == "nothing"
    assert simulated.lost_to(of_a_step, one, taking(10, 1, 0.5), 8) == "gathers of the base"
    assert simulated.lost_to(of_a_step, one, taking(10, 1, 1.5), 8) == "the sum of gradients"
    assert simulated.lost_to(of_a_step, one, taking(12, 1, 1.5), 8) == "small micro-batches"
    assert simulated.lost_to(of_a_step, one, taking(12, 1, 1.5), 16) == "GPUs without rows"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "12"], "expected a multiple of 8"),
        (["--gpus", "0"], "expected 1 or more"),
        (["--rows", "-1"], "expected 1 or more"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    simulated: Any, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulated._arguments(given)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_card_or_model_is_one_line(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (["--card", "abacus"], ["--models", "no-such-model"]):
        monkeypatch.setattr(sys, "argv", ["scale_simulated.py", *given])
        with pytest.raises(SystemExit, match=f"^error: .*{given[1]}"):
            simulated.main()


def test_the_command(
    simulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    given = [
        "--models", "demo", "--gpus", "1,16", "--rows", "8", "--tokens", "64", "--memory", "1GB",
        "--networks", "slow=0.01", "--json", str(saved), "--plot", str(picture),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["scale_simulated.py", *given])
    simulated.main()
    out = capsys.readouterr().out
    assert out.count("not measured") >= 3, "over each table of figures"
    found = json.loads(saved.read_text())
    assert "not measured" in found["what"]
    assert {"machine", "command", "rates"} <= found.keys()
    assert len(found["steps"]) == 2 * 3
    lost = {row["form"]: row["lost_to"] for row in found["steps"] if row["gpus"] == 16}
    assert lost == {
        "replicated": "the sum of gradients", "sharded": "gathers of the base",
        "2-D": "the sum of gradients",
    }  # fmt: skip
    assert found["most_gpus_that_pay"][0]["replicated"] == "1 to 1, then the sum of gradients"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_the_host_one_gpu_takes_the_plans_time(simulated: Any, scale: Any) -> None:
    given = simulated._arguments(["--call-us", "0"])
    ceilings = simulated._ceilings(given)
    assert ceilings == H100
    one = scale.Run("demo", 4, 2, 64)
    found = one.step(scale.REPLICATED, 1, simulated.cluster_of(given, "ethernet"), ceilings)
    counted = one.amounts(1)
    work = scale.StepWork(counted.micro_batch, counted.update, 2, 128)
    assert found.seconds == step_seconds(work, H100).all
