"""``python -m veneer.cli``."""

from veneer.cli.main import main

main()
