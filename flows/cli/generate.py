"""`stackwise generate`: text from a rack, on the terminal as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.cli.arguments import add_common
from flows.cli.opening import add_rack, objective_of, open_racks
from flows.run.say import complain, say, say_json
from stackwise_core.errors import ConfigError, Fault, shown

if TYPE_CHECKING:
    from flows.cli.opening import Opened
    from stackwise_core.data.tokenizer import Tokenizer
    from stackwise_core.generation.text import TextStream

_MOST_BYTES = 2**26
"""Of a prompt on stdin."""


class _Made(NamedTuple):
    """What was made from one prompt."""

    text: str
    tokens: list[int]
    reason: str


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add_common(parser, _run, json=True)
    add_rack(parser)
    help_text = "a text to continue; may be repeated; default: the text on stdin"
    parser.add_argument("--prompt", action="append", metavar="TEXT", help=help_text)
    help_text = "put the text as a message into the chat template of the tokenizer"
    parser.add_argument("--chat", action="store_true", help=help_text)
    help_text = "the rack as it was with K stacks; default: as far as it is trained"
    parser.add_argument("--depth", type=int, metavar="K", help=help_text)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most N new tokens (128)")
    help_text = "0 takes the most likely token (default), 1 draws from the rack's distribution"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=help_text)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    help_text = "go on past the length that the rack was trained on"
    parser.add_argument("--beyond-context", action="store_true", help=help_text)
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    help_text = "draw among the fewest most likely tokens that have the probability P together"
    parser.add_argument("--top-p", type=float, metavar="P", help=help_text)
    help_text = "draw among tokens of at least P times the highest probability"
    parser.add_argument("--min-p", type=float, metavar="P", help=help_text)
    help_text = "above 1, tokens that occurred become less likely"
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help=help_text)
    masked = parser.add_argument_group("for a run that was trained on masked tokens (mlm)")
    help_text = "which tokens come first: the surest by confidence (default), margin or entropy, or at random"
    masked.add_argument("--order", choices=("confidence", "margin", "entropy", "random"), help=help_text)
    help_text = "steps for each block; default: one a token or, where depth is time, one a stack"
    masked.add_argument("--steps", type=int, metavar="N", help=help_text)
    help_text = "fill in N tokens, then the next N; default: all together"
    masked.add_argument("--block-length", type=int, metavar="N", help=help_text)
    help_text = "follow the prompt more closely: move away by W from what is likely without it (0)"
    masked.add_argument("--guidance", type=float, metavar="W", help=help_text)


_CAUSAL = ("top_k", "top_p", "min_p", "repetition_penalty")
_MASKED = ("order", "steps", "block_length", "guidance")


def _run(options: argparse.Namespace) -> None:
    texts = _prompts(options.prompt)
    if options.max_new_tokens < 1:
        raise ConfigError([Fault("--max-new-tokens", repr(options.max_new_tokens), "1 or more")])
    (opened,) = open_racks(options, options.depth)
    objective = objective_of(opened)
    _refuse_unused(options, opened, objective)
    tokenizer = opened.tokenizer()
    prompts = [_encoded(options, opened, tokenizer, text) for text in texts]
    n_new = _room(options, prompts, opened.config.data.seq_len)
    made = (_continued if objective == "clm" else _filled_in)(options, opened, tokenizer, prompts, n_new)
    if options.json:
        say_json(_document(options, opened, texts, made, n_new))
    elif len(texts) > 1:
        for number, (text, each) in enumerate(zip(texts, made, strict=True)):
            say(*([""] if number else []), f"> {shown(text, 200)}")
            _show(f"{each.text}\n")
    if n_new < options.max_new_tokens and any(each.reason == "length" for each in made):
        context = opened.config.data.seq_len
        complain(f"ended at {context:,} tokens, the length that the rack was trained on; --beyond-context goes on")


def _refuse_unused(options: argparse.Namespace, opened: Opened, objective: str) -> None:
    """Refuse options of the other kind of run, before anything is loaded."""
    other, ((kind, name),) = _MASKED if objective == "clm" else _CAUSAL, opened.called.items()
    allowed = f"{kind} {name} was trained with {objective}, where it means nothing; leave it out"
    given = [name for name in other if getattr(options, name) is not None]
    if given:
        raise ConfigError(
            [Fault(f"--{name.replace('_', '-')}", repr(getattr(options, name)), allowed) for name in given]
        )


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _prompts(given: list[str] | None) -> list[str]:
    """Return the texts to continue; raises ConfigError if there are none, or a text is not UTF-8."""
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


def _encoded(options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a prompt, after those that an imported model expects; an empty one begins a document."""
    if options.chat:
        from stackwise_core.generation.chat import render_chat

        rendered = render_chat(opened.config.data.tokenizer, [{"role": "user", "content": text}])
        return tokenizer.encode_named(rendered.encode()).tolist()
    start = tokenizer.start_tokens if opened.is_imported else []
    if tokens := [*start, *tokenizer.encode(text.encode()).tolist()]:
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


def _continued(
    options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], n_new: int
) -> list[_Made]:
    """Return what follows each prompt; a single one is shown as it comes."""
    from stackwise_core.generation.generate import generate
    from stackwise_core.generation.sampling import Sampling
    from stackwise_core.generation.text import TextStream
    from stackwise_core.interop.tokenizer_json import end_tokens
    from stackwise_core.training.hardware import use_hardware

    sampling = Sampling(**_given(options, "temperature", "seed", *_CAUSAL))
    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts]
    alone = len(prompts) == 1 and not options.json
    rack = opened.rack(dense=True).to(use_hardware(opened.config.hardware))

    def on_token(row: int, token: int) -> bool:
        piece = streams[row].add(token)
        if alone:
            _show(piece)
        return streams[row].stopped

    ends = {*end_tokens(Path(opened.config.data.tokenizer)), *([] if (end := tokenizer.end_token) is None else [end])}
    found = generate(rack, prompts, n_new, sampling, end_tokens=ends, on_token=on_token)
    rest = [stream.finish() for stream in streams]
    if alone:
        _show(f"{rest[0]}\n")
    return [_Made(stream.text, each.tokens, each.reason) for stream, each in zip(streams, found, strict=True)]


def _filled_in(
    options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], n_new: int
) -> list[_Made]:
    """Return what a rack that was trained on masked tokens fills in after each prompt."""
    from stackwise_core.generation.text import TextStream
    from stackwise_core.generation.unmask import Unmasking, unmask
    from stackwise_core.training.hardware import use_hardware

    how = Unmasking(**_given(options, "temperature", "seed", *_MASKED))
    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts]
    denoisers = opened.denoisers(use_hardware(opened.config.hardware))
    assert tokenizer.mask_token is not None  # it was trained with one
    never = {tokenizer.pad_token, *range(tokenizer.vocab_size, opened.shape.vocab_size)}
    rows = [[*prompt, *[tokenizer.mask_token] * n_new] for prompt in prompts]
    filled = unmask(denoisers, rows, tokenizer.mask_token, how, sorted(never - {tokenizer.end_token}))
    made = [
        _cut(tokenizer, row[len(prompt) :], stream)
        for row, prompt, stream in zip(filled, prompts, streams, strict=True)
    ]
    if len(prompts) == 1 and not options.json:
        _show(f"{made[0].text}\n")
    return made


def _cut(tokenizer: Tokenizer, tokens: list[int], stream: TextStream) -> _Made:
    """Return a text up to its first end token or stop string."""
    kept = list[int]()
    for token in tokens:
        if token == tokenizer.end_token:
            stream.finish()
            return _Made(stream.text, kept, "end")
        kept.append(token)
        stream.add(token)
        if stream.stopped:
            return _Made(stream.text, kept, "stop")
    stream.finish()
    return _Made(stream.text, kept, "stop" if stream.stopped else "length")


def _document(
    options: argparse.Namespace, opened: Opened, texts: Sequence[str], made: Sequence[_Made], n_new: int
) -> dict[str, Any]:
    short, ids = n_new < options.max_new_tokens, opened.ids
    completions = [
        {
            "prompt": text,
            "text": each.text,
            "tokens": each.tokens,
            "reason": "context" if short and each.reason == "length" else each.reason,
        }
        for text, each in zip(texts, made, strict=True)
    ]
    said = {key: ids[key] for key in ("stage", "stack", "depth")}
    return {**opened.called, **said, "seed": options.seed, "completions": completions}


def _show(piece: str) -> None:
    """Write a piece of generated text; on a terminal what it would obey becomes visible, except line ends and tabs."""
    if sys.stdout.isatty():
        piece = shown(piece, max(1, len(piece)), keep="\n\t")
    sys.stdout.write(piece)
    sys.stdout.flush()
