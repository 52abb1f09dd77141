"""Fine-tune a classifier here and with PEFT under transformers' own trainer; compare the accuracy.

    python benchmarks/classify.py --model FOLDER --train FILE --test FILE [--seeds 1,2,3] [--rows N]

The model is an encoder or a decoder. Both sides have the same base, rows, steps, batches, learning
rate and schedule, LoRA on the same layers, and a head of their own, drawn from the seed. They
differ in the order of the rows and in the first values of A and of the head. The kit runs through
its command line, in processes of its own. Printed are the accuracy on the test rows and the time
of each side, and the mean of the seeds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine_and_command, print_table, run_side

RANK, ALPHA, DROPOUT, CLIP, WARMUP = 16, 32, 0.0, 1.0, 0.03


def main() -> None:
    """Run every side, bits and seed, one after the other, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder of the base")
    parser.add_argument("--train", help="TSV with the columns sentence and label")
    parser.add_argument("--test", help="likewise")
    parser.add_argument("--rows", type=int, help="train on the first rows only")
    parser.add_argument("--bits", default="4,16")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument(
        "--group-by-length", action="store_true",
        help="let the kit put rows of about the same length into one batch, as it does by default; "
        "PEFT's trainer does not",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_SIDES[arguments.side](json.loads(arguments.settings))))
        return
    names = (
        "model", "train", "test", "rows", "steps", "batch_size", "learning_rate", "max_length",
        "group_by_length",
    )  # fmt: skip
    common = {name: getattr(arguments, name) for name in names}
    rows = []
    for bits in map(int, arguments.bits.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            for side in _SIDES:
                settings = {**common, "bits": bits, "seed": seed}
                rows.append({"side": side, "bits": bits, "seed": seed})
                rows[-1] |= run_side(sys.argv[0], side, settings)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if arguments.json:
                    found = {**machine_and_command(), "settings": common, "runs": rows}
                    arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    means = [
        {"side": side, "bits": bits, "accuracy": round(statistics.mean(accuracies), 4)}
        for bits in map(int, arguments.bits.split(","))
        for side in _SIDES
        if (accuracies := [r["accuracy"] for r in rows if (r["side"], r["bits"]) == (side, bits)])
    ]
    print_table(means, ["side", "bits", "accuracy"])


def run_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate through the command line."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = _first_rows(settings, Path(folder))
        kit = [sys.executable, "-m", "qlora_kit"]
        train = [
            *kit, "train", "--task", "classify", "--model", settings["model"],
            "--data", str(data), "--output", f"{folder}/run", "--device", "cpu",
            "--bits", str(settings["bits"]), "--seed", str(settings["seed"]),
            "--max-steps", str(settings["steps"]), "--batch-size", str(settings["batch_size"]),
            "--gradient-accumulation-steps", "1", "--targets", "all-linear",
            "--learning-rate", str(settings["learning_rate"]), "--rank", str(RANK),
            "--alpha", str(ALPHA), "--lora-dropout", str(DROPOUT), "--max-grad-norm", str(CLIP),
            "--warmup-ratio", str(WARMUP), "--max-length", str(settings["max_length"]),
            "--validation-fraction", "0", "--save-steps", "100000",
            "--group-by-length" if settings["group_by_length"] else "--no-group-by-length",
        ]  # fmt: skip
        subprocess.run(train, check=True, capture_output=True)
        measure = [*kit, "evaluate", "--adapter", f"{folder}/run", "--data", settings["test"]]
        done = subprocess.run([*measure, "--json"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    seconds = time.perf_counter() - start
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "seconds": seconds}


def _first_rows(settings: dict[str, Any], folder: Path) -> Path:
    """Return the training file, or a file in `folder` with its header and first rows."""
    if settings["rows"] is None:
        return Path(settings["train"])
    with Path(settings["train"]).open(encoding="utf-8") as stream:
        lines = list(itertools.islice(stream, 1 + settings["rows"]))
    (folder / "train.tsv").write_text("".join(lines), encoding="utf-8")
    return folder / "train.tsv"


def run_peft(settings: dict[str, Any]) -> dict[str, Any]:
    """PEFT's LoRA under `transformers.Trainer`, on bitsandbytes' own layers in 4 bits."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    start = time.perf_counter()
    torch.manual_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    quantization = None
    if settings["bits"] == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            # The head is in no checkpoint, and cannot be packed before it has values.
            llm_int8_skip_modules=["classifier", "score"],
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=2, dtype=torch.float32, quantization_config=quantization
    )
    # A decoder finds the last token of a padded row by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, task_type="SEQ_CLS",
        target_modules="all-linear",
    )  # fmt: skip
    model = get_peft_model(model, lora)

    def rows(path: str, most: int | None = None) -> datasets.Dataset:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            table = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:][:most]
        texts = [text for text, _ in table]
        encoded = tokenizer(texts, truncation=True, max_length=settings["max_length"])
        return datasets.Dataset.from_dict({**encoded, "labels": [int(row[1]) for row in table]})

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, max_steps=settings["steps"], use_cpu=True, report_to="none",
            per_device_train_batch_size=settings["batch_size"], per_device_eval_batch_size=32,
            learning_rate=settings["learning_rate"], lr_scheduler_type="linear",
            warmup_steps=round(WARMUP * settings["steps"]), max_grad_norm=CLIP, weight_decay=0.0,
            seed=settings["seed"], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=options, train_dataset=rows(settings["train"], settings["rows"]),
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        accuracy = _accuracy(trainer.model, rows(settings["test"]), trainer.data_collator)
    return {"accuracy": accuracy, "seconds": time.perf_counter() - start}


def _accuracy(model: Any, rows: Any, collate: Any) -> float:
    """Measure a model of PEFT's on rows.

    In evaluation mode bitsandbytes repacks its 4-bit layers on some CPUs, and then fails on those
    that it has packed. They stay in training mode, in which they compute the same.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            batch = collate([rows[i] for i in range(start, min(start + 32, len(rows)))])
            right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return right / len(rows)


_SIDES = {"ours": run_ours, "peft": run_peft}

if __name__ == "__main__":
    main()
