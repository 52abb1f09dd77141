"""The package as it is installed: the files of the wheel, and the public names."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import PROJECT

import qlora_kit


def test_every_public_name_is_there_and_listed() -> None:
    for name in qlora_kit.__all__:
        assert getattr(qlora_kit, name) is not None
    assert qlora_kit.__all__ == [
        "Adapter", "AdapterSet", "Base", "BaseModelOptions", "BaseRecord", "BaseSpec",
        "EvaluateConfig", "ExportConfig", "GenerateConfig", "LoraSpec", "PerRow", "QloraKitError",
        "Quantization", "RecordOptions", "Sampling", "TokenOptions", "TrainConfig", "TrainResult",
        "Variant", "__version__",
        "attach", "choose_hardware", "configure", "detach", "evaluate", "find_model", "generate",
        "known_models", "load_adapter", "load_adapters", "load_base", "load_data",
        "load_shared_base", "merge", "merge_to", "open_base", "open_classifier", "quantize_to",
        "read_adapter", "save_adapter", "train_adapter", "verify_merge",
    ]  # fmt: skip


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = qlora_kit.nonsense


def test_the_exception_tree_is_the_documented_one() -> None:
    errors = importlib.import_module("qlora_kit.errors")
    tree = {
        name: (kind.__bases__[0].__name__, kind.exit_code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.QloraKitError)
    }
    assert tree == {
        "QloraKitError": ("Exception", 1),
        "InputError": ("QloraKitError", 2),
        "ConfigError": ("InputError", 2),
        "DataError": ("InputError", 2),
        "ModelError": ("InputError", 2),
        "AdapterError": ("InputError", 2),
        "OutputError": ("InputError", 2),
        "EnvironmentFault": ("QloraKitError", 3),
        "HubError": ("EnvironmentFault", 3),
        "StorageError": ("EnvironmentFault", 3),
        "WorkerLost": ("EnvironmentFault", 3),
        "OutOfMemory": ("EnvironmentFault", 3),
        "TornStep": ("OutOfMemory", 3),
        "NumericsError": ("QloraKitError", 4),
        "LearningError": ("NumericsError", 4),
        "VerificationError": ("QloraKitError", 5),
    }
    for name in tree:
        assert name in (errors.__doc__ or ""), "the tree in the docstring names every error"


def test_private_names_of_torch_and_transformers_have_one_home() -> None:
    """Names that a release may take away are in two files; `layers/` and `step/` have some yet."""
    package = PROJECT / "qlora_kit"
    private = re.compile(
        r"torch\._|torch\.utils\._|\._cdata|_foreach_|\._buffers|\._parameters\b|\._modules"
        r"|_(attn|experts)_implementation|_init_weights|_keys_to_ignore"
    )
    homes = {package / "private_torch.py", package / "private_transformers.py"}
    found = {path for path in package.rglob("*.py") if private.search(path.read_text())}
    assert homes <= found
    assert {path.relative_to(package).parts[0] for path in found - homes} <= {"layers", "step"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "."]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_configs_templates_and_demo(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (PROJECT / "configs").glob("*.yaml"):
        assert f"qlora_kit/configs/{path.name}" in names
    templates = [*(PROJECT / "qlora_kit" / "report" / "templates").iterdir()]
    assert len(templates) >= 7
    assert {f"qlora_kit/report/templates/{path.name}" for path in templates} <= names
    for name in ("model/model.safetensors", "model/tokenizer.json", "train.jsonl", "test.jsonl"):
        assert f"qlora_kit/demo/{name}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import qlora_kit; from qlora_kit.model.names import find_model, known_models\n"
        "print(qlora_kit.__file__, len(known_models()), find_model('demo').folder)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    package, models, demo = done.stdout.split()
    assert package.startswith(str(site))
    assert int(models) == len(list((PROJECT / "configs").glob("*.yaml")))
    assert Path(demo).is_relative_to(site)
    assert (Path(demo) / "config.json").is_file()


def test_python_m_and_the_console_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("qlora-kit")
    module = [sys.executable, "-m", "qlora_kit", "models"]
    outputs = [subprocess.check_output(command) for command in (module, [str(script), "models"])]
    assert outputs[0] == outputs[1]
