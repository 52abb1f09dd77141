"""The forms of an export that llama.cpp reads: a merged model, and an adapter alone, as GGUF."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import ExportConfig
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Closing, Facts
from qlora_kit.redact import redacted_values
from qlora_kit.storage import staged_folder, write_json, write_text

if TYPE_CHECKING:
    from qlora_kit.config import GgufTypeName
    from qlora_kit.export.gguf.model_file import GgufFile
    from qlora_kit.lora.stored import StoredAdapter
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.opening.model import Opened

_MODELFILE = "Modelfile"


def check_form(config: ExportConfig) -> None:
    """Refuse options that do not go together with the form of the export.

    Raises:
        ConfigError: such an option is given.
    """
    is_gguf = config.form.startswith("gguf")
    if config.gguf_type is not None and not is_gguf:
        raise ConfigError(
            f"--gguf-type {config.gguf_type}: is of GGUF files, and --form is {config.form}; "
            "expected --form gguf or gguf-adapter; leave one of them out"
        )
    if is_gguf and config.dtype != "float16":
        raise ConfigError(
            f"--dtype {config.dtype}: is of safetensors, and --form is {config.form}; expected "
            "--gguf-type; pass --gguf-type f32, f16, bf16 or q8_0 instead"
        )
    if config.form != "merged" and config.requantize:
        raise ConfigError(
            f"--requantize: packs merged safetensors, and --form is {config.form}; expected "
            "--form merged; leave one of them out"
        )
    if config.form.endswith("adapter") and config.base != "quantized":
        raise ConfigError(
            f"--base {config.base}: is what an adapter is merged into, and --form {config.form} "
            "merges nothing; leave it out"
        )
    if config.form.endswith("adapter") and config.verify_threshold is not None:
        raise ConfigError(
            f"--verify-threshold: compares merged models, and --form {config.form} merges nothing; "
            "leave it out"
        )


def gguf_file(
    config: ExportConfig, adapter: StoredAdapter, spec: BaseSpec, opened: Opened
) -> GgufFile:
    """Return the GGUF file that a merge shall be written to.

    Raises:
        ModelError: the model or its tokenizer is not known to be right as GGUF.
    """
    from qlora_kit.export.gguf.families import Architecture
    from qlora_kit.export.gguf.model_file import GgufFile, Origin
    from qlora_kit.export.gguf.vocabulary import Vocabulary
    from qlora_kit.export.merge import untied_copies

    skeleton = spec.skeleton()
    is_tied = not untied_copies(adapter.with_twins(skeleton), skeleton)
    architecture = Architecture.of(spec.source.name, skeleton, is_tied=is_tied)
    name, rows = spec.source.name, architecture.rows
    template = opened.tokenizer.chat_template if _has_template(opened, adapter) else None
    vocabulary = Vocabulary.of(opened.tokenizer, name, rows, _ends(opened), template)
    kind: GgufTypeName = config.gguf_type or "f16"
    origin = Origin(spec.source.identity, adapter.folder.resolve().name)
    return GgufFile(_file_name(adapter, kind), architecture, vocabulary, kind, origin)


def _file_name(adapter: StoredAdapter, kind: str) -> str:
    return f"{adapter.folder.resolve().name}-{kind}.gguf"


def _ends(opened: Opened) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    from qlora_kit.data.template import end_token_ids
    from qlora_kit.model.architecture import read_generation_config

    folder = opened.fetched.folder
    settings = read_generation_config(folder) if folder else None
    named = None if settings is None else settings.eos_token_id
    return [each for each in end_token_ids(opened.tokenizer, named) if each is not None]


def _has_template(opened: Opened, adapter: StoredAdapter) -> bool:
    """Whether there is a chat template that the model or the adapter has learnt."""
    # Where a model has none, the kit gives its tokenizer one that a run may have trained with.
    has_trained = adapter.record is not None and adapter.record.template_hash is not None
    return bool(opened.has_template or has_trained)


def write_modelfile(folder: Path, file: GgufFile, opened: Opened, adapter: StoredAdapter) -> None:
    """Write the `Modelfile` of Ollama beside a GGUF file.

    Raises:
        StorageError: it could not be written.
    """
    from qlora_kit.export.gguf.modelfile import modelfile, turns_of

    tokenizer = opened.tokenizer
    stops = tokenizer.convert_ids_to_tokens(_ends(opened))
    learnt_texts = adapter.record is not None and adapter.record.template_hash is None
    text = modelfile(
        file.file,
        turns_of(tokenizer, adds_bos=file.vocabulary.adds_bos),
        stops,
        file.architecture.usual_context,
        raw=learnt_texts or not _has_template(opened, adapter),
    )
    write_text(folder / _MODELFILE, text)


def use_gguf(folder: Path) -> tuple[str, ...]:
    """Return commands that use an export in GGUF."""
    file = next(folder.glob("*.gguf"), folder / "model.gguf")
    return (
        f"llama-cli -m {shlex.quote(str(file))}",
        f"ollama create {shlex.quote(folder.name)} -f {shlex.quote(str(folder / _MODELFILE))}",
    )


# ---------------------------------------------------------------- adapters alone


def export_gguf_adapter(
    folder: Path,
    config: ExportConfig,
    adapter: StoredAdapter,
    spec: BaseSpec,
    announce: Announce,
) -> dict[str, Any]:
    """Write an adapter without its base as GGUF.

    Returns:
        The facts of the file and the report, for programs.
    """
    from qlora_kit.export.target import check_target

    check_target(folder, [adapter.folder, spec.folder], config.overwrite)
    with staged_folder(folder, replace=config.overwrite) as staging:
        report = _write_gguf_adapter(staging, config.gguf_type or "f32", adapter, spec)
    layers = len(adapter.tensors)
    announce(Facts(f"adapter in {folder}", (("layers", str(layers)), ("form", config.form))))
    file = shlex.quote(str(next(folder.glob("*.gguf"))))
    announce(Closing((str(folder),), (f"llama-cli -m BASE.gguf --lora {file}",)))
    return {"folder": str(folder), "layers": layers, "report": report}


def _write_gguf_adapter(
    folder: Path, kind: GgufTypeName, adapter: StoredAdapter, spec: BaseSpec
) -> dict[str, Any]:
    from qlora_kit.export.gguf.adapter_file import AdapterFile
    from qlora_kit.export.merge_report import NAME
    from qlora_kit.lora.files import library_versions
    from qlora_kit.report.merge import write_adapter_card

    name = _file_name(adapter, kind)
    file = AdapterFile(name, adapter, spec, kind)
    file.write(folder)
    report: dict[str, Any] = redacted_values(
        {
            "format": 1,
            "base": spec.source.identity,
            "adapter": adapter.folder.resolve().name,
            "trained_on": f"its base in {spec.quantization.describe()}",
            "forms": [asdict(file.verify(folder))],
            "versions": library_versions(),
        }
    )
    write_json(folder / NAME, report)
    write_adapter_card(folder, report, name)
    text = (
        f"# The GGUF file of {spec.source.name}, or the name of the model in Ollama:\n"
        f"FROM BASE.gguf\nADAPTER ./{name}\n"
    )
    write_text(folder / _MODELFILE, text)
    return report
