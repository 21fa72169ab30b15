// What the cache took and saved, and where the numbers come from.
const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value, note]) => h("div", null, h("dt", null, name), h("dd", null, value), note && h("dd", { class: "quiet" }, note))));

function ledger(of) {
  const lost = Object.entries(of.quarantined);
  return lost.length ? lost.map(([why, n]) => `${count(n)} ${plain(why)}`).join(", ") : "none";
}

function cost_section() {
  const { cache, trainings } = data.cost, readers = trainings.filter((of) => of.reads_teacher);
  const read = readers.reduce((sum, of) => sum + of.examples, 0);
  const took = cache && facts([
    ["Bytes on disk", bytes(cache.bytes), `${count(cache.bytes)} B in ${count(cache.shards)} shards`],
    ["Answer positions", count(cache.positions.planned), `${count(cache.rows)} examples; ${count(cache.top_k)} of ${count(cache.vocab_size)} logits each`],
    ["Bytes a position", count(cache.bytes / Math.max(1, cache.positions.planned)), cache.store_ids ? `ids kept, codec ${cache.codec}` : `no ids kept, codec ${cache.codec}`],
    ["Teacher's time", cache.seconds === null ? "not known" : duration(cache.seconds), cache.seconds === null ? "this cache's records do not say" : "sum over the shards"],
    ["Quarantined", ledger(cache.positions), `positions; examples: ${ledger(cache.examples)}`],
    ["Largest codec error", cache.codec_error_max.toPrecision(2), "logits"],
  ]);
  const times = cache && read / Math.max(1, cache.rows);
  const saved = cache && read > 0 && h("p", null, `The teacher read ${count(cache.rows)} examples once. ${count(readers.length)} training${readers.length === 1 ? "" : "s"} read ${count(read)}`
    + ` (each example ${times.toFixed(1)} times), and an online teacher would have read it again each time: ${count(Math.max(0, read - cache.rows))} readings by the teacher were saved.`
    + (cache.seconds === null ? " In hours this is not known." : ` At the cache's own rate that is ${duration(cache.seconds * Math.max(0, times - 1))}.`));
  const title = "Trainings, as their own steps recorded it";
  const table = trainings.length > 0 && wide(title, h("table", null, h("caption", null, title),
    h("thead", null, h("tr", null, ["Student", "Run", "Reads the teacher"].map((x) => h("th", { scope: "col" }, x)), ["Steps", "Examples read", "Time of its steps"].map((x) => h("th", { scope: "col", class: "number" }, x)))),
    h("tbody", null, trainings.map((of) => h("tr", null, h("td", null, plain(of.student)), h("th", { scope: "row" }, plain(of.run)), h("td", null, of.reads_teacher ? "yes" : "no"),
      h("td", { class: "number" }, of.steps ? count(of.steps) : "not known"), h("td", { class: "number" }, of.steps ? count(of.examples) : "not known"), h("td", { class: "number" }, of.seconds === null ? "not known" : duration(of.seconds)))))));
  return section("cost", "Cost", "What the cache took, and what it saved. What is not recorded is not guessed.",
    took ?? h("p", { class: "notice" }, "What the cache took is read together with the token viewer; see there why it is missing."), saved, table);
}

// A tree as indented lines, for reading.
function tree(value, indent = "") {
  if (value === null || typeof value !== "object") return plain(JSON.stringify(value));
  const entries = Object.entries(value);
  if (!entries.length) return Array.isArray(value) ? "[]" : "{}";
  if (Array.isArray(value) && entries.every(([, of]) => of === null || typeof of !== "object")) return plain(JSON.stringify(value));
  return entries.map(([key, of]) => {
    const text = tree(of, `${indent}  `);
    return `\n${indent}${plain(key)}: ${text}`;
  }).join("");
}
const shown_tree = (title, value) => value && h("details", null, h("summary", null, title), h("pre", { class: "mono" }, tree(value).replace(/^\n/, "")));

// As one types it: quoted where the shell would read it otherwise.
const command = (words) => h("pre", { class: "mono command" }, plain(words.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, "'\"'\"'")}'`)).join(" ")));

function provenance_section() {
  const of = data.provenance, prints = [of.cache_fingerprint].flat().filter(Boolean);
  const versions = Object.entries({ python: of.scored_by?.python, ...data.versions }).filter(([, value]) => value);
  return section("provenance", "Provenance", null,
    facts([
      ["Recipe", plain(data.results.recipe)],
      ["Cache fingerprint", prints.length ? prints.map((print) => h("code", { class: "print" }, plain(print))) : "no arm read one"],
    ]),
    h("h3", null, "Commands"),
    of.cache_command && [h("p", { class: "quiet" }, "The cache was made by"), command(of.cache_command)],
    of.command && [h("p", { class: "quiet" }, "This report was written by"), command(of.command)],
    h("h3", null, "Versions"),
    facts(versions.map(([name, value]) => [name, plain(value)])),
    of.answers_written_by.map((group, i) => shown_tree(`Answers written by${of.answers_written_by.length > 1 ? ` (${i + 1})` : ""}: ${group.answers.length} files`, { ...group.by, answers: group.answers })),
    shown_tree("The resolved recipe", of.recipe),
    shown_tree("What the arms were trained with", of.trained_with),
    shown_tree("How each metric was computed", data.results.metrics),
    shown_tree("The cache's identity, of which the fingerprint is the hash", data.cost.cache?.identity));
}
