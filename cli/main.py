"""The `alpacache` command."""


def main() -> None:
    """Entry point; the commands arrive with the stages they run."""
    raise SystemExit("no command is built yet")
