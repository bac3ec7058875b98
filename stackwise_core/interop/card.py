"""The model card of an exported folder: README.md with the front matter that Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pydantic import BaseModel

from stackwise_core.errors import shown


class Card(BaseModel, frozen=True):
    """What a model card says beside what is in config.json."""

    name: str
    base_model: str = ""
    """The name of the repository that it was imported from; empty where none is known."""
    how: str
    """A sentence on where it comes from, see `grown`."""
    facts: tuple[str, ...] = ()
    """How it was made: Markdown, a line each."""
    columns: tuple[str, ...] = ()
    """Of the table of stages; | aligns a column right."""
    rows: tuple[tuple[str, ...], ...] = ()

    def text(self, architecture: str, parameters: int, blocks: int, dtype: str, *, gguf: bool = False) -> str:
        """Return the card as Markdown."""
        causal = architecture.endswith("ForCausalLM")
        task, load = ("text-generation", "AutoModelForCausalLM") if causal else ("fill-mask", "AutoModelForMaskedLM")
        library = "gguf" if gguf else "transformers"
        base = [f"base_model: {json.dumps(self.base_model)}"] if self.base_model else []
        stages = [
            "",
            "## Stages",
            "",
            "Losses in nats per position that counts; validation is on held-out text of the same corpus.",
            "",
            _row(column.removeprefix("|") for column in self.columns),
            _row("--:" if column.startswith("|") else "---" for column in self.columns),
            *map(_row, self.rows),
        ]
        lines = [
            *("---", f"library_name: {library}", f"pipeline_tag: {task}", *base, "tags: [stackwise]", "---", ""),
            f"# {self.name}",
            "",
            f"{architecture} with {parameters:,} parameters in {blocks} layers ({dtype}).",
            self.how,
            "",
            *(_LLAMA_CPP if gguf else _transformers(load)),
            "",
            "## How it was made",
            "",
            *(f"- {fact}" for fact in self.facts),
            "- Adapters are merged and quantised weights dequantised.",
            "- `stackwise.json` has the ids of the artifacts, the sha256 of every file, and how the logits of this",
            "  folder compared with those of the run.",
            *(stages if self.rows else ()),
            "",
        ]
        return "\n".join(lines)


_LLAMA_CPP = ("```sh", "llama-cli -m model.gguf", "```")


def _transformers(load: str) -> tuple[str, ...]:
    return (
        "```python",
        f"from transformers import {load}, AutoTokenizer",
        "",
        f'model = {load}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
    )


def grown(n_stacks: int, on: str = "") -> str:
    """Return where a model comes from: the stacks that were added, to nothing or to what was imported."""
    begun = f"It was imported from {code(on)}" if on else "It was grown from nothing"
    added = f"; StackWise added {n_stacks} stacks of layers one after the other"
    return f"{begun}{added if n_stacks else ', and nothing was added'}."


def code(text: str) -> str:
    """Return a text that others may have written as Markdown code in one line."""
    return f"`{shown(text).replace('`', chr(39))}`"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(shown(cell).replace('|', '/') for cell in cells)} |"
