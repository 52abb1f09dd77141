"""PEFT's form of what an adapter has of the tables of a vocabulary, embedding and head.

Takes the tensors of an adapter file that are no LoRA matrices; says which rows of tokens they are
(`trainable_token_indices`), and which whole tables. PEFT saves a table whole where it was trained
whole, and also where tokens were added before training, asked or not. Reads and writes no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_kit.errors import AdapterError
from qlora_kit.layers.trained import TiedOutput
from qlora_kit.layers.trained_rows import RowsEmbedding, RowsHead, with_rows
from qlora_kit.lora.files import WEIGHTS
from qlora_kit.lora.whole import TokenRows
from qlora_kit.model.vocabulary import rows_of, tables

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_kit.lora.attach import Adapter
    from qlora_kit.lora.files import PeftConfig
    from qlora_kit.lora.stored import StoredAdapter
    from qlora_kit.model.load import BaseSpec

_ROWS = "token_adapter.trainable_tokens_delta"
_PREFIX = r"(base_model\.model\.)?"
_ROWS_KEY = re.compile(_PREFIX + rf"(?P<path>.+)\.{re.escape(_ROWS)}(\.default)?")
_UNDER_ROWS = re.compile(_PREFIX + r"(?P<path>.+)\.token_adapter\.base_layer\.weight")
# What a trained module was before training, which PEFT saves of tables that were resized.
_BEFORE = re.compile(r".+\.(original_module\..+|token_adapter\.trainable_tokens_original(\..+)?)")
# The names of tables that PEFT saves though `modules_to_save` does not name them: those of
# transformers' models.
_TABLES = frozenset(
    {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared"}
)
# Tokens that an adapter may add without the tables that have them.
_MOST_ADDED = 65_536
# The tables that PEFT can hold together by `ensure_weight_tying`.
_TIED_BY_PEFT = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class TokenTensors:
    """What a file has of tables of tokens.

    Attributes:
        rest: all other tensors, and whole tables under the keys that saved modules have.
        rows: values (k, D) of trained rows, by the path of their table.
        token_rows: their numbers; None without.
        tables: paths of whole tables that `modules_to_save` need not name.
    """

    rest: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    token_rows: TokenRows | None
    tables: tuple[str, ...]


def token_tensors(raw: Mapping[str, Tensor], config: PeftConfig, file: Path) -> TokenTensors:
    """Divide the tensors of a file that are no LoRA matrices.

    Raises:
        AdapterError: rows have no numbers, or numbers no rows; or values are not finite.
    """
    rest: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    under: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        if match := _ROWS_KEY.fullmatch(key):
            rows[match["path"]] = tensor
        elif match := _UNDER_ROWS.fullmatch(key):
            under[match["path"]] = tensor
        elif not _BEFORE.fullmatch(key):
            rest[key] = tensor
    if config.trainable_token_indices and not rows:
        raise AdapterError(
            f"{file}: trainable_token_indices is set and there are no rows of tokens; expected "
            f"{_ROWS}; save the adapter again"
        )
    ids = {path: _ids_of(path, values, config, file) for path, values in rows.items()}
    for path, table in under.items():
        # Tokens were added before training: the file has the whole table, and its rows beside it.
        values = rows.pop(path, None)
        whole = table if values is None else with_rows(table, ids.pop(path), values)
        rest[f"base_model.model.{path}.weight"] = whole
    # A bias alone is none of a table: `bias` asks for those that were trained.
    weights = (key for key in rest if key.endswith(".weight"))
    paths = (re.sub(_PREFIX, "", key, count=1).rpartition(".")[0] for key in weights)
    is_table = {path for path in paths if path.rpartition(".")[2] in _TABLES}
    found = TokenRows(ids) if ids else None
    return TokenTensors(rest, {path: each.float() for path, each in rows.items()}, found,
                        tuple(sorted(is_table)))  # fmt: skip


def _ids_of(path: str, rows: Tensor, config: PeftConfig, file: Path) -> tuple[int, ...]:
    """Return the numbers of the trained rows of a table."""
    named = config.trainable_token_indices
    if isinstance(named, dict):
        own = [ids for name, ids in named.items() if path == name or path.endswith(f".{name}")]
        # The head of a tied pair may have the rows of its embedding under its own path.
        ids = own[0] if own else next(iter(named.values()), [])
    else:
        ids = named or []
    if len(set(ids)) != len(ids) or rows.ndim != 2 or len(rows) != len(ids) or not ids:
        raise AdapterError(
            f"{file}: {path} has rows {tuple(rows.shape)} for {len(set(ids))} tokens of "
            "trainable_token_indices; expected a row for each; save the adapter again"
        )
    if not (rows.is_floating_point() and torch.isfinite(rows).all()):
        raise AdapterError(f"{file}: the rows of {path} hold NaN or infinity; train it again")
    return tuple(ids)


def has_tables(folder: Path) -> bool:
    """Whether a file of an adapter may hold tables of tokens, or rows of them; reads its names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [*file.keys()]
    except (OSError, SafetensorError):
        return True  # whoever reads the values says what is wrong with it
    parts = (name.split(".") for name in names if ".lora_" not in name)
    return any("token_adapter" in each or _TABLES.intersection(each) for each in parts)


def vocabulary_of(stored: StoredAdapter, spec: BaseSpec) -> int | None:
    """Return the rows that a base needs for an adapter; None if it has as many already.

    Args:
        stored: the adapter.
        spec: the base.
    """
    if not stored.saved and not stored.rows:
        return None
    skeleton = spec.skeleton()
    own = rows_of(skeleton.config)
    named = tables(skeleton)
    # With one table of two, the rows that the other one needs are not known.
    is_whole = named <= stored.saved.keys()
    whole = {len(stored.saved[name]) for name in named} if is_whole else set()
    numbers = stored.spec.token_rows.ids.values() if stored.spec.token_rows else ()
    most = max((max(ids) + 1 for ids in numbers), default=0)
    if most > (own or 0) + _MOST_ADDED:
        return None  # and so it does not fit: a number in a file must not take all memory
    needed = whole.pop() if len(whole) == 1 else max(most, own or 0)
    return needed if own is not None and needed not in (0, own) else None


# ---------------------------------------------------------------- writing


def trained_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return what is trained beside LoRA as PEFT writes it, by key without the prefix."""
    found: dict[str, Tensor] = {}
    for path, layer in adapter.whole.items():
        for leaf, parameter in layer.named_parameters():
            found[f"{path}.{_ROWS if is_of_rows(layer) else leaf}"] = parameter
        if isinstance(layer, TiedOutput):
            # PEFT wants the tensor of both halves of a tied pair; a file has no tensor twice.
            found[f"{path}.weight"] = layer.weight.detach().clone()
    return found


def is_of_rows(layer: Any) -> bool:
    """Whether of a layer some rows are trained, and not all of it."""
    return isinstance(layer, RowsEmbedding | RowsHead)


def token_fields(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` that say what is trained of tables of tokens."""
    rows = {
        path: [*layer.ids]
        for path, layer in adapter.whole.items()
        if isinstance(layer, RowsEmbedding | RowsHead) and [*layer.named_parameters()]
    }
    fields: dict[str, Any] = {}
    if rows:
        # Of one table PEFT takes a list for the embedding, and for the head that is tied to it.
        is_embedding = [isinstance(adapter.whole[path], RowsEmbedding) for path in rows]
        fields["trainable_token_indices"] = (
            next(iter(rows.values())) if is_embedding == [True] else rows
        )
    if tied_pair(adapter):
        fields["ensure_weight_tying"] = True
    return fields


def tied_pair(adapter: Adapter) -> str | None:
    """Return the path of the head of a pair that is trained whole and that PEFT can keep tied."""
    heads = [path for path, each in adapter.whole.items() if isinstance(each, TiedOutput)]
    names = [path.rpartition(".")[2] for path in adapter.whole]
    return heads[0] if heads and any(name in _TIED_BY_PEFT for name in names) else None
