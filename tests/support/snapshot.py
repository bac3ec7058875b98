"""What StackWise does, as one JSON document: a small run of every way to grow, and what the commands say of it.

`tests/project/test_snapshot.py` compares it with `tests/fixtures/snapshot.json`, so that moving code about cannot
change what the code does unseen. Where a change is meant, write the fixture anew, and read its diff before it is
committed:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python -m support.snapshot --write
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

# All that is imported of what is tested: whoever moves these adapts this place alone.
from flows.cli.main import main
from flows.run.events import subscribed
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StackWiseError
from stackwise_core.stages.plan import RunPlan
from storage.manifest import fingerprint
from support.records import change

FIXTURE = Path(__file__).parents[1] / "fixtures" / "snapshot.json"

# ---------------------------------------------------------------- the runs

_WORDS = "the of stack trunk frozen layer boundary token grows each one then keeps rack under noise"
G = "training.progressive."

BASE: dict[str, Any] = {
    "run": {"name": "tiny"},
    "data": {"source": "corpus.txt", "seq_len": 16, "max_sequences": 16, "sample": "first", "validation_fraction": 0.1},
    "model": {"d_model": 16, "n_heads": 2, "d_ff": 32, "blocks_per_stack": 1},
    "training": {
        "batch_size": 4,
        "steps_per_stack": 6,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "progressive": {"training_objective": "clm", "target_stacks": 2},
    },
    "hardware": {"threads": 1, "device": "cpu"},
    "validation": {"max_sequences": 8, "sampled_rows": 16},
}
"""Two stacks of one block; 16 sequences in batches of 4, so that 6 steps are an epoch and a half."""

THREE = {f"{G}target_stacks": 3}
MLM = {f"{G}training_objective": "mlm"}
PREPEND = {f"{G}building_mode": "prepend"}
ADAPTED = {f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True, f"{G}qlora_rank": 4}
NF4 = {f"{G}new_stack_precision": "qlora", f"{G}qlora_rank": 4}
DUAL = {f"{G}progressive_qlora": True, f"{G}progressive_qlora_rank": 2}
DEPTH = {**MLM, f"{G}time_interpretation": "depth"}
INPUT = {**MLM, f"{G}time_interpretation": "input", f"{G}num_time_steps": 10}

FAMILIES: dict[str, dict[str, Any]] = {
    "append clm": {**THREE, "cache.keep": "all"},
    "append mlm": {**MLM, **THREE},
    "prepend": PREPEND,
    "mixed": {
        f"{G}stacks": [{}, {"mode": "prepend", "n_blocks": 2, "steps": 4}, {"precision": "bfloat16"}],
        **THREE,
    },
    "qlora trunk": {**ADAPTED, **MLM},
    "qlora top": {**ADAPTED, **THREE, f"{G}trunk_trainable_top": 1},
    "full trunk": {f"{G}trunk_strategy": "full"},
    "half": {f"{G}new_stack_precision": "half"},
    "bfloat16 prepend": {**PREPEND, f"{G}new_stack_precision": "bfloat16"},
    "nvfp4": {f"{G}new_stack_precision": "nvfp4"},
    "nf4": NF4,
    "nf4 dual, ranks that grow": {
        **NF4,
        **DUAL,
        **THREE,
        f"{G}trunk_strategy": "qlora",
        f"{G}trunk_trainable_top": 1,
        f"{G}qlora_strategy": "progressive",
        f"{G}qlora_rank_pattern": "linear",
        f"{G}qlora_alpha_pattern": "increasing",
    },
    "ranks by stack": {
        **DUAL,
        f"{G}trunk_strategy": "qlora",
        f"{G}qlora_enabled": True,
        f"{G}qlora_strategy": "variable",
        f"{G}qlora_configs": {0: {"rank": 2, "alpha": 4.0}, 1: {"rank": 3, "alpha": 5.0}},
    },
    "depth linear": {**DEPTH, **PREPEND, f"{G}time_per_stack": 2},
    "depth exponential": {**DEPTH, f"{G}stack_time_mapping": "exponential", f"{G}num_time_steps": 100},
    "depth custom": {**DEPTH, f"{G}stack_time_mapping": "custom", f"{G}time_mapping": [0, 3], "cache.views": 2},
    "depth joint": {**DEPTH, "training.joint_steps": 3},
    "input per batch": INPUT,
    "input per sequence": {**INPUT, "training.time_sampling": "per_sequence", f"{G}time_encoding_type": "learned"},
    "elbo": {
        **INPUT,
        "training.time_sampling": "stratified",
        "training.loss_weighting": "elbo",
        "training.corruption": "mask",
        f"{G}time_embedding_dim": 8,
    },
    "custom": {f"{G}training_objective": "custom", "data.source": "examples.jsonl", "model.attention": "bidirectional"},
    "joint anneal": {"training.joint_steps": 3},
    "end to end": {f"{G}enabled": False},
    "cache float32": {"cache.dtype": "float32"},
    "cache int8": {**MLM, **THREE, "cache.dtype": "int8", "cache.keep": "all"},
    "cache fp8": {"cache.dtype": "fp8"},
    "no cache": {f"{G}cache_activations": False},
    "blocks of the order": {"training.shuffle_block": 3, "run.seed": 7},
    "accumulation": {"training.accumulation_steps": 2, "training.new_stack_init": "random"},
}

SLOW = {
    *("qlora top", "half", "bfloat16 prepend", "nf4", "ranks by stack", "depth exponential", "depth custom"),
    *("depth joint", "input per batch", "input per sequence", "cache float32", "no cache", "blocks of the order"),
    *("cache fp8", "accumulation"),
}
"""Families that `make test-slow` compares: each has a near relation among the others."""


def write_inputs(folder: Path) -> None:
    """Write the corpora of all runs, from a seed: some kilobytes of words, and examples with targets."""
    draw = random.Random(0)
    (folder / "corpus.txt").write_text(" ".join(draw.choice(_WORDS.split()) for _ in range(400)))
    with (folder / "examples.jsonl").open("w") as file:
        for _ in range(40):
            line = " ".join(draw.choice(_WORDS.split()).title() for _ in range(4))[: draw.randint(8, 16)]
            targets = list(line.encode())
            masks = [character.isalpha() for character in line]
            file.write(
                json.dumps({"input_ids": list(line.lower().encode()), "targets": targets, "masks": masks}) + "\n"
            )


def write_config(path: Path, changes: dict[str, Any]) -> Path:
    """Write the configuration of a run; changes are dotted keys."""
    values = json.loads(json.dumps(BASE))
    for key, value in changes.items():
        *sections, last = key.split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    path.write_text(yaml.safe_dump(values))
    return path


@contextlib.contextmanager
def at_home() -> Generator[Path]:
    """Work in a temporary folder with the corpora in it: paths in records and in messages are then relative."""
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        here = Path.cwd()
        write_inputs(here)
        yield here


def of_family(name: str) -> dict[str, Any]:
    """Grow one run and collect all there is to know of it."""
    with at_home() as here:
        path = write_config(here / "config.yaml", FAMILIES[name])
        found: dict[str, Any] = {"plan": command("plan", path.name, "--json")}
        found["told"] = told_by(path)
        found["told again"] = told_by(path)
        found["plan after"] = summary_of_plan(command("plan", path.name, "--json"))
        found |= of_artifacts(here / "artifacts")
        for key, words in {
            "status RUN": ["status", "tiny"],
            "status": ["status"],
            "du": ["du"],
            "why": ["why", newest(found, "stack")],
            "gc": ["gc", "--dry-run"],
            "quarantine": ["quarantine"],
            "inspect stack": ["inspect", newest(found, "stack")],
            "inspect store": ["inspect", newest(found, "activations")],
        }.items():
            if words[-1]:
                found[key] = command(*words, "--json")
        # The configuration first: where a default changed, it is the difference that explains the others.
        return normal({"records": found.pop("records"), **found}, here)


def newest(found: dict[str, Any], kind: str) -> str:
    """Return the name of the last artifact of a kind, or ''."""
    return max((name for name in found["ids"] if name.startswith(f"{kind}-")), default="")


def told_by(config: Path, **how: Any) -> list[Any]:
    """Grow by plain calls and return what was told, without what manifests say too."""
    events: list[Any] = []
    # Without times and memory, whose digits would change the sizes of files.
    with subscribed(events.append), patch("stackwise_core.training.training._clocked", return_value={}):
        try:
            grow(StackWiseConfig.from_yaml(config), "artifacts", **how)
        except StackWiseError as error:
            events.append(error)
    lines = [[type(event).__name__, *_content(event)] for event in events if not getattr(event, "computed", 0)]
    return [line for line in lines if line[0] not in ("StepTaken", "StageDone", "StagesPriced", "Judged")]


def _content(event: Any) -> list[Any]:
    if isinstance(event, StackWiseError):
        return [event.exit_code, str(event)]
    return [value for name, value in vars(event).items() if name != "computed"]  # said by time, not by work


def summary_of_plan(result: dict[str, Any]) -> Any:
    """Return what a plan says otherwise once all is made."""
    document = result["json"]
    return [document["complete"], [[stage["states"], stage["to_run"]] for stage in document["stages"]]]


def of_artifacts(root: Path) -> dict[str, Any]:
    """Return ids, manifests, losses of steps and records of runs."""
    manifests: dict[str, dict[str, Any]] = {}
    ids: dict[str, str] = {}
    steps: dict[str, list[Any]] = {}
    for path in sorted(root.glob("*/*/manifest.json")):
        name, manifest = path.parent.name, json.loads(path.read_text())
        ids[name] = "id:" + manifest["ref"]["sha256"]
        manifests[name] = manifest
        if (metrics := path.parent / "metrics.jsonl").exists():
            steps[name] = [list(json.loads(line).values()) for line in metrics.read_text().splitlines()]
    attempts = sorted(root.glob("runs/*/attempts/*"))
    records = {f"{path.parent.parent.name} {path.name}": record_of(path) for path in attempts}
    return {"ids": ids, "manifests": manifests, "steps": steps, "records": records}


def record_of(attempt: Path) -> dict[str, Any]:
    """Return the record of one start of a run, its plan as a hash: the recipes of manifests say the same.

    What is at its default is left out, so that a new key changes nothing here.
    """
    start, plan, outcome = (json.loads((attempt / f"{name}.json").read_text()) for name in ("start", "plan", "outcome"))
    config = StackWiseConfig.from_yaml(attempt / "config.yaml").model_dump(mode="json", exclude_defaults=True)
    plan = RunPlan.model_validate(plan).model_dump(mode="json", exclude_defaults=True)
    assert start.pop("files").keys() == {"config.yaml", "plan.json"}  # their checksums; what they say is below
    names = sorted(path.name for path in attempt.iterdir())
    return {"files": names, "start": start, "plan": sha256(plan), "outcome": outcome, "config": config}


# ---------------------------------------------------------------- the commands


def command(*words: str) -> dict[str, Any]:
    """Run a command in this process and return what it did; JSON is read."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main(list(words))
        except SystemExit as stopped:  # argparse
            code = stopped.code
    result: dict[str, Any] = {"exit": code}
    if "--json" in words and out.getvalue():
        result["json"] = json.loads(out.getvalue())
    elif out.getvalue():
        result["out"] = out.getvalue().splitlines()
    if err.getvalue():
        result["err"] = err.getvalue().splitlines()
    return result


WRONG: tuple[str, ...] = (
    "",
    "grow",
    "status nobody",
    "status nobody --json",
    "status --artifacts nowhere",
    "status --artifacts ftp://nowhere/x",
    "inspect stack-9",
    "inspect stack-",
    "inspect data --html page.html",
    "inspect stack-1 --rows 3",
    "inspect activations-0 --rows 0 --json",
    "inspect activations-0 --against stack-0",
    "why stack-9",
    "why stack-",
    "why stack-9 config.yaml",
    "plan missing.yaml",
    "plan wrong.yaml",
    "plan wrong.yaml --json",
    "plan broken.yaml",
    "plan config.yaml --set training.batch_size",
    "plan config.yaml --set training.batchsize=3",
    "plan config.yaml --set data.source=missing.txt",
    "plan config.yaml --set training.mask_ratio=0.3",
    "train config.yaml --from-stack=-5",
    "train config.yaml --from-stack=9",
    "train config.yaml --force everything",
    "train config.yaml --set hardware.device=tpu",
    "verify nobody",
    "gc --keep-last=-1",
    "gc --pin nobody",
    "gc --unpin nobody",
    "quarantine --drop nobody",
    "quarantine --release nobody",
    "quarantine --drop a --release b",
    "push nowhere nobody",
    "pull nowhere",
)
"""What cannot be done, in a folder with one run in it."""


def of_wrong_commands() -> dict[str, Any]:
    """Return exit codes and messages of commands that cannot be."""
    with at_home() as here:
        config = write_config(here / "config.yaml", {})
        write_config(
            here / "wrong.yaml", {"model.n_heads": 3, "training.steps": 1, "data.seq_len": "x", f"{G}target_stacks": 0}
        )
        (here / "broken.yaml").write_text("run: [")
        told_by(config)
        return normal({words: command(*words.split()) for words in WRONG}, here)


def of_housekeeping() -> dict[str, Any]:
    """Return what the commands say of a folder with several runs, before and after things are taken away."""
    found: dict[str, Any] = {}
    with at_home() as here:
        root = here / "artifacts"
        config = write_config(here / "config.yaml", {"cache.keep": "all"})
        other = write_config(here / "other.yaml", {"run.name": "other", "training.learning_rate": 0.01, **MLM})

        def say(words: str) -> None:
            found[f"{len(found)}. {words}"] = command(*words.split())

        def grow_again(path: Path, **how: Any) -> None:
            found[f"{len(found)}. grow {path.stem} {how or ''}".rstrip()] = told_by(path, **how)
            set_clock(root)

        say("plan config.yaml --no-probe")
        grow_again(config)
        grow_again(other)
        write_config(config, {"cache.keep": "all", **THREE})
        grow_again(config)
        grow_again(config, force="validate", from_stack=1)
        grow_again(config, from_stack=2)
        grow_again(config, force="everything")
        grow_again(config, from_stack=9)
        write_config(other, {"run.name": "other", "training.learning_rate": 0.02, **MLM})
        grow_again(other)
        for words in (
            "status --json",
            "status tiny --json",
            "du --json",
            "gc --dry-run --json",
            "gc --dry-run --json --superseded",
            "gc --dry-run --json --keep-last 1",
            "gc --pin stack-2",
            "gc --dry-run --json --keep-last 0",
            "du --json",
            "gc --unpin stack-2",
            "why stack-2 --json",
            "why stack-2 config.yaml --json --set data.seq_len=8 --set training.steps_per_stack=7",
            "why data",
            "inspect activations-1 --json --rows 8",
            "verify tiny",
            "push elsewhere tiny",
            "status --json --artifacts elsewhere",
        ):
            say(words)
        (store,) = root.glob("activations/activations-1-*")
        shutil.move(store, root / "quarantine" / store.name)
        (root / "quarantine" / store.name / "reason.txt").write_text("row 3 differs\n")
        for words in ("quarantine --json", "quarantine --release activations-1", "quarantine --json"):
            say(words)
        say("gc --json --superseded")
        say("verify")
        for damage in DAMAGES:
            found[damage.__name__.strip("_").replace("_", " ")] = of_damage(damage, root)
        return normal(found, here)


def set_clock(root: Path) -> None:
    """Date what was started since this was called last a second later than all before."""
    starts = {path: json.loads(path.read_text()) for path in root.glob("runs/*/attempts/*/start.json")}
    n_dated = sum(start["started"].startswith("2000") for start in starts.values())
    for path, start in starts.items():
        if not start["started"].startswith("2000"):
            change(path, started=f"2000-01-01T00:00:{n_dated:02}+00:00")


def of_damage(damage: Callable[[Path], None], root: Path) -> dict[str, Any]:
    """Return what is said of a damaged stack; it is put right again."""
    (folder,) = root.glob("stacks/stack-2-*")
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, Path(aside) / "kept")
        damage(folder)
        names = ("status tiny", "plan config.yaml", "inspect stack-2", "verify tiny", "gc --dry-run", "status")
        found: dict[str, Any] = {words: command(*words.split(), "--json") for words in names if "verify" not in words}
        found["verify"] = command("verify", "tiny")
        found["grow"] = told_by(Path("config.yaml"))
        shutil.rmtree(folder)
        shutil.copytree(Path(aside) / "kept", folder)
    return found


def _a_flipped_byte(folder: Path) -> None:
    data = bytearray((folder / "stack.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "stack.safetensors").write_bytes(data)


def _a_missing_file(folder: Path) -> None:
    (folder / "head.safetensors").unlink()


def _an_edited_fact(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"]["steps"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _a_newer_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))


def _a_manifest_that_is_none(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


DAMAGES = (_a_flipped_byte, _a_missing_file, _an_edited_fact, _a_newer_format, _a_manifest_that_is_none)

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "wrong commands": of_wrong_commands,
    "housekeeping": of_housekeeping,
    **{name: (lambda name=name: of_family(name)) for name in FAMILIES},
}
"""Everything that is compared, part by part."""

# ---------------------------------------------------------------- what differs from one day to the next

_VOLATILE = {
    *("created", "fingerprint", "seal", "seconds", "tokens_per_second", "cache_bytes_per_second"),
    *("started", "ended", "since", "pid", "host", "holder"),
}
_LONG = 24


def normal(value: Any, here: Path) -> Any:
    """Return a document without times, speeds, processes and machines; paths and hashes short, long lists hashed."""
    if isinstance(value, dict):
        kept = {str(key): normal(entry, here) for key, entry in value.items() if key not in _VOLATILE}
        return {_text(key, here): entry for key, entry in kept.items()}
    if isinstance(value, list | tuple):
        entries = [normal(entry, here) for entry in value]
        numbers = len(entries) > _LONG and all(isinstance(entry, int | float) for entry in entries)
        return {"length": len(entries), "checksum": sha256([*map(_rounded, entries)])[:16]} if numbers else entries
    return _text(value, here) if isinstance(value, str) else value


def _text(text: str, here: Path) -> str:
    if text.startswith("id:"):
        return text.removeprefix("id:")
    text = text.replace(str(here), "HERE")
    text = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", text)
    return re.sub(r"[\d,]+ tokens/s|[\d.]+ \wi?B/s", "SPEED", text)


def _rounded(number: float) -> str:
    """Return a number to four significant digits."""
    return f"{number:.3e}"


def sha256(document: Any) -> str:
    """Return the hash of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def made_on() -> dict[str, Any]:
    """Return what the bits of weights depend on beside the recipes."""
    whole = fingerprint(1, "cpu", compiled=False)
    return {key: whole[key] for key in ("torch", "cpu", "cpu_capability")}


# ---------------------------------------------------------------- comparing


def differences(expected: Any, found: Any, *, same_numerics: bool, path: tuple[str, ...] = ()) -> list[str]:
    """Return the places where two documents differ, as 'status RUN > json > stages: 2 in the fixture, 3 now'."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines: list[str] = []
        for key in [*expected, *(key for key in found if key not in expected)]:
            here = (*path, key)
            if key not in found or key not in expected:
                lines.append(f"{' > '.join(here)}: only {'in the fixture' if key in expected else 'now'}")
            else:
                lines += differences(expected[key], found[key], same_numerics=same_numerics, path=here)
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [
            line
            for n, (one, other) in pairs
            for line in differences(one, other, same_numerics=same_numerics, path=(*path, str(n)))
        ]
    if _equal(expected, found, path, same_numerics=same_numerics):
        return []
    return [f"{' > '.join(path)}: {expected!r} in the fixture, {found!r} now"]


_BITS = ("digest", "checksum", "initial_tensors")
"""Keys of what depends on every bit of computed numbers."""
_NAME = re.compile(r"(data|build|trunk|stack|activations|validation)-[\w-]+")
_BITS_IN_TEXT = re.compile(r"sha256:[0-9a-f]+|\s*[\d.]+ \w*B\b")
_BYTES = re.compile(r"(\d+\. )?(du|gc|quarantine)\b")


def _equal(one: Any, other: Any, path: tuple[str, ...], *, same_numerics: bool) -> bool:
    if one == other and type(one) is type(other):
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, int) and any(map(_BYTES.match, path)):
        # Manifests tell times and speeds, in so many digits; records and locks name the process and its machine.
        # Records of runs hold every key of a configuration, also those that are new.
        return path[-1] == "other" or (min(one, other) > 0 and math.isclose(one, other, rel_tol=0.1, abs_tol=64))
    if same_numerics or "flops" in path[-1]:
        return False
    # Other kernels sum in another order. An instruction set less moved losses by 1e-6; what is rounded to four bits
    # moves further where a weight falls on the other side. A change of meaning in six steps is larger than a percent.
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=0.01, abs_tol=0.001)
    if isinstance(one, int):  # files hold numbers as text, and compressed ones
        return path[-1] in ("size", "cache_bytes") and math.isclose(one, other, rel_tol=0.05, abs_tol=8)
    if isinstance(one, str) and " " in one:
        return _BITS_IN_TEXT.sub("", one) == _BITS_IN_TEXT.sub("", other)
    names = [part for part in path if _NAME.fullmatch(part)]
    exact = names and names[-1].startswith(("data-", "trunk-")) and "inputs" not in path  # no kernel has a part in them
    return path[-1] in _BITS and not exact


def read_fixture() -> dict[str, Any]:
    """Return what was written."""
    return json.loads(FIXTURE.read_text())


def write_fixture() -> None:
    """Make the fixture anew: a line for each entry of a part, and what compares equal as it was.

    On a machine with other kernels than that which wrote it, only what means something else is written: so it stays
    true on both if that has no computed numbers.
    """
    os.environ["COLUMNS"] = "200"
    os.fsync = lambda fd: None  # only a power cut would tell
    before = read_fixture() if FIXTURE.exists() else {}
    where = before.get("made on", made_on())
    blocks = [f'"made on": {json.dumps(where)}']
    for name, part in PARTS.items():
        print(name, file=sys.stderr)
        old, lines = before.get(name, {}), list[str]()
        for key, entry in part().items():
            kept = _kept(old[key], entry, where == made_on(), (key,)) if key in old else entry
            lines.append(f" {json.dumps(key)}: {json.dumps(kept)}")
        blocks.append(json.dumps(name) + ": {\n" + ",\n".join(lines) + "\n}")
    FIXTURE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def _kept(old: Any, new: Any, same_numerics: bool, path: tuple[str, ...]) -> Any:
    """Return what was found, with what was written before wherever that compares equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _kept(old.get(key), new[key], same_numerics, (*path, key)) for key in new}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [_kept(one, other, same_numerics, (*path, str(n))) for n, (one, other) in pairs]
    return old if _equal(old, new, path, same_numerics=same_numerics) else new


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m support.snapshot --write")
    write_fixture()
