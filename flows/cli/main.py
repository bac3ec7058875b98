"""`stackwise`: the table of commands, the parser and the exit codes.

Only the module of the chosen command is imported, so that `stackwise --help` is quick.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

from stackwise_core.errors import StackWiseError


class Command(NamedTuple):
    """A row of the table; `add_NAME` of the module adds the arguments and sets what runs."""

    module: str
    summary: str
    example: str


_COMMANDS = {
    "train": Command(
        "train",
        "grow the rack of a configuration to its target",
        "train configs/quickstart.yaml --set training.progressive.target_stacks=4",
    ),
    "plan": Command(
        "plan",
        "show what would run, what it costs and which artifacts exist",
        "plan configs/quickstart.yaml --json",
    ),
    "status": Command("status", "show the runs, or the stages and artifacts of one run", "status quickstart"),
    "inspect": Command(
        "inspect",
        "show one artifact: layout, provenance, statistics",
        "inspect activations-1-3f2a --html store.html",
    ),
    "verify": Command(
        "verify",
        "recompute every checksum and recompute sampled cache rows from tokens",
        "verify quickstart",
    ),
    "gc": Command("gc", "remove unreachable artifacts and leftovers of killed processes", "gc --dry-run"),
    "du": Command("du", "show which runs use how much disk space", "du --json"),
    "why": Command(
        "why",
        "explain why an artifact id differs from the most similar one",
        "why stack-1-3f2a configs/quickstart.yaml --set training.batch_size=8",
    ),
    "push": Command(
        "push_pull",
        "copy artifacts and runs into another artifacts folder",
        "push /mnt/shared/artifacts quickstart",
    ),
    "pull": Command(
        "push_pull",
        "copy artifacts and runs from another artifacts folder",
        "pull /mnt/shared/artifacts stack-1-3f2a",
    ),
    "quarantine": Command(
        "quarantine",
        "list the stores that failed their validation, release or delete one",
        "quarantine --release activations-1-3f2a",
    ),
    "doctor": Command("doctor", "check what works on this machine", "doctor"),
    "server": Command("services", "run Prefect's server and its web pages", "server --port 4200"),
    "worker": Command(
        "services",
        "register the deployments and execute their runs",
        "worker, then: prefect deployment run train-rack/quickstart",
    ),
    "heartbeat": Command("services", "let Prefect mark the runs of dead machines as crashed", "heartbeat"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 a stage failed; 2 the command or the configuration is wrong; 3 an artifact is missing,
        unsealed or corrupt.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.run(options) or 0
    except StackWiseError as error:
        print(f"stackwise: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stackwise: interrupted; run the same command to continue", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `stackwise status | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"stackwise: {where}{error.strerror or error}; sealed artifacts are kept", file=sys.stderr)
        return 1
    except MemoryError:
        print("stackwise: not enough memory; lower the sizes of the model or training.batch_size", file=sys.stderr)
        return 1
    except Exception:  # a bug in StackWise: the traceback helps to fix it
        traceback.print_exc()
        print("stackwise: an unexpected error, please report it; sealed artifacts are kept", file=sys.stderr)
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; exits with 2 where it is wrong."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="stackwise",
        description="Grow a deep transformer one stack at a time, on cached activations, resumable at every stage.",
        epilog="example: stackwise train configs/quickstart.yaml\n\n"
        "exit codes: 0 done, 1 a stage failed, 2 the command or the configuration is wrong,\n"
        "            3 an artifact is missing, unsealed or corrupt",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"stackwise {version('stackwise')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name, (module, summary, example) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: stackwise {example}",
            formatter_class=formatter,
        )
        if name == chosen:
            getattr(import_module(f"flows.cli.{module}"), f"add_{name}")(sub)
    return parser.parse_args(arguments)
