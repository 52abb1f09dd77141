"""Asks llama.cpp itself what it computes of a GGUF file: see `node_llama_cpp.mjs`."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import torch
from npm_packages import npm_package
from torch import Tensor


def ask_llama_cpp(folder: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what llama.cpp answers to jobs, in one process; `folder` is for the request.

    Where llama.cpp is not installed a test fails: nothing else reads the files as users' programs
    do.
    """
    modules = npm_package("node-llama-cpp").parent
    request, answers = folder / "request.json", folder / "answers.json"
    request.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("node_llama_cpp.mjs")
    command = ["node", *map(str, (script, modules, request, answers))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found


def job(model: Path, **wanted: Any) -> dict[str, Any]:
    """Return a job for a GGUF file, or for the one in a folder."""
    return {"model": str(gguf_in(model)), **wanted}


def gguf_in(folder: Path) -> Path:
    """Return the GGUF file of an export."""
    if folder.is_file():
        return folder
    (found,) = folder.glob("*.gguf")
    return found


def logprobs(answer: dict[str, Any], size: int) -> Tensor:
    """Return the log-probabilities that llama.cpp gave, (T, V); -inf of tokens it left out."""
    found = torch.full((len(answer["logprobs"]), size), -math.inf)
    for row, pairs in zip(found, answer["logprobs"], strict=True):
        tokens, values = zip(*pairs, strict=True)
        row[list(tokens)] = torch.tensor(values)
    return found


def furthest(answer: dict[str, Any], expected: Tensor) -> float:
    """Return the largest difference from log-probabilities (T, V), of tokens that are likely.

    llama.cpp gives probabilities in fp32: those below 1e-6 have too few digits to compare.
    """
    found = logprobs(answer, expected.shape[1])
    likely = expected > math.log(1e-6)
    return float((found - expected)[likely].abs().max())
