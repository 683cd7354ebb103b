"""The command line: options to settings, results to text, errors to exit codes."""

from chgval.cli.commands import app, main

__all__ = ["app", "main"]
