"""The command `stackwise`: each command parses, calls, prints."""
