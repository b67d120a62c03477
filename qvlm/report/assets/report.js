"use strict";
// Sorting, filters, the card of provenance, and the theme. The page can be read without any of it.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Theme: automatic, light, dark.
const theme = document.getElementById("theme");
const themes = { automatic: "light dark", light: "light", dark: "dark" };
theme.addEventListener("click", () => {
  const names = Object.keys(themes);
  const next = names[(names.indexOf(theme.textContent.slice(7)) + 1) % names.length];
  document.documentElement.style.colorScheme = themes[next];
  theme.textContent = `Theme: ${next}`;
});

// Tables: a button in each column's title sorts by it, first from large to small.
const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort);
};
for (const table of all("table.sortable")) {
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      all("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// The card: shown while a number is pointed at or has the focus; a press keeps it.
const card = document.getElementById("card");
let kept = null;
function show(source, keep) {
  const parts = [];
  if (source.dataset.about) {
    const line = document.createElement("p");
    line.className = "value";
    line.textContent = source.dataset.about;
    parts.push(line);
  }
  for (const run of source.dataset.run.split(" ").filter(Boolean)) {
    const about = document.querySelector(`#run-${run} .about`);
    if (about) parts.push(about.cloneNode(true));
  }
  if (keep) {
    const close = document.createElement("button");
    close.className = "close";
    close.textContent = "\u00d7";
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => hide(true));
    parts.unshift(close);
    kept = source;
  }
  card.replaceChildren(...parts);
  card.hidden = false;
  card.scrollTop = 0;
  if (keep) card.focus();
}
function hide(back) {
  const source = kept;
  if (back && source) source.focus(); // while it is kept, so that the focus does not show it again
  card.hidden = true;
  kept = null;
}
const sourceOf = (event) => (event.target.closest ? event.target.closest("[data-run]") : null);
document.addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch" || kept) return;
  const source = sourceOf(event);
  if (source) show(source, false);
  else if (!card.hidden && !card.contains(event.target)) hide(false);
});
document.addEventListener("focusin", (event) => {
  if (kept) return;
  const source = sourceOf(event);
  if (source) show(source, false);
  else if (!card.contains(event.target)) hide(false);
});
document.addEventListener("click", (event) => {
  const source = sourceOf(event);
  if (source) show(source, true);
  else if (!card.contains(event.target)) hide(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !card.hidden) hide(true);
});

// Charts: one stop of the tab key each; arrow keys go from point to point.
for (const plot of all(".plot")) {
  const points = all(".point", plot);
  if (!points.length) continue;
  points[0].setAttribute("tabindex", "0");
  plot.addEventListener("keydown", (event) => {
    const at = points.indexOf(event.target);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (at >= 0 && (event.key === "Enter" || event.key === " ")) {
      show(points[at], true);
      event.preventDefault();
    }
    if (at < 0 || !step) return;
    const next = points[(at + step + points.length) % points.length];
    points[at].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
    event.preventDefault();
  });
}

// Questions: filters, and a few at a time.
const PAGE = 24;
for (const form of all(".filters")) {
  const group = form.dataset.group;
  const questions = all(`.questions[data-group="${group}"] .question`);
  const count = form.parentElement.querySelectorAll(".count")[all(".filters").indexOf(form)];
  const more = document.querySelector(`.more[data-group="${group}"]`);
  let most = PAGE;
  const right = (question, run) => {
    const answer = question.querySelector(`.answers [data-run="${run}"]`);
    return answer ? answer.classList.contains("right") : null;
  };
  const passes = (question, wanted) => {
    if (wanted.class && !question.dataset.classes.split(" ").includes(wanted.class)) return false;
    if (wanted.skill && question.dataset.skill !== wanted.skill) return false;
    if (wanted.words && !question.textContent.toLowerCase().includes(wanted.words.toLowerCase())) return false;
    if (!wanted.outcome) return true;
    const runs = wanted.run ? [wanted.run] : [...form.elements.run.options].map((o) => o.value).filter(Boolean);
    return runs.some((run) => {
      const option = [...form.elements.run.options].find((o) => o.value === run);
      const [own, full] = [right(question, run), right(question, option.dataset.full)];
      if (own === null) return false;
      if (wanted.outcome === "lost") return full === true && !own;
      if (wanted.outcome === "won") return full === false && own;
      if (wanted.outcome === "wrong") return !own;
      return question.querySelector(`.answers [data-run="${run}"]`).dataset.letter === "-";
    });
  };
  const update = () => {
    const wanted = Object.fromEntries(new FormData(form));
    let found = 0;
    for (const question of questions) {
      const passed = passes(question, wanted);
      question.hidden = !passed || found >= most;
      found += passed;
      for (const answer of all(".answers [data-run]", question)) {
        answer.classList.toggle("chosen", answer.dataset.run === wanted.run);
      }
    }
    count.textContent = `${Math.min(found, most)} of ${found} questions shown`;
    more.hidden = found <= most;
  };
  form.addEventListener("input", () => { most = PAGE; update(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => { most = PAGE; setTimeout(update); });
  more.addEventListener("click", () => { most += PAGE; update(); });
  update();
}
