"""The pages of the site, as Zensical reads them: `make docs` and `make check` lay them out in build/docs.

On a code host a link of a page may leave docs/, and a notebook is shown. A site has neither: it gets a page for every
file that is linked, and one for the notebook. Reports are linked in the gallery once `make gallery` has made them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")
NOT_MADE = "None of these pages is linked, since `make gallery` has not made them yet.\n\n"


def lay_out(folder: Path) -> None:
    """Write the pages of docs/ into a folder, which is emptied first, with links that stay inside it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for notebook in folder.rglob("*.ipynb"):
        notebook.with_suffix(".md").write_text(_page_of_notebook(notebook))
    link_gallery(folder)
    for page in sorted(folder.rglob("*.md")):
        page.write_text(TARGET.sub(partial(_inside, page, folder), page.read_text()))


def link_gallery(folder: Path) -> None:
    """Make links of the names in the gallery's table whose page is in `folder`/gallery."""
    page = folder / "gallery.md"
    made = {report.stem for report in (folder / "gallery").glob("*.html")}
    text = page.read_text().replace(NOT_MADE, "" if made else NOT_MADE)
    for name in made:
        text = text.replace(f"| `{name}` |", f"| [`{name}`](gallery/{name}.html) |")
    page.write_text(text)


def _inside(page: Path, folder: Path, target: re.Match[str]) -> str:
    """Return where a link of a page leads on the site, and write the page there if it is of a file outside docs/."""
    if target[0].endswith(".ipynb"):
        return str(Path(target[0]).with_suffix(".md"))
    source = (ROOT / "docs" / page.relative_to(folder).parent / target[0]).resolve()
    if source.is_relative_to(ROOT / "docs"):
        return target[0]
    return os.path.relpath(_page_of_file(source, folder), page.parent)


def _page_of_file(source: Path, folder: Path) -> Path:
    """Write a page that shows a file whole, or lists the files of a folder."""
    name = source.relative_to(ROOT)
    page = folder / "files" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        files = {file: _page_of_file(file, folder).relative_to(page.parent) for file in sorted(source.rglob("*.*"))}
        text = "\n".join(f"- [`{to.with_suffix('')}`]({to}){_about(file)}" for file, to in files.items())
    else:
        text = f"~~~~{source.suffix[1:]}\n{source.read_text()}~~~~"
    page.write_text(f"# `{name}`\n\n{text}\n")
    return page


def _about(file: Path) -> str:
    """Return the first sentence of the comment at the top of a file, as a line of its own."""
    comment = re.match(r"(?:# .*\n)*", file.read_text())
    words = comment[0].replace("\n# ", " ").removeprefix("# ") if comment else ""
    return f"<br>{words.split('. ')[0].strip().removesuffix('.')}." if words else ""


def _page_of_notebook(notebook: Path) -> str:
    """Return a notebook as Markdown; its drawings become files beside it."""
    first, *cells = json.loads(notebook.read_text())["cells"]
    parts = ["".join(first["source"]), f'The notebook itself: <a href="{notebook.name}" download>{notebook.name}</a>.']
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"~~~~python\n{source}\n~~~~")
        for output in cell.get("outputs", []):
            shown: dict[str, Any] = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in shown:
                drawing = notebook.with_suffix(f".{len(parts)}.png")
                drawing.write_bytes(base64.b64decode(shown["image/png"]))
                parts.append(f"![{source.strip(';')}]({drawing.name})")
            elif "text/html" in shown:
                parts.append("".join(shown["text/html"]))
            else:
                parts.append(f"~~~~text\n{''.join(shown['text/plain'])}\n~~~~")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
