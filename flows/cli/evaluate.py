"""`stackwise evaluate`: how well a rack predicts text, at every depth of a run: bits per byte, minimal pairs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.arguments import add_common
from flows.cli.opening import add_rack, objective_of, open_racks
from flows.run.numbers import percent
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, plain_table
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.resolve import keeps_documents_apart

if TYPE_CHECKING:
    import torch

    from flows.cli.opening import Opened
    from stackwise_core.data.masks import IntArray
    from stackwise_core.data.tokenizer import Tokenizer
    from stackwise_core.generation.minimal_pairs import Pair

_AT_ONCE = 4096
"""Tokens of a batch."""
_DRAWS = 8
_SHIPPED = "the pairs of StackWise"

Found = dict[str, Any]
"""What a document says."""


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    add_common(parser, _run, json=True)
    add_rack(parser)
    help_text = "text to predict, as data.source names it; default: the run's own validation sequences"
    parser.add_argument("--data", default="", metavar="SOURCE", help=help_text)
    help_text = "the rack as it was with K stacks, or `all` for every depth; default: as far as it is trained"
    parser.add_argument("--depth", default="", metavar="K", help=help_text)
    help_text = "at most N sequences, 0 for all; default: validation.max_sequences of the run, 256 of a folder"
    parser.add_argument("--max-sequences", type=int, metavar="N", help=help_text)
    help_text = "read the text in sequences of N tokens; default: as many as the rack was trained on"
    parser.add_argument("--seq-len", type=int, metavar="N", help=help_text)
    help_text = f"masks that are drawn for each sequence of a run of mlm ({_DRAWS})"
    parser.add_argument("--draws", type=int, default=_DRAWS, metavar="N", help=help_text)
    help_text = "minimal pairs instead: how often the good one of two sentences is the more probable; without FILE "
    help_text += 'those of StackWise; a line of FILE is {"good": TEXT, "bad": TEXT}, perhaps with "phenomenon"'
    parser.add_argument("--pairs", nargs="?", const=_SHIPPED, default="", metavar="FILE", help=help_text)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    opened = open_racks(options, options.depth or None)
    from stackwise_core.training.hardware import use_hardware

    objective = objective_of(opened[0])
    tokenizer, device = opened[0].tokenizer(), use_hardware(opened[0].config.hardware)
    judge = _judge_pairs if options.pairs else _judge_text
    stages = [{**each.ids, **judge(options, each, tokenizer, device)} for each in opened]
    source = options.pairs or options.data or "validation sequences of the run"
    document = {**opened[0].called, "data": source, "tokenizer": tokenizer.name, "stages": stages}
    score = "pseudo-log-likelihood" if objective == "mlm" else "log probability"
    document |= {"score": score} if options.pairs else {"bound": objective == "mlm"}
    if options.json:
        say_json(document)
    else:
        (_show_pairs if options.pairs else _show_text)(document)


def _check(options: argparse.Namespace) -> None:
    most = options.max_sequences
    checks = (
        (options.depth not in ("", "all") and not options.depth.isdecimal(), "--depth", options.depth, "K or `all`"),
        (most is not None and most < 0, "--max-sequences", most, "0 takes all; else 1 or more"),
        (options.seq_len is not None and options.seq_len < 2, "--seq-len", options.seq_len, "2 or more"),
        (options.seq_len and not options.data, "--seq-len", options.seq_len, "it is for --data; leave it out"),
        (options.draws < 1, "--draws", options.draws, "1 or more"),
        (options.pairs and options.data, "--data", options.data, "with --pairs the texts are those; leave it out"),
    )
    faults = [Fault(option, repr(value), allowed) for wrong, option, value, allowed in checks if wrong]
    if faults:
        raise ConfigError(faults)


def _name(document: Found) -> str:
    return document.get("run") or document["folder"]


def _told(stage: Found) -> list[str]:
    """Return the cells that say which rack it is; a folder has no stage."""
    return ["-" if stage[key] is None else str(stage[key]) for key in ("stage", "how", "depth")]


# ---------------------------------------------------------------- text


def _judge_text(options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, device: torch.device) -> Found:
    from stackwise_core.data.rows import in_batches
    from stackwise_core.generation.judging import TextOf, judge_masked, judge_next_tokens

    seq_len = options.seq_len or opened.config.data.seq_len
    apart = tokenizer.end_token if keeps_documents_apart(opened.config) else None
    size, text = max(1, _AT_ONCE // seq_len), TextOf(tokenizer)
    batches = in_batches(_rows(options, opened, tokenizer), size)
    if objective_of(opened) == "mlm":
        assert tokenizer.mask_token is not None  # it was trained with one
        found = judge_masked(opened.denoisers(device), batches, text, tokenizer.mask_token, options.draws, apart)
    else:
        found = judge_next_tokens(opened.rack(dense=True).to(device), batches, text, apart)
    return {
        "bits_per_byte": found.bits_per_byte,
        "nats_per_token": found.nats_per_token,
        "nats_per_token_error": found.error,
        "perplexity_per_token": found.perplexity,
        "bytes_per_token": found.n_bytes / found.n_tokens,
        "sequences": found.n_sequences,
        "tokens": found.n_tokens,
        "bytes": found.n_bytes,
    }


def _rows(options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer) -> Iterator[IntArray]:
    """Yield the sequences to be judged, one at a time."""
    from stackwise_core.data.rows import rows_of

    config = opened.config
    most = config.validation.max_sequences if options.max_sequences is None else options.max_sequences
    if options.data:
        seq_len = options.seq_len or config.data.seq_len
        begin = keeps_documents_apart(config)
        rows = rows_of(options.data, tokenizer, seq_len, config.data.token_type, begin=begin)
    else:
        rows = opened.validation_rows()
    return itertools.islice(rows, most or None)


def _show_text(document: Found) -> None:
    stages = document["stages"]
    bound = document["bound"]
    below = "<= " if bound else ""
    table = plain_table("stage", "how", "|depth", "|bits/byte", "|nats/token", "|+-", "|ppl/token")
    for each in stages:
        bits, nats = (f"{below}{each[key]:.4f}" for key in ("bits_per_byte", "nats_per_token"))
        error = "-" if each["nats_per_token_error"] is None else f"{each['nats_per_token_error']:.4f}"
        perplexity = f"{below}{each['perplexity_per_token']:.2f}"
        table.add_row(*_told(each), bits, nats, error, perplexity)
    first = stages[0]
    size = f"{first['sequences']:,} sequences, {first['tokens']:,} tokens, {first['bytes']:,} bytes"
    say(f"{_name(document)} on {document['data']}: {size}")
    say(f"tokenizer {document['tokenizer']}, {first['bytes_per_token']:.2f} bytes per token; special ones do not count")
    if bound:
        say("upper bounds, estimated by masking a random number of tokens")
    plain_console().print(table)


# ---------------------------------------------------------------- minimal pairs


def _judge_pairs(options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, device: torch.device) -> Found:
    from stackwise_core.generation.minimal_pairs import Share, masked_score, next_token_scores, shares

    pairs = _pairs(options)
    texts = [_checked(opened, tokenizer, pair.where, text) for pair in pairs for text in (pair.good, pair.bad)]
    if objective_of(opened) == "mlm":
        assert tokenizer.mask_token is not None  # it was trained with one
        denoisers = opened.denoisers(device)
        scores = [masked_score(denoisers, tokens, tokenizer.mask_token) for tokens in texts]
    else:
        end = [] if tokenizer.end_token is None else [tokenizer.end_token]
        start = (opened.is_imported and tokenizer.start_tokens) or end
        scores = next_token_scores(opened.rack(dense=True).to(device), texts, start)
    right = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]

    def told(of: Share) -> Found:
        return {"pairs": of.n, "right": of.n_right, "share": of.share, "interval": list(of.interval)}

    by_phenomenon = shares((pair.phenomenon, is_right) for pair, is_right in zip(pairs, right, strict=True))
    listed = [{"phenomenon": name, **told(of)} for name, of in by_phenomenon.items()]
    return {**told(Share(sum(right), len(right))), "phenomena": listed}


def _pairs(options: argparse.Namespace) -> list[Pair]:
    from stackwise_core.generation.minimal_pairs import pairs_in, shipped_pairs

    pairs = list(shipped_pairs() if options.pairs == _SHIPPED else pairs_in(Path(options.pairs)))
    if not pairs:
        raise ConfigError([Fault("--pairs", repr(options.pairs), "it has no line")])
    return pairs


def _checked(opened: Opened, tokenizer: Tokenizer, where: str, text: str) -> IntArray:
    """Return the tokens of a text that is as long as the rack can read."""
    tokens, most = tokenizer.encode(text.encode()).astype("int64"), opened.config.data.seq_len - 1
    if not 1 <= len(tokens) <= most:
        allowed = f"of 1 to {most:,} tokens, as the rack was trained on"
        raise ConfigError([Fault(where, f"a text of {len(tokens):,}", allowed)])
    return tokens


def _show_pairs(document: Found) -> None:
    table = plain_table("stage", "how", "|depth", "|right", "|of", "|share", "|95 % interval")
    phenomena = plain_table("phenomenon", "|right", "|of", "|share", "|95 % interval")
    for each in document["stages"]:
        table.add_row(*_told(each), *_shares(each))
    for each in document["stages"][-1]["phenomena"]:
        phenomena.add_row(each["phenomenon"] or "-", *_shares(each))
    say(f"{_name(document)} on {document['data']}: the good text of a pair has the higher {document['score']}")
    plain_console().print(table)
    if len(document["stages"][-1]["phenomena"]) > 1:
        plain_console().print(phenomena)


def _shares(of: Found) -> list[str]:
    low, high = of["interval"]
    between = f"{100 * low:.1f} to {percent(high, '.1f')}"
    return [str(of["right"]), str(of["pairs"]), percent(of["share"], ".1f"), between]
