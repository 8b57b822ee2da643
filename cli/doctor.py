"""`alpacache doctor`: which commands will work on this machine."""

from typing import Annotated

import typer

from . import options, output

FAILED = 1


def doctor(
    store: Annotated[
        str | None,
        typer.Option(help="Where the store is or will be. [default: the working directory]", callback=options.place),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or directory whose configs should be readable.", callback=options.place)
    ] = None,
    json: options.Json = False,
) -> None:
    """Check Python, packages, GPU, memory, disk and hub access in seconds. Exit code 1 if anything failed.

    Example: `alpacache doctor --store cache/train --model nvidia/Alpamayo-R1-10B`
    """
    from alpacache.checks.check import worst
    from alpacache.checks.machine import diagnose

    checks = diagnose(store=store, model=model)
    is_ok = worst(checks) != "fail"
    if json:
        output.print_json({"ok": is_ok, "checks": checks})
    else:
        rows = [[check.status, check.name, check.found] for check in checks]
        output.print_table("doctor", rows)
        steps = [[check.name, check.remedy] for check in checks if check.remedy]
        if steps:
            output.print_table("next", steps)
    if not is_ok:
        raise typer.Exit(FAILED)
