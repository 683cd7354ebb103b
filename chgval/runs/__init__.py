"""One module per command: the wiring from settings to output."""
