"""`stackwise generate`: the rack of a run at any depth, texts on stdin and as arguments, what is refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from stackwise_core.config.stacks import mask_ratio_of, resolve_time_input, stack_time_step
from stackwise_core.generation.unmask import Denoiser, Unmasking, unmask
from stackwise_core.interop.families import FAMILIES
from storage.racks import load_rack, open_run
from support.checkpoints import saved_checkpoint
from support.commands import Run
from support.modes import G
from support.runs import grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]


def on_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@torch.no_grad()
def recomputed(root: Path, text: str, n_new: int, depth: int | None = None) -> list[int]:
    rack, tokens = load_rack(root, "tiny", depth), torch.tensor([list(text.encode())])
    for _ in range(n_new):
        tokens = torch.cat([tokens, rack(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[0, len(text) :].tolist()


def test_any_depth_continues_texts(reference: Reference, run: Run) -> None:
    root = reference()
    prompts = ("--prompt", "stack", "--prompt", "the trunk")
    for depth in (1, None):
        how = () if depth is None else ("--depth", depth)
        answer = run("generate", "tiny", "--artifacts", root, *prompts, "--max-new-tokens", 6, *how, "--json").document
        expected = [recomputed(root, text, 6, depth) for text in prompts[1::2]]
        assert [each["tokens"] for each in answer["completions"]] == expected
        assert [each["text"] for each in answer["completions"]] == [bytes(each).decode() for each in expected]
        assert {each["reason"] for each in answer["completions"]} == {"length"}
        assert (answer["run"], answer["depth"], answer["seed"]) == ("tiny", depth or 3, 0)
        assert (root / "stacks" / answer["stack"]).is_dir()
    assert answer["stage"] == 2


def test_text_from_stdin_goes_to_stdout(reference: Reference, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on_stdin(monkeypatch, b"stack")
    answer = run("generate", "tiny", "--artifacts", reference(), "--max-new-tokens", 6)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == bytes(recomputed(reference(), "stack", 6)).decode() + "\n"
    several = run(
        "generate", "tiny", "--artifacts", reference(), "--prompt", "a\n", "--prompt", "b", "--stop", "\u2028"
    )
    assert several.out.startswith("> a\\n\n")
    assert "\n\n> b\n" in several.out


def test_draws_are_those_of_their_seed(reference: Reference, run: Run) -> None:
    def drawn(seed: int, *prompts: str) -> list[str]:
        texts = [part for text in prompts for part in ("--prompt", text)]
        how = ("--temperature", 1.2, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 8)
        answer = run("generate", "tiny", "--artifacts", reference(), *texts, *how, "--json")
        return [each["tokens"] for each in answer.document["completions"]]

    assert drawn(7, "stack") == [drawn(7, "the", "stack")[1]] != drawn(8, "stack")


def test_where_texts_end(reference: Reference, run: Run) -> None:
    """tiny was trained on 16 tokens."""
    how = ("generate", "tiny", "--artifacts", reference(), "--prompt", "stack trunk")
    whole = run(*how, "--beyond-context", "--max-new-tokens", 12, "--json").document["completions"][0]
    assert (len(whole["tokens"]), whole["reason"]) == (12, "length")
    answer = run(*how, "--max-new-tokens", 12)
    assert answer.out == whole["text"][:5] + "\n"
    assert answer.err == "ended at 16 tokens, the length that the rack was trained on; --beyond-context goes on\n"
    stop = whole["text"][2:4]
    (ended,) = run(*how, "--max-new-tokens", 12, "--beyond-context", "--stop", stop, "--json").document["completions"]
    assert (ended["text"], ended["reason"]) == (whole["text"][: whole["text"].index(stop)], "stop")


def test_on_a_terminal_nothing_is_obeyed(reference: Reference, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import generate

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    generate._show("a\x1b[2J\n\tb\x07")  # pyright: ignore[reportPrivateUsage]
    assert screen.getvalue() == "a\\x1b[2J\n\tb\\x07"


@pytest.mark.parametrize(
    ("how", "stdin", "message"),
    [
        ((), b"a\xffb", r"stdin: got 3 bytes that are not UTF-8 \(byte 1\); give text in UTF-8"),
        (("--prompt", "a\udcff"), b"", r"--prompt: got 2 bytes that are not UTF-8 \(byte 1\)"),
        (
            ("--prompt", "x" * 16),
            b"",
            "--prompt: got 16 tokens; the rack was trained on 16 tokens; shorten it, or go on",
        ),
        (("--prompt", "x", "--depth", "9"), b"", "depth: got 9; the run tiny has racks of these depths: 1, 2, 3"),
        (("--prompt", "x", "--max-new-tokens", "0"), b"", "--max-new-tokens: got 0; 1 or more"),
        (("--prompt", "x", "--stop", ""), b"", "stop: got ''"),
        (("--prompt", "x", "--chat"), b"", "--chat: got 'byte'; its tokenizer has no chat template"),
        (("--prompt", "x", "--top-p", "2", "--seed", "-1"), b"", "top_p: got 2.0; above 0, up to 1"),
    ],
)
def test_what_is_refused(
    how: tuple[str, ...], stdin: bytes, message: str, reference: Reference, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_stdin(monkeypatch, stdin)
    answer = run("generate", "tiny", "--artifacts", reference(), *how)
    assert (answer.code, answer.out) == (2, "")
    assert any(re.match(message, fault) for fault in answer.faults)


def test_runs_that_do_not_continue_texts(reference: Reference, run: Run) -> None:
    answer = run("generate", "nobody", "--artifacts", reference(), "--prompt", "x")
    assert (answer.code, answer.faults[0][:21]) == (2, "RUN: got 'nobody'; no")


# ---------------------------------------------------------------- runs that were trained on masked tokens

QUICK = {"training.steps_per_stack": 2, f"{G}target_stacks": 2, "data.seq_len": 12, f"{G}training_objective": "mlm"}
BY_DEPTH = {**QUICK, f"{G}time_interpretation": "depth", "training.mask_ratio_min": 0.3, f"{G}max_stacks": 2}


@pytest.mark.parametrize(
    ("changes", "depths"),
    [
        ({**QUICK, f"{G}target_stacks": 1}, [1]),
        ({**QUICK, f"{G}target_stacks": 1, f"{G}time_interpretation": "input", f"{G}num_time_steps": 10}, [1]),
        (BY_DEPTH, [2, 1]),
        ({**BY_DEPTH, f"{G}building_mode": "prepend", f"{G}new_stack_precision": "bfloat16"}, [2, 1]),
    ],
    ids=["one ratio", "input", "append", "prepend"],
)
def test_masked_tokens_are_filled_in(changes: dict[str, Any], depths: list[int], tmp_path: Path, run: Run) -> None:
    """Where depth is time, the rack of every depth with its own head, the deepest first."""
    config, root = tiny(tmp_path, changes), tmp_path / "a"
    grown(config, root)
    how = ("generate", "tiny", "--artifacts", root, "--prompt", "trunk", "--max-new-tokens", 6, "--json")
    (found,) = run(*how, "--order", "margin").document["completions"]
    racks, time = [load_rack(root, "tiny", depth) for depth in depths], resolve_time_input(config)
    ratios = [mask_ratio_of(config, stack_time_step(config, depth - 1)) for depth in depths if len(depths) > 1] or [1.0]
    steps = tuple(time.ratios(np.arange(10)).tolist()) if time else ()
    denoisers = [Denoiser(rack, ratio, steps) for rack, ratio in zip(racks, ratios, strict=True)]
    rows, never = [[*b"trunk", *[256] * 6]], [257, *range(259, 264)]
    (filled,) = unmask(denoisers, rows, 256, Unmasking("margin"), never)
    expected = filled[5 : filled.index(258)] if 258 in filled else filled[5:]
    assert (found["tokens"], found["text"]) == (expected, bytes(expected).decode(errors="replace"))
    assert found["reason"] == ("end" if 258 in filled else "length")
    answer = run(*how, "--top-k", 3)
    (guided,) = run(*how, "--guidance", 4, "--order", "margin").document["completions"]
    (filled,) = unmask(denoisers, rows, 256, Unmasking("margin", guidance=4.0), never)
    assert [*guided["tokens"], 258] == [*filled[5:], 258][: len(guided["tokens"]) + 1]
    allowed = "run tiny was trained with mlm, where it means nothing; leave it out"
    assert (answer.code, answer.faults) == (2, [f"--top-k: got 3; {allowed}"])


@pytest.mark.parametrize(("span", "lightest"), [("point", 0.3), ("interval", 0.6)])
def test_the_annealed_rack_is_every_depth(span: str, lightest: float, tmp_path: Path) -> None:
    """Trained by intervals, the lighter denoiser is used up to half way to the heavier one."""
    changes = {**BY_DEPTH, f"{G}building_mode": "prepend", "training.joint_steps": 1, f"{G}stack_time_span": span}
    config, root = tiny(tmp_path, changes), tmp_path / "a"
    grown(config, root)
    opened, whole = open_run(root, "tiny"), load_rack(root, "tiny")
    deep, flat = opened.denoisers()
    assert (deep.ratio, flat.ratio) == pytest.approx((0.9, lightest))
    tokens = torch.tensor([[1, 2, 3, 256]])
    assert torch.equal(deep.rack(tokens), whole(tokens))
    assert torch.equal(flat.rack(tokens), whole.head(whole.stacks[1](whole.embedding(tokens))))  # a suffix: prepended
    before = open_run(root, "tiny", 2).denoisers()
    assert [denoiser.ratio for denoiser in before] == [deep.ratio, flat.ratio]
    assert torch.equal(before[1].rack(tokens), load_rack(root, "tiny", 1)(tokens))
    assert before[0].rack.stacks[1] is before[1].rack.stacks[0]  # the trunk is frozen, and loaded once
    assert not torch.equal(before[1].rack(tokens), flat.rack(tokens))


def test_a_run_with_targets_of_its_own_makes_no_text(reference: Reference, run: Run, tmp_path: Path) -> None:
    rows = [{"input_ids": [n] * 8, "targets": [1] * 8} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {f"{G}training_objective": "custom", "data.source": str(tmp_path / "rows.jsonl"), "data.seq_len": 8}
    grown(tiny(tmp_path, {**changes, "training.steps_per_stack": 1, f"{G}target_stacks": 1}), tmp_path / "a")
    answer = run("generate", "tiny", "--artifacts", tmp_path / "a", "--prompt", "x")
    assert (answer.code, answer.out) == (2, "")
    assert answer.faults[0].startswith("RUN: got 'tiny'; run tiny was trained on targets of its own (custom)")
    answer = run("generate", "tiny", "--artifacts", reference(), "--prompt", "x", "--steps", 3, "--order", "margin")
    assert [fault[: fault.index(";")] for fault in answer.faults] == ["--order: got 'margin'", "--steps: got 3"]


# ---------------------------------------------------------------- imported models


def test_an_imported_model_continues_as_transformers_does(tmp_path: Path, run: Run) -> None:
    """With the token that its tokenizer begins every text with, and by its chat template."""
    from transformers import PreTrainedTokenizerFast

    folder, model = saved_checkpoint(tmp_path / "model", FAMILIES[0])
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="[END] $A", special_tokens=[("[END]", 258)])
    library.save(str(folder / "tokenizer.json"))
    template = "{% for each in messages %}{{ '[PAD]' + each.role + each.content + eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=False)
    root = tmp_path / "a"
    assert run("import", folder, "--name", "base", "--artifacts", root).code == 0
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=False)
    for ids, how in ((theirs("Hi").input_ids, ()), (chat, ("--chat",))):
        assert ids[0] == (257 if how else 258)
        given = torch.tensor([ids])
        found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=9, do_sample=False)
        answer = run("generate", "base", "--artifacts", root, "--prompt", "Hi", "--max-new-tokens", 9, *how, "--json")
        tokens = answer.document["completions"][0]["tokens"]
        assert tokens == [token for token in found[0, len(ids) :].tolist() if token != 258]
    answer = run("evaluate", "base", "--artifacts", root)
    assert (answer.code, answer.faults[0][:49]) == (2, "--data: got nothing; run base has no validation s")
    (tmp_path / "text.txt").write_text("some text")
    assert run("evaluate", "base", "--artifacts", root, "--data", "text.txt", "--depth", "all", "--json").document[
        "stages"
    ]
