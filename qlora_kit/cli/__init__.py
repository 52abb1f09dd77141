"""The command line: flags become a configuration, errors become one line and an exit code.

`main` takes the arguments of a command and exits with its code. The commands themselves are in
`recipe/`: nothing here decides anything about a run.
"""

from __future__ import annotations

import sys
import traceback

import click

import qlora_kit
from qlora_kit.cli.commands import COMMANDS
from qlora_kit.cli.models import doctor, models
from qlora_kit.errors import EXIT_INTERRUPTED, EnvironmentFault, QloraKitError
from qlora_kit.launched import end_with_launcher, is_by_devices, place
from qlora_kit.model.environment import restart_with_tight_heap
from qlora_kit.parallel.one import leave, lost_process, speaks
from qlora_kit.redact import one_line, redacted
from qlora_kit.signals import Stopped, disregard_signals, stop_on_signals


class _Group(click.Group):
    """The group of all commands; its help shows the whole summary of each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one entry a command; click itself would cut off long summaries."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, each.get_short_help_str(1000)) for name, each in self.commands.items()]
            )


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(qlora_kit.__version__, prog_name="qlora-kit")
def cli() -> None:
    """Fine-tune large language models on small GPUs: 4-bit base, LoRA, merged exports.

    \b
    Exit codes: 0 done, 1 internal error, 2 input, 3 environment (hub, disk, memory),
    4 numerics, 5 verification failed, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """


for command in (*COMMANDS, models, doctor):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code; every error is one line unless `--debug`."""
    if arguments is None:
        arguments = sys.argv[1:]
        # Training fills the heap most, and takes long enough that starting twice does not matter.
        if arguments[:1] in (["train"], ["sweep"]):
            restart_with_tight_heap()
        command = [sys.executable, *sys.orig_argv[1:]]
    else:
        command = [sys.executable, "-m", "qlora_kit", *arguments]
    debug = "--debug" in arguments
    try:
        end_with_launcher()
        with stop_on_signals(says_so=place().is_writer and not is_by_devices()):
            cli.main(args=arguments, prog_name="qlora-kit", standalone_mode=False, obj=command)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _fail([error.format_message()], 2)
    except Stopped as stop:
        if (line := lost_process()) is not None:
            _fail([line], EnvironmentFault.exit_code)
        _fail([str(stop)], stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(["stopped by the user"], EXIT_INTERRUPTED)
    except QloraKitError as error:
        if debug:
            click.echo(redacted(traceback.format_exc()), err=True)
        _fail(error.faults, error.exit_code)
    except MemoryError:
        _fail(["out of host memory; close other programs or choose a smaller model"], 3)
    except Exception as error:
        if debug:
            click.echo(redacted(traceback.format_exc()), err=True)
        _fail([_internal(error)], 3 if _looks_out_of_memory(error) else 1)
    except BaseException as error:
        # A panic of the tokenizers library, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        _fail([_internal(error)], 1)
    sys.exit(0)


def _looks_out_of_memory(error: BaseException) -> bool:
    # Told by name and text: these are errors of torch, which may not have been imported.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _internal(error: BaseException) -> str:
    if _looks_out_of_memory(error):
        return (
            "out of memory; try --batch-size 1, a smaller --max-length or --rank, or fewer --bits"
        )
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else "no message"
    return (
        f"internal error: {type(error).__name__}: {reason}; this is a defect of qlora-kit; run "
        "again with --debug and report it"
    )


def _fail(faults: object, code: int) -> None:
    """Say once, however many processes fail, what is wrong, and exit."""
    if is_by_devices():
        # A launcher asks the others to end when one has, which is no other reason.
        disregard_signals()
    if speaks():
        for fault in faults:  # type: ignore[attr-defined]
            click.echo(f"error: {one_line(str(fault))}", err=True)
    leave()
    sys.exit(code)
