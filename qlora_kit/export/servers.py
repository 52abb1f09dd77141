"""What servers refuse of an adapter, and what they leave out of it without a word.

Takes an adapter folder; returns reasons, and the arguments that the server needs. The rules were
read in the public loaders of the servers, each at the version that it names. Nothing of a server is
imported or run, and no weights are read: names and shapes are enough. Imports no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qlora_kit.errors import AdapterError, raised_as
from qlora_kit.lora.files import WEIGHTS, check_adapter_folder, peft_fields, read_base_record
from qlora_kit.lora.peft_fields import is_unset

ServerName = Literal["vllm", "sglang", "tgi"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MOST_NAMED = 4
_TEMPLATE = "chat_template.jinja"
_ADDED_TOKENS = "added_tokens.json"


@dataclass(frozen=True)
class StoredFacts:
    """What the files of an adapter say without their weights.

    Attributes:
        folder: the folder.
        fields: those of `adapter_config.json`, as they are written.
        shapes: of its tensors, by name; empty where they are pickled.
        is_pickled: whether they are in `adapter_model.bin`, of which nothing is read.
        new_tokens: the tokens of which it trained rows.
        has_added_tokens: whether it has a file of tokens that a tokenizer was given.
        bits: bits of the base that it was trained on; None if that is not known.
        is_merge_aware: whether it was trained as packed weights.
    """

    folder: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    is_pickled: bool
    new_tokens: tuple[str, ...]
    has_added_tokens: bool
    bits: int | None
    is_merge_aware: bool

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer with LoRA, by path; `r` alone where no tensors are read."""
        found = {}
        for name, shape in self.shapes.items():
            for end in (_A, _EMBEDDING_A):
                if name.endswith(end) and shape:
                    found[_path(name.removesuffix(end))] = shape[0]
        r = self.fields.get("r")
        return found or {"": r if isinstance(r, int) else 0}

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The last parts of the paths of the layers with LoRA, each once, sorted."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.ranks if path}))

    @property
    def saved_modules(self) -> list[str]:
        """The layers that are trained whole, by name."""
        named = self.fields.get("modules_to_save") or []
        return [str(each) for each in named] if isinstance(named, list) else [str(named)]

    def has(self, name: str) -> bool:
        """Whether a field is set, in whatever spelling."""
        return not is_unset(self.fields.get(name))


def _path(name: str) -> str:
    return name.removeprefix("base_model.model.")


def read_facts(folder: Path) -> StoredFacts:
    """Read what the rules need.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    check_adapter_folder(folder)
    file = folder / WEIGHTS
    record = read_base_record(folder)
    return StoredFacts(
        folder=folder,
        fields=peft_fields(folder),
        shapes=_shapes(file) if file.is_file() else {},
        is_pickled=not file.is_file(),
        new_tokens=() if record is None else record.new_tokens,
        has_added_tokens=(folder / _ADDED_TOKENS).is_file(),
        bits=None if record is None else record.bits,
        is_merge_aware=record is not None and record.trained_codes is not None,
    )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    def line(error: Exception) -> str:
        return f"{file}: not a complete safetensors file ({error}); expected one; restore it"

    with (
        raised_as(AdapterError, line, of=(SafetensorError, OSError)),
        safe_open(file, framework="numpy") as stream,
    ):
        return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118


# ---------------------------------------------------------------- rules

Find = Callable[[StoredFacts], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """One thing that a server does not take.

    Attributes:
        about: what it is about, for the docs.
        source: the file and the function that the rule was read in.
        find: yields the reasons by which an adapter is not taken.
    """

    about: str
    source: str
    find: Find


def _is_no_lora(facts: StoredFacts) -> Iterator[str]:
    if (kind := facts.fields.get("peft_type")) and str(kind).upper() != "LORA":
        yield f"peft_type is {_short(kind)}; it takes LORA alone"


def _lacks_fields(facts: StoredFacts) -> Iterator[str]:
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in facts.fields]
    if missing:
        yield f"adapter_config.json has no {', '.join(missing)}, which it needs"


def _set(name: str, why: str) -> Find:
    def find(facts: StoredFacts) -> Iterator[str]:
        if facts.has(name):
            yield f"{name} is set to {_short(facts.fields[name])}: {why}"

    return find


def _saved_modules(*taken: str, why: str) -> Find:
    def find(facts: StoredFacts) -> Iterator[str]:
        others = [name for name in facts.saved_modules if name not in taken]
        if others:
            yield f"modules_to_save has {_named(others)}: {why}"

    return find


def _start_of(*taken: str, why: str) -> Find:
    def find(facts: StoredFacts) -> Iterator[str]:
        start = facts.fields.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in ("true", "false", *taken):
            yield f"init_lora_weights is {_short(start)}: {why}"

    return find


def _rank_above(most: int) -> Find:
    def find(facts: StoredFacts) -> Iterator[str]:
        if facts.rank > most:
            yield f"rank {facts.rank}: it takes at most {most}"

    return find


def _convolutions(facts: StoredFacts) -> Iterator[str]:
    found = [name for name, s in facts.shapes.items() if name.endswith(_A) and len(s) > 2]
    if found:
        yield f"LoRA on convolutions ({_named(map(_path, found))}): it takes linear layers"


def _tensors_besides_lora(facts: StoredFacts) -> Iterator[str]:
    """Find tensors that are neither A nor B, nor explained by a field that is told of already."""
    told = facts.saved_modules
    ends: tuple[str, ...] = (_A, _B, _EMBEDDING_A, _EMBEDDING_B)
    ends += (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    if facts.has("use_dora"):
        ends += (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
    if facts.has("bias") or facts.has("lora_bias"):
        ends += (".bias",)
    others = [
        name
        for name in facts.shapes
        if not name.endswith(ends) and not {*told} & {*_path(name).split(".")}
    ]
    if others:
        yield f"{_named(_path(name) for name in others)}: no A and no B of LoRA"


def _grown_vocabulary(facts: StoredFacts) -> Iterator[str]:
    if facts.new_tokens:
        yield (
            f"it trained the rows of tokens ({_named(facts.new_tokens)}): the server holds the "
            "base's tables, which do not have them"
        )


def _targets_by_pattern(facts: StoredFacts) -> Iterator[str]:
    targets = facts.fields.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield "target_modules is a pattern: it takes a list of names, or all-linear"


def _modules_outside(known: Sequence[str]) -> Find:
    def find(facts: StoredFacts) -> Iterator[str]:
        others = [name for name in facts.modules if name not in known]
        if others:
            yield f"LoRA on {_named(others)}: it knows {', '.join(known)}"

    return find


def _patterned(facts: StoredFacts) -> Iterator[str]:
    for name in ("rank_pattern", "alpha_pattern"):
        if facts.has(name):
            yield f"{name} is set: it scales all layers by lora_alpha / r"
            return
    r = facts.fields.get("r")
    if any(rank != r for path, rank in facts.ranks.items() if path):
        yield f"layers have another rank than r = {r}: it scales all layers by lora_alpha / r"


def _layers_without(facts: StoredFacts) -> Iterator[str]:
    """Find projections that some layers do not have: such a projection is not used at all."""
    layers: dict[str, set[str]] = {}
    for path in facts.ranks:
        if found := re.search(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?([^.]+)$", path):
            layers.setdefault(found[2], set()).add(found[1])
    # The configuration of the base is not at hand, so the layers of all projections stand for it.
    every = set().union(*layers.values())
    partial = sorted(name for name, numbers in layers.items() if numbers < every)
    if partial or facts.has("layers_to_transform"):
        named = _named(partial or layers)
        yield f"{named}: not in every layer; such a projection is left out of all layers"


def _padded_rank(facts: StoredFacts) -> Iterator[str]:
    r = facts.fields.get("r")
    is_padded = isinstance(r, int) and r != 8 and r % 16 != 0
    if is_padded and len(facts.modules) > 1:
        yield (
            f"rank {r}: it pads ranks to 8 or a multiple of 16, and scales all projections after "
            "the first by lora_alpha / the padded rank"
        )


def _pickled(facts: StoredFacts) -> Iterator[str]:
    if facts.is_pickled:
        yield "its weights are in adapter_model.bin: it reads .safetensors alone"


def _named(names: Iterator[str] | Sequence[str] | Mapping[str, Any] | Any) -> str:
    every = [str(name) for name in names]
    rest = len(every) - _MOST_NAMED
    return ", ".join(map(_short, every[:_MOST_NAMED])) + (f" and {rest} more" if rest > 0 else "")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


# ---------------------------------------------------------------- servers

_IGNORED = "it is left out without a word, and the answers are others"
_CHANGES_BASE = "such a start changes the base; convert it in PEFT to plain LoRA"

_VLLM_CONFIG, _VLLM_TENSORS = "vllm/lora/peft_helper.py", "vllm/lora/utils.py"
_SGLANG_LOADER = "sglang/srt/lora/lora.py"
_SGLANG_MANAGER, _SGLANG_UTILS = "sglang/srt/lora/lora_manager.py", "sglang/srt/lora/utils.py"
_TGI_LOADER = "server/text_generation_server/adapters/lora.py"
_TGI_LAYERS = "server/text_generation_server/utils/adapter.py"

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what vLLM takes as `--max-lora-rank` (vllm/config/lora.py)"""
_VLLM_DEFAULT_RANK = 16

_SGLANG_MODULES = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj",
    "gate_up_proj", "down_proj", "in_proj", "embed_tokens", "lm_head", "q_a_proj",
    "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj",
)  # fmt: skip
_TGI_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _unread(source: str, *names: str) -> tuple[Rule, ...]:
    """Return a rule for each field that a server does not read, though it changes what counts."""
    return tuple(Rule(name, source, _set(name, _IGNORED)) for name in names)


_NEVER_READ = (
    "use_dora", "bias", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A server, and what it takes.

    Attributes:
        title: its name for people.
        version: the version or commit whose loader was read.
        rules: what it refuses or leaves out.
        command: the command that serves an adapter, given its facts, its base and a name for it.
        notes: what else the user should know.
    """

    title: str
    version: str
    rules: tuple[Rule, ...]
    command: Callable[[StoredFacts, str, str], str]
    notes: Callable[[StoredFacts], Iterator[str]]

    def reasons(self, facts: StoredFacts) -> list[str]:
        """Return the reasons why it would not serve the adapter as it was trained."""
        return [reason for rule in self.rules for reason in rule.find(facts)]


def _vllm_command(facts: StoredFacts, base: str, name: str) -> str:
    given = ["vllm", "serve", base, "--enable-lora"]
    if facts.rank > _VLLM_DEFAULT_RANK:
        fitting = next(rank for rank in MAX_LORA_RANKS if rank >= facts.rank)
        given += ["--max-lora-rank", str(fitting)]
    return shlex.join([*given, "--lora-modules", f"{name}={facts.folder}", *_template(facts)])


def _sglang_command(facts: StoredFacts, base: str, name: str) -> str:
    given = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
    given += ["--max-lora-rank", str(facts.rank), "--lora-paths", f"{name}={facts.folder}"]
    return shlex.join([*given, *_template(facts)])


def _tgi_command(facts: StoredFacts, base: str, name: str) -> str:
    adapters = shlex.quote(f"{name}={facts.folder}")
    return f"LORA_ADAPTERS={adapters} text-generation-launcher --model-id {shlex.quote(base)}"


def _template(facts: StoredFacts) -> list[str]:
    file = facts.folder / _TEMPLATE
    return ["--chat-template", str(file)] if file.is_file() else []


def _notes(facts: StoredFacts) -> Iterator[str]:
    if facts.is_pickled:
        yield "adapter_model.bin is not looked into: its tensors are not checked"
    if facts.is_merge_aware:
        yield (
            "trained merge-aware: a server computes W x + B A x, which is close and not what was "
            "trained; `export --requantize` writes the model that was"
        )
    elif facts.bits is not None and facts.bits < 16:
        yield (
            f"trained on its base in {facts.bits} bits: a server that holds the base in 16 gives "
            "other numbers"
        )


def _vllm_notes(facts: StoredFacts) -> Iterator[str]:
    yield from _notes(facts)
    if any(".experts" in path for path in facts.ranks):
        yield "LoRA on experts: it depends on the model whether it is taken, and in which format"


def _sglang_notes(facts: StoredFacts) -> Iterator[str]:
    yield from _notes(facts)
    if facts.has_added_tokens:
        yield (
            f"{_ADDED_TOKENS}: refused if one of its numbers is beyond the vocabulary of the base; "
            "delete the file if none is"
        )


SERVERS: Mapping[ServerName, Server] = {
    "vllm": Server(
        "vLLM",
        "0.33.0",
        (
            Rule("peft_type", _VLLM_CONFIG, _is_no_lora),
            Rule("missing fields", _VLLM_CONFIG, _lacks_fields),
            Rule("rank", "vllm/config/lora.py", _rank_above(MAX_LORA_RANKS[-1])),
            Rule(
                "modules_to_save",
                _VLLM_CONFIG,
                _saved_modules(
                    "classifier", "score", why="it takes those of a classifier's head alone"
                ),
            ),
            Rule("use_dora", _VLLM_CONFIG, _set("use_dora", "it has no DoRA")),
            Rule("bias", _VLLM_CONFIG, _set("bias", "it takes no trained biases")),
            Rule("lora_bias", _VLLM_CONFIG, _set("lora_bias", "it takes no biases of B")),
            Rule(
                "init_lora_weights",
                _VLLM_CONFIG,
                _start_of("gaussian", "eva", "orthogonal", "mica", "lora_ga", why=_CHANGES_BASE),
            ),
            *(
                Rule(name, _VLLM_CONFIG, _set(name, "it does not have this"))
                for name in (
                    "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
                )
            ),
            Rule("convolutions", _VLLM_TENSORS, _convolutions),
            Rule("other tensors", _VLLM_TENSORS, _tensors_besides_lora),
            Rule("vocabulary", "vllm/lora/lora_model.py", _grown_vocabulary),
        ),
        _vllm_command,
        _vllm_notes,
    ),
    "sglang": Server(
        "SGLang",
        "0.5.23",
        (
            Rule("peft_type", _SGLANG_LOADER, _is_no_lora),
            Rule("missing fields", "sglang/srt/lora/lora_config.py", _lacks_fields),
            Rule("target_modules", _SGLANG_UTILS, _targets_by_pattern),
            Rule("layers", _SGLANG_UTILS, _modules_outside(_SGLANG_MODULES)),
            Rule("modules_to_save", _SGLANG_LOADER, _saved_modules(why=_IGNORED)),
            Rule(
                "use_rslora",
                _SGLANG_LOADER,
                _set("use_rslora", "it scales by lora_alpha / r, and not by its square root"),
            ),
            Rule("rank_pattern, alpha_pattern", _SGLANG_LOADER, _patterned),
            Rule("init_lora_weights", _SGLANG_LOADER, _start_of(
                "gaussian", "eva", "orthogonal", "mica", why=_CHANGES_BASE)),
            Rule("use_dora", _SGLANG_MANAGER, _set("use_dora", "it has no DoRA")),
            *_unread(_SGLANG_LOADER, *_NEVER_READ[1:]),
            Rule("other tensors", _SGLANG_LOADER, _tensors_besides_lora),
            Rule("vocabulary", _SGLANG_MANAGER, _grown_vocabulary),
        ),
        _sglang_command,
        _sglang_notes,
    ),
    "tgi": Server(
        "TGI",
        "main at db931fc (3.3.6-dev0)",
        (
            Rule("peft_type", _TGI_LOADER, _is_no_lora),
            Rule("missing fields", _TGI_LOADER, _lacks_fields),
            Rule("pickled weights", _TGI_LAYERS, _pickled),
            Rule("layers", _TGI_LAYERS, _modules_outside(_TGI_MODULES)),
            Rule("some layers only", _TGI_LOADER, _layers_without),
            Rule("rank", _TGI_LOADER, _padded_rank),
            Rule("rank_pattern, alpha_pattern", _TGI_LOADER, _patterned),
            Rule("modules_to_save", _TGI_LOADER, _saved_modules(why=_IGNORED)),
            Rule("init_lora_weights", _TGI_LOADER, _start_of(
                "gaussian", "eva", "orthogonal", "mica", why=_CHANGES_BASE)),
            *_unread(_TGI_LOADER, *_NEVER_READ),
            Rule("other tensors", _TGI_LOADER, _tensors_besides_lora),
            Rule("vocabulary", _TGI_LOADER, _grown_vocabulary),
        ),
        _tgi_command,
        _notes,
    ),
}  # fmt: skip
