"""Compare tokens a second of `chat` and `serve` with transformers' `generate`, answer after answer.

    python benchmarks/serve.py --model models/SmolLM2-135M-Instruct

All compute in fp32 on the CPU with the same number of threads, greedily, and continue the same
prompts. `chat` is the command itself on a terminal, where the prompts are typed one after another.
`serve` is the command in a process of its own, asked over HTTP by one caller and by eight at once;
an adapter of random values is on its base where --adapter-rank asks for one, and half of the
requests are for it. The sides of a round follow each other, and a ratio is of one round; the median
of the ratios counts. The bars: 1.0 for `chat` and for one caller, 3.0 for eight.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from measure import PROJECT, print_table, run_side, save_results

PROMPTS = [
    "The capital of France is", "A short story about a dog:", "To bake bread, first",
    "The three laws of motion are", "Dear Sir or Madam,", "def fibonacci(n):",
    "In the year 1969,", "The difference between a lake and a sea is",
]  # fmt: skip
SIDES_OF_A_ROUND = [("generate", 1), ("chat", 1), ("serve", 1), ("serve", 8)]
BARS = {"chat": 1.0, "serve, 1 caller": 1.0, "serve, 8 callers": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="its folder")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adapter-rank", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serve.json")
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](**json.loads(arguments.settings))))
        return
    settings = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "adapter_rank": arguments.adapter_rank,
    }
    rows = [
        {
            "side": _name(side, callers),
            "round": number,
            **run_side(__file__, side, {**settings, "callers": callers}),
        }
        for number in range(1, arguments.rounds + 1)
        for side, callers in SIDES_OF_A_ROUND
    ]
    print_table(rows, ["side", "round", "tokens", "seconds", "tokens_per_second"])
    ratios = {name: _ratio(rows, name) for name in BARS}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times generate; the bar is {BARS[name]}")
    if arguments.save:
        save_results("serve", {"settings": settings, "rows": rows, "ratios": ratios,
                               "load_average": os.getloadavg()})  # fmt: skip


def _name(side: str, callers: int) -> str:
    return side if side != "serve" else f"{side}, {callers} caller{'s' * (callers > 1)}"


def _ratio(rows: list[dict[str, Any]], name: str) -> float:
    of = {(row["side"], row["round"]): row["tokens_per_second"] for row in rows}
    rounds = {row["round"] for row in rows}
    return statistics.median(of[name, n] / of["generate", n] for n in rounds)


# ---------------------------------------------------------------- the sides


def generate(
    model: str, tokens: int, threads: int, adapter_rank: int, callers: int
) -> dict[str, Any]:
    """Answer one prompt after another with transformers alone; an adapter is left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_kit.data.encode import prompt_ids

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # The ids that the kit gives the model: a model that was trained with a BOS gets one.
    prompts = [torch.tensor([prompt_ids(tokenizer, prompt)]) for prompt in PROMPTS]

    def answer(ids: torch.Tensor, most: int) -> int:
        given = network.generate(ids, max_new_tokens=most, do_sample=False)
        return int(given.shape[1] - ids.shape[1])

    with torch.inference_mode():
        answer(prompts[0], 4)
        begun = time.perf_counter()
        made = sum(answer(prompt, tokens) for prompt in prompts)
        seconds = time.perf_counter() - begun
    return _figures(made, seconds)


def serve(model: str, tokens: int, threads: int, adapter_rank: int, callers: int) -> dict[str, Any]:
    """Answer the same prompts by the command, asked by some callers at a time."""
    with tempfile.TemporaryDirectory() as folder:
        named = [Path(model).resolve().name]
        more = []
        if adapter_rank:
            more = ["--adapter", f"tuned={_adapter(model, adapter_rank, Path(folder))}"]
            named.append("tuned")
        with _server(model, threads, more) as port:
            asked = [(named[n % len(named)], prompt) for n, prompt in enumerate(PROMPTS)]
            for name in named:
                _asked(port, name, PROMPTS[0], 4)
            with ThreadPoolExecutor(callers) as pool:
                begun = time.perf_counter()
                made = sum(pool.map(lambda each: _asked(port, *each, tokens), asked))
                seconds = time.perf_counter() - begun
    return _figures(made, seconds)


def chat(model: str, tokens: int, threads: int, adapter_rank: int, callers: int) -> dict[str, Any]:
    """Type the same prompts into the command; an adapter is left out."""
    command = [*_command("chat", model, threads), "--raw", "--max-new-tokens", str(tokens)]
    # The history of what was typed here is nobody's.
    with tempfile.TemporaryDirectory() as state, _Typist(command, XDG_STATE_HOME=state) as typist:
        typist.ask(PROMPTS[0])
        begun = time.perf_counter()
        made = sum(typist.ask(prompt) for prompt in PROMPTS)
        seconds = time.perf_counter() - begun
    return _figures(made, seconds)


SIDES = {"generate": generate, "chat": chat, "serve": serve}


def _figures(tokens: int, seconds: float) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def _adapter(model: str, rank: int, folder: Path) -> Path:
    """Save an adapter of all linear layers, whose B is random."""
    import torch

    import qlora_kit as qk

    base = qk.open_base(qk.TrainConfig(model=model, bits=16, device="cpu", dtype="float32")).base
    adapter = qk.attach(base, qk.LoraSpec(rank=rank, targets=("all-linear",)))
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    qk.save_adapter(adapter, folder, qk.BaseRecord.of(base))
    return folder


def _command(name: str, model: str, threads: int) -> list[str]:
    return [
        sys.executable, "-m", "qlora_kit", name, "--model", model, "--bits", "16",
        "--dtype", "float32", "--device", "cpu", "--threads", str(threads),
    ]  # fmt: skip


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", **more}


class _Typist:
    """A command on a terminal of its own, and somebody who types there."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._terminal, own = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=own, stdout=own, stderr=own, start_new_session=True,
            env=_environment(TERM="dumb", COLUMNS="200", **environment),
        )  # fmt: skip
        os.close(own)
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def ask(self, prompt: str) -> int:
        """Type a prompt, and wait for its whole answer; return how many tokens it has."""
        known = len(self._answers())
        os.write(self._terminal, f"{prompt}\n".encode())
        while len(found := self._answers()) == known:
            # The terminal of a process that ended raises OSError.
            self._shown += os.read(self._terminal, 1 << 16).decode("utf-8", "replace")
        return int(found[-1])

    def _answers(self) -> list[str]:
        """Return the numbers of tokens in the lines that end answers."""
        return re.findall(r"\[(\d+) tokens · ", self._shown)


@contextmanager
def _server(model: str, threads: int, more: list[str]) -> Iterator[int]:
    """Start the command on a free port; yield the port."""
    command = [*_command("serve", model, threads), "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"listening on http://[^ ]*:(\d+)", line):
                # What it writes later must not fill the pipe.
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(process.stdout.read)
                    yield int(found[1])
                    process.terminate()
                return
        raise RuntimeError("the server has ended")
    finally:
        process.kill()
        process.wait()


def _asked(port: int, model: str, prompt: str, tokens: int) -> int:
    """Return how many tokens an answer has."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
