"""A tokenizer as llama.cpp reads it: tokens, types, scores or merges, special tokens, template.

Takes transformers' tokenizer, and says what of it llama.cpp has; never opens a file. Two kinds are
known to be right: byte-level pair encoding ("gpt2"), and SentencePiece's pair encoding ("llama"),
whose scores follow from the order of its merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from qlora_kit.errors import ModelError
from qlora_kit.export.gguf.pre_tokenizers import pre_tokenizer_name

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that are not marked special, and that llama.cpp's converter takes for such.
_LIKE_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.S)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        kind: llama.cpp's name of the algorithm: "llama" or "gpt2".
        pre: its name of the rules that split a text into words.
        tokens: the text of each token, as many as the embedding has rows.
        types: the type of each token.
        scores: the score of each token, where pairs are merged by score.
        merges: the pairs that are merged, in their order, where they are merged by order.
        special: ids of special tokens, by llama.cpp's word for them.
        adds_bos: whether a text begins with the token `bos`.
        adds_eos: whether it ends with the token `eos`.
        adds_space: whether a space is put before a text.
        template: the chat template, in Jinja; None without one.
    """

    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    template: str | None

    @classmethod
    def of(
        cls, tokenizer: Any, name: str, rows: int, ends: Sequence[int], template: str | None = None
    ) -> Vocabulary:
        """Return the vocabulary of a tokenizer.

        Args:
            tokenizer: transformers' tokenizer.
            name: the name of the model, for errors.
            rows: rows of the model's embedding.
            ends: ids of the tokens that end an answer.
            template: the chat template, in Jinja; None without one.

        Raises:
            ModelError: llama.cpp is not known to encode as the tokenizer does, or the tokenizer
                has tokens that the model has no row for.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{name}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json; "
                "expected one; save it with transformers' fast tokenizer first"
            )
        content = json.loads(backend.to_str())
        kind = _kind(content, name)
        tokens = {index: text for text, index in tokenizer.get_vocab().items()}
        if tokens and max(tokens) >= rows:
            raise ModelError(
                f"{name}: its tokenizer has the token {max(tokens)}, and the model {rows} rows of "
                "tokens; expected a row for each token; train with the tokenizer of the model"
            )
        types = _types(content, tokens, kind)
        merges = [" ".join(_pair(each)) for each in content["model"]["merges"]]
        plain = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        return cls(
            kind=kind,
            pre="default" if kind == "llama" else pre_tokenizer_name(tokenizer, name),
            tokens=[_text(tokens.get(i, f"[PAD{i}]"), types.get(i), kind) for i in range(rows)],
            types=[types.get(i, gguf.TokenType.UNUSED) for i in range(rows)],
            scores=_scores(content, tokens, rows) if kind == "llama" else None,
            merges=merges if kind == "gpt2" else None,
            special=_special(tokenizer, ends),
            adds_bos=tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id],
            adds_eos=tokenizer.eos_token_id is not None and whole[-1:] == [tokenizer.eos_token_id],
            adds_space=str(tokenizer.convert_ids_to_tokens(plain[:1])[0]).startswith(_SPACE),
            template=template,
        )

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the vocabulary."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([token.encode() for token in self.tokens])
        writer.add_token_types([int(each) for each in self.types])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for word, index in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{word}_token_id", index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def _kind(content: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name of a tokenizer's algorithm.

    Raises:
        ModelError: it is not known to have it.
    """
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "BPE" and '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):
        return "gpt2"
    found = "BPE without bytes" if model["type"] == "BPE" else model["type"]
    raise ModelError(
        f"{name}: its tokenizer is of the kind {found}, which is not known to be right as GGUF; "
        "expected byte-level BPE, or SentencePiece's BPE with bytes; leave --form out"
    )


def _types(content: dict[str, Any], tokens: dict[int, str], kind: str) -> dict[int, int]:
    """Return the type of every token that exists."""
    types: dict[int, int] = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    if kind == "llama":
        types.update(
            {i: gguf.TokenType.BYTE for i, text in tokens.items() if _BYTE.fullmatch(text)}
        )
    for added in content["added_tokens"]:
        is_special = added["special"] or _LIKE_SPECIAL.fullmatch(added["content"])
        types[added["id"]] = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
    unknown = content["model"]["vocab"].get(content["model"].get("unk_token"))
    if unknown is not None and kind == "llama":
        types[unknown] = gguf.TokenType.UNKNOWN
    return types


def _text(token: str, kind_of_token: int | None, kind: str) -> str:
    """Return a token's text; llama.cpp finds added tokens in a text before spaces are marked."""
    if kind == "llama" and kind_of_token == gguf.TokenType.USER_DEFINED:
        return token.replace(_SPACE, " ")
    return token


def _scores(content: dict[str, Any], tokens: dict[int, str], rows: int) -> list[float]:
    """Return the score of every token: minus the place of the first merge that makes it.

    llama.cpp merges the pair with the largest score of what it becomes, and Hugging Face's
    tokenizer the pair that comes first, so the order is the same. Other scores are never compared.
    """
    places: dict[str, int] = {}
    for place, merge in enumerate(content["model"]["merges"]):
        places.setdefault("".join(_pair(merge)), place)
    return [-float(places.get(tokens.get(i, ""), len(places))) for i in range(rows)]


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _special(tokenizer: Any, ends: Sequence[int]) -> dict[str, int]:
    """Return the ids of special tokens by llama.cpp's words; `eot` also ends an answer."""
    words = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {word: getattr(tokenizer, f"{own}_token_id") for word, own in words.items()}
    others = [each for each in ends if each is not None and each != tokenizer.eos_token_id]
    found["eot"] = others[-1] if others else None
    return {word: int(index) for word, index in found.items() if index is not None}
