"""The command line. Commands read their arguments, call the library, and show what it returns."""


def main() -> None:
    """Run ``spectr``; mistakes of the user end with one clear message and exit code 2."""
    from spectr.cli.app import run

    run()
