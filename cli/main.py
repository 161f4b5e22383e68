"""`shardwright`: the group of commands. Result on stdout, progress on stderr, one message and an exit status on failure.

Exit status: 0 done; 1 legal but does not fit, or a difference was found; 2 cannot be expressed or executed. Commands live in
one file each and are imported when called, so that `--help` starts at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import IO, Any

import click

from ..errors import ShardwrightError

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "demo": (".demo", "Plan, run and verify a small GPT on this machine."),
        "plan": (".plan", "Find the fastest plan that fits."),
        "run": (".run", "Run a plan."),
        "export": (".export", "Write a plan as a file that starts it elsewhere."),
        "check": (".check", "Show what capture finds in a model: problems, ops, regions."),
        "profile": (".profile", "Measure this machine, or recalibrate from past runs."),
        "report": (".report.command", "Write a plan as one HTML page."),
        "clusters": (".clusters", "Show the known devices, or all that is assumed of one."),
        "diff": (".diff", "Compare two plans."),
        "explain": (".explain", "Say what binds a plan, and what another choice would cost."),
        "simulate": (".simulate", "Play the step of a plan, or plan again over a grid of changes."),
    }
)
"""Command -> (module, one line of help). The module holds the command as `command`."""


class Refused(click.ClickException):
    """A ShardwrightError on its way to the user."""

    def __init__(self, error: ShardwrightError) -> None:
        super().__init__(str(error))
        vars(self)["exit_code"] = error.exit_status  # a class variable in click

    def show(self, file: IO[Any] | None = None) -> None:
        from .sheet import fitted_text

        click.echo(fitted_text(f"error: {self.format_message()}", sys.stderr), file=file, err=file is None)


class Commands(click.Group):
    """The commands, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0], __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShardwrightError as error:
            raise Refused(error) from error
        except KeyboardInterrupt:
            click.echo("shardwright: interrupted", err=True)
            ctx.exit(130)


def _version() -> str:
    from importlib.metadata import version

    return version("shardwright")


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"shardwright {_version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Plan, rewrite and run any PyTorch model on the machines you have."""


if __name__ == "__main__":
    main()
