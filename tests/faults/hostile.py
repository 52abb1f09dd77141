"""Artefacts that attack the user who opens them, each opened as a user would open it.

`attacks()` returns them. An attack makes its artefact in a folder, and runs the command line on it.
It raises `AssertionError` if the attack succeeds: the kit touches the canary, shows a traceback,
ends with an internal error, or accepts the artefact as if it had no fault.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

Attack = Callable[[Path, Path], None]

_CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_MOST_SHOWN = 2000
_ATTACKS: dict[str, Attack] = {}


def attacks() -> Mapping[str, Attack]:
    """Return every class of hostile artefact by name: `attack(tmp_path, canary)`.

    The canary is a file that the artefact tries to make, change or copy.
    """
    return dict(_ATTACKS)


def _attack(make: Attack) -> Attack:
    """Register an attack, and check the canary after it."""

    @functools.wraps(make)
    def attempt(folder: Path, canary: Path) -> None:
        before = _state(canary)
        make(folder, canary)
        assert _state(canary) == before, f"{make.__name__}: the canary was touched"

    _ATTACKS[make.__name__] = attempt
    return attempt


def _state(canary: Path) -> tuple[bytes | None, int, list[str]]:
    content = canary.read_bytes() if canary.exists() else None
    written = canary.stat().st_mtime_ns if canary.exists() else 0
    return content, written, sorted(path.name for path in canary.parent.iterdir())


# ---------------------------------------------------------------- the user


class _NoAnswer(io.StringIO):
    """A terminal without a user: code that asks it a question is detected."""

    def readline(self, size: int | None = -1, /) -> str:
        raise AssertionError("a question was asked on the terminal")

    def isatty(self) -> bool:
        return True


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command; return its exit code, stdout and stderr."""
    from qlora_kit.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", _NoAnswer()),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("a command ends with an exit code")


def refused(says: str, *arguments: object) -> None:
    """Assert that a command refuses its input, in one line that gives the reason."""
    code, out, err = run(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    shown = f"exit {code}: {err[:_MOST_SHOWN]}"
    assert code in (2, 3), shown
    assert len(errors) == 1, shown
    assert "Traceback" not in out + err, shown
    assert says in errors[0], f"{says!r} not in {shown}"
    assert len(err) < _MOST_SHOWN, "an error that fills the screen"


# ---------------------------------------------------------------- what is attacked


class _Opens:
    """An object whose pickle makes the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


class _Shell(_Opens):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _model(folder: Path, *, config: Any = None, **changes: Any) -> Path:
    """Copy the built-in model, with other numbers in its config.json."""
    from qlora_kit.model.names import find_model

    source = find_model("demo").folder
    assert source is not None
    model = folder / "model"
    shutil.copytree(source, model)
    numbers = json.loads((model / "config.json").read_text())
    text = config if isinstance(config, str) else json.dumps({**numbers, **changes})
    (model / "config.json").write_text(text)
    return model


def _change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _adapter(folder: Path, **config: Any) -> Path:
    """Write a small adapter of the built-in model, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(4, 192), key.format("B"): torch.zeros(192, 4)},
        adapter / "adapter_model.safetensors",
    )
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    values |= {"base_model_name_or_path": "demo", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return adapter


def _record(adapter: Path, **values: Any) -> None:
    record = {
        "base": "demo", "digest": "0" * 32, "bits": 4, "quant_type": "nf4", "double_quant": True,
        "compute_dtype": "float32", "dequantization_dtype": "float32", **values,
    }  # fmt: skip
    (adapter / "qlora_kit.json").write_text(json.dumps(record))


def _rows(folder: Path) -> Path:
    data = folder / "rows.jsonl"
    data.write_text(json.dumps(_CHAT) + "\n")
    return data


def _with_template(folder: Path, template: str) -> tuple[object, ...]:
    model = _model(folder)
    (model / "chat_template.jinja").write_text(template)
    return "evaluate", "--model", model, "--data", _rows(folder), "--device", "cpu"


def _evaluate(model: Path) -> tuple[object, ...]:
    return "evaluate", "--model", model, "--max-rows", "1", "--device", "cpu"


def _use(adapter: Path) -> tuple[object, ...]:
    return "evaluate", "--adapter", adapter, "--max-rows", "1", "--device", "cpu"


# ---------------------------------------------------------------- pickles


@_attack
def pickled_weights(folder: Path, canary: Path) -> None:
    """A `.bin` shard, in torch's archive format, that runs a command."""
    import torch

    model = _model(folder)
    (model / "model.safetensors").unlink()
    torch.save({"weight": _Shell(canary)}, model / "pytorch_model.bin")
    refused("not a checkpoint of plain tensors", *_evaluate(model))


@_attack
def pickled_weights_of_old(folder: Path, canary: Path) -> None:
    """A `.bin` shard that is a bare pickle, and a shard in the format before torch 1.6."""
    import torch

    model = _model(folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Opens(canary)}))
    refused("not a checkpoint of plain tensors", *_evaluate(model))
    state = {"weight": _Opens(canary)}
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused("not a checkpoint of plain tensors", *_evaluate(model))


@_attack
def pickle_named_safetensors(folder: Path, canary: Path) -> None:
    """A pickle under the name of a safe format, in a model and in an adapter."""
    content = pickle.dumps(_Opens(canary))
    model = _model(folder)
    (model / "model.safetensors").write_bytes(content)
    refused("not a complete safetensors file", *_evaluate(model))
    adapter = _adapter(folder)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused("not a complete safetensors file", *_use(adapter))


@_attack
def pickled_adapter_weights(folder: Path, canary: Path) -> None:
    """An adapter in PEFT's old format, which is a pickle."""
    import torch

    adapter = _adapter(folder)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(_Shell(canary), adapter / "adapter_model.bin")
    refused("not a checkpoint of plain tensors", *_use(adapter))


@_attack
def pickles_beside_the_tokenizer(folder: Path, canary: Path) -> None:
    """Side files that older tokenizers and trainers unpickle; they are not opened."""
    model = _model(folder)
    names = ("tokenizer.pkl", "vocab.bin", "training_args.bin", "optimizer.pt", "scheduler.pt")
    for name in (*names, "rng_state.pth", "tokenizer.model"):
        (model / name).write_bytes(pickle.dumps(_Shell(canary)))
    code, _, err = run(*_evaluate(model))
    assert code == 0, err
    (model / "tokenizer.json").unlink()
    refused("no usable tokenizer", *_evaluate(model))


@_attack
def pickled_data(folder: Path, canary: Path) -> None:
    """Pickles and loading scripts as data, under their own names and under others."""
    payload = pickle.dumps(_Shell(canary))
    script = f"open({str(canary)!r}, 'w')".encode()
    contents = {
        "rows.pkl": payload, "rows.pt": payload, "rows.npy": payload, "rows.py": script,
        "rows.parquet": payload, "rows.jsonl": payload, "rows.csv": payload,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        refused(name, "train", "--data", folder / name, "--output", folder / "run")


@_attack
def script_in_a_data_folder(folder: Path, canary: Path) -> None:
    """A folder named like its loading script, as `datasets` once ran them."""
    data = folder / "evil"
    data.mkdir()
    (data / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    refused("a folder; expected a train file", "train", "--data", data, "--output", folder / "run")


@_attack
def archive_as_data(folder: Path, canary: Path) -> None:
    """A zip with an entry outside of its folder; the kit never unpacks archives."""
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr(os.path.relpath(canary, folder), "breached")
    refused("expected one of", "train", "--data", folder / "rows.zip", "--output", folder / "run")
    shutil.move(folder / "rows.zip", folder / "rows.parquet")
    refused("not a readable parquet", "train", "--data", folder / "rows.parquet")


# ---------------------------------------------------------------- code that comes with a model


def _own_code(folder: Path, canary: Path, **config: Any) -> Path:
    model = _model(folder, **config)
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    return model


@_attack
def model_with_its_own_code(folder: Path, canary: Path) -> None:
    """`auto_map` of an architecture that transformers does not have."""
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    model = _own_code(folder, canary, model_type="evil", auto_map=classes)
    refused("needs code of its own, which the kit never runs", *_evaluate(model))


@_attack
def known_model_with_code_beside_it(folder: Path, canary: Path) -> None:
    """`auto_map` of an architecture that transformers has; transformers' own is used."""
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "owner/repo--evil.Evil"}
    model = _own_code(folder, canary, auto_map=classes)
    code, _, err = run(*_evaluate(model))
    assert code == 0, err


@_attack
def tokenizer_with_its_own_code(folder: Path, canary: Path) -> None:
    """`auto_map` of a tokenizer, alone, and with a class that transformers does not have."""
    model = _own_code(folder, canary)
    settings = model / "tokenizer_config.json"
    _change_json(settings, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert run(*_evaluate(model))[0] in (0, 2)
    _change_json(settings, tokenizer_class="EvilTokenizer")
    assert run(*_evaluate(model))[0] in (0, 2)


@_attack
def kernels_of_the_hub(folder: Path, canary: Path) -> None:
    """Attention from a repository that transformers would download and run."""
    from qlora_kit.model.architecture import read_architecture

    for key in ("attn_implementation", "_attn_implementation"):
        model = _model(folder / key, **{key: "kernels-community/evil"})
        assert read_architecture(model)._attn_implementation in (None, "eager", "sdpa")
        code, _, err = run(*_evaluate(model))
        assert code == 0, err


# ---------------------------------------------------------------- ways out of a folder


@_attack
def links_out_of_an_adapter(folder: Path, canary: Path) -> None:
    """Its files are links to files of this machine."""
    adapter = _adapter(folder)
    for name in ("qlora_kit.json", "tokenizer_config.json", "deep/er/link"):
        link = adapter / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(canary)
        refused("a link to", *_use(adapter))
        link.unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).rename(folder / name)
        (adapter / name).symlink_to(f"../{name}")
        refused("a link to", *_use(adapter))
        (adapter / name).unlink()
        (folder / name).rename(adapter / name)


@_attack
def links_out_of_a_model(folder: Path, canary: Path) -> None:
    """A file that an export would copy, and a folder that leads to the root."""
    canary.write_bytes(b"a secret of this machine")
    before = canary.stat().st_mtime_ns
    model = _model(folder)
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").symlink_to(canary)
    adapter = _adapter(folder)
    merged = folder / "merged"
    refused("a link to", "export", adapter, "--to", merged, "--model", model)
    assert not merged.exists()
    (model / "generation_config.json").unlink()
    (model / "chat_templates").symlink_to("/")
    refused("a link to /, outside of", *_evaluate(model))
    assert canary.stat().st_mtime_ns == before
    canary.unlink()


@_attack
def a_cache_that_links_out(folder: Path, canary: Path) -> None:
    """A folder like one of the hub's cache, whose folder of blobs is a link to the root."""
    repository = folder / "models--owner--name"
    model = _model(repository / "snapshots")
    (repository / "blobs").symlink_to("/")
    (model / "tokenizer.model").symlink_to(f"../../blobs{canary}")
    refused("a link to", *_evaluate(model))


@_attack
def pipes_in_a_model(folder: Path, canary: Path) -> None:
    """A pipe, on which a reader would wait for ever."""
    model = _model(folder)
    os.mkfifo(model / "special_tokens_map.json")
    refused("a pipe, socket or device", *_evaluate(model))


@_attack
def shards_outside(folder: Path, canary: Path) -> None:
    """An index whose shards lie elsewhere."""
    model = _model(folder)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    for name in (
        "../outside.safetensors",
        str(folder / "outside.safetensors"),
        "..\\outside",
        "..",
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        code, _, err = run(*_evaluate(model))
        assert code == 2, err
        assert err.count("error: ") == 1


@_attack
def templates_named_like_paths(folder: Path, canary: Path) -> None:
    """A template whose name becomes a file where the tokenizer is saved."""
    model = _model(folder)
    name = os.path.relpath(canary, folder / "run" / "chat_templates")
    named = [{"name": "default", "template": "x"}, {"name": name, "template": "breached"}]
    _change_json(model / "tokenizer_config.json", chat_template=named)
    refused("expected a plain name", "train", "--model", model, "--output", folder / "run")


@_attack
def tokenizer_files_outside(folder: Path, canary: Path) -> None:
    """A tokenizer that says its vocabulary is a file of this machine."""
    model = _model(folder)
    outside = folder / "outside.json"
    shutil.copy(model / "tokenizer.json", outside)
    settings = model / "tokenizer_config.json"
    _change_json(settings, fast_tokenizer_files=["../tokenizer.1.0.0.json"])
    refused("expected a plain name", *_evaluate(model))
    settings.write_text(json.dumps({"tokenizer_file": str(outside), "eos_token": "<eos>"}))
    (model / "tokenizer.json").unlink()
    assert run(*_evaluate(model))[0] == 2


@_attack
def revision_named_like_a_path(folder: Path, canary: Path) -> None:
    """An adapter whose recorded commit is a path that leads out of the hub's cache."""
    adapter = _adapter(folder)
    _record(adapter, base="owner/name", revision="../../../../evil")
    refused("expected a commit, branch or tag", *_use(adapter))
    _record(adapter, base="owner/..", revision=None)
    refused("not a hub id", *_use(adapter))


# ---------------------------------------------------------------- templates


@_attack
def templates_that_reach_for_python(folder: Path, canary: Path) -> None:
    """Every usual way from a template to the interpreter."""
    command = f"touch {canary}"
    templates = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.system({command!r}) }}}}",
        f"{{{{ lipsum.__globals__['os'].popen({command!r}).read() }}}}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{% import 'os' as os %}{{ os }}",
        f"{{% include {str(canary)!r} %}}",
    )
    for number, template in enumerate(templates):
        refused("the chat template refuses", *_with_template(folder / str(number), template))


@_attack
def templates_that_change_their_arguments(folder: Path, canary: Path) -> None:
    """A template that would put its own turns into the data."""
    for number, change in enumerate(
        ("messages.append(messages[0])", "messages.clear()", "messages[0].update(content='x')")
    ):
        template = f"{{% set _ = {change} %}}{{{{ messages[0]['content'] }}}}"
        refused("the chat template refuses", *_with_template(folder / str(number), template))


_ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@_attack
def templates_without_end(folder: Path, canary: Path) -> None:
    """Loops too long for any user to wait, in every row and in a single row."""
    with mock.patch("qlora_kit.data.chat_template.PROBE_SECONDS", 0.3):
        refused("does not finish", *_with_template(folder / "all", _ENDLESS))
    written = "{% for m in messages %}{{ m.content }}{% endfor %}"
    on_this_row = "{% if messages[0].content == 'a' %}" + _ENDLESS + "{% endif %}" + written
    with mock.patch("qlora_kit.data.chat_text.SECONDS_A_RENDERING", 0.3):
        refused("takes too long", *_with_template(folder / "one", on_this_row))


@_attack
def templates_that_eat_memory(folder: Path, canary: Path) -> None:
    """Text of endless length, made when constants are folded and when a row is rendered."""
    for number, template in enumerate(
        ("{{ 'a' * 10**12 }}", "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}")
    ):
        refused("needs more than 1 GiB", *_with_template(folder / str(number), template))


@_attack
def templates_that_are_no_text(folder: Path, canary: Path) -> None:
    """Other kinds of values where a template is expected."""
    for number, value in enumerate((5, [5], [{"name": 1, "template": 2}], {"default": "x"})):
        model = _model(folder / str(number))
        _change_json(model / "tokenizer_config.json", chat_template=value)
        refused("chat_template is no text", *_evaluate(model))


# ---------------------------------------------------------------- numbers


@_attack
def models_too_large_to_build(folder: Path, canary: Path) -> None:
    """Numbers that would exhaust the machine before a weight is read."""
    for key, value in {
        "num_hidden_layers": 10**9, "hidden_size": 10**9, "intermediate_size": 2**62,
        "vocab_size": 10**12, "max_position_embeddings": 10**15, "num_attention_heads": 10**9,
    }.items():  # fmt: skip
        refused(f"{key} is", *_evaluate(_model(folder / key, **{key: value})))


@_attack
def models_with_impossible_numbers(folder: Path, canary: Path) -> None:
    """Numbers of the wrong kind, sign or proportion."""
    changes: list[dict[str, Any]] = [
        {"num_hidden_layers": -1}, {"num_hidden_layers": "4"}, {"hidden_size": True},
        {"num_attention_heads": 0}, {"num_attention_heads": 7}, {"hidden_act": "evil"},
        {"rope_parameters": [1]}, {"dtype": "evil"}, {"model_type": ["llama"]},
        {"quantization_config": [3]}, {"auto_map": 5}, {"pad_token_id": "x"}, {"eos_token_id": "x"},
        {"architectures": 5, "rms_norm_eps": "x"}, {"__class__": "x"},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        refused(
            "config.json" if number < 3 else "", *_evaluate(_model(folder / str(number), **change))
        )


@_attack
def settings_of_generation_that_are_none(folder: Path, canary: Path) -> None:
    """End tokens that are not numbers, and settings of the wrong kind."""
    from qlora_kit.errors import ModelError
    from qlora_kit.model.architecture import read_generation_config

    model = _model(folder)
    for text in ('{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', "[]", "{", '{"a": 1, "a": 2}'):
        (model / "generation_config.json").write_text(text)
        found = None
        with contextlib.suppress(ModelError):
            found = read_generation_config(model)
        assert found is None, f"accepted: {text}"


@_attack
def broken_json(folder: Path, canary: Path) -> None:
    """JSON that is nested very deeply, or has a key twice; and files that are no JSON."""
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    for number, text in enumerate((deep, '{"a": 1, "a": 2}', "[]", "", "\x00", '{"a": ')):
        model = _model(folder / f"config{number}", config=text)
        refused("expected a JSON object", *_evaluate(model))
        model = _model(folder / f"tokenizer{number}")
        (model / "tokenizer_config.json").write_text(text)
        refused("expected a JSON object", *_evaluate(model))
        adapter = _adapter(model)
        (adapter / "adapter_config.json").write_text(text)
        refused("adapter_config.json", *_use(adapter))


@_attack
def broken_tokenizers(folder: Path, canary: Path) -> None:
    """Tokenizers that crash the Rust code behind them, or give tokens that no model has."""
    from qlora_kit.model.names import find_model

    source = find_model("demo").folder
    assert source is not None
    whole = json.loads((source / "tokenizer.json").read_text())
    changes: list[dict[str, Any]] = [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": []}},
        {"model": {**whole["model"], "merges": [["no", "where"]]}},
        {"added_tokens": 5},
        {"model": {**whole["model"], "vocab": {**whole["model"]["vocab"], "zz": 2**32 - 1}}},
        {"added_tokens": [*whole["added_tokens"], {**whole["added_tokens"][0], "id": 70_000,
                                                   "content": "Spoken"}]},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        model = _model(folder / str(number))
        (model / "tokenizer.json").write_text(json.dumps({**whole, **change}))
        refused("tokenizer", *_evaluate(model))


@_attack
def safetensors_that_lie(folder: Path, canary: Path) -> None:
    """Headers longer than the file, tensors past its end, and shapes that overflow."""
    overlong = struct.pack("<Q", 2**60) + b"{}"
    tensor = {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
    header = json.dumps(tensor).encode()
    overflowing = struct.pack("<Q", len(header)) + header + bytes(4)
    for number, content in enumerate((overlong, overflowing, b"", bytes(64))):
        adapter = _adapter(folder) if number == 0 else folder / "adapter"
        (adapter / "adapter_model.safetensors").write_bytes(content)
        refused("not a complete safetensors file", *_use(adapter))
    model = _model(folder)
    (model / "model.safetensors").write_bytes(overlong)
    refused("not a complete safetensors file", *_evaluate(model))


# ---------------------------------------------------------------- adapters


@_attack
def adapters_with_impossible_values(folder: Path, canary: Path) -> None:
    """Every field of adapter_config.json with values of the wrong kind or size."""
    values: dict[str, tuple[Any, ...]] = {
        "r": (0, -4, 2**40, "4", None, [4], 1.5, True),
        "lora_alpha": ("8", 0, -1, [], None),
        "lora_dropout": (-1, 1, "0.1"),
        "use_rslora": ("yes", 5),
        "base_model_name_or_path": (5, ["demo"], {"a": 1}),
        "revision": (5, ["main"]),
        "bias": ("some", 5, ["all"]),
        "lora_bias": ("yes", 5),
        "use_bdlora": (True, 5, {"nblocks": 0}, {"nblocks": 2**40}, {"nblocks": "2"}),
        "rank_pattern": ({"q_proj": 0}, {"q_proj": "8"}, {"q_proj": 10**9}, ["q_proj"], 5),
        "alpha_pattern": ({"q_proj": -1}, {"q_proj": None}, "q_proj"),
        "peft_type": (None, 5, "IA3", ["LORA"]),
    }
    adapter = _adapter(folder)
    good = (adapter / "adapter_config.json").read_text()
    for field, tried in values.items():
        for value in tried:
            (adapter / "adapter_config.json").write_text(good)
            _change_json(adapter / "adapter_config.json", **{field: value})
            refused(field, *_use(adapter))
    for text in ('{"peft_type": "LORA", "lora_alpha": NaN}', '{"peft_type": "LORA", "r": 1e999}'):
        (adapter / "adapter_config.json").write_text(text)
        refused("adapter_config.json", *_use(adapter))


@_attack
def adapters_with_unknown_features(folder: Path, canary: Path) -> None:
    """Features without which the kit would compute another model, if it ignored them."""
    adapter = _adapter(folder)
    good = (adapter / "adapter_config.json").read_text()
    features = {"use_mora": True, "kasa_config": {"beta": 1},
                "arrow_config": {"top_k": 2}, "layer_replication": [[0, 2], [1, 2]],
                "alora_invocation_tokens": [5], "use_qalora": True, "enable_lora": [True],
                "shiny_new_option": "on", "init_lora_weights": "pissa"}  # fmt: skip
    for name, value in features.items():
        (adapter / "adapter_config.json").write_text(good)
        _change_json(adapter / "adapter_config.json", **{name: value})
        refused(f"{name} is set", *_use(adapter))


@_attack
def adapters_with_endless_patterns(folder: Path, canary: Path) -> None:
    """Regular expressions that take longer than the universe on the name of a layer."""
    adapter = _adapter(folder)
    patterns = ("(a+)+$", "(.*)*x", "(a|a)*b", "((a{1,9}){1,9}){1,9}z", "a" * 500, "(", "[[a]",
                r"(.)\1*x", ".*.*.*.*.*.*.*x", "(a|a)" * 30, "x{99999999999}")  # fmt: skip
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in patterns:
            _change_json(adapter / "adapter_config.json", rank_pattern={}, alpha_pattern={})
            _change_json(adapter / "adapter_config.json", **{field: {pattern: 4}})
            if pattern != "a" * 500:
                refused(field, *_use(adapter))
    many = {f"q_proj{number}.*": 4 for number in range(1000)}
    _change_json(adapter / "adapter_config.json", rank_pattern=many)
    refused("at most 64 regular expressions", *_use(adapter))


@_attack
def adapters_with_impossible_tensors(folder: Path, canary: Path) -> None:
    """Tensors that lack their other side, have not two dimensions, or belong to no layer."""
    import torch
    from safetensors.torch import save_file

    adapter = _adapter(folder)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = torch.ones(4, 192), torch.zeros(192, 4)
    twice = {key.format("A"): a, key.format("A").replace(".weight", ".default.weight"): a.clone()}
    for tensors in (
        {key.format("A"): torch.ones(4)}, {key.format("A"): a}, twice, {"evil": a},
        {key.format("A"): torch.tensor(1.0), key.format("B"): b},
        {key.format("A") + "\x1b[2J\n": a},
        {key.format("A").replace("q_proj", "(a+)+$"): a,
         key.format("B").replace("q_proj", "(a+)+$"): b},
        {key.format("A"): a * float("nan"), key.format("B"): b},
        {key.format("A"): a.to(torch.int8), key.format("B"): b},
        {key.format("A"): a.to(torch.complex64), key.format("B"): b},
        {key.format("A"): a[:0], key.format("B"): b},
    ):  # fmt: skip
        save_file(tensors, adapter / "adapter_model.safetensors")
        refused("adapter", *_use(adapter))


@_attack
def records_with_impossible_values(folder: Path, canary: Path) -> None:
    """Every field of qlora_kit.json with values the kit never writes."""
    values: dict[str, tuple[Any, ...]] = {
        "base": (5, "", None), "digest": ("../x", 5), "bits": (5, "4", True, 10**9),
        "quant_type": ("int4", None), "double_quant": ("yes",), "weights": ("evil", None),
        "compute_dtype": ("float8", "os.system"), "dequantization_dtype": ("x", None),
        "block_size": (0, -1, 10**9), "revision": (5,), "versions": ([], {"torch": 2}),
        "surplus": (1,),
    }  # fmt: skip
    adapter = _adapter(folder)
    for field, tried in values.items():
        for value in tried:
            _record(adapter, **{field: value})
            refused(f"not a record of this kit: {field}", *_use(adapter))
    for text in ("[]", "5", "{", '{"bits": 4}'):
        (adapter / "qlora_kit.json").write_text(text)
        refused("qlora_kit.json", *_use(adapter))


# ---------------------------------------------------------------- configurations, names


@_attack
def configurations_that_call_python(folder: Path, canary: Path) -> None:
    """YAML tags that make any object."""
    config = folder / "run.yaml"
    for tag in (
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/new:open ['{canary}', 'w']",
        "!!python/name:os.system",
        "!!python/module:os",
    ):
        config.write_text(f"rank: {tag}\n")
        refused("not valid YAML", "train", "--config", config, "--dry-run")


@_attack
def configurations_that_grow(folder: Path, canary: Path) -> None:
    """Nine aliases of nine aliases of …, and nesting without end."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for last, name in zip("abcde", "bcdef", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]")
    config = folder / "run.yaml"
    for text in ("\n".join([*lines, "targets: *f"]), "a: " + "[" * 100_000):
        config.write_text(text)
        refused("run.yaml", "train", "--config", config, "--dry-run")


@_attack
def names_that_write_on_the_terminal(folder: Path, canary: Path) -> None:
    """File names with line ends, escape sequences, and marks that reverse the text."""
    name = "a\nerror: all is well\x1b[2J\u202e.jsonl"
    code, out, err = run("train", "--data", folder / name, "--output", folder / "run")
    assert code == 2
    assert err.count("\n") == 1, err
    assert not set(out + err.rstrip("\n")) & set("\n\x1b\u202e")


# ---------------------------------------------------------------- runs


@_attack
def runs_that_link_out(folder: Path, canary: Path) -> None:
    """A stranger's run to resume, whose log is a link to a file of this machine."""
    output = folder / "run"
    output.mkdir()
    (output / "training_config.yaml").write_text("model: demo\n")
    (output / "trainer_log.jsonl").symlink_to(canary)
    refused("a link to", "train", "--output", output, "--resume", "--max-steps", "1")


@_attack
def checkpoints_that_are_pickles(folder: Path, canary: Path) -> None:
    """A stranger's checkpoint with the state files that other trainers unpickle."""
    checkpoint = folder / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
                 "state.safetensors", "optimizer.safetensors", "manifest.json"):  # fmt: skip
        (checkpoint / name).write_bytes(pickle.dumps(_Shell(canary)))
    resume = ("train", "--output", checkpoint.parent, "--resume", checkpoint, "--max-steps", "1")
    code, _, err = run(*resume)
    assert code in (2, 3), err
    assert err.count("error: ") == 1
