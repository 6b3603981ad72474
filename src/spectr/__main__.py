"""``python -m spectr``."""

from spectr.cli import main

main()
