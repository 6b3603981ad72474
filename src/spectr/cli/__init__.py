"""The command line. Commands read arguments, call the library and print results."""


def main() -> None:
    """Run ``spectr``. A user's mistake ends with one clear message and exit code 2."""
    try:
        from spectr.cli.app import run

        run()
    except KeyboardInterrupt:  # pressed while Python was importing modules
        raise SystemExit(130) from None
