"""How the command line works: options that are made late, errors as messages, exit codes."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..data.errors import ConfigError, VpdError
from .plugins import load_plugins
from .signals import Stopped

if TYPE_CHECKING:
    from .config import VpdConfig

DEBUG = "vpd.debug"
"""Key of the context's `meta` that is set where `--debug` was given."""
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG}
"""Errors of the machine, such as a full disk; any other OSError is an error of the program."""


class LazyCommand(click.Command):
    """A command some of whose options are made when the command is first used.

    These options need the settings and the registries, whose import takes longer than `vpd --help` should.
    """

    def __init__(self, *args: Any, options: Callable[[], Sequence[click.Parameter]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._make_options = options

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        load_plugins()
        if self._make_options is not None:
            self.params = [*self.params, *self._make_options()]
            self._make_options = None
        return super().get_params(ctx)


class VpdGroup(click.Group):
    """The `vpd` command. A subcommand returns its exit code, or None for 0.

    An error that a user can act on is printed as one paragraph. Its exit code is 2 for settings and 1 for the rest.
    """

    command_class = LazyCommand

    def invoke(self, ctx: click.Context) -> NoReturn:
        try:
            code = super().invoke(ctx)
        except VpdError as error:
            if DEBUG in ctx.meta:
                raise
            click.echo(f"vpd: error: {error}", err=True)
            code = 2 if isinstance(error, ConfigError) else 1
        except OSError as error:
            if DEBUG in ctx.meta or error.errno not in MACHINE_ERRORS:
                raise
            where = error.filename or "a file (--debug shows which)"
            click.echo(f"vpd: error: {where}: {error.strerror}. Repair that, or choose another place.", err=True)
            code = 1
        except SystemExit as error:
            if DEBUG in ctx.meta:
                raise
            click.echo(
                f"vpd: error: code outside vpd, such as that of the target or of a plugin, ended the program "
                f"(SystemExit {error.code}). --debug shows which.",
                err=True,
            )
            code = 1
        except Stopped as stopped:
            code = stopped.exit_code
        except KeyboardInterrupt:
            click.echo("vpd: interrupted; what was committed is kept, the same command continues.", err=True)
            code = Stopped(signal.SIGINT).exit_code
        ctx.exit(code or 0)


def settings(*sections: str, read: Collection[str] | None = None) -> list[click.Parameter]:
    """One option per field of these sections of the settings.

    Args:
        read: fields of the section `read` that get an option too.
    """
    from .config import VpdConfig
    from .options import section_options

    wanted = dict.fromkeys(sections) | ({} if read is None else {"read": read})
    defaults = VpdConfig()
    return [
        option for name, only in wanted.items() for option in section_options(type(getattr(defaults, name)), name, only)
    ]


def codecs() -> list[click.Parameter]:
    """The option `--codec`, whose choices are the registered codecs."""
    from ..data.cache.codecs import CODECS

    return [
        click.Option(["--codec"], required=True, type=click.Choice([*CODECS]), help="How the states of OUT are stored.")
    ]


def forms() -> list[click.Parameter]:
    """The option `--format`, whose choices are the forms of an exported drafter."""
    from ..stages.export.forms import FORMS

    text = "dflash = what vLLM and SGLang load; speculators = what that library and vLLM load."
    return [
        click.Option(["--format", "form"], type=click.Choice([*FORMS]), default="dflash", show_default=True, help=text)
    ]


def resolve(
    source: str | None, assignments: Sequence[str], flags: dict[str, Any], drafter_config: Path | None = None
) -> VpdConfig:
    """The settings of a command.

    A later one of these wins over an earlier one: defaults, recipe, a drafter's config.json, `--set`, flags.
    """
    from .config import from_drafter_json, load_config, parse_assignment
    from .options import collect_overrides

    below = {} if drafter_config is None else from_drafter_json(drafter_config)
    return load_config(source, below | dict(map(parse_assignment, assignments)) | collect_overrides(flags))


def remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True
