"""Makes the demo from nothing: tokenizer, a tiny Llama pretrained from scratch, the task's rows.

    python -m qlora_kit.demo.pretrain --output demo-build

The same seed, thread count and library versions give the same files.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_kit.demo import corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 640
TRAIN_ROWS, TEST_ROWS = 3000, 600


def train_tokenizer(seed: int, documents: int = 20_000) -> Tokenizer:
    """Train a byte-level BPE tokenizer that keeps every text intact and splits digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        # Without the full alphabet, bytes the corpus lacks could not be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(corpus.documents(seed), documents), trainer)
    return tokenizer


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Create the randomly initialised model."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Tokenizer, seed: int, rows: int, length: int) -> Iterator[Tensor]:
    """Yield (rows, length) tokens: documents between BOS and EOS, packed one after the other."""
    bos, eos = (tokenizer.encode(token).ids[0] for token in (BOS, EOS))
    # The tokenizer saw the documents of `seed`; the model learns from others.
    source = corpus.documents(seed + 1)
    stream: list[int] = []
    while True:
        while len(stream) < rows * length:
            for encoding in tokenizer.encode_batch(list(itertools.islice(source, 256))):
                stream += [bos, *encoding.ids, eos]
        yield torch.tensor(stream[: rows * length]).view(rows, length)
        stream = stream[rows * length :]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return a linear warm-up followed by half a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(model: Any, tokenizer: Tokenizer, options: argparse.Namespace) -> float:
    """Train the model and return the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    losses: list[float] = []
    start = time.monotonic()
    source = batches(tokenizer, options.seed, options.rows, options.length)
    for step, ids in enumerate(itertools.islice(source, options.steps)):
        rate = learning_rate(step, options.steps, options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            mean = sum(losses[-50:]) / 50
            print(f"step {step + 1} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in float16, its configuration and its tokenizer."""
    config = model.config
    generation: Any = GenerationConfig
    model.generation_config = generation(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.half().save_pretrained(folder)
    wrapper: Any = PreTrainedTokenizerFast
    wrapper(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=32, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Make all files of the demo in the output folder."""
    options = parse_options()
    options.output.mkdir(parents=True)
    # Probabilities of bytes that never occur become denormal numbers, on which some
    # processors are ten times slower; set before any thread of the pool starts.
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = time.monotonic()
    tokenizer = train_tokenizer(options.seed)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    loss = pretrain(model, tokenizer, options)
    save(model, tokenizer, options.output / "model")
    train, test = corpus.task_rows(options.seed, TRAIN_ROWS, TEST_ROWS)
    corpus.write_rows(train, options.output / "train.jsonl")
    corpus.write_rows(test, options.output / "test.jsonl")
    print(f"final loss {loss:.4f}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
