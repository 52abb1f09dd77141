"""Compare memory and speed of a merge and its verification with copying the same files.

    python benchmarks/merge.py                # a random 2 GB Llama in shards of 200 MB

Writes a random bf16 Llama and an adapter of all its linear layers, merges them in a fresh process,
and prints the growth of anonymous memory after the imports. The copy reads and writes the same
bytes on the same disk, and flushes them to the disk as the merge does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import print_table, run_side, save_results

ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 8192, "dtype": "bfloat16",
}  # fmt: skip
SHARD_BYTES = 200_000_000
RANK = 16
MEASURED = ["copy", "merge", "merge and verify weights", "merge and verify all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=ARCHITECTURE["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](**json.loads(arguments.settings))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        settings = {"folder": folder, "layers": arguments.layers}
        print(run_side(__file__, "write", settings))
        rows = [
            {"side": side, "round": number, **run_side(__file__, side, settings)}
            for number in range(1, arguments.rounds + 1)
            for side in arguments.sides
        ]
    columns = ["side", "round", "seconds", "cpu_seconds", "mb_per_second", "grown_mb"]
    print_table(rows, columns)
    save_results("merge_2gb_llama_cpu", {"settings": {**ARCHITECTURE, "rank": RANK,
                 "shard_bytes": SHARD_BYTES, "num_hidden_layers": arguments.layers}, "rows": rows,
                 "load_average": os.getloadavg()})  # fmt: skip


# ---------------------------------------------------------------- the sides


def write(folder: str, layers: int) -> dict[str, Any]:
    """Write the random model and an adapter of it."""
    import torch
    from safetensors.torch import save_file

    from qlora_kit.export.shards import ShardWriter
    from qlora_kit.layers.projections import projections
    from qlora_kit.model.architecture import architecture_from, build_skeleton

    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = architecture_from({**ARCHITECTURE, "num_hidden_layers": layers})
    config.save_pretrained(base)
    skeleton = build_skeleton(config)
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(base, SHARD_BYTES)
    for name, shaped in skeleton.state_dict().items():
        values = torch.randn(shaped.shape, generator=generator).mul_(0.02)
        writer.add(name, (values + 1 if shaped.dim() == 1 else values).bfloat16())
    writer.finish()
    tensors = {}
    for path, layer in projections(skeleton).items():
        key = f"base_model.model.{path}.lora_{{}}.weight"
        tensors[key.format("A")] = torch.randn(RANK, layer.in_features, generator=generator) * 0.02
        tensors[key.format("B")] = torch.randn(layer.out_features, RANK, generator=generator) * 0.02
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK})
    )
    return {"written_gb": writer.total_bytes / 1e9}


def copy(folder: str, layers: int) -> dict[str, Any]:
    """Copy the files of the model, flushed to the disk."""
    target = Path(folder) / "copied"
    files = sorted((Path(folder) / "base").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    target.mkdir()
    with _measured(size) as found:
        for path in files:
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(target)
    return found


def merge(folder: str, layers: int, verify_tokens: int | None = None) -> dict[str, Any]:
    """Merge; with `verify_tokens` 0 verify the weights, and above 0 the predictions as well."""
    import torch

    import qlora_kit as qk
    from qlora_kit.export.merge import Check, merge_to
    from qlora_kit.export.rows import some_rows
    from qlora_kit.export.verify import verify_merge
    from qlora_kit.model.tokenizer import load_tokenizer

    base, target = Path(folder) / "base", Path(folder) / "merged"
    tokenizer = load_tokenizer(qk.find_model("demo").folder)
    rows = None
    if verify_tokens:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 600, (verify_tokens // 128, 128), generator=generator).tolist()
        made = ({"input_ids": row, "labels": row, "row": n} for n, row in enumerate(ids))
        rows = some_rows(made, verify_tokens, 0, "random tokens")
    check: Check | None = None
    if verify_tokens is not None:
        check = lambda merge, made: verify_merge(merge, made, rows) and None  # noqa: E731
    spec = qk.BaseSpec(qk.find_model(str(base)), base, qk.Quantization(4))
    stored = qk.read_adapter(Path(folder) / "adapter")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    with _measured(size) as found:
        merge_to(target, stored, spec, tokenizer, shard_bytes=SHARD_BYTES, check=check)
    shutil.rmtree(target)
    return found


@contextlib.contextmanager
def _measured(size: int) -> Iterator[dict[str, Any]]:
    """Time the block, and measure how far anonymous memory rises above its start."""
    found: dict[str, Any] = {}
    done = threading.Event()
    start = peak = _anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        done.set()
        watcher.join()
    found.update(
        seconds=round(seconds, 1),
        # Of all threads together. Where the machine has other work, this says more than the clock.
        cpu_seconds=round(cpu_seconds, 1),
        mb_per_second=round(size / 1e6 / seconds),
        grown_mb=round((peak - start) / 1e6),
    )


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("RssAnon is not in /proc/self/status; this needs Linux")


SIDES = {
    "write": write,
    "copy": copy,
    "merge": merge,
    "merge and verify weights": lambda **settings: merge(**settings, verify_tokens=0),
    "merge and verify all": lambda **settings: merge(**settings, verify_tokens=1024),
}

if __name__ == "__main__":
    main()
