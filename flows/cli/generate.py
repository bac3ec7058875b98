"""`stackwise generate`: text from the rack of a run, on the terminal as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.cli.arguments import add_common
from flows.run.say import complain, say, say_json
from stackwise_core.errors import ConfigError, Fault, shown

if TYPE_CHECKING:
    from stackwise_core.data.tokenizer import Tokenizer
    from stackwise_core.generation.generate import Generated
    from stackwise_core.generation.sampling import Sampling
    from stackwise_core.model.rack import Rack
    from storage.racks import OpenedRun

_MOST_BYTES = 2**26
"""Of a prompt on stdin."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add_common(parser, _run, json=True)
    parser.add_argument("name", metavar="RUN", help="name of a run")
    help_text = "a text to continue; may be repeated; default: the text on stdin"
    parser.add_argument("--prompt", action="append", metavar="TEXT", help=help_text)
    help_text = "the rack as it was with K stacks; default: as far as it is trained"
    parser.add_argument("--depth", type=int, metavar="K", help=help_text)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most N new tokens (128)")
    help_text = "0 takes the most likely token (default), 1 draws from the rack's distribution"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=help_text)
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K most likely tokens")
    help_text = "draw among the fewest most likely tokens that have the probability P together"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=help_text)
    help_text = "draw among tokens of at least P times the highest probability"
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help=help_text)
    help_text = "above 1, tokens that occurred become less likely"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help=help_text)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    help_text = "go on past the length that the rack was trained on"
    parser.add_argument("--beyond-context", action="store_true", help=help_text)


def _run(options: argparse.Namespace) -> None:
    texts = _prompts(options.prompt)
    from stackwise_core.generation.sampling import Sampling
    from stackwise_core.training.hardware import use_hardware
    from storage.racks import open_run

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    opened = open_run(options.artifacts, options.name, options.depth)
    _check_objective(opened)
    tokenizer = opened.tokenizer()
    prompts = [_encoded(tokenizer, text) for text in texts]
    n_new = _room(options, prompts, opened.config.data.seq_len)
    rack = opened.rack(dense=True).to(use_hardware(opened.config.hardware))
    _continue(options, opened, rack, tokenizer, texts, prompts, n_new, sampling)


def _prompts(given: list[str] | None) -> list[str]:
    """Return the texts to continue; raises ConfigError if there is none, or one is not UTF-8."""
    if given is not None:
        return [_text(text.encode(errors="surrogateescape"), "--prompt") for text in given]
    if sys.stdin.isatty():
        raise ConfigError([Fault("--prompt", "nothing", "give a text to continue, or one on stdin")])
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ConfigError([Fault("stdin", f"more than {_MOST_BYTES:,} bytes", "give a shorter text")])
    return [_text(data, "stdin")]


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        received = f"{len(data):,} bytes that are not UTF-8 (byte {error.start})"
        raise ConfigError([Fault(where, received, "give text in UTF-8")]) from None


def _check_objective(opened: OpenedRun) -> None:
    """Refuse a run that has not learned what comes next."""
    objective = opened.config.training.progressive.training_objective
    if objective != "clm":
        allowed = f"run {opened.attempt.name} was trained with {objective}; only clm learns what comes next"
        raise ConfigError([Fault("RUN", repr(opened.attempt.name), allowed)])


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a prompt; an empty one begins a document, after the end token."""
    if tokens := tokenizer.encode(text.encode()).tolist():
        return tokens
    if tokenizer.end_token is None:
        allowed = "its tokenizer has no end token to begin a text with; give one character or more"
        raise ConfigError([Fault("--prompt", "no text", allowed)])
    return [tokenizer.end_token]


def _room(options: argparse.Namespace, prompts: list[list[int]], context: int) -> int:
    """Return how many new tokens there is room for; raises ConfigError if a prompt fills the context."""
    longest = max(map(len, prompts))
    if options.beyond_context or longest + options.max_new_tokens <= context:
        return options.max_new_tokens
    if longest >= context:
        allowed = f"the rack was trained on {context:,} tokens; shorten it, or go on with --beyond-context"
        raise ConfigError([Fault("--prompt", f"{longest:,} tokens", allowed)])
    return context - longest


def _continue(
    options: argparse.Namespace,
    opened: OpenedRun,
    rack: Rack,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    n_new: int,
    sampling: Sampling,
) -> None:
    from stackwise_core.generation.generate import generate
    from stackwise_core.generation.text import TextStream

    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts]
    alone = len(prompts) == 1 and not options.json

    def on_token(row: int, token: int) -> bool:
        piece = streams[row].add(token)
        if alone:
            _show(piece)
        return streams[row].stopped

    ends = () if tokenizer.end_token is None else (tokenizer.end_token,)
    found = generate(rack, prompts, n_new, sampling, end_tokens=ends, on_token=on_token)
    rest = [stream.finish() for stream in streams]
    if options.json:
        say_json(_document(options, opened, texts, streams, found, n_new))
    elif alone:
        _show(f"{rest[0]}\n")
    else:
        for number, (text, stream) in enumerate(zip(texts, streams, strict=True)):
            say(*([""] if number else []), f"> {shown(text, 200)}")
            _show(f"{stream.text}\n")
    if n_new < options.max_new_tokens and any(text.reason == "length" for text in found):
        context = opened.config.data.seq_len
        complain(f"ended at {context:,} tokens, the length that the rack was trained on; --beyond-context goes on")


def _document(
    options: argparse.Namespace,
    opened: OpenedRun,
    texts: Sequence[str],
    streams: Sequence[Any],
    found: Sequence[Generated],
    n_new: int,
) -> dict[str, Any]:
    stage = opened.stages[-1]
    short = n_new < options.max_new_tokens
    completions = [
        {
            "prompt": text,
            "text": stream.text,
            "tokens": each.tokens,
            "reason": "context" if short and each.reason == "length" else each.reason,
        }
        for text, stream, each in zip(texts, streams, found, strict=True)
    ]
    ids = {"run": opened.attempt.name, "stage": stage.index, "stack": stage.ref("stack").name}
    return {**ids, "depth": len(stage.spec.stacks), "seed": options.seed, "completions": completions}


def _show(piece: str) -> None:
    """Write a piece of generated text; on a terminal what it would obey becomes visible, except line ends and tabs."""
    if sys.stdout.isatty():
        piece = shown(piece, max(1, len(piece)), keep="\n\t")
    sys.stdout.write(piece)
    sys.stdout.flush()
