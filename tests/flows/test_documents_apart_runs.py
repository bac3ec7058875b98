"""Runs whose documents are kept apart: cached activations equal the live ones, and tokens need their end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stackwise_core.errors import CorpusError
from support.commands import Run
from support.runs import digests, grown, subset, tiny

GROWTH = "training.progressive"


def corpus(folder: Path) -> str:
    texts = ["the rack grows " * (n % 4 + 1) for n in range(120)]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(texts))
    )
    return f"{folder}/texts.jsonl"


@pytest.mark.parametrize(("objective", "dtype", "stacks"), [("clm", "int8", 3), ("mlm", "bfloat16", 2)])
def test_a_cache_holds_what_the_live_trunk_computes(objective: str, dtype: str, stacks: int, tmp_path: Path) -> None:
    changes = {
        "data.source": corpus(tmp_path),
        "data.documents": "separate",
        "data.seq_len": 64,
        "training.steps_per_stack": 2,
        f"{GROWTH}.target_stacks": stacks,
        "cache.dtype": dtype,
        "cache.views": 2,
        f"{GROWTH}.training_objective": objective,
        "validation.sampled_rows": 8,
    }
    found = list[dict[str, str]]()
    for cached in (True, False):
        root = tmp_path / f"cached-{cached}"
        grown(tiny(tmp_path, {**changes, f"{GROWTH}.cache_activations": cached}), root)  # compares sampled rows too
        sealed = digests(root)
        found.append({name: sealed[name] for name in subset(sealed, "stack")})
    assert found[0] == found[1]
    assert len(found[0]) == stacks


def test_evaluate_keeps_them_apart(tmp_path: Path, run: Run) -> None:
    changes = {"data.source": corpus(tmp_path), "data.seq_len": 64, f"{GROWTH}.target_stacks": 1}
    figures = dict[str, Any]()
    for how in ("concat", "separate"):
        grown(tiny(tmp_path, {**changes, "data.documents": how, "run.name": how}), tmp_path / "artifacts")
        root = ("--artifacts", str(tmp_path / "artifacts"))
        (figures[how],) = run("evaluate", how, "--data", changes["data.source"], "--json", *root).document["stages"]
    assert figures["separate"]["tokens"] < figures["concat"]["tokens"]  # the first token of each is not predicted


def test_tokens_without_end_tokens(tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "words.json"))
    np.ones(3000, dtype="<u2").tofile(tmp_path / "a.bin")
    changes = {"data.source": f"{tmp_path}/a.bin", "data.tokenizer": f"{tmp_path}/words.json"}
    with pytest.raises(CorpusError, match=r"the end token 2 of data\.tokenizer is not in it"):
        grown(tiny(tmp_path, {**changes, "data.documents": "separate"}), tmp_path / "artifacts")
