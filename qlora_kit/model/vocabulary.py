"""A vocabulary of another size than the checkpoint's: tokens were added, or spare rows taken away.

Takes a model, or its tables as they are read; gives its embedding and its head as many rows as are
asked for. Rows that no checkpoint has start at the mean of those that it has, and so give each new
token the same small chance; whoever trains them sets their values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_kit.layers.projections import input_embedding, vocabulary_paths
from qlora_kit.layers.trained_rows import mean_row


def rows_of(architecture: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model has rows for; None if it does not say."""
    return getattr(architecture.get_text_config(), "vocab_size", None)


def set_rows(architecture: PreTrainedConfig, rows: int) -> None:
    """Give an architecture rows for as many tokens."""
    architecture.get_text_config().vocab_size = rows


def tables(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters that have a row for each token: embedding, head, its bias.

    Args:
        model: in any state.
    """
    if input_embedding(model) is None:
        return frozenset()
    rows = rows_of(model.config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    found = {f"{path}.{leaf}" for path in vocabulary_paths(model) for leaf in ("weight", "bias")}
    return frozenset(name for name in found & shapes.keys() if shapes[name][0] == rows)


@torch.no_grad()
def with_row_count(table: Tensor, rows: int) -> Tensor:
    """Return a table (V, …) with another number of rows: cut, or continued by the mean row."""
    if len(table) >= rows:
        return table[:rows]
    mean = mean_row(table, len(table)).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *table.shape[1:])])
