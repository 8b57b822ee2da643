"""The `alpacache` command. Each command is a module; errors become exit codes here.

Exit codes: 0 done; 1 failed; 2 bad usage or input, nothing touched; 3 done but samples were quarantined;
130 interrupted.
"""

import errno
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from alpacache.errors import UsageError
from alpacache.interrupt import heard_requests

from . import (
    check,
    codecs,
    convert,
    drive,
    evaluate,
    export,
    extract,
    options,
    output,
    plan,
    prepare,
    probe,
    store,
    train,
)
from .output import BAD_INPUT, FAILED, INTERRUPTED


class _Commands(TyperGroup):
    """The commands; a refused option is masked before it is folded to the terminal's width, which splits tokens."""

    def get_params(self, ctx: Any) -> list[Any]:
        return options.plain_switches(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(message := getattr(error, "message", None), str):  # click's own errors
                error.message = output.shown(message)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="alpacache",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, function in (
    ("check", check.check),
    ("convert", convert.convert),
    ("prepare", prepare.prepare),
    ("plan", plan.plan),
    ("codecs", codecs.codecs),
    ("extract", extract.extract),
    ("train", train.train),
    ("eval", evaluate.evaluate),
    ("export", export.export),
    ("drive", drive.drive),
    ("probe", probe.probe),
):
    app.command(name, cls=options.ConfigCommand)(function)
app.command("info", cls=options.Command)(store.info)
app.command("verify", cls=options.Command)(store.verify)
app.command("clean", cls=options.Command)(store.clean)
app.command("copy", cls=options.Command)(store.copy)
app.command("doctor", cls=options.Command)(check.doctor)
app.command("demo", cls=options.ConfigCommand)(evaluate.demo)


def _print_versions(wanted: bool) -> None:
    """Print our version, then what a bug report should say. No library is imported for it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from alpacache import __version__

    if not wanted:
        return
    typer.echo(f"alpacache {__version__}\npython {platform.python_version()}")
    for name in ("torch", "transformers", "zarr", "numcodecs", "safetensors", "numpy"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} not installed")
    raise typer.Exit


@app.callback()
def alpacache(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print versions of alpacache and its libraries.", is_eager=True, callback=_print_versions
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no notes; warnings and errors remain.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="All log messages, and the traceback of an error.")
    ] = False,
) -> None:
    """Fine-tune the action expert of Alpamayo driving models on one 24 GB GPU.

    Stage one, **extract**, runs the frozen vision-language model once per sample (big GPU) and caches its KV.
    Stage two, **train**, trains expert and flow-matching head from that cache alone (small GPU).
    **eval** tells whether the straight-line bias is gone; **export** makes a complete checkpoint of the result.

    `--quiet` and `--verbose` may stand behind the command too. `NO_COLOR=1` turns colours off.
    """
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other.")
    output.set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")


def main() -> None:
    """Run the command line; every error a user can meet ends as one message and an exit code."""
    output.guard_streams()
    for number in heard_requests():
        signal.signal(number, signal.default_int_handler)
    try:
        # The program's options may stand behind the command, where people put them.
        app(sorted(sys.argv[1:], key=lambda word: word not in ("--quiet", "--verbose")))
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        _leave_at_once("interrupted; everything committed so far is kept.")  # Typer's KeyboardInterrupt
    except Exception as error:
        _end_with(error)


_OS_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "See that you may read and write there"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "See that the place is there, and mounted"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (`ulimit -n`)"),
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Choose a path whose links do not lead in a ring",
    errno.EROFS: "Mount it writable",
    errno.EIO: "See to the disk",
}
_NO_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}
"""Reasons for which a path cannot be anything's: that it was given is bad usage."""


def _end_with(error: Exception) -> None:
    """Say what went wrong and exit; raise what is not meant for users. The stores' errors are imported only now."""
    from alpacache.errors import AlpacacheError, InterruptedRunError, LostProcessError, UsageError
    from cache_store import CacheStoreError, FormatError, IdentityMismatchError, StoreAddressError, StoreNotFoundError

    match error:
        case LostProcessError():
            raise SystemExit(FAILED) from None  # the one that failed has said why
        case InterruptedRunError():
            _fail(str(error), INTERRUPTED)
        case UsageError() | IdentityMismatchError() | StoreAddressError() | StoreNotFoundError() | FormatError():
            _fail(str(error), BAD_INPUT)
        case AlpacacheError() | CacheStoreError():
            _fail(str(error), FAILED)
        case OSError():
            what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            remedy = _OS_REMEDIES.get(error.errno or 0, "Mend what it names")
            if error.errno in _NO_NAMES:
                _fail(f"{what}. {remedy}.", BAD_INPUT)
            _fail(f"{what}. {remedy}, and run the same command again; what was committed is intact.", FAILED)
    output.say(traceback.format_exc().rstrip())  # a fault of the program
    raise SystemExit(FAILED) from error


def _leave_at_once(message: str) -> None:
    """Say it, and end as an interruption does, without waiting for threads that may be writing for minutes yet."""
    try:
        _fail(message, INTERRUPTED)
    finally:
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


def _fail(message: str, code: int) -> None:
    """Print a message and exit. Of torchrun's processes the first says an interruption, each says its own failure."""
    if code == INTERRUPTED:
        from alpacache.torchrun import this_process

        with suppress(UsageError):
            if this_process().rank > 0:
                raise SystemExit(code)
    if output.is_verbose():
        output.say(traceback.format_exc().rstrip())
    output.say(f"alpacache: {message}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
