// A browser breaks a line behind a hyphen, also in the middle of --budgets or of flat-2/3. Words of inline code that fit
// the smallest screen stay whole.
const LONGEST = 34;

for (const code of document.querySelectorAll("article :not(pre) > code")) {
  if (code.childElementCount) continue; // a signature with links
  code.replaceChildren(
    ...code.textContent.split(/(\s+)/).map((word) => {
      if (!/[-/]/.test(word) || word.length > LONGEST) return word;
      const whole = document.createElement("span");
      whole.className = "whole";
      whole.textContent = word;
      return whole;
    }),
  );
}
