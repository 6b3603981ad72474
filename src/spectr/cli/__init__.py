"""The command line. Commands read their arguments, call the library, and show what it returns."""


def main() -> None:
    """Run ``spectr``; mistakes of the user end with one clear message and exit code 2."""
    try:
        from spectr.cli.app import run

        run()
    except KeyboardInterrupt:  # while Python was still reading its modules
        raise SystemExit(130) from None
