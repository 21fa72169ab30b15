// Generated answers beside the reference: which ones an arm won over another, which it lost.
const ANSWERS_A_PAGE = 10;

function answers_section() {
  const all = data.answers;
  if (!all.length) return section("answers", "Answers", "There are no answers of a student.");
  const pick = (key, values) => [...new Set(values.map((of) => of[key]))];
  const start = all.find((of) => of.block === "test") ?? all[0];
  const chosen = { student: start.student, block: start.block, task: start.task, kind: "fixed", search: "", page: 0 };
  const top = h("div", { class: "choices" }), bar = h("div", { class: "bar" }), list = h("div", { class: "answers" }), pager = h("nav", { class: "pager", "aria-label": "Pages of answers" });
  const status = h("p", { class: "quiet", role: "status" });
  let of, verdicts;

  const verdict = (a, b) => (a > b ? "fixed" : a < b ? "broken" : a > 0 ? "same" : "both wrong");
  const LABELS = { fixed: "Fixed", broken: "Broken", same: "Same score", "both wrong": "Both at zero", all: "All" };

  function choose() { // what there is to choose, after another student, block or task
    const of_student = all.filter((x) => x.student === chosen.student);
    if (!of_student.some((x) => x.block === chosen.block)) chosen.block = of_student[0].block;
    const of_block = of_student.filter((x) => x.block === chosen.block);
    if (!of_block.some((x) => x.task === chosen.task)) chosen.task = of_block[0].task;
    of = of_block.find((x) => x.task === chosen.task);
    const conditions = Object.keys(of.conditions), pair = data.results.pair;
    if (!conditions.includes(chosen.arm)) chosen.arm = pair && conditions.includes(pair[1]) ? pair[1] : conditions.at(-1);
    if (!conditions.includes(chosen.to)) chosen.to = pair && conditions.includes(pair[0]) ? pair[0] : conditions[0];
    const again = (key) => (value) => { chosen[key] = value; chosen.page = 0; choose(); };
    top.replaceChildren(...[
      choice("Student", pick("student", all), chosen.student, again("student")),
      choice("Examples", pick("block", of_student), chosen.block, again("block"), block_named),
      choice("Task", pick("task", of_block), chosen.task, again("task")),
      choice("What", conditions, chosen.arm, again("arm"), named),
      choice("over", conditions, chosen.to, again("to"), named),
      h("label", { class: "choice" }, h("span", null, "Search"), h("input", { type: "search", value: chosen.search, placeholder: "in prompts and answers",
        oninput: (event) => { chosen.search = event.currentTarget.value.toLowerCase(); chosen.page = 0; draw(); } })),
    ].filter(Boolean));
    verdicts = of.values[chosen.arm].map((value, i) => verdict(value, of.values[chosen.to][i]));
    const kinds = ["fixed", "broken", "same", "both wrong", "all"];
    const counted = (kind) => (kind === "all" ? of.n : verdicts.filter((x) => x === kind).length);
    if (chosen.kind !== "all" && counted(chosen.kind) === 0) chosen.kind = "all";
    bar.replaceChildren(buttons("Which answers", kinds, chosen.kind, (kind) => { chosen.kind = kind; chosen.page = 0; draw(); }, (kind) => `${LABELS[kind]} ${count(counted(kind))}`));
    draw();
  }

  function draw() {
    const wanted = of.texts.filter((x) => (chosen.kind === "all" || verdicts[x.at] === chosen.kind)
      && (!chosen.search || [x.id, x.prompt, x.gold, ...Object.values(x.said)].some((text) => text.toLowerCase().includes(chosen.search))));
    const pages = Math.max(1, Math.ceil(wanted.length / ANSWERS_A_PAGE));
    chosen.page = Math.min(chosen.page, pages - 1);
    const from = chosen.page * ANSWERS_A_PAGE, shown = wanted.slice(from, from + ANSWERS_A_PAGE);
    const fewer = of.texts.length < of.n ? ` The texts of ${count(of.texts.length)} of ${count(of.n)} examples are in this page, differing ones first; the counts are of all.` : "";
    status.textContent = wanted.length ? `${from + 1} to ${from + shown.length} of ${count(wanted.length)}, by ${of.metric}.${fewer}` : `None.${fewer}`;
    list.replaceChildren(...shown.map(card));
    const turn = (by, label, off) => h("button", { type: "button", disabled: off, onclick: () => { chosen.page += by; draw(); list.scrollIntoView({ block: "start" }); } }, label);
    pager.replaceChildren(...(pages > 1 ? [turn(-1, "Previous", chosen.page === 0), h("span", null, `Page ${chosen.page + 1} of ${pages}`), turn(1, "Next", chosen.page === pages - 1)] : []));
  }

  function card(x) {
    const kind = verdicts[x.at], order = [...new Set([chosen.arm, chosen.to, ...Object.keys(x.said)])];
    return h("article", { class: "answer" },
      h("header", null, h("h3", null, quoted(x.id)), h("span", { class: `tag ${kind.replace(" ", "-")}` }, LABELS[kind])),
      h("details", null, h("summary", null, "Prompt"), h("pre", null, quoted(x.prompt))),
      h("dl", null,
        h("div", { class: "gold" }, h("dt", null, "Reference"), h("dd", null, h("pre", null, quoted(x.gold)))),
        order.filter((name) => name in x.said).map((name) => h("div", { class: name === chosen.arm || name === chosen.to ? "compared" : null },
          h("dt", null, plain(named(name)), h("span", { class: "score" }, `: ${percent(of.values[name][x.at], 0)} %`)),
          h("dd", null, x.said[name] === "" ? h("em", null, "(empty)") : h("pre", null, quoted(x.said[name])))))));
  }

  choose();
  return section("answers", "Answers", "What was generated, beside the reference: which examples training fixed, and which it broke. Of an arm with several seeds, the first.", top, bar, status, list, pager);
}
