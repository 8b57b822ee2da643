"""The `alpacache` command: one module a group of commands, errors turned into exit codes here.

Exit codes: 0 done; 1 failed; 2 bad usage or input, nothing touched; 3 done but samples were quarantined;
130 interrupted.
"""

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from cli import check, demo, doctor, evaluate, export, extract, plan, prepare, probe, store, train

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="alpacache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check")(check.check)
app.command("prepare")(prepare.prepare)
app.command("plan")(plan.plan)
app.command("extract")(extract.extract)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("probe")(probe.probe)
app.command("info")(store.info)
app.command("verify")(store.verify)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


@app.callback()
def alpacache(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of alpacache and its libraries.",
            is_eager=True,
            callback=lambda wanted: _print_versions() if wanted else None,
        ),
    ] = False,
) -> None:
    """Fine-tune the action expert of Alpamayo driving models on one 24 GB GPU.

    Stage one, **extract**, runs the frozen vision-language model once a sample (big GPU) and caches its KV.
    Stage two, **train**, trains expert and flow-matching head from that cache alone (small GPU).
    **eval** tells whether the straight-line bias is gone; **export** makes a complete checkpoint of the result.
    """


def _print_versions() -> None:
    """Ours first, then what a report of a problem should say; no library is imported for it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from alpacache import __version__

    lines = [f"alpacache {__version__}", f"python {platform.python_version()}"]
    for name in ("torch", "transformers", "zarr", "numcodecs", "safetensors", "numpy"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    typer.echo("\n".join(lines))
    raise typer.Exit


def main() -> None:
    """Run the command line; every error a user can meet ends as one message and an exit code."""
    from alpacache.errors import AlpacacheError, InterruptedRunError, LostProcessError, UsageError
    from cache_store import CacheStoreError, FormatError, IdentityMismatchError, StoreNotFoundError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except LostProcessError:
        raise SystemExit(FAILED) from None  # the one that failed has said why
    except InterruptedRunError as error:
        _fail(str(error), INTERRUPTED)
    except KeyboardInterrupt:
        _fail("interrupted; everything committed so far is kept.", INTERRUPTED)
    except (UsageError, IdentityMismatchError, StoreNotFoundError, FormatError) as error:
        _fail(str(error), BAD_INPUT)
    except (AlpacacheError, CacheStoreError) as error:
        _fail(str(error), FAILED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    """Say it once, however many processes torchrun has started; a failure that only one of them met is always said."""
    if code == INTERRUPTED and os.environ.get("RANK", "0") != "0":
        raise SystemExit(code)
    sys.stderr.write(f"alpacache: {message}\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
