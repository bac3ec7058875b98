// A browser breaks a line behind a hyphen, also in the middle of --budgets or of flat-2/3. Words of inline code stay whole;
// of those that are longer than a phone has room for, the parts of a path or of NAME=VALUE do.
const LONGEST = 32;

function whole(text) {
  if (text.length > LONGEST || !/\S/.test(text)) return text;
  const span = document.createElement("span");
  span.className = "whole";
  span.textContent = text;
  return span;
}

function broken(word, longest) {
  if (word.length <= longest) return [whole(word)];
  const [first, ...others] = word.split(/(?<=[/=@])/).map(whole);
  return [first, ...others.flatMap((part) => [document.createElement("wbr"), part])];
}

for (const code of document.querySelectorAll("article :not(pre) > code")) {
  if (code.childElementCount) continue; // a signature with links
  const longest = code.closest("h1") ? 20 : LONGEST; // the letters of a title are larger
  code.replaceChildren(...code.textContent.split(/(\s+)/).flatMap((word) => broken(word, longest)));
}

// A table of two names and a text, such as a key, its default and what it is, has another shape on a phone: site.css.
// There a column of "1, 2" needs no room for words, and a table that still scrolls at its narrowest need not be that
// narrow.
for (const table of document.querySelectorAll("article table")) {
  const rows = [...table.tBodies[0].rows];
  for (const { cellIndex } of rows[0].cells) {
    const cells = rows.map(({ cells }) => cells[cellIndex]).filter(Boolean);
    if (cells.every((cell) => cell.textContent.length <= 8)) cells.forEach((cell) => (cell.dataset.short = ""));
  }
  const isName = (cell) => cell.firstElementChild?.textContent === cell.textContent;
  if (rows.every(({ cells }) => cells.length === 3 && isName(cells[1]))) table.dataset.names = "";
  else if (rows[0].cells.length > 2 && table.scrollWidth > table.closest("article").clientWidth) table.dataset.wide = "";
}
