"""The commands that write models: an adapter merged into its base, and a quantised model."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import (
    BaseModelOptions,
    ExportConfig,
    QuantizeConfig,
    TokenOptions,
    TrainConfig,
    resolve,
)
from qlora_kit.data.samples import is_hub_id, load_samples
from qlora_kit.errors import (
    AdapterError,
    ConfigError,
    DataError,
    EnvironmentFault,
    InputError,
    OutputError,
)
from qlora_kit.events import (
    Announce,
    Closing,
    Facts,
    Notice,
    silent,
)
from qlora_kit.model.environment import prepare_environment
from qlora_kit.model.names import find_model
from qlora_kit.opening.adapters import check_base, stored_options
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.opening.tasks import is_of_images, stored_task_name
from qlora_kit.recipe.exporting_forms import (
    check_form,
    export_gguf_adapter,
    gguf_file,
    use_gguf,
    write_modelfile,
)
from qlora_kit.recipe.rows import read_data, tokenize_data
from qlora_kit.recipe.server_check import check_for_server
from qlora_kit.recipe.sharing import check_belongs, export_adapter
from qlora_kit.redact import redacted_values
from qlora_kit.storage import (
    check_writable,
    write_json,
)
from qlora_kit.train.folder import (
    CONFIG,
    check_outside_runs,
    stored_layer,
)

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.export.gguf.model_file import GgufFile
    from qlora_kit.export.merge import Merged
    from qlora_kit.export.merge_report import MergeReport
    from qlora_kit.export.rows import VerificationRows
    from qlora_kit.lora.files import BaseRecord
    from qlora_kit.model.load import BaseSpec
    from qlora_kit.opening.model import Opened


def export(config: ExportConfig, announce: Announce = silent) -> dict[str, Any]:
    """Merge an adapter into its base, verify the merge, and write the model with its report.

    With `--form adapter` the adapter alone is written; to a repository of the hub, what is written
    is pushed. With `check_server` nothing is written, see `check_for_server`.

    Returns:
        The facts of the merge and the merge report, for programs; or those of the other forms.
    """
    if config.check_server is not None and config.to is not None:
        raise ConfigError(
            "--check-server: writes nothing, and --to names a folder; expected one of the two; "
            "leave --to out, or export without a check"
        )
    if config.check_server is not None:
        return check_for_server(config.adapter, config.check_server, config.model, announce)
    if config.to is None:
        raise ConfigError("--to: missing; give one")
    prepare_environment()
    if config.repository is not None:
        from qlora_kit.recipe.pushing import push

        return push(config, announce)
    check_belongs(config)
    check_form(config)
    _check_new(config.to, config.overwrite)
    if config.form == "adapter":
        return export_adapter(config, announce)
    return _model_written(config, config.to, announce)


def _model_written(config: ExportConfig, to: Path, announce: Announce) -> dict[str, Any]:
    """Write and verify a form that needs the base: a merged model, a GGUF file, or its adapter."""
    if config.verify_threshold is not None and not config.verify_tokens:
        raise ConfigError(
            "--verify-threshold: needs predictions to compare, and --verify-tokens is 0; expected "
            "tokens; pass --verify-tokens above 0, or leave the threshold out"
        )
    stored = stored_options(config.adapter, config.model)
    model = stored.get("model")
    if model is None:
        raise AdapterError(f"{config.adapter}: does not say what its base is; name it with --model")
    check_base(model, config.adapter)
    options = BaseModelOptions(**stored, device=config.device)

    from qlora_kit.export.merge import Merge, merge_to
    from qlora_kit.export.merge_report import check_threshold
    from qlora_kit.export.verify import verify_merge
    from qlora_kit.lora.reading import read_adapter
    from qlora_kit.model.hardware import choose_hardware, dtype_named
    from qlora_kit.model.threads import choose_threads

    choose_threads()
    adapter = read_adapter(config.adapter)
    opened = open_tokenizer(options, announce, config.adapter)
    _say_how_to_ask(adapter.record, opened, announce)
    spec = opened.spec(options)
    if config.form == "gguf-adapter":
        return export_gguf_adapter(to, config, adapter, spec, announce)
    file = gguf_file(config, adapter, spec, opened) if config.form == "gguf" else None
    rows = _verification_rows(config, opened, spec, announce)
    reports: list[MergeReport] = []

    def check(merge: Merge, folder: Path) -> None:
        reports.append(verify_merge(merge, folder, rows, announce))
        check_threshold(reports[0], config.verify_threshold)
        _write_merge_report(folder, reports[0], config, file)
        if file is not None:
            write_modelfile(folder, file, opened, adapter)

    merged = merge_to(
        to,
        adapter,
        spec,
        opened.tokenizer,
        dtype=dtype_named(config.dtype),
        over=config.base,
        requantize=config.requantize,
        device=choose_hardware(config.device).device,
        shard_bytes=config.max_shard_size,
        file=file,
        overwrite=config.overwrite,
        check=check,
        announce=announce,
    )
    (report,) = reports
    _announce_merge(config, model, merged, report, announce)
    return {
        **asdict(merged),
        "folder": str(merged.folder),
        "report": redacted_values(report.as_json()),
    }


def _say_how_to_ask(record: BaseRecord | None, opened: Opened, announce: Announce) -> None:
    """Say that prompts need no template, which an adapter records and a merged model does not."""
    learnt_texts = record is not None and record.template_hash is None
    if learnt_texts and opened.has_template and opened.task.generates:
        announce(
            Notice(
                "the adapter learnt texts as they are, without the chat template that its model "
                "has; give the merged model its prompts so too, as by `qlora-kit generate --raw`"
            )
        )


def _check_new(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder}: exists; pass --overwrite, or name another --to")
    check_outside_runs(folder, "--to")
    check_writable(folder)


def _verification_rows(
    config: ExportConfig, opened: Opened, spec: BaseSpec, announce: Announce
) -> VerificationRows | None:
    """Return rows to verify with: from `--data`, or else the run's own, or else built-in ones."""
    from qlora_kit.data.tokens import tokenize
    from qlora_kit.export.rows import built_in_images, built_in_rows, some_rows
    from qlora_kit.export.streamed import NOT_RUN_IN_PARTS

    if not config.verify_tokens:
        return None
    if (kind := spec.architecture().model_type) in NOT_RUN_IN_PARTS:
        announce(Notice(f"predictions are not compared: {kind} cannot be run layer by layer"))
        return None
    tokenizer, makes = opened.tokenizer, opened.task.makes
    pad = tokenizer.pad_token_id
    base = spec if spec.classes is not None or opened.task.has_sources else None
    run = _config_of_run(config.adapter, announce)
    processor = tokenizer if is_of_images(opened.task) else None
    if config.data is not None:
        samples = load_samples(config.data, "test", run, task=opened.task.name)
        options = run or TokenOptions()
        named = tokenize(samples, tokenizer, options, makes=makes)
        source = Path(config.data).name
        return some_rows(named.rows, config.verify_tokens, pad, source, base, processor)
    held_out = None if run is None else _held_out_rows(run, opened, announce)
    if held_out is None and processor is not None:
        assert spec.classes is not None, "a classifier"
        return built_in_images(processor, spec.classes)
    if held_out is None:
        return built_in_rows(tokenizer, base)
    source = "validation rows of the run"
    return some_rows(held_out.rows, config.verify_tokens, pad, source, base, processor)


def _config_of_run(adapter: Path, announce: Announce) -> TrainConfig | None:
    """Return the options an adapter was trained with; None if its folder is not a run's."""
    run = adapter if (adapter / CONFIG).is_file() else None
    try:
        layer = stored_layer(run, str(adapter))
        return None if layer is None else resolve(TrainConfig, [layer])
    except InputError as error:
        announce(Notice(f"the options of the run are not used: {error.faults[0]}"))
        return None


def _held_out_rows(run: TrainConfig, opened: Opened, announce: Announce) -> Tokenized | None:
    """Return the validation rows of a run, where its data is still on this machine."""
    named = [source.path for source in run.sources] + ([run.validation] if run.validation else [])
    try:
        if any(is_hub_id(name) and not Path(name).exists() for name in named):
            # A folder that came from somebody else must not make this machine use the network.
            raise DataError("they are on the hub; name a file with --data")
        samples, validation = read_data(run, silent)
        _, held_out = tokenize_data(samples, validation, opened, run, silent)
    except (InputError, EnvironmentFault) as error:
        announce(Notice(f"the validation rows of the run are not used: {error.faults[0]}"))
        return None
    return held_out


def _write_merge_report(
    folder: Path, report: MergeReport, config: ExportConfig, file: GgufFile | None
) -> None:
    from qlora_kit.export.merge_report import NAME
    from qlora_kit.report.card import front_of
    from qlora_kit.report.merge import PICTURE, draw_layers, write_merged_card

    content = redacted_values(report.as_json())
    write_json(folder / NAME, content)
    draw_layers(content, folder / PICTURE)
    told = front_of(config.adapter)
    told = replace(told, license=config.license or told.license)
    write_merged_card(folder, content, told, None if file is None else file.file)


def _announce_merge(
    config: ExportConfig, model: str, merged: Merged, report: MergeReport, announce: Announce
) -> None:
    from qlora_kit.report.merge import layer_rows, variant_rows, written_as

    content = report.as_json()
    if content["variants"]:
        where = f"{report.rows}, {report.tokens:,} supervised tokens"
        announce(Facts(f"merge report, in fp32, on {where}", variant_rows(content)))
    announce(
        Facts("layers with the least delta for what quantising changed", layer_rows(content, 5))
    )
    facts = (
        ("base", f"{model}, {report.quantization.describe()}"),
        ("merged", f"{merged.layers} layers of {merged.tensors} tensors"),
        ("size", f"{merged.bytes / 1e9:.3f} GB in {merged.shards} file(s), {written_as(content)}"),
        ("verdict", " ".join(report.verdict.text)),
    )
    announce(Facts(f"merged into {merged.folder}", facts))
    if config.form == "gguf":
        announce(Closing((str(merged.folder),), use_gguf(merged.folder)))
        return
    bits = report.quantization.bits if report.is_requantized else 16
    path = shlex.quote(str(merged.folder))
    evaluate_it = f"qlora-kit evaluate --model {path} --bits {bits} --data test.jsonl"
    announce(Closing((str(merged.folder),), (evaluate_it,)))


def quantize(config: QuantizeConfig, announce: Announce = silent) -> dict[str, Any]:
    """Write a model in 4 or 8 bits, as a bitsandbytes checkpoint.

    Returns:
        The facts of the files, for programs.
    """
    prepare_environment()
    _check_new(config.to, config.overwrite)
    find_model(config.model)

    from qlora_kit.export.quantized import quantize_to
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.model.hardware import choose_hardware, dtype_named
    from qlora_kit.model.threads import choose_threads

    choose_threads()
    options = BaseModelOptions(model=config.model, revision=config.revision)
    opened = open_tokenizer(options, announce)
    opened.check_head()
    quantization = Quantization(config.bits, config.quant_type, config.double_quant)
    written = quantize_to(
        config.to,
        opened.spec(options),
        quantization,
        opened.tokenizer,
        dtype=None if config.dtype == "auto" else dtype_named(config.dtype),
        device=choose_hardware(config.device).device,
        shard_bytes=config.max_shard_size,
        overwrite=config.overwrite,
        announce=announce,
    )
    facts = (
        ("model", config.model),
        ("stored", quantization.describe()),
        ("size", f"{written.bytes / 1e9:.3f} GB in {written.shards} file(s)"),
        ("of", f"{written.original_bytes / 1e9:.3f} GB"),
    )
    announce(Facts(f"quantised into {config.to}", facts))
    task = stored_task_name(config.model, None)
    of_task = "" if task == "causal" else f" --task {task}"
    train_it = f"qlora-kit train{of_task} --model {shlex.quote(str(config.to))} --data my.jsonl"
    announce(Closing((str(config.to),), (train_it,)))
    return {**asdict(written), "folder": str(written.folder)}
