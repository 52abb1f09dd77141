"""`benchmarks/launches.py` counts what a step launches, on fake tensors."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from support import PROJECT

SCRIPT = PROJECT / "benchmarks" / "launches.py"


@pytest.fixture(scope="module")
def launches() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("launches", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "launches", module)
        spec.loader.exec_module(module)
        yield module


def total(launches: Any, found: Any) -> Any:
    return launches._sum(found.costs.values())


def test_views_and_empty_tensors_launch_nothing(launches: Any) -> None:
    x = torch.zeros(4, 6)
    with launches.Counted() as found:
        x.view(24).unflatten(0, (6, 4)).T.chunk(2)
        torch.empty_like(x).expand(4, 6).detach()
    assert found.costs == {}


def test_bytes_and_operations_of_a_kernel(launches: Any) -> None:
    x, y, row = torch.zeros(4, 6), torch.zeros(6, 5), torch.zeros(6)
    cases = {
        "a sum": (lambda: x + 1, 96, 96, 0),
        "a sum in place": (lambda: x.add_(row), 96 + 24, 96, 0),
        "a row that is expanded": (lambda: x + row.expand(4, 6), 96 + 24, 96, 0),
        "a product": (lambda: x @ y, 96 + 120, 80, 2 * 4 * 6 * 5),
        "a product into": (lambda: torch.mm(x, y, out=z), 96 + 120, 80, 2 * 4 * 6 * 5),
        "a copy": (lambda: x.copy_(row), 24, 96, 0),
    }
    z = torch.zeros(4, 5)
    for name, (run, read, written, flop) in cases.items():
        with launches.Counted() as found:
            run()
        cost = total(launches, found)
        assert (cost.launches, cost.read, cost.written, cost.flop) == (1, read, written, flop), name
        assert cost.seconds == max((read + written) / 2.65e12, flop / 650e12)


def test_masks_are_seen(launches: Any) -> None:
    with launches.Counted() as found:
        torch.ones(7, 7, dtype=torch.bool).tril()
        torch.ones(7, dtype=torch.bool)
    assert found.masks == 2 * 49


def test_a_step_by_part(launches: Any) -> None:
    layer, rest, masks = launches.step_costs("smollm2-135m", "auto", 1, 64)
    parts = {
        part: launches._sum(cost for (name, _), cost in layer.items() if name == part)
        for part in launches.PARTS
    }
    assert masks == 0
    # Seven weights, unpacked as often as they multiply, but for the one that backward holds.
    assert parts["base products"].launches == 20
    assert parts["unpacking"].launches == 19
    # Queries, keys and values together, and the output by itself: forward, again, and backward.
    assert parts["LoRA"].launches == 2 * (6 + 4) + 11 + 7
    assert (parts["RoPE"].launches, parts["attention"].launches) == (3, 5)
    assert parts["norms"].launches == 6
    assert parts["head and loss"].launches == 0
    assert launches._sum(rest.values()).launches > 10
    kernels = sum(launches._kernels(layer, phase) for phase in launches.PHASES)
    assert kernels <= 100


@pytest.mark.slow
def test_what_a_group_shares_is_counted_once(launches: Any) -> None:
    found = [launches.figures("smollm2-135m", side, 1, 64) for side in launches.SIDES]
    with_kernels, plain, alone = (each["parts"]["LoRA"] for each in found)
    for name in ("layer_launches", "layer_bytes"):
        assert with_kernels[name] < plain[name] < alone[name]
    assert all(each["parts"]["norms"]["layer_launches"] > 5 for each in found)
