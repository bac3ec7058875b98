"""Prefect's command line, as `python -m flows.program`, with our worker and one-line errors for refused settings."""

from __future__ import annotations

import sys
from importlib import import_module

from flows.run.say import complain
from flows.settings import SettingsError, load_prefect


def main() -> int:
    """Run the command line of Prefect with the arguments of this process; return 2 for a wrong setting."""
    try:
        load_prefect()
    except SettingsError as error:
        complain(*(f"stackwise: {line}" for line in str(error).splitlines()))
        return error.exit_code
    from prefect.cli import app

    import_module("flows.worker")  # registers itself
    app()
    return 0


if __name__ == "__main__":
    sys.exit(main())
