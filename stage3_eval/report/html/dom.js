// Elements, texts and numbers. Nothing here or elsewhere parses HTML: a text becomes a text node, whatever is in it.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "css") for (const [key, of] of Object.entries(value)) node.style.setProperty(key, of);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Control characters and those that turn the direction of writing, by name: a text cannot rearrange the page.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const plain = (text) => String(text).replace(HIDDEN, (c) => `<U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
const quoted = (text) => h("bdi", { class: "text" }, plain(text));
// A token alone: its white space can be seen.
function token(text) {
  const shown = plain(text).replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return shown === "" ? "∅" : shown;
}

const count = (value) => Number(value).toLocaleString("en", { maximumFractionDigits: 1 });
const percent = (value, digits = 2) => `${(100 * value).toFixed(digits)}`;
const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(100 * value).toFixed(2)}`;
const p_value = (value) => (value < 1e-99 ? "< 1e-99" : value >= 1e-4 ? value.toFixed(4) : value.toExponential(0));
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; value >= 1000 && i < units.length - 1; i += 1) value /= 1000;
  return `${i ? value.toFixed(value < 10 ? 2 : 1) : count(value)} ${units[i]}`;
}
function duration(seconds) {
  if (seconds < 90) return `${count(seconds)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const NAMES = { zero_shot: "base", few_shot: "base, few-shot" };
const named = (condition) => NAMES[condition] ?? condition;
const block_named = (block) => data.results.block_names[block] ?? block;

// A labelled choice; nothing is drawn where there is nothing to choose.
function choice(label, options, chosen, changed, text = (option) => option) {
  if (options.length < 2) return null;
  const select = h("select", { "aria-label": label, onchange: () => changed(options[select.selectedIndex]) },
    options.map((option) => h("option", { selected: option === chosen }, plain(text(option)))));
  return h("label", { class: "choice" }, h("span", null, label), select);
}

// Buttons of which one is pressed.
function buttons(label, options, chosen, changed, text) {
  const group = h("div", { class: "buttons", role: "group", "aria-label": label });
  for (const option of options) {
    group.append(h("button", {
      type: "button",
      "aria-pressed": String(option === chosen),
      onclick: (event) => {
        for (const other of group.children) other.setAttribute("aria-pressed", "false");
        event.currentTarget.setAttribute("aria-pressed", "true");
        changed(option);
      },
    }, text(option)));
  }
  return group;
}

function section(id, title, lead, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title), lead && h("p", { class: "lead" }, lead), ...children);
}
const wide = (label, ...children) => h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label }, ...children);
