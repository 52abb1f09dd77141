"""The header of a run: what is about to be trained on what.

Takes the records that the stages return; returns rows of name and value, which the terminal
and the model card both show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.config import TrainConfig
    from qlora_kit.data.samples import Samples
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.lora.attach import Adapter

Rows = tuple[tuple[str, str], ...]


def header(
    adapter: Adapter,
    rows: Tokenized,
    held_out: Tokenized | None,
    samples: Samples,
    config: TrainConfig,
) -> Rows:
    """Return what is about to be trained on what."""
    base = adapter.base
    share = adapter.trainable / base.parameters
    batch = config.batch_size * config.gradient_accumulation_steps
    return (
        ("model", f"{base.spec.source.identity}, {base.parameters:,} parameters"),
        ("bits", f"{base.quantization.describe()}; {base.unquantized_share:.2%} of the weights "
                 "outside embeddings and head stay unquantised"),
        ("trainable", f"{adapter.trainable:,} parameters ({share:.2%}) in "
                      f"{len(adapter.layers)} layers"),
        ("device", base.hardware.device_name),
        ("dtype", f"{base.hardware.dtype_name} ({base.hardware.reason})"),
        ("data", f"{samples.source}, {len(rows.rows):,} rows, "
                 f"{rows.counts.supervised_tokens:,} supervised tokens"),
        ("validation", f"{len(held_out.rows):,} rows" if held_out else "none"),
        ("batch", f"{batch} rows an optimiser step ({config.batch_size} × "
                  f"{config.gradient_accumulation_steps})"),
    )  # fmt: skip
