"""`stackwise evaluate`: how well a rack predicts text, at every depth of a run: bits per byte, minimal pairs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.arguments import add_common
from flows.cli.opening import add_rack, objective_of, open_racks
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, plain_table
from stackwise_core.errors import ConfigError, Fault

if TYPE_CHECKING:
    import torch

    from flows.cli.opening import Opened
    from stackwise_core.data.masks import IntArray
    from stackwise_core.data.tokenizer import Tokenizer

_AT_ONCE = 4096
"""Tokens of a batch."""
_DRAWS = 8


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
    help_text = 'minimal pairs instead: a line {"good": TEXT, "bad": TEXT} each; how often good is more probable'
    parser.add_argument("--pairs", default="", metavar="FILE", help=help_text)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    from stackwise_core.training.hardware import use_hardware

    opened = open_racks(options, options.depth or None)
    objective = objective_of(opened[0])
    tokenizer, device = opened[0].tokenizer(), use_hardware(opened[0].config.hardware)
    judge = _judge_pairs if options.pairs else _judge_text
    stages = [{**each.ids, **judge(options, each, tokenizer, device)} for each in opened]
    source = options.pairs or options.data or "validation sequences of the run"
    document = {**opened[0].called, "data": source, "tokenizer": tokenizer.name, "stages": stages}
    document |= {} if options.pairs else {"bound": objective == "mlm"}
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


def _name(document: dict[str, Any]) -> str:
    return document.get("run") or document["folder"]


def _told(stage: dict[str, Any]) -> list[str]:
    """Return the cells that say which rack it is; a folder has no stage."""
    return ["-" if stage[key] is None else str(stage[key]) for key in ("stage", "how", "depth")]


# ---------------------------------------------------------------- text


def _judge_text(
    options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Any]:
    from stackwise_core.data.rows import in_batches
    from stackwise_core.generation.judging import TextOf, judge_masked, judge_next_tokens

    seq_len = options.seq_len or opened.config.data.seq_len
    size, text = max(1, _AT_ONCE // seq_len), TextOf(tokenizer)
    batches = in_batches(_rows(options, opened, tokenizer), size)
    if objective_of(opened) == "mlm":
        assert tokenizer.mask_token is not None  # it was trained with one
        found = judge_masked(opened.denoisers(device), batches, text, tokenizer.mask_token, options.draws)
    else:
        found = judge_next_tokens(opened.rack(dense=True).to(device), batches, text)
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
        rows = rows_of(options.data, tokenizer, seq_len, config.data.token_type)
    else:
        rows = opened.validation_rows()
    return itertools.islice(rows, most or None)


def _show_text(document: dict[str, Any]) -> None:
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


def _judge_pairs(
    options: argparse.Namespace, opened: Opened, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Any]:
    from stackwise_core.generation.judging import Pairs, masked_score, next_token_score

    config, n_right, n = opened.config, 0, 0
    masked = objective_of(opened) == "mlm"
    denoisers = opened.denoisers(device) if masked else []
    rack = None if masked else opened.rack(dense=True).to(device)
    for number, pair in _pairs(Path(options.pairs)):
        scores = list[float]()
        for text in pair:
            tokens = tokenizer.encode(text.encode()).astype("int64")
            if not 1 <= len(tokens) < config.data.seq_len:
                allowed = f"of 1 to {config.data.seq_len - 1:,} tokens, as the rack was trained on"
                raise ConfigError([Fault(f"{options.pairs}:{number}", f"a text of {len(tokens):,}", allowed)])
            if rack is None:
                assert tokenizer.mask_token is not None
                scores.append(masked_score(denoisers, tokens, tokenizer.mask_token))
            else:
                scores.append(next_token_score(rack, tokens, tokenizer.end_token))
        n, n_right = n + 1, n_right + (scores[0] > scores[1])
    if not n:
        raise ConfigError([Fault("--pairs", repr(options.pairs), "it has no line")])
    found = Pairs(n_right, n)
    return {"pairs": n, "right": n_right, "share": found.share, "interval": list(found.interval)}


def _pairs(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the pairs of a file with their line numbers; raises ConfigError at a line that is not a pair."""
    from stackwise_core.data.sources import parse_object

    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = parse_object(line)
                    good, bad = row.get("good"), row.get("bad")
                    if not (isinstance(good, str) and isinstance(bad, str)):
                        raise ValueError("has no texts `good` and `bad`")
                    yield number, (good, bad)
    except OSError as error:
        raise ConfigError([Fault("--pairs", repr(str(path)), f"it cannot be read ({error.strerror})")]) from None
    except ValueError as error:
        raise ConfigError([Fault("--pairs", f"{path}:{number}", f"{error}")]) from None


def _show_pairs(document: dict[str, Any]) -> None:
    table = plain_table("stage", "how", "|depth", "|right", "|of", "|share", "|95 % interval")
    for each in document["stages"]:
        low, high = each["interval"]
        counts = [str(each[key]) for key in ("right", "pairs")]
        table.add_row(*_told(each), *counts, f"{each['share']:.1%}", f"{low:.1%} to {high:.1%}")
    say(f"{_name(document)} on {document['data']}: the good text of a pair is the more probable one")
    plain_console().print(table)
