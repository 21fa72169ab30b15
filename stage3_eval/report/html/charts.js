// Curves over steps, drawn from the numbers in the page; each with its numbers as a table beneath.
const FURTHER = ["var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
function series_style(name, others) {
  if (name === data.results.reference) return { color: "var(--c1)", dash: null };
  if (name === data.results.pair?.[1]) return { color: "var(--accent)", dash: null };
  const at = others.indexOf(name);
  return { color: FURTHER[Math.max(0, at) % FURTHER.length], dash: ["7 3", "2 3", "9 3 2 3"][Math.max(0, at) % 3] };
}

function ticks(low, high, most = 5) {
  const span = high - low || 1, rough = span / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + 1e-9 * span; at += step) found.push(Math.abs(at) < 1e-12 ? 0 : at);
  return found;
}

// series: {name, points: [[x, y, low?, high?]], color, dash}; lines: {name, y}. One figure.
function chart(title, series, lines, y_label, digits, table) {
  const W = 640, H = 306, left = 52, right = 16, top = 14, bottom = 48;
  const xs = series.flatMap((of) => of.points.map((p) => p[0]));
  const ys = [...series.flatMap((of) => of.points.flatMap((p) => p.slice(1))), ...lines.map((line) => line.y)];
  const x0 = Math.min(0, ...xs), x1 = Math.max(...xs), pad = 0.06 * (Math.max(...ys) - Math.min(...ys) || 1);
  const y0 = Math.max(0, Math.min(...ys) - pad), y1 = Math.max(...ys) + pad;
  const X = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (W - left - right);
  const Y = (y) => H - bottom - ((y - y0) / (y1 - y0 || 1)) * (H - top - bottom);
  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
  const last = series.map((of) => `${plain(of.name)} ends at ${of.points.at(-1)[1].toFixed(digits)} (step ${of.points.at(-1)[0]})`);
  const said = `${title}. ${[...last, ...lines.map((line) => `${plain(line.name)} is at ${line.y.toFixed(digits)}`)].join("; ")}.`;
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": said, class: "chart" },
    ticks(y0, y1).map((y) => [s("line", { class: "grid", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }),
      s("text", { x: left - 8, y: Y(y) + 4, "text-anchor": "end" }, y.toFixed(y1 - y0 < 2 ? 2 : 0))]),
    ticks(x0, x1, 6).map((x) => s("text", { x: X(x), y: H - bottom + 20, "text-anchor": "middle" }, count(x))),
    s("text", { x: W - right, y: H - 6, "text-anchor": "end", class: "axis" }, "step"),
    s("text", { x: left, y: H - 6, class: "axis" }, y_label),
    lines.map((line) => s("line", { class: "baseline", x1: left, x2: W - right, y1: Y(line.y), y2: Y(line.y), "stroke-dasharray": line.dash })),
    series.map((of) => {
      const banded = of.points.filter((p) => p.length > 3);
      const band = banded.length > 1 && s("path", { class: "band", fill: of.color,
        d: `${path(banded.map((p) => [p[0], p[3]]))}${path(banded.map((p) => [p[0], p[2]]).reverse()).replace("M", "L")}Z` });
      const whiskers = banded.length === 1 && s("line", { stroke: of.color, "stroke-width": 2, x1: X(banded[0][0]), x2: X(banded[0][0]), y1: Y(banded[0][2]), y2: Y(banded[0][3]) });
      return [band, whiskers, s("path", { class: of.points.length > 60 ? "line thin" : "line", stroke: of.color, "stroke-dasharray": of.dash, d: path(of.points) }),
        of.points.length <= 60 && of.points.map((p) => s("circle", { cx: X(p[0]), cy: Y(p[1]), r: 3.5, fill: of.color }))];
    }));
  const key = h("ul", { class: "key", "aria-hidden": "true" },
    series.map((of) => h("li", null, s("svg", { viewBox: "0 0 26 8" }, s("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: of.color, "stroke-width": 3, "stroke-dasharray": of.dash })), plain(of.name))),
    lines.map((line) => h("li", null, s("svg", { viewBox: "0 0 26 8" }, s("line", { class: "baseline", x1: 0, x2: 26, y1: 4, y2: 4, "stroke-dasharray": line.dash })), plain(line.name))));
  return h("figure", null, h("figcaption", null, title), svg, key, h("details", null, h("summary", null, "The numbers"), table));
}

function step_table(caption, series, cell) {
  const steps = [...new Set(series.flatMap((of) => of.points.map((p) => p[0])))].sort((a, b) => a - b);
  const shown = steps.length <= 24 ? steps : steps.filter((_, i) => i % Math.ceil(steps.length / 24) === 0 || i === steps.length - 1);
  const points = series.map((of) => new Map(of.points.map((p) => [p[0], p])));
  return wide(caption, h("table", null, h("caption", null, caption),
    h("thead", null, h("tr", null, h("th", { scope: "col", class: "number" }, "Step"), series.map((of) => h("th", { scope: "col", class: "number" }, plain(of.name))))),
    h("tbody", null, shown.map((step) => h("tr", null, h("th", { scope: "row", class: "number" }, count(step)),
      points.map((of) => h("td", { class: "number" }, of.has(step) ? cell(of.get(step)) : "–")))))));
}

function styled(names) {
  const others = names.filter((name) => name !== data.results.reference && name !== data.results.pair?.[1]);
  return (name) => series_style(name, others);
}

function score_charts(student, block) {
  const figures = [];
  for (const [task, metrics] of Object.entries(data.results.students[student].blocks[block] ?? {})) {
    const [metric, cells] = Object.entries(metrics)[0] ?? [];
    if (metric === undefined) continue;
    const curves = Object.entries(cells.curve).filter(([, rows]) => rows.length);
    if (!curves.some(([, rows]) => rows.length > 1)) continue; // one checkpoint is no curve
    const style = styled(curves.map(([name]) => name));
    const series = curves.map(([name, rows]) => ({ name, ...style(name), points: rows.map((r) => [r.step, 100 * r.mean, 100 * r.interval[0], 100 * r.interval[1]]) }));
    const lines = Object.entries(cells.curve_baselines).map(([name, row], i) => ({ name: named(name), y: 100 * row.mean, dash: i ? "8 4" : "2 4" }));
    const n = curves[0][1][0].n;
    const title = `${plain(student)} on ${plain(task)}, ${plain(metric)} in % by step (n = ${count(n)})`;
    figures.push(chart(title, series, lines, "score, %", 2, step_table(title, series, (p) => `${p[1].toFixed(2)} [${p[2].toFixed(2)}, ${p[3].toFixed(2)}]`)));
  }
  return figures;
}

function curves_section() {
  const blocks = Object.keys(data.results.blocks), students = Object.keys(data.results.students);
  const chosen = { student: students[0], block: blocks.includes("test") ? "test" : blocks[0] };
  const place = h("div", { class: "figures" });
  const draw = () => {
    const found = score_charts(chosen.student, chosen.block);
    const runs = Object.entries(data.losses[chosen.student] ?? {});
    const style = styled(runs.map(([name]) => name));
    if (runs.length) {
      const series = runs.map(([name, points]) => ({ name, points, ...style(name) }));
      const title = `${plain(chosen.student)}: cross-entropy on the training answers, nats a token`;
      found.push(chart(title, series, [], "cross-entropy", 3, step_table(title, series, (p) => p[1].toFixed(3))));
    }
    place.replaceChildren(...(found.length ? found : [h("p", null, "There is no curve: no arm has two checkpoints that were scored on these examples.")]));
  };
  if (students.length) draw();
  return section("curves", "Checkpoints and losses", "Of scores, bands are 95 % intervals and dashed lines the untouched student.",
    h("div", { class: "choices" },
      choice("Student", students, chosen.student, (name) => { chosen.student = name; draw(); }),
      choice("Examples", blocks, chosen.block, (name) => { chosen.block = name; draw(); }, block_named)),
    place);
}
