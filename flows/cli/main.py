"""`stackwise`: the table of commands, the parser and the exit codes.

Only the module of the chosen command is imported, so that `stackwise --help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import traceback
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple, NoReturn

from flows.network import bypass_proxy
from flows.run.say import complain, wrapped
from stackwise_core.errors import StackWiseError, shown, why_no_memory
from stackwise_core.files import why_full


class Command(NamedTuple):
    """A row of the table; `add_NAME` of the module adds the arguments and sets what runs."""

    summary: str
    example: str = ""
    """Arguments of the example in the help."""
    module: str = ""
    """Module in this folder; by default named as the command."""


_COMMANDS = {
    "train": Command(
        "grow the rack of a configuration to its target",
        "configs/quickstart.yaml --set training.progressive.target_stacks=4",
    ),
    "plan": Command("show what would run, what it costs and which artifacts exist", "configs/quickstart.yaml --json"),
    "config": Command(
        "print every key with its default and description, or what a file changes",
        "--diff configs/quickstart.yaml",
    ),
    "compare": Command(
        "compare a configuration with other ways to spend its FLOPs",
        "configs/quickstart.yaml --arms full,jump --seeds 3",
    ),
    "join": Command("train as a further node of runs with hardware.nodes above 1", "--artifacts /mnt/shared/artifacts"),
    "status": Command("show the runs, or the stages and artifacts of one run", "quickstart"),
    "report": Command("show what came of a run, or of several side by side", "quickstart --html quickstart.html"),
    "track": Command("send the curves of a trained run to a tracker of experiments", "quickstart --to tensorboard"),
    "export": Command("write the rack of a run for transformers", "quickstart --to model --dtype bfloat16"),
    "import": Command("make a Hugging Face checkpoint a run, to grow on", "./SmolLM2-135M --name smol", "imports"),
    "inspect": Command("show one artifact: layout, provenance, statistics", "activations-1-3f2a --html store.html"),
    "generate": Command(
        "continue a text with a rack, of a run or in a folder", "quickstart --prompt 'def main' --temperature 0.8"
    ),
    "evaluate": Command("measure how well a rack, of a run or in a folder, predicts text", "quickstart --depth all"),
    "verify": Command("recompute every checksum, and sampled cache rows from tokens", "quickstart"),
    "gc": Command("remove unreachable artifacts and leftovers of killed processes", "--dry-run"),
    "du": Command("show which runs use how much disk space", "--json"),
    "why": Command(
        "explain why an artifact id differs from the most similar one",
        "stack-1-3f2a configs/quickstart.yaml --set training.batch_size=8",
    ),
    "push": Command("copy artifacts and runs to another folder", "/mnt/shared/artifacts quickstart", "push_pull"),
    "pull": Command("copy artifacts and runs from another folder", "/mnt/shared/artifacts stack-1-3f2a", "push_pull"),
    "quarantine": Command("list, release or delete stores that failed validation", "--release activations-1-3f2a"),
    "doctor": Command("check what works on this machine"),
    "server": Command("run Prefect's server and its web pages", "--port 4200", "services"),
    "worker": Command(
        "register the deployments and execute their runs",
        "--limit 2, then: prefect deployment run train-rack/quickstart",
        "services",
    ),
    "notify": Command("post a line to an address when a run fails", "https://example.com/hook --done", "services"),
    "heartbeat": Command("let Prefect mark the runs of dead machines as crashed", module="services"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 a stage failed; 2 the command or the configuration is wrong; 3 an artifact is missing,
        unsealed or corrupt.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        bypass_proxy()
        return options.run(options) or 0
    except StackWiseError as error:
        complain(*f"stackwise: {error}".split("\n"))
        return error.exit_code
    except KeyboardInterrupt:
        complain("stackwise: interrupted; run the same command to continue")
        return 1
    except BrokenPipeError:  # `stackwise status | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print what went wrong on this machine in one line; anything else is a bug, whose traceback helps to mend it."""
    if why := why_no_memory(error):
        remedy = "lower the sizes of the model or training.batch_size, or close other programs"
        complain(f"stackwise: {why}; {remedy}; sealed artifacts are kept")
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        complain(f"stackwise: {where}{why_full(error) or error.strerror or error}; sealed artifacts are kept")
    else:
        complain(*"".join(traceback.format_exception(error)).splitlines())
        complain("stackwise: an unexpected error, please report it; sealed artifacts are kept")
    return 1


class _Parser(argparse.ArgumentParser):
    """A parser whose errors repeat the arguments as `say` prints them."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; exits with 2 where it is wrong."""
    formatter, width = argparse.RawDescriptionHelpFormatter, shutil.get_terminal_size().columns
    about = "Grow a deep transformer one stack at a time, on cached activations, resumable at every stage."
    parser = _Parser(
        prog="stackwise",
        description="\n".join(wrapped(about, width)),
        epilog="example: stackwise train configs/quickstart.yaml\n\n"
        "exit codes:\n"
        "  0  done\n"
        "  1  a stage failed or was stopped\n"
        "  2  the command or the configuration is wrong\n"
        "  3  an artifact is missing, unsealed or corrupt",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"stackwise {version('stackwise')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    if chosen not in _COMMANDS and (close := difflib.get_close_matches(chosen, _COMMANDS, n=1)):
        parser.error(f"there is no command {chosen!r}; did you mean {close[0]}?")
    subs = dict[str, argparse.ArgumentParser]()
    for name, (summary, example, module) in _COMMANDS.items():
        subs[name] = sub = commands.add_parser(
            name,
            help=summary,
            description="\n".join(wrapped(summary, width)),
            epilog=f"example: stackwise {name} {example}".rstrip(),
            formatter_class=formatter,
        )
        if name == chosen:
            getattr(import_module(f"flows.cli.{module or name}"), f"add_{name}")(sub)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # told with the usage of the command, which parse_args does not
        subs[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
