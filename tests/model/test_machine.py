"""Names, downloads and devices: the model, the place of its files, and the device it runs on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import errors
from support import PROJECT

from qlora_kit.config import BaseModelOptions
from qlora_kit.errors import ConfigError, EnvironmentFault, HubError, ModelError
from qlora_kit.events import Event, Notice
from qlora_kit.layers.quantize import Quantization
from qlora_kit.model import doctor, environment
from qlora_kit.model.fetch import Fetched, fetch
from qlora_kit.model.hardware import choose_hardware, dtype_named, make_deterministic
from qlora_kit.model.memory import memory_in_use_bytes
from qlora_kit.model.names import DEMO, ModelSource, find_model, known_models
from qlora_kit.opening.model import open_tokenizer

# huggingface_hub moved from one to the other.
httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")

# ---------------------------------------------------------------- names


@pytest.mark.parametrize("module", ["qlora_kit.model.names", "qlora_kit.model.fetch"])
def test_names_are_found_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; from qlora_kit.model.names import find_model;"
        "find_model('deepseek-7b');"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_known_name_knows_its_architecture() -> None:
    source = find_model("deepseek-7b")
    assert source.hub_id == source.identity == "deepseek-ai/deepseek-llm-7b-base"
    assert source.parameters == 6_910_365_696
    assert source.architecture is not None
    assert source.architecture["num_hidden_layers"] == 30
    assert find_model("deepseek-ai/deepseek-llm-7b-base") is source


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    source = find_model("owner/name")
    assert source.folder == tmp_path / "owner" / "name"
    assert source.identity == str(tmp_path / "owner" / "name")
    assert find_model("owner/other") == ModelSource("other", hub_id="owner/other")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deepsek-7b", "did you mean deepseek-7b?"),
        ("llama-3.1-8", "did you mean llama-3.1-8b?"),
        ("zzz", "`qlora-kit models` lists the names"),
        ("no/such/thing", "`qlora-kit models` lists the names"),
        ("", "`qlora-kit models` lists the names"),
    ],
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_model(name)
    (fault,) = caught.value.faults
    assert repr(name) in fault
    assert hint in fault


GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


def test_known_architectures_are_those_of_the_real_files(assets: Path) -> None:
    known = {s.hub_id.rsplit("/", 1)[1]: s for s in known_models().values() if s.hub_id}
    compared = 0
    for path in sorted((assets / "configs").glob("*.json")):
        if path.stem not in known:
            continue
        real, ours = json.loads(path.read_text()), known[path.stem].architecture or {}
        # GPT-2's file has other names for the same numbers.
        real |= {own: real[its] for own, its in GPT2_NAMES.items() if its in real}
        wrong = {
            key: (ours[key], real[key]) for key in ours if key in real and ours[key] != real[key]
        }
        assert wrong == {}, path.stem
        compared += 1
    assert compared >= 10


# ---------------------------------------------------------------- fetching


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert fetch(ModelSource("it", folder=tmp_path)) == Fetched(tmp_path, tmp_path)


@pytest.mark.parametrize("random", [True, False])
def test_an_unreachable_hub_is_one_line(empty_cache: Path, random: bool) -> None:
    with pytest.raises(HubError) as caught:
        fetch(find_model("owner/model"), random=random)
    (fault,) = caught.value.faults
    assert "\n" not in fault
    assert fault.startswith("owner/model: the model hub is out of reach")
    assert "check the network, or give --model a folder" in fault
    assert caught.value.exit_code == 3


def test_a_cached_copy_is_used_when_the_hub_is_out_of_reach(empty_cache: Path) -> None:
    repository, commit = empty_cache / "models--owner--model", "a" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert fetch(find_model("owner/model")) == Fetched(snapshot, snapshot, commit)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (errors.GatedRepoError, HubError, "grants access on request"),
        (errors.RepositoryNotFoundError, ModelError, "the hub has no such model"),
        (errors.HfHubHTTPError, HubError, "out of reach"),
        (httpx.ConnectTimeout, HubError, "out of reach"),
        (ConnectionResetError, HubError, "out of reach"),
    ],
)
def test_each_fault_of_the_hub_is_told(
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: type[Exception],
    expected: type[Exception],
    message: str,
) -> None:
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    is_http = issubclass(raised, errors.HfHubHTTPError)
    fault = raised("no", response=response) if is_http else raised("no")
    original = huggingface_hub.snapshot_download

    def download(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        if local_files_only:
            return original(*args, local_files_only=True, **kwargs)
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(expected, match=message) as caught:
        fetch(find_model("owner/model"), random=True)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["model.safetensors", "pytorch_model.bin", "evil.py"], "model*.safetensors"),
        (["pytorch_model-1.bin", "modeling.py"], "pytorch_model*.bin"),
    ],
)
def test_only_tensors_and_text_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], pattern: str
) -> None:
    seen: list[str] = []
    siblings = [type("File", (), {"rfilename": name}) for name in files]
    info = type("Info", (), {"siblings": siblings})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, hub_id, revision: info)

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        seen.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch(find_model("owner/model")).revision == tmp_path.name
    assert seen == ["*.json", "*.jinja", "*.model", "*.txt", pattern]


def test_random_weights_of_a_known_architecture_need_no_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = {DEMO: ModelSource(DEMO, folder=tmp_path)}
    monkeypatch.setattr("qlora_kit.model.fetch.known_models", lambda: demo)
    assert fetch(find_model("deepseek-7b"), random=True) == Fetched(None, tmp_path)


# ---------------------------------------------------------------- devices


def test_a_cpu_computes_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_hardware()
    assert (chosen.device.type, chosen.dtype_name) == ("cpu", "float32")
    assert "CPU" in chosen.reason
    asked = choose_hardware("cpu", "bfloat16")
    assert (asked.dtype, asked.reason) == (torch.bfloat16, "as asked")
    assert f"{torch.get_num_threads()} thread" in chosen.device_name
    assert memory_in_use_bytes(chosen.device) > 1e7


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: no GPU is visible.*--device cpu"):
        choose_hardware("cuda")
    with pytest.raises(ConfigError, match=r"--dtype float16: .*use float32"):
        choose_hardware("cpu", "float16")
    with pytest.raises(ConfigError, match="float16"):
        choose_hardware("auto", "float16")


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_computes_in_bfloat16_where_it_can(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    chosen = choose_hardware()
    assert (str(chosen.device), chosen.dtype_name) == ("cuda:0", dtype)
    assert choose_hardware("cuda", "float16").dtype == dtype_named("float16")
    assert choose_hardware("cpu").device.type == "cpu"


# Prints the settings that torch and cuBLAS find when torch is first imported, then torch's flags.
_SEEN = """
import os, sys

class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            names = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF")
            print("seen", *map(os.environ.get, names))

sys.meta_path.insert(0, Seen())
from qlora_kit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    import torch
    matmul = torch.backends.cuda.matmul
    print("seen", end.code, torch.are_deterministic_algorithms_enabled(),
          matmul.allow_bf16_reduced_precision_reduction,
          matmul.allow_fp16_reduced_precision_reduction)
"""


def seen_by(*arguments: str) -> tuple[str, str]:
    """Return the first and the last line that `_SEEN` prints while a command runs."""
    names = {"CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", _SEEN, *arguments], capture_output=True, text=True, env=environment
    )
    first, last = (line for line in done.stdout.splitlines() if line.startswith("seen "))
    return first, last


def test_what_is_read_once_is_set_before_torch_is_there(tmp_path: Path) -> None:
    train = ("train", "--model", "demo", "--max-steps", "1", "--no-rehearse", "--batch-size", "2",
             "--samples", "0", "--validation-fraction", "0", "--device", "cpu",
             "--output")  # fmt: skip
    first, last = seen_by(*train, str(tmp_path / "run"), "--deterministic")
    assert first == "seen :4096:8 expandable_segments:True"
    assert last == "seen 0 True False False"


BEGIN_AGAIN = """
import os
from qlora_kit.model import environment
environment.restart_with_tight_heap()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), environment.has_tight_heap())
"""


@pytest.mark.skipif(not environment._keeps_offcuts(), reason="a C library that needs no help")
@pytest.mark.parametrize(
    ("own", "found"),
    [
        (None, "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0 True"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0 False"),
    ],
)
def test_a_process_begins_again_with_a_tight_heap(own: str | None, found: str) -> None:
    """It begins again once, with the same id and arguments; the user's settings stay."""
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environ |= {"GLIBC_TUNABLES": own} if own else {}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN_AGAIN], env=environ, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    assert output.strip() == f"{process.pid} {found}"


def test_sums_of_16_bits_are_forbidden_in_evaluation_too() -> None:
    first, last = seen_by("evaluate", "--model", "demo", "--device", "cpu", "--max-rows", "8")
    assert first == "seen None expandable_segments:True"
    assert last == "seen 0 False False False"


def test_determinism_that_comes_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(EnvironmentFault, match="has opened the GPU before, without CUBLAS_WORK"):
        make_deterministic()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_promises_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(EnvironmentFault, match=r"is ':0:0'; expected :4096:8 or :16:8; unset it"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- doctor


def test_the_doctor_finds_this_machine_well() -> None:
    findings = {finding.name: finding for finding in doctor.examine()}
    assert [f for f in findings.values() if not f.ok] == []
    assert {"python", "torch", "bitsandbytes", "cpu", "4-bit on cpu", "8-bit on cpu"} <= set(
        findings
    )
    assert findings["4-bit on cpu"].found.startswith("works, output error ")


def test_the_doctor_survives_a_broken_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Quantization, weight: torch.Tensor) -> None:
        raise RuntimeError("no kernel for this machine\nlong trace")

    monkeypatch.setattr(Quantization, "freeze", broken)
    found = {finding.name: finding for finding in doctor.examine()}["8-bit on cpu"]
    assert not found.ok
    assert found.found == "RuntimeError: no kernel for this machine"
    assert "reinstall bitsandbytes" in found.remedy


def test_the_doctor_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Quantization.freeze
    monkeypatch.setattr(Quantization, "freeze", lambda self, weight: own(self, weight * 1.3))
    found = {finding.name: finding for finding in doctor.examine()}["4-bit on cpu"]
    assert not found.ok
    assert "wrong numbers" in found.remedy


def test_the_doctor_names_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.metadata.version

    def version(package: str) -> str:
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return {"transformers": "5.3.1", "torch": "2.12.0+cpu"}.get(package) or own(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.name: finding for finding in doctor.examine()}
    assert (found["datasets"].ok, found["datasets"].remedy) == (False, "pip install datasets")
    assert not found["transformers"].ok
    assert found["transformers"].remedy == "pip install 'transformers>=5.22'"
    assert found["torch"].ok


def test_an_old_package_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / "transformers-5.3.1.dist-info"
    stale.mkdir()
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.3.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    heard: list[Event] = []
    assert open_tokenizer(BaseModelOptions(model="demo"), heard.append).tokenizer.eos_token
    told = [event.text for event in heard if isinstance(event, Notice)]
    assert told == [
        "transformers 5.3.1 is older than what this is tested with; "
        "pip install 'transformers>=5.22'"
    ]


def test_the_doctor_asks_for_what_the_package_asks_for() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    for package, least in doctor._MINIMUM.items():
        assert f"{package}>={'.'.join(map(str, least))}" in project["project"]["dependencies"]
