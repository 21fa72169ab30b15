// The page: its head with the numbers an experiment is about, then the sections.
function headline() {
  const pair = data.results.pair;
  if (!pair) return null;
  const cards = [];
  for (const [student, of] of Object.entries(data.results.students)) {
    const blocks = Object.keys(of.blocks), block = blocks.includes("test") ? "test" : blocks[0];
    for (const [task, metrics] of Object.entries(of.blocks[block] ?? {})) {
      const [metric, cells] = Object.entries(metrics)[0] ?? [];
      const row = cells?.rows[pair[1]];
      if (!row?.difference || cards.length === 6) continue;
      const [low, high] = row.difference.interval;
      cards.push(h("div", { class: "card" }, h("p", { class: "quiet" }, plain(`${student} · ${task} · ${metric}`)),
        h("p", { class: "big" }, percent(row.mean), h("span", { class: "unit" }, " %")),
        h("p", null, h("strong", null, signed(row.difference.mean)), ` points over ${plain(row.difference.to)}`),
        h("p", { class: "quiet" }, `95 % interval ${signed(low)} to ${signed(high)}, n = ${count(row.difference.n)}`)));
    }
  }
  return cards.length ? h("div", { class: "cards", "aria-label": `${plain(pair[1])} against ${plain(pair[0])}`, role: "group" }, cards) : null;
}

function theme_button() {
  const root = document.documentElement, dark = window.matchMedia("(prefers-color-scheme: dark)");
  const is_dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const button = h("button", { type: "button", class: "theme", onclick: () => { root.dataset.theme = is_dark() ? "light" : "dark"; said(); } });
  const said = () => { button.textContent = is_dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to the ${is_dark() ? "light" : "dark"} theme`); };
  dark.addEventListener("change", said);
  said();
  return button;
}

// What one section stumbles over does not take the others away.
const sections = Object.entries({ results: results_section, curves: curves_section, answers: answers_section, viewer: viewer_section, cost: cost_section, provenance: provenance_section }).map(([id, make]) => {
  try {
    return make();
  } catch (error) {
    console.error(error);
    return section(id, id, null, h("p", { class: "notice" }, plain(`This section could not be drawn: ${error}. Its numbers are in results.json.`)));
  }
});
document.body.append(
  h("a", { class: "skip", href: "#results" }, "Skip to the results"),
  h("header", { class: "page" }, h("p", { class: "quiet" }, "Report of a run"), h("h1", null, plain(data.results.recipe)), theme_button()),
  h("nav", { class: "page", "aria-label": "Sections" }, sections.map((of) => h("a", { href: `#${of.id}` }, of.querySelector("h2").textContent))),
  h("main", null, headline(), sections),
  h("footer", { class: "page" }, h("p", { class: "quiet" }, "One file, no network. Beside it: results.json and table.md, whose p values are before Holm's correction where they do not say so.")));
