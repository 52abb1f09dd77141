"""What a sweep varies is read alike from flags and files."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.config import Layer, SweepConfig, resolve
from qlora_kit.errors import ConfigError


def varied(value: Any) -> dict[str, tuple[Any, ...]]:
    config = resolve(SweepConfig, [Layer("", {"over": value})])
    return {over.key: over.values for over in config.over}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("rank=8", {"rank": ("8",)}),
        ("rank=8, 16", {"rank": ("8", "16")}),
        ("learning-rate=1e-4,3e-4", {"learning_rate": ("1e-4", "3e-4")}),
        ("targets=q_proj,v_proj;mlp", {"targets": ("q_proj,v_proj", "mlp")}),
        (r"targets=layers\.\d{1,2}\.q_proj,mlp", {"targets": (r"layers\.\d{1,2}\.q_proj", "mlp")}),
        ("rank_pattern=down_proj=8;q_proj=4", {"rank_pattern": ("down_proj=8", "q_proj=4")}),
        (["rank=8", "bits=4,8"], {"rank": ("8",), "bits": ("4", "8")}),
        ({"rank": [8, 16], "bits": 4}, {"rank": (8, 16), "bits": (4,)}),
        ({"targets": [["q_proj", "v_proj"], "mlp"]}, {"targets": (["q_proj", "v_proj"], "mlp")}),
        ([{"key": "rank", "values": ["8"]}], {"rank": ("8",)}),
    ],
)
def test_what_is_varied(written: Any, meant: dict[str, tuple[Any, ...]]) -> None:
    assert varied(written) == meant
    again = resolve(SweepConfig, [Layer("", {"over": written})]).model_dump(mode="json")
    assert varied(again["over"]) == meant, "as it is stored"


@pytest.mark.parametrize(
    "written",
    ["rank", "=8", "rank=", "rank=8,", "rank=8;;4", {"rank": []}, {"rank": None}, 7, [[8]]],
)
def test_what_is_not_understood(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--over: found .*expected"):
        varied(written)
