// The token viewer: one answer, token by token, what the teacher expected beside the student before and after training.
const REASONS = { not_finite: "a number of the teacher's was not finite", unknown_token: "this or an earlier token is unknown to the teacher", cut: "beyond what the teacher could read" };

function viewer_section() {
  const names = Object.keys(data.viewer.students);
  const missing = Object.entries(data.viewer.missing).map(([what, why]) => h("div", { class: "notice", role: "note" }, plain(`${what}: ${why}`)));
  const lead = "Cached training answers, read token by token: what the teacher expected, and the student before and after training. "
    + "Disagreement is half the L1 distance of the two distributions: 0 the same, 1 nothing in common.";
  if (!names.length) return section("viewer", "Token viewer", lead, missing);
  const chosen = { student: names[0], example: 0, token: 0, colour: null, mode: "boundary" };
  const top = h("div", { class: "choices" }), head = h("div"), strip = h("div", { class: "strip", tabindex: "0", role: "listbox", "aria-label": "Tokens of the answer", "aria-orientation": "horizontal" });
  const panel = h("div", { class: "panel", "aria-live": "polite" }), drawing = h("div", { class: "drawing" });
  let student, example;

  function choose() { // after another student
    student = data.viewer.students[chosen.student];
    const pair = data.results.pair;
    chosen.colour = student.conditions.find((name) => pair && name.split("@")[0] === pair[1]) ?? student.conditions.at(-1);
    top.replaceChildren(...[
      choice("Student", names, chosen.student, (name) => { chosen.student = name; chosen.example = 0; choose(); }),
      h("div", { class: "choice" }, h("span", null, "Colour by"), buttons("Colour by the disagreement of", student.conditions, chosen.colour, (name) => { chosen.colour = name; draw(); }, condition_named)),
    ].filter(Boolean));
    open(0);
  }

  const condition_named = (name) => plain(named(name.split("@")[0]) + (name.includes("@") ? ` @${name.split("@")[1]}` : ""));

  function open(index) { // another example
    const most = student.examples.length;
    chosen.example = (index + most) % most;
    chosen.token = 0;
    example = student.examples[chosen.example];
    draw();
  }

  function draw() {
    if (!example) { head.replaceChildren(h("p", null, "No cached example fits into this student's window.")); return; }
    const select = choice("Example", student.examples, example, (of) => open(student.examples.indexOf(of)),
      (of) => `${student.examples.indexOf(of) + 1}. ${of.why}: ${of.id}`);
    const tasks = new Set(student.examples.map((of) => of.task)).size > 1 ? ` · ${plain(example.task)}` : "";
    head.replaceChildren(
      h("div", { class: "choices" }, select,
        h("button", { type: "button", class: "step", onclick: () => open(chosen.example - 1), "aria-label": "Previous example" }, "‹"),
        h("button", { type: "button", class: "step", onclick: () => open(chosen.example + 1), "aria-label": "Next example" }, "›"),
        h("span", { class: "tag" }, example.why), h("span", { class: "quiet" }, tasks)),
      h("details", null, h("summary", null, "Prompt and answer"), h("pre", null, quoted(example.prompt)), h("pre", null, quoted(example.answer))),
      h("p", { class: "means" }, "Mean disagreement with the teacher: ", student.conditions.map((name, i) => [i ? " · " : "", `${condition_named(name)} `,
        h("strong", null, example.student[name].mean === null ? "not known" : example.student[name].mean.toFixed(3))]),
        example.by_rank ? " (compared rank by rank, since token ids mean something else to each)" : ""));
    draw_strip();
    step(chosen.token);
  }

  const letters = () => Array.from(example.answer);
  const text_of = (m) => (m === example.tokens.length - 1 ? "end" : token(letters().slice(...example.tokens[m].slice(0, 2)).join("") || example.tokens[m][3]));
  function state(m) {
    const n = example.pairs.boundary[m];
    if (n < 0) return "unpaired";
    return example.teacher[n].status === "usable" ? "" : "quarantined";
  }

  function draw_strip() {
    const positions = example.student[chosen.colour].positions;
    strip.replaceChildren(...positions.map((of, m) => {
      const d = of.disagreement, how = state(m);
      const said = how === "unpaired" ? "no teacher" : how === "quarantined" ? "quarantined" : `disagreement ${d === null ? "not known" : d.toFixed(2)}`;
      const node = h("span", { id: `token-${m}`, role: "option", class: `token ${how}`, "aria-label": `${text_of(m)}, ${said}`, title: said, css: { "--d": Math.sqrt(d ?? 0).toFixed(3) },
        onclick: () => { step(m); strip.focus({ preventScroll: true }); } }, h("span", { class: "letters" }, text_of(m)), h("span", { class: "level", "aria-hidden": "true" }, how === "quarantined" ? "✕" : how === "unpaired" ? "?" : d === null ? "–" : d.toFixed(2).replace("0.", ".")));
      return node;
    }));
  }

  function step(m) {
    chosen.token = Math.max(0, Math.min(m, example.tokens.length - 1));
    for (const [i, node] of [...strip.children].entries()) node.setAttribute("aria-selected", String(i === chosen.token));
    strip.setAttribute("aria-activedescendant", `token-${chosen.token}`);
    strip.children[chosen.token].scrollIntoView({ block: "nearest", inline: "nearest" });
    panel.replaceChildren(...detail(chosen.token).filter(Boolean));
    const modes = Object.keys(example.pairs);
    drawing.replaceChildren(...(modes.length < 2 ? [] : [h("h3", null, "The two tokenizers"),
      h("div", { class: "choices" }, choice("Pairs", modes, chosen.mode, (mode) => { chosen.mode = mode; step(chosen.token); },
        (mode) => (mode === "boundary" ? "by text consumed" : "by index, as published"))),
      ...alignment_figure(example, modes.includes(chosen.mode) ? chosen.mode : "boundary", chosen.token, step)]));
  }

  const bar = (p) => h("span", { class: "p" }, h("span", { class: "fill", css: { "--p": p.toFixed(4) } }), h("span", null, p >= 0.0005 ? p.toFixed(3) : p > 0 ? "< .001" : "0"));

  function detail(m) {
    const n = example.pairs.boundary[m], teacher = n < 0 ? null : example.teacher[n], conditions = student.conditions;
    const of = (name) => example.student[name].positions[m];
    const title = h("h3", null, `Token ${m + 1} of ${example.tokens.length}: `, h("bdi", { class: "mono" }, text_of(m)));
    const why = n < 0 ? "No teacher here: no position of the teacher's has read exactly this text before." : teacher.status !== "usable" ? `Quarantined: ${REASONS[teacher.status] ?? teacher.status}. The teacher's numbers are not used here.` : null;
    const came = h("p", null, "Probability of the token that came: ", conditions.map((name, i) => [i ? " · " : "", `${condition_named(name)} `, h("strong", null, of(name).target.toFixed(3))]),
      ". Disagreement: ", conditions.map((name, i) => [i ? " · " : "", `${condition_named(name)} `, h("strong", null, of(name).disagreement === null ? "–" : of(name).disagreement.toFixed(3))]), ".");
    const usable = teacher !== null && teacher.status === "usable", by_id = usable && of(conditions[0]).at !== undefined;
    const first = (name) => of(name).names.map((text, i) => [text, of(name).p[i]]);
    const rows = of(conditions[0]).names.map((_, i) => h("tr", null, h("th", { scope: "row", class: "number" }, i + 1),
      usable && h("td", null, h("bdi", { class: "mono" }, teacher.names?.[i] !== undefined ? token(teacher.names[i]) : "·"), teacher.p[i] !== undefined && bar(teacher.p[i])),
      conditions.map((name) => h("td", null, first(name)[i] && [h("bdi", { class: "mono" }, token(first(name)[i][0])), bar(first(name)[i][1])]))));
    const own = wide("First candidates of each", h("table", { class: "candidates" }, h("caption", null, "First candidates of each, by rank", usable && teacher.names === null ? "; this cache keeps no token ids" : ""),
      h("thead", null, h("tr", null, h("th", { scope: "col", class: "number" }, "Rank"), usable && h("th", { scope: "col" }, "teacher"), conditions.map((name) => h("th", { scope: "col" }, condition_named(name))))), h("tbody", null, rows)));
    const same = by_id && wide("The teacher's candidates", h("table", { class: "candidates" }, h("caption", null, "What each gives to the teacher's candidates"),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Candidate"), h("th", { scope: "col" }, "teacher"), conditions.map((name) => h("th", { scope: "col" }, condition_named(name))))),
      h("tbody", null, teacher.names.map((text, i) => h("tr", { class: teacher.ids[i] === example.tokens[m][2] ? "main" : null },
        h("th", { scope: "row" }, h("bdi", { class: "mono" }, token(text)), teacher.ids[i] === example.tokens[m][2] && h("span", { class: "quiet" }, " came")), h("td", null, bar(teacher.p[i])), conditions.map((name) => h("td", null, bar(of(name).at[i]))))),
        h("tr", null, h("th", { scope: "row" }, "all others"), h("td", null, bar(Math.max(0, teacher.others))), conditions.map((name) => h("td", null, bar(Math.max(0, 1 - of(name).at.reduce((a, b) => a + b, 0)))))))));
    return [title, why && h("p", { class: "notice" }, why), came, same, by_id ? h("details", null, h("summary", null, "First candidates of each model"), own) : own];
  }

  strip.addEventListener("keydown", (event) => {
    const to = { ArrowRight: () => step(chosen.token + 1), ArrowLeft: () => step(chosen.token - 1), Home: () => step(0), End: () => step(example.tokens.length - 1),
      PageDown: () => open(chosen.example + 1), PageUp: () => open(chosen.example - 1) }[event.key];
    if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    to();
  });
  choose();
  const temperature = student.temperature === 1 ? "" : ` Probabilities are at temperature ${student.temperature}, as they were cached.`;
  return section("viewer", "Token viewer", lead + temperature, missing, top, head,
    h("p", { class: "quiet" }, "← → step through the tokens, Page Up and Page Down through the examples. The number under a token is its disagreement; ✕ quarantined, ? no teacher."),
    strip, panel, drawing);
}
