// Two tokenizers over one text: a row of tokens each, a line from every position of the student to the teacher's that
// has read exactly the same text before it. A row is as long as the text; what has no counterpart is hatched.
const ROW = 30, GAP = 56, END = 46;

// [x, width] of each token. Tokens that consume one character between them share its place.
function places(tokens, length, CHARACTER) {
  const found = [];
  for (let i = 0; i < tokens.length; i += 1) {
    let j = i;
    while (j + 1 < tokens.length - 1 && tokens[j + 1][1] === tokens[i][1]) j += 1;
    if (i === tokens.length - 1) { found.push([length * CHARACTER + 4, END]); break; }
    const start = Math.min(...tokens.slice(i, j + 1).map((t) => t[0])), width = Math.max((tokens[i][1] - start) * CHARACTER, 4) / (j - i + 1);
    for (let k = i; k <= j; k += 1) found.push([start * CHARACTER + (k - i) * width, width]);
    i = j;
  }
  return found;
}

function token_row(tokens, at, y, label, state, letters, picked, pick) {
  return tokens.map(([start, end, , name], i) => {
    const [x, width] = at[i], last = i === tokens.length - 1;
    const text = last ? "end" : token(letters.slice(start, end).join("") || name || "");
    const size = Math.max(7, Math.min(13, (1.55 * width) / Math.max(1, [...text].length)));
    return s("g", { class: `token ${state(i)}${picked === i ? " picked" : ""}`, onclick: pick && (() => pick(i)) },
      s("title", null, `${label} ${i}: ${text}${state(i) ? `, ${state(i)}` : ""}`),
      s("rect", { x: x + 0.5, y, width: Math.max(2, width - 1), height: ROW, rx: 3 }),
      s("text", { x: x + width / 2, y: y + ROW / 2 + size / 3, "text-anchor": "middle", css: { "font-size": `${size.toFixed(1)}px` } }, text));
  });
}

function alignment_figure(example, mode, picked, pick) {
  const letters = Array.from(example.answer), pairs = example.pairs[mode];
  const teacher = example.teacher.map((t) => [t.start, t.end]), student = example.tokens;
  const CHARACTER = Math.max(11, Math.min(28, 900 / letters.length)); // wider where there is room
  const above = places(teacher, letters.length, CHARACTER), below = places(student, letters.length, CHARACTER);
  const answered = new Set(pairs.filter((n) => n >= 0));
  const lower = 20 + ROW + GAP, W = letters.length * CHARACTER + END + 8, H = lower + ROW + 20;
  const of_teacher = (n) => (example.teacher[n].status !== "usable" ? "quarantined" : answered.has(n) ? "" : "unpaired");
  const of_student = (m) => (pairs[m] < 0 ? "unpaired" : example.teacher[pairs[m]].status !== "usable" ? "quarantined" : "");
  const unpaired = pairs.filter((n) => n < 0).length, idle = teacher.length - answered.size;
  const quarantined = example.teacher.filter((t) => t.status !== "usable").length;
  const said = `${pairs.length - unpaired} of the student's ${pairs.length} positions have a teacher's; ${unpaired} have none; `
    + `${idle} of the teacher's ${teacher.length} are not used; ${quarantined} are quarantined.`;
  const svg = s("svg", { class: "alignment", viewBox: `0 -2 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": `Alignment of the two tokenizers. ${said}` },
    s("defs", null, s("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      s("line", { class: "hatching", x1: 0, y1: 0, x2: 0, y2: 6 }))),
    s("text", { class: "axis", x: 0, y: 12 }, "teacher"), s("text", { class: "axis", x: 0, y: H - 4 }, "student"),
    pairs.map((n, m) => n >= 0 && s("line", { class: `pair${picked === m ? " picked" : ""}`, x1: above[n][0] + Math.min(5, above[n][1] / 2), y1: 20 + ROW, x2: below[m][0] + Math.min(5, below[m][1] / 2), y2: lower })),
    token_row(teacher, above, 20, "teacher's position", of_teacher, letters, pairs[picked], null),
    token_row(student, below, lower, "student's position", of_student, letters, picked, pick));
  return [h("p", { class: "quiet" }, said, mode === "boundary" ? " A line stands where both have read the same text before their token" : " A line joins positions of the same number, whatever each has read", "; hatched tokens have no counterpart."),
    wide("Alignment of the two tokenizers", svg)];
}
