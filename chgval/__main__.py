"""Lets `python -m chgval` work."""

from chgval.cli import main

main()
