"""What servers refuse of an adapter: each rule has one that it refuses, and one that it takes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import PROJECT, run
from tiny_models import load_folder

import qlora_kit as qk
from qlora_kit.export.servers import MAX_LORA_RANKS, SERVERS, read_facts

PAGE = (PROJECT / "docs" / "export.md").read_text(encoding="utf-8")
_Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def base(save_tiny: Folder) -> Any:
    return load_folder(save_tiny(), 4)


@pytest.fixture(scope="module")
def stored(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that saves an adapter of some spec, once."""
    saved: dict[str, Path] = {}

    def folder(**spec: Any) -> Path:
        if (key := repr(spec)) not in saved:
            adapter = qk.attach(base, qk.LoraSpec(**{"rank": 8, "targets": ("attention",)} | spec))
            saved[key] = tmp_path_factory.mktemp("adapter")
            qk.save_adapter(adapter, saved[key], qk.BaseRecord.of(base))
            qk.detach(adapter)
        return saved[key]

    return folder


@pytest.fixture
def changed(stored: Folder, tmp_path: Path) -> Folder:
    """Return a function that saves a copy with other fields in its configuration."""

    def folder(of: Path | None = None, **fields: Any) -> Path:
        copy = shutil.copytree(of or stored(), tmp_path / "copy", dirs_exist_ok=True)
        file = copy / "adapter_config.json"
        content = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
        return copy

    return folder


def reasons(server: Any, folder: Path) -> str:
    return "\n".join(SERVERS[server].reasons(read_facts(folder)))


@pytest.mark.parametrize("server", SERVERS)
def test_a_plain_adapter_is_taken(server: str, stored: Folder) -> None:
    for targets in (("attention",), ("mlp",), ("all-linear",)):
        assert not reasons(server, stored(targets=targets))


ALL = ("vllm", "sglang", "tgi")
FIELDS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"peft_type": "IA3"}, "peft_type is IA3", ALL),
    ({"lora_alpha": "absent"}, "has no lora_alpha", ALL),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save has lm_head", ALL),
    ({"modules_to_save": ["score"]}, "modules_to_save has score", ("sglang", "tgi")),
    ({"use_dora": True}, "use_dora is set", ALL),
    ({"bias": "lora_only"}, "bias is set to lora_only", ALL),
    ({"lora_bias": True}, "lora_bias is set", ALL),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa", ALL),
    ({"init_lora_weights": "gaussian"}, "", ()),
    ({"layer_replication": [[0, 2]]}, "layer_replication is set", ALL),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set", ALL),
    ({"use_qalora": True}, "use_qalora is set", ALL),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set", ALL),
    ({"use_rslora": True}, "use_rslora is set", ("sglang",)),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is set", ("sglang", "tgi")),
    ({"target_modules": ".*_proj"}, "target_modules is a pattern", ("sglang",)),
    ({"target_parameters": ["experts.up"]}, "target_parameters is set", ("sglang", "tgi")),
    ({"trainable_token_indices": [5]}, "trainable_token_indices is set", ("sglang", "tgi")),
    ({"layers_to_transform": [1]}, "not in every layer", ("tgi",)),
    ({"modules_to_save": [], "bias": "none", "use_dora": None, "rank_pattern": {}}, "", ()),
]


@pytest.mark.parametrize(("fields", "expected", "refusing"), FIELDS, ids=lambda value: str(value))
def test_what_a_field_says(
    fields: dict[str, Any], expected: str, refusing: tuple[str, ...], changed: Folder
) -> None:
    folder = changed(**fields)
    for server in ALL:
        found = reasons(server, folder)
        assert (expected in found and bool(found)) is (server in refusing), (server, found)


def test_what_the_tensors_say(stored: Folder, changed: Folder) -> None:
    partial = changed()
    file = partial / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[_Q.format(1)], tensors[_Q.format(1).replace("_A", "_B")]
    save_file(tensors, file)
    assert "q_proj: not in every layer" in reasons("tgi", partial)
    assert not reasons("vllm", partial)
    save_file(
        {**tensors, "base_model.model.model.norm.weight": tensors[_Q.format(0)].clone()}, file
    )
    for server in ALL:
        assert "model.norm.weight: no A and no B of LoRA" in reasons(server, partial)


def test_what_the_adapters_of_the_kit_are(stored: Folder) -> None:
    patterned = stored(rank_pattern={"q_proj": 4})
    assert not reasons("vllm", patterned)
    assert "rank_pattern is set" in reasons("sglang", patterned)
    assert "rank 12: it pads ranks to 8" in reasons("tgi", stored(rank=12))
    head = stored(targets=("attention", "lm_head"))
    assert not reasons("vllm", head)
    assert not reasons("sglang", head)
    assert "LoRA on lm_head: it knows q_proj" in reasons("tgi", head)
    whole = stored(modules_to_save=("lm_head",))
    assert [reasons(server, whole).count("\n") for server in ALL] == [0, 0, 0], (
        "one cause, one line"
    )


def test_pickled_weights_are_not_looked_into(changed: Folder) -> None:
    folder = changed()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "it reads .safetensors alone" in reasons("tgi", folder)
    facts = read_facts(folder)
    assert not SERVERS["vllm"].reasons(facts)
    assert any("not looked into" in note for note in SERVERS["vllm"].notes(facts))
    assert facts.rank == 8


@pytest.mark.parametrize(("rank", "flag"), [(8, ""), (16, ""), (17, "32"), (300, "320")])
def test_the_command_has_the_rank_that_vllm_needs(rank: int, flag: str, stored: Folder) -> None:
    facts = read_facts(stored(rank=rank, targets=("q_proj",)))
    command = SERVERS["vllm"].command(facts, "some/base", "mine")
    assert re.findall(r"--max-lora-rank (\d+)", command) == ([flag] if flag else [])
    assert f"--lora-modules mine={facts.folder}" in command
    assert f"--max-lora-rank {rank} " in SERVERS["sglang"].command(facts, "some/base", "mine")


def test_a_rank_above_the_largest_is_refused(stored: Folder) -> None:
    rank = MAX_LORA_RANKS[-1] + 8
    folder = stored(rank=rank, targets=("q_proj",))
    assert f"rank {rank}: it takes at most 512" in reasons("vllm", folder)


# ---------------------------------------------------------------- the command


def test_the_command_says_yes_with_how_and_no_with_why(
    stored: Folder, changed: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = str(stored(rank=32, targets=("q_proj",)))
    code, out, err = run("export", taken, "--check-server", "vllm", capsys=capsys)
    assert code == 0, err
    assert "vLLM would serve this adapter" in out
    assert "--enable-lora --max-lora-rank 32" in out
    assert "trained on its base in 4 bits" in out
    code, out, _ = run("export", taken, "--check-server", "tgi", "--json", capsys=capsys)
    assert json.loads(out)["command"].startswith("LORA_ADAPTERS=")
    refused = str(changed(use_dora=True, bias="all"))
    code, out, err = run("export", refused, "--check-server", "vllm", capsys=capsys)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {refused}: vLLM 0.33.0: ") for line in lines)
    assert "qlora-kit export" in lines[-1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("nowhere", "--check-server", "vllm"), "nowhere: no such folder"),
        (("nowhere", "--check-server", "tgi", "--to", "x"), "--check-server: writes nothing"),
        (("nowhere", "--check-server", "ollama"), "--check-server: found ollama; expected"),
    ],
)
def test_wrong_inputs_are_one_line(
    given: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("export", *given, capsys=capsys)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_a_damaged_file_is_one_line(changed: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed()
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    code, _, err = run("export", str(folder), "--check-server", "vllm", capsys=capsys)
    assert code == 2
    assert "not a complete safetensors file" in err
    (folder / "adapter_config.json").write_text("[]")
    code, _, err = run("export", str(folder), "--check-server", "vllm", capsys=capsys)
    assert code == 2
    assert "adapter_config.json: found no JSON object" in err


def test_it_needs_no_torch(stored: Folder) -> None:
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n"
        "from qlora_kit.cli import main\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "export", str(stored()), "--check-server", "sglang"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "False"
    assert "sglang.launch_server" in done.stdout


def test_the_page_has_every_rule_with_its_source_and_version() -> None:
    for server in SERVERS.values():
        assert f"{server.title} {server.version}" in PAGE
        for rule in server.rules:
            row = rf"^\| {re.escape(rule.about)} \|.*`{re.escape(rule.source)}`"
            assert re.search(row, PAGE, re.MULTILINE), (server.title, rule.about, rule.source)
