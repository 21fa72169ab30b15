// The table of results: every row with its interval and its paired test; a click or a key on a head sorts it.
function result_rows() {
  const found = data.results, rows = [];
  const add = (model, kind, block, task, metric, condition, row) => rows.push({
    model, kind, block, task, metric, condition, ...row,
    p: row.difference?.p, p_holm: row.difference?.p_holm, gain: row.difference?.mean,
  });
  for (const [name, of] of Object.entries(found.references))
    for (const [block, tasks] of Object.entries(of.blocks))
      for (const [task, metrics] of Object.entries(tasks))
        for (const [metric, row] of Object.entries(metrics)) add(name, "reference", block, task, metric, "reference", row);
  for (const [name, of] of Object.entries(found.students))
    for (const [block, tasks] of Object.entries(of.blocks))
      for (const [task, metrics] of Object.entries(tasks))
        for (const [metric, cells] of Object.entries(metrics))
          for (const [condition, row] of Object.entries(cells.rows)) add(name, "student", block, task, metric, condition, row);
  return rows;
}

function interval_bar(row) {
  const [low, high] = row.interval.map((value) => 100 * value);
  return s("svg", { class: "interval", viewBox: "0 0 100 12", "aria-hidden": "true", preserveAspectRatio: "none" },
    s("line", { class: "rail", x1: 0, x2: 100, y1: 6, y2: 6 }),
    s("rect", { class: "range", x: low, y: 4, width: Math.max(0.5, high - low), height: 4 }),
    s("rect", { class: "point", x: Math.min(99, 100 * row.mean) - 0.5, y: 1, width: 1.5, height: 10 }));
}

const interval_text = (of) => `[${percent(of.interval[0])}, ${percent(of.interval[1])}]`;

function result_columns(rows) {
  const many = (key) => new Set(rows.map((row) => row[key])).size > 1;
  const to = data.results.reference;
  const columns = [
    many("model") && { title: "Model", value: (r) => r.model, cell: (r) => plain(r.model) },
    { title: "Condition", value: (r) => named(r.condition), cell: (r) => h("span", { class: "condition" }, plain(named(r.condition)), r.seeds > 1 && ` (${r.seeds} seeds)`), head: true },
    many("task") && { title: "Task", value: (r) => r.task, cell: (r) => plain(r.task) },
    many("metric") && { title: "Metric", value: (r) => r.metric, cell: (r) => plain(r.metric) },
    { title: "Step", value: (r) => r.checkpoint ?? -1, cell: (r) => (r.checkpoint === null || r.checkpoint === undefined ? "–" : count(r.checkpoint)), number: true },
    { title: "n", value: (r) => r.n, cell: (r) => count(r.n), number: true },
    { title: "Score, %", value: (r) => r.mean, cell: (r) => h("strong", null, percent(r.mean)), number: true },
    { title: "95 % interval", value: (r) => r.interval[0], cell: (r) => h("span", { class: "with-bar" }, interval_text(r), interval_bar(r)), number: true },
    to && { title: `Points over ${plain(to)}`, value: (r) => r.gain ?? -Infinity, number: true,
      cell: (r) => (r.difference ? h("span", { title: `${r.difference.test ?? "paired"}; n = ${r.difference.n}` }, `${signed(r.difference.mean)} [${signed(r.difference.interval[0])}, ${signed(r.difference.interval[1])}]`) : "–") },
    to && { title: "Won / lost", value: (r) => (r.difference?.better ?? 0) - (r.difference?.worse ?? 0), number: true,
      cell: (r) => (r.difference?.better === undefined ? "–" : `${count(r.difference.better)} / ${count(r.difference.worse)}`) },
    to && { title: "p (Holm)", value: (r) => r.p_holm ?? 2, number: true,
      cell: (r) => (r.p_holm === undefined ? "–" : h("span", null, p_value(r.p_holm), r.p_holm < 0.05 && h("span", { class: "star", title: "below 0.05" }, " *"))) },
    { title: "Unparsable", value: (r) => r.unparsable, cell: (r) => count(r.unparsable), number: true },
    { title: "Unfinished", value: (r) => r.unfinished, cell: (r) => count(r.unfinished), number: true },
    rows.some((r) => r.too_long) && { title: "Too long", value: (r) => r.too_long, cell: (r) => count(r.too_long), number: true },
  ];
  return columns.filter(Boolean);
}

// rows: any objects. columns: title, value (to sort by), cell (text or element), number, head.
function sortable(caption, columns, rows) {
  const body = h("tbody");
  const said = h("span", { class: "visually-hidden", role: "status" });
  let by = null, down = false;
  const order = () => {
    if (by === null) return rows;
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    return [...rows].sort((a, b) => (down ? -1 : 1) * compare(by.value(a), by.value(b)));
  };
  const draw = () => body.replaceChildren(...order().map((row) => h("tr", { class: row.condition === data.results.pair?.[1] ? "main" : null },
    columns.map((column) => h(column.head ? "th" : "td", { scope: column.head ? "row" : null, class: column.number ? "number" : null }, column.cell(row))))));
  const heads = columns.map((column) => {
    const head = h("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": "none" });
    head.append(h("button", {
      type: "button",
      onclick: () => {
        down = by === column ? !down : Boolean(column.number);
        by = column;
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        said.textContent = `sorted by ${column.title}, ${down ? "descending" : "ascending"}`;
        draw();
      },
    }, column.title, h("span", { class: "arrow", "aria-hidden": "true" })));
    return head;
  });
  draw();
  return [said, wide(caption, h("table", { class: "sortable" }, h("caption", null, caption), h("thead", null, h("tr", null, heads)), body))];
}

function results_section() {
  const all = result_rows();
  const blocks = Object.keys(data.results.blocks);
  const tasks = [...new Set(all.map((row) => row.task))];
  const chosen = { block: blocks.includes("test") ? "test" : blocks[0], task: null };
  const place = h("div");
  const draw = () => {
    const rows = all.filter((row) => row.block === chosen.block && (chosen.task === null || row.task === chosen.task));
    place.replaceChildren(...sortable(`Scores, ${block_named(chosen.block)}`, result_columns(rows), rows).filter(Boolean));
  };
  draw();
  const missing = Object.entries(data.results.missing ?? {});
  return section("results", "Results", null,
    h("div", { class: "choices" },
      choice("Examples", blocks, chosen.block, (block) => { chosen.block = block; draw(); }, block_named),
      tasks.length > 1 && choice("Task", [null, ...tasks], null, (task) => { chosen.task = task; draw(); }, (task) => task ?? "all")),
    place,
    missing.length > 0 && h("div", { class: "notice", role: "note" }, h("strong", null, "Missing, since it could not be generated:"),
      h("ul", null, missing.map(([name, why]) => h("li", null, plain(`${name}: ${why}`))))),
    h("details", null, h("summary", null, "How to read these numbers"), h("p", null, plain(data.notes)),
      h("p", null, "p (Holm) is adjusted over the columns of a block. *: below 0.05.")));
}
