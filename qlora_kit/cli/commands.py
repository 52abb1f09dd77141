"""The commands that run a recipe. Each is one declaration; its flags are made from its options."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import click

from qlora_kit import recipe
from qlora_kit.cli.options import configure, parameters_of
from qlora_kit.cli.run import listener, print_config, print_result
from qlora_kit.config import (
    ChatConfig,
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    Options,
    PlanConfig,
    QuantizeConfig,
    RunsConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
    by_heading,
    declared,
)
from qlora_kit.launched import place
from qlora_kit.parallel.launch import started_processes


class _Command(click.Command):
    """A command whose help shows the options that matter first, and the rest by group.

    Args:
        name: the name of the command and of its recipe.
        config_class: the configuration that the flags fill.
        text: the description of the command; its first sentence is the summary.
        example: an example of a command line.
        positional: the field that is given as an argument instead of a flag.
    """

    def __init__(
        self,
        name: str,
        config_class: type[Options],
        text: str,
        example: str,
        positional: str | None = None,
    ) -> None:
        def callback(**given: Any) -> None:
            config, as_json = configure(config_class, given), given["json"]
            story = name
            if given["dry_run"] and isinstance(config, ExportConfig) and config.repository:
                story = "list_push"
            elif given["dry_run"]:
                if place().is_writer:
                    print_config(config, as_json=as_json)
                return
            if name == "train" and isinstance(config, TrainConfig):
                code = started_processes(config, click.get_current_context().obj)
                if code is not None:
                    sys.exit(code)
            with listener(as_json=as_json, answers_alone=name == "chat") as announce:
                result = getattr(recipe, story)(config, announce)
            if as_json and place().is_writer:
                print_result(result)

        self._config_class = config_class
        super().__init__(
            name,
            callback=callback,
            params=parameters_of(config_class, positional),
            help=f"{text}\n\n\b\n{example}",
            short_help=text.partition(". ")[0].rstrip("."),
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        found = {str(param.name): param.get_help_record(ctx) for param in self.get_params(ctx)}
        records = {name: record for name, record in found.items() if record is not None}
        for heading, names in _headings(self._config_class, records):
            with formatter.section(heading):
                formatter.write_dl([records[name] for name in names])


def _headings(
    config_class: type[Options], shown: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield each heading of a help page with its options; every option stands under one heading."""
    fields = config_class.model_fields
    leading = [name for name in shown if name in fields and declared(config_class, name)["leads"]]
    if leading:
        yield "What matters first", leading
    for heading, names in by_heading(config_class):
        if under := [name for name in names if name in shown and name not in leading]:
            yield heading, under
    yield "Every command", [name for name in shown if name not in fields]


COMMANDS: tuple[click.Command, ...] = (
    _Command(
        "check",
        CheckConfig,
        "Show what a model would learn from a data file, token by token, without training. Takes "
        "the options of `train`; writes nothing but the page that --html names. Exit code 0: the "
        "data can be trained on; 2: why it cannot.",
        "qlora-kit check --model deepseek-7b --data my.jsonl --html data.html",
    ),
    _Command(
        "plan",
        PlanConfig,
        "Predict the peak memory of a run, without a GPU, weights or a network. Takes the options "
        "of `train`, and a folder or a bare config.json as --model.",
        "qlora-kit plan --model deepseek-7b --bits 4 --max-length 2048",
    ),
    _Command(
        "train",
        TrainConfig,
        "Train a LoRA adapter on a frozen base.",
        "qlora-kit train --model deepseek-7b --bits 4 --data my.jsonl --output runs/mine",
    ),
    _Command(
        "sweep",
        SweepConfig,
        "Train a run for each combination of values, on one loaded base, and rank them. Takes the "
        "options of `train`. The folder is a set of ordinary runs, with sweep.html beside them.",
        "qlora-kit sweep --model deepseek-7b --data my.jsonl --output sweeps/one \\\n"
        "  --over learning_rate=1e-4,3e-4 --over rank=8,16",
    ),
    _Command(
        "evaluate",
        EvaluateConfig,
        "Measure a model, with or without an adapter, on a data file.",
        "qlora-kit evaluate --model deepseek-7b --adapter runs/mine --data test.jsonl",
    ),
    _Command(
        "generate",
        GenerateConfig,
        "Generate text with a model, with or without an adapter.",
        'qlora-kit generate --adapter runs/mine --prompt "Once upon a time"',
    ),
    _Command(
        "chat",
        ChatConfig,
        "Hold a conversation with a model, with or without adapters. In a terminal /help lists "
        "the commands; through a pipe each line is a turn, and the answers are plain text.",
        "qlora-kit chat --adapter runs/mine",
    ),
    _Command(
        "serve",
        ServeConfig,
        "Answer over HTTP as OpenAI's interface does, with a base and adapters on it. Requests are "
        "answered together, whatever adapter they ask for; a page compares two of them.",
        "qlora-kit serve --adapter mine=runs/mine --adapter other=runs/other",
    ),
    _Command(
        "export",
        ExportConfig,
        "Merge an adapter into its base, verify the merge, and write the model with its report; or "
        "write the adapter alone. Pushes to the hub where --to names a repository; there --dry-run "
        "lists the files with their hashes.",
        "qlora-kit export runs/mine --to merged/mine\n"
        "  qlora-kit export runs/mine --to hub:me/mine --form adapter --private",
        positional="adapter",
    ),
    _Command(
        "quantize",
        QuantizeConfig,
        "Write a model in 4 or 8 bits, to be loaded in seconds, here and in plain transformers.",
        "qlora-kit quantize --model deepseek-7b --bits 4 --to models/deepseek-7b-nf4",
    ),
    _Command(
        "runs",
        RunsConfig,
        "List the runs in a folder with their state and their best figures. Draws them together in "
        "the page that --html names.",
        "qlora-kit runs runs --sort best --html",
        positional="folder",
    ),
)
