"""llama.cpp's raw logits of a GGUF file, through llama-cpp-python, are transformers'.

`tests/node_llama_cpp.py` asks a prebuilt llama.cpp, which gives probabilities alone. This package
gives what they are made of, and is compiled here: `make llama-cpp`, some ten minutes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import exported, save_trained
from node_llama_cpp import gguf_in
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

TEXT = "Once upon a time, there was a big dog. He liked to play in the park with his ball."


def raw_logits(file: Path, ids: list[int]) -> Tensor:
    """Return llama.cpp's logits, (T, V)."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="not built: `make llama-cpp` does it")
    fp32 = llama_cpp.GGML_TYPE_F32  # keys and values too, so that what differs is the file
    model = llama_cpp.Llama(
        str(file), n_ctx=512, logits_all=True, type_k=fp32, type_v=fp32, verbose=False
    )
    model.eval(ids)
    found = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    return found


@pytest.mark.parametrize(("base", "std"), [("stories", 0.02), ("smollm2", 0.002)])
def test_raw_logits_are_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, std: float
) -> None:
    adapter = save_trained(request.getfixturevalue(base), tmp_path / "adapter", std=std)
    merged = exported(adapter, tmp_path / "merged", "merged", dtype="float32")
    target = exported(adapter, tmp_path / "gguf", "gguf", gguf_type="f32")
    ids = AutoTokenizer.from_pretrained(adapter).encode(TEXT)
    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0]
    found = raw_logits(gguf_in(target), ids)
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    apart = float((found - expected).abs().max())
    assert apart <= 1e-4 * largest, (apart, largest)
