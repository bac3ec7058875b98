"""The command `stackwise`: one module per command, which parses, calls and prints."""
