"""Broken and hostile input of an export: one clear line each, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.children import finish
from safetensors.torch import load_file, save_file
from support import run
from tiny_models import fill_lora, load_folder

import qlora_kit as qk
from qlora_kit.cli import main

A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a tokenizer, and an adapter of it."""
    folder = tmp_path_factory.mktemp("whole")
    demo = qk.find_model("demo").folder
    assert demo is not None
    shutil.copytree(demo, folder / "model")
    base = load_folder(folder / "model", 4)
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("mlp",)))
    fill_lora(adapter)
    (folder / "adapter").mkdir()
    qk.save_adapter(adapter, folder / "adapter", qk.BaseRecord.of(base))
    return folder


def tensors_of(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def adapter_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: tensors_of(folder / "adapter" / "adapter_model.safetensors", change)


def model_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: tensors_of(folder / "model" / "model.safetensors", change)


def json_of(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return change


def truncated(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def pointer(name: str) -> Callable[[Path], None]:
    """Return what makes a file Git LFS's pointer to itself, as a clone without it has it."""

    def change(folder: Path) -> None:
        size = (folder / name).stat().st_size if (folder / name).exists() else 1
        (folder / name).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"
        )

    return change


def pickled_pointer(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).with_suffix(".safetensors").unlink()
        pointer(name)(folder)

    return change


def flipped_bit(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))


def linked_outside(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    file.rename(folder / "elsewhere.safetensors")
    file.symlink_to(folder / "elsewhere.safetensors")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


def shards_outside(folder: Path) -> None:
    model = folder / "model"
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder / "outside.safetensors"), "../outside")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder: Path) -> None:
    model = folder / "model"
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (truncated("model/model.safetensors"), "not a complete safetensors file"),
    "truncated adapter": (truncated("adapter/adapter_model.safetensors"), "not a complete"),
    **{
        f"pointer to {name}": (
            pointer(name),
            f"{name}: a Git LFS pointer to the file; expected "
            "the file itself; get it with `git lfs pull`, or download it again",
        )
        for name in (
            "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json",
            "adapter/qlora_kit.json",
            "model/model.safetensors",
            "model/config.json",
            "model/tokenizer.json",
            "model/tokenizer_config.json",
        )
    },
    "pointer to a pickled adapter": (
        pickled_pointer("adapter/adapter_model.bin"),
        "adapter_model.bin: a Git LFS pointer to the file",
    ),
    "flipped bit in the base": (flipped_bit, "trained on other weights than"),
    "missing shard": (missing_shard, "missing, though the index names it"),
    "missing tensor of the base": (
        model_tensors(lambda t: t.pop("model.norm.weight")),
        "missing tensors in the checkpoint (1): model.norm.weight",
    ),
    "wrong shape in the base": (
        model_tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        "model.norm.weight: shape (3,) in the checkpoint",
    ),
    "not finite in the base": (
        model_tensors(lambda t: t["model.norm.weight"].fill_(float("inf"))),
        "model.norm.weight: holds NaN or infinity",
    ),
    "adapter of another model": (
        adapter_tensors(lambda t: t.update({A: torch.ones(4, 12)})),
        "up_proj",
    ),
    "not finite in B": (adapter_tensors(lambda t: t[B].fill_(float("nan"))), "holds NaN"),
    "rank mismatch": (json_of("adapter/adapter_config.json", r=5), "expected rank 5"),
    "A without B": (adapter_tensors(lambda t: t.pop(B)), "has only one of lora_A and lora_B"),
    "layer of the adapter missing": (
        adapter_tensors(lambda t: (t.pop(A), t.pop(B))),
        "targets model.layers.1.mlp.up_proj, and its tensors are missing",
    ),
    "surplus tensor": (
        adapter_tensors(lambda t: t.update(more=torch.ones(1))),
        "unknown tensor more",
    ),
    "delta of nothing": (
        adapter_tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]),
        "merging changes nothing",
    ),
    "overflow in float16": (
        adapter_tensors(lambda t: t[B].fill_(1e7)),
        "does not fit float16; pass --dtype bfloat16",
    ),
    "record of another digest": (
        json_of("adapter/qlora_kit.json", digest="0" * 32),
        "trained on other weights than",
    ),
    "link out of the adapter": (linked_outside, "a link to"),
    "shards outside of the model": (shards_outside, "expected a file in the same folder"),
    "no tokenizer": (without_tokenizer, "no usable tokenizer"),
}


def export(folder: Path, capsys: Any, *extra: str) -> tuple[int, str]:
    arguments = ("export", str(folder / "adapter"), "--to", str(folder / "out" / "merged"),
                 "--model", str(folder / "model"), "--verify-tokens", "0", *extra)  # fmt: skip
    code, out, err = run(*arguments, capsys=capsys)
    assert "Traceback" not in out + err
    return code, err


def nothing_left(folder: Path) -> bool:
    return not (folder / "out").exists() or not any((folder / "out").iterdir())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_line_and_leaves_nothing(
    whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    change, says = BROKEN[name]
    change(folder)
    code, err = export(folder, capsys)
    assert code == 2, err
    assert err.count("error: ") == 1
    assert says in err
    assert nothing_left(folder)


def test_a_pointer_to_what_is_not_read_is_no_fault(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    for name in ("model/pytorch_model.bin", "model/tokenizer.model", "adapter/adapter_model.bin"):
        pointer(name)(folder)
    code, err = export(folder, capsys)
    assert code == 0, err


@pytest.mark.parametrize("nothing", ["", None])
def test_a_base_that_is_named_with_nothing_is_not_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], nothing: str | None
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    (folder / "adapter" / "qlora_kit.json").unlink()
    changes = {"base_model_name_or_path": nothing, "revision": "", "exclude_modules": ""}
    json_of("adapter/adapter_config.json", **changes)(folder)
    code, _, err = run("export", str(folder / "adapter"), "--to", str(folder / "out"),
                       capsys=capsys)  # fmt: skip
    assert code == 2
    assert "does not say what its base is; name it with --model" in err
    code, err = export(folder, capsys)
    assert code == 0, err


def test_the_same_input_unbroken_is_exported(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    code, err = export(folder, capsys)
    assert code == 0, err


@pytest.mark.parametrize("extra", [(), ("--requantize",)])
def test_no_space_is_known_before_anything_is_written(
    whole: Path,
    tmp_path: Path,
    extra: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    usage = shutil.disk_usage(folder)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, err = export(folder, capsys, *extra)
    assert code == 3
    assert "GB for the merged model; free space" in err
    assert nothing_left(folder)


# ---------------------------------------------------------------- what was asked for


def test_a_threshold_without_anything_to_measure_is_refused_at_once(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    code, err = export(folder, capsys, "--verify-threshold", "0.1")
    assert code == 2
    assert "--verify-threshold: needs predictions to compare" in err
    assert nothing_left(folder)


def test_nothing_is_written_into_what_was_written_whole(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    assert export(folder, capsys)[0] == 0
    inside = str(folder / "out" / "merged" / "deeper" / "still")
    code, err = export(folder, capsys, "--to", inside)
    assert code == 2
    assert "is inside" in err
    assert "deleted as a whole; name another --to" in err
    arguments = ("quantize", "--model", str(folder / "model"), "--to", inside)
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert "is inside" in err
    assert not (folder / "out" / "merged" / "deeper").exists()


def test_a_base_that_has_moved_is_asked_for(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    gone = str(tmp_path / "gone")
    json_of("adapter/qlora_kit.json", base=gone)(folder)
    adapter = str(folder / "adapter")
    for command in (
        ("export", adapter, "--base", "original", "--to", str(folder / "out" / "merged")),
        ("evaluate", "--adapter", adapter),
        ("generate", "--adapter", adapter, "--prompt", "x"),
    ):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2
        assert err.count("error: ") == 1
        assert f"{adapter} goes on it: name where it is now with --model" in err
    assert nothing_left(folder)
    assert export(folder, capsys)[0] == 0, "with --model"


def test_quantising_what_is_quantised_names_no_flag_that_was_not_given(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, once = str(whole / "model"), str(tmp_path / "once")
    code, _, err = run("quantize", "--model", model, "--to", once, capsys=capsys)
    assert code == 0, err
    code, _, err = run("quantize", "--model", once, "--to", str(tmp_path / "2"), capsys=capsys)
    assert code == 2
    assert "is quantised already; expected unquantised weights" in err
    assert "--bits" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def die_with_all_shards_written(arguments: tuple[str, ...]) -> None:
    """Do a command that is killed before its model gets its name; to be called in a child."""
    from qlora_kit.export.shards import ShardWriter

    write_rest = ShardWriter.finish

    def write_and_die(self: ShardWriter) -> None:
        write_rest(self)
        os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.finish = write_and_die  # type: ignore[method-assign]
    main(list(arguments))


def test_a_killed_export_leaves_no_model_and_the_next_one_clears_up(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "case")
    merged = folder / "out" / "merged"

    def killed(*extra: str) -> None:
        given = ("export", str(folder / "adapter"), "--model", str(folder / "model"),
                 "--to", str(merged), "--verify-tokens", "0", *extra)  # fmt: skip
        ended = finish(lambda: die_with_all_shards_written(given), tmp_path / "streams")
        assert ended.code == 128 + signal.SIGKILL, ended.errors

    killed()
    assert not merged.exists()
    assert export(folder, capsys)[0] == 0
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    killed("--overwrite")
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    assert export(folder, capsys, "--overwrite")[0] == 0
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
