"use strict";

const { findings, texts, kinds, words } = JSON.parse(document.getElementById("data").textContent);
const layers = findings.model.routed_layers;
const GROUPINGS = {
  kind: "by kind of token",
  loss: "by the loss of predicting the next token, nats",
  surprise: "by how surprising the token was, nats",
  frequency: "by how often the token occurs",
  position: "by position in the sequence",
  source: "by source",
};
const chosen = { source: 0, layer: "all", gate: "the model", measure: "density" };

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const fixed = (number, digits = 2) => (number === null ? "–" : number.toFixed(digits).replace("-", "−"));
const signed = (number, digits = 2) => (number > 0 ? "+" : "") + fixed(number, digits);
const percent = (share) => `${(100 * share).toFixed(1)}%`;

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "circle", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/* colours: from the paper's to full, so that light and dark pages read alike */

let theme;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
  theme = Object.fromEntries(["paper", "some", "much", "more", "fewer"].map((name) => [name, rgb(`--${name}`)]));
}
const mix = (from, to, share) => from.map((part, i) => Math.round(part + (to[i] - part) * share));
const fill = (share) => (share < 0.5 ? mix(theme.paper, theme.some, 2 * share) : mix(theme.some, theme.much, 2 * share - 1));
const diverge = (value, most) => mix(theme.paper, value > 0 ? theme.more : theme.fewer, Math.min(1, Math.abs(value) / most));

function luminance(rgb) {
  const [r, g, b] = rgb.map((part) => part / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function paint(node, rgb) {
  node.style.backgroundColor = `rgb(${rgb})`;
  node.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff"; // equal contrast to both
}

/* choices, tooltips, arrow keys */

function offer(container, name, options, redraw) {
  for (const [value, label] of options) {
    const input = element("input", { type: "radio", name, value, ...(String(chosen[name]) === String(value) && { checked: "" }) });
    input.addEventListener("change", () => { chosen[name] = value; redraw(); });
    container.append(element("label", {}, input, element("span", {}, label)));
  }
}

function showTip(node, content) {
  const tip = byId("tooltip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - tip.offsetHeight - 6)}px`;
  node.setAttribute("aria-describedby", "tooltip");
}
function hideTip() {
  byId("tooltip").hidden = true;
  document.querySelectorAll("[aria-describedby=tooltip]").forEach((node) => node.removeAttribute("aria-describedby"));
}

/* One tab stop for many items: arrow keys move among them, up and down to the nearest one a line away. */
function explore(container, items, describe) {
  items.forEach((item, at) => { item.dataset.item = at; item.tabIndex = at ? -1 : 0; });
  if (!explored.has(container)) listen(container);
  explored.set(container, { items, describe });
}
const explored = new Map();

function listen(container) {
  const itemAt = (event) => Number(event.target.closest("[data-item]")?.dataset.item ?? -1);
  const show = (event) => {
    const { items, describe } = explored.get(container);
    const at = itemAt(event);
    if (at < 0) hideTip();
    else showTip(items[at], describe(at));
  };
  const on = (name, act) => container.addEventListener(name, act);
  on("pointerover", show);
  on("focusin", show);
  on("pointerleave", hideTip);
  on("focusout", hideTip);
  on("click", (event) => itemAt(event) >= 0 && move(explored.get(container).items, itemAt(event)));
  on("keydown", (event) => {
    const { items } = explored.get(container);
    const at = itemAt(event);
    if (event.key === "Escape") hideTip();
    const steps = {
      ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => items.length - 1,
      ArrowUp: () => lineAway(items, at, -1), ArrowDown: () => lineAway(items, at, 1),
    };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    move(items, Math.max(0, Math.min(items.length - 1, steps[event.key]())));
  });
}
function move(items, to) {
  items.forEach((item) => { item.tabIndex = -1; });
  items[to].tabIndex = 0;
  items[to].focus();
}
function lineAway(items, at, step) {
  const start = items[at].getBoundingClientRect();
  let best = at;
  let nearest = Infinity;
  let line = null;
  for (let i = at + step; i >= 0 && i < items.length; i += step) {
    const box = items[i].getBoundingClientRect();
    if (Math.abs(box.top - start.top) < start.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > start.height / 2) break;
    if (Math.abs(box.left - start.left) < nearest) [best, nearest] = [i, Math.abs(box.left - start.left)];
  }
  return best;
}

/* the text */

let tokens = [];
const coins = texts.map((text, number) => text.executed.map((_, i) => coin(number * 1e6 + i)));

/* What a random gate of the same densities makes of a token: bits as the model's own. */
function coin(seed) {
  return findings.density.map((density, layer) => {
    let bits = Math.imul(seed ^ (layer * 0x9e3779b1), 0x85ebca6b) >>> 0; // a hash, so that a page is always the same
    bits = Math.imul(bits ^ (bits >>> 16), 0x7feb352d);
    bits = Math.imul(bits ^ (bits >>> 15), 0x846ca68b);
    return ((bits ^ (bits >>> 16)) >>> 0) / 2 ** 32 < density ? "1" : "0";
  }).join("");
}
const decisions = () => (chosen.gate === "the model" ? texts : coins.map((executed) => ({ executed })))[chosen.source].executed;
const depthOf = (bits) => [...bits].filter((bit) => bit === "1").length;

function drawText() {
  const text = texts[chosen.source];
  const box = byId("text");
  box.replaceChildren();
  tokens = text.text.map((shown, i) => {
    if (i && text.document[i] !== text.document[i - 1]) box.append(element("hr"));
    const token = element("span");
    for (const part of (shown || "·").split(/(\n|\t)/)) {
      if (part === "\n" || part === "\t") token.append(element("i", {}, part === "\n" ? "↵" : "⇥"), part);
      else token.append(part);
    }
    box.append(token);
    return token;
  });
  const source = findings.text.sources[chosen.source];
  byId("cut").textContent = tokens.length < source.tokens
    ? `The first ${count(tokens.length)} of ${count(source.tokens)} tokens; all of them are in the numbers below.` : "";
  explore(box, tokens, describeToken);
  colourText();
}

function colourText() {
  const single = chosen.layer !== "all";
  decisions().forEach((bits, i) => {
    const depth = single ? Number(bits[chosen.layer]) : depthOf(bits);
    tokens[i].dataset.executed = depth;
    paint(tokens[i], fill(single ? depth : depth / layers.length));
  });
  const every = Math.ceil(layers.length / 12);
  const depths = [...Array(layers.length + 1).keys()].filter((depth) => depth % every === 0 || depth === layers.length);
  const steps = single ? ["skipped", "executed"] : depths;
  const list = element("ol");
  steps.forEach((label, i) => {
    const step = element("li", {}, String(label));
    paint(step, fill(single ? i : label / layers.length));
    list.append(step);
  });
  const what = single ? `layer ${layers[chosen.layer]}` : "layers executed";
  byId("legend").replaceChildren(what, list);
  byId("legend").setAttribute("aria-label", `${what}: from no colour, ${steps[0]}, to full colour, ${steps.at(-1)}`);
}

function describeToken(i) {
  const text = texts[chosen.source];
  const bits = decisions()[i];
  const strip = element("div", { class: "strip" });
  layers.forEach((layer, at) => strip.append(element("span", bits[at] === "1" ? { class: "ran" } : {}, String(layer))));
  const quoted = text.text[i] ? JSON.stringify(text.text[i]) : "part of a character";
  return [
    element("b", {}, quoted), ` ${kinds[text.kind[i]]}`, strip,
    element("div", {}, `executes ${depthOf(bits)} of ${layers.length} routed layers`),
    element("div", {}, `loss ${fixed(text.loss[i])} nats (predicting the next token)`),
    element("div", {}, `surprise ${fixed(text.surprise[i])} nats (of this token)`),
    element("div", {}, `this token occurs ${count(text.count[i])} times`),
  ];
}

/* the numbers */

function headOf(...names) {
  return element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name))));
}

function drawGroups() {
  byId("groups").replaceChildren();
  const drawn = Object.entries(GROUPINGS).filter(([name]) => findings.groupings[name].length > 1);
  const depths = drawn.flatMap(([name]) => findings.groupings[name].flatMap((group) => [group.depth, ...group.random_depth]));
  const span = [Math.min(...depths), Math.max(...depths)]; // one scale, so that groupings can be compared
  for (const [name, title] of drawn) {
    const groups = findings.groupings[name];
    const body = element("tbody");
    const notes = [];
    for (const group of groups) {
      const row = element("tr", {}, element("th", { scope: "row" }, group.label), element("td", { class: "tokens" }, count(group.tokens)));
      group.density.forEach((share, layer) => row.append(densityCell(group, share, layer, notes)));
      row.append(element("td", {}, fixed(group.depth)), element("td", { class: "plot" }, rangePlot(group.depth, null, group.random_depth, span)));
      body.append(row);
    }
    const table = element("table", { "data-grouping": name }, headOf("", "tokens", ...layers.map(String), "depth", scaleOf(span)), body);
    explore(table, [...table.querySelectorAll("td.cell")], (at) => [notes[at]]);
    byId("groups").append(element("div", {}, element("h3", {}, title), table));
  }
}

function densityCell(group, share, layer, notes) {
  const [low, high] = group.random[layer];
  const difference = share - findings.density[layer];
  const chance = share >= low && share <= high;
  const absolute = chosen.measure === "density";
  const cell = element("td", { class: chance ? "cell chance" : "cell" }, absolute ? (100 * share).toFixed(0) : signed(100 * difference, 0));
  paint(cell, absolute ? fill(share) : diverge(difference, 0.5));
  notes.push(`${group.label}, layer ${layers[layer]}: ${percent(share)} of ${count(group.tokens)} tokens; a random gate gives `
    + `${percent(low)} to ${percent(high)}`);
  return cell;
}

/* The ends of a plot's scale, over its ends. */
function scaleOf(ends, digits = 2) {
  return element("div", { class: "scale" }, ...ends.map((end) => element("span", {}, fixed(end, digits))));
}

/* A dot with its interval over the band of a random gate. */
function rangePlot(value, interval, band, [from, to], width = 100) {
  const x = (at) => 5 + ((at - from) / (to - from || 1)) * (width - 10);
  const plot = element("svg", { width, height: 18, role: "img", "aria-label": `${fixed(value)}; random ${fixed(band[0])} to ${fixed(band[1])}` });
  plot.append(element("line", { class: "axis", x1: 0, x2: width, y1: 9, y2: 9 }));
  plot.append(element("rect", { class: "band", x: x(band[0]), y: 3, width: Math.max(2, x(band[1]) - x(band[0])), height: 12 }));
  if (interval) plot.append(element("line", { class: "reach", x1: x(interval[0]), x2: x(interval[1]), y1: 9, y2: 9 }));
  if (value !== null) plot.append(element("circle", { class: "dot", cx: x(value), cy: 9, r: 4 }));
  return plot;
}

function drawDepth() {
  const { share, random } = findings.depth;
  const most = Math.max(...share, ...random);
  const body = element("tbody");
  share.forEach((found, depth) => {
    if (found < 0.0005 && random[depth] < 0.0005) return;
    const plot = element("svg", { width: 260, height: 18, role: "img", "aria-label": `${percent(found)}, random ${percent(random[depth])}` });
    plot.append(element("rect", { class: "bar", x: 1, y: 2, width: (255 * found) / most, height: 14 }));
    plot.append(element("rect", { class: "outline", x: 1, y: 2, width: (255 * random[depth]) / most, height: 14 }));
    body.append(element("tr", {}, element("th", { scope: "row" }, String(depth)), element("td", { class: "plot" }, plot),
      element("td", {}, percent(found)), element("td", { class: "tokens" }, percent(random[depth]))));
  });
  byId("depth").append(element("table", { "aria-labelledby": "depth-title" }, headOf("layers", "", "tokens", "random gate"), body));
}

function drawCorrelations() {
  const found = findings.rank_correlation;
  const entries = Object.entries(found.with);
  const reach = Math.max(0.05, ...found.random, ...entries.flatMap(([, { rho, interval }]) => [rho, ...(interval ?? [])].map(Math.abs)));
  const body = element("tbody");
  for (const [name, { rho, interval }] of entries) {
    body.append(element("tr", {}, element("th", { scope: "row" }, name),
      element("td", { class: "plot" }, rangePlot(rho, interval, found.random, [-reach, reach], 260)),
      element("td", {}, rho === null ? "–" : signed(rho, 3)),
      element("td", { class: "tokens" }, interval ? `${signed(interval[0], 3)} to ${signed(interval[1], 3)}` : "")));
  }
  const how = found.sampled ? `95% intervals from ${count(found.resamples)} samples of the ${count(found.units)} ${found.sampled}s. ` : "";
  byId("correlations").append(
    element("table", { "aria-labelledby": "correlation-title" }, headOf("", scaleOf([-reach, 0, reach]), "ρ", "95%"), body),
    element("p", { class: "muted" }, `${how}The grey bar is what a random gate gives.`));
}

function drawAgreement() {
  const { correlation, share, random } = findings.agreement;
  const body = element("tbody");
  const notes = [];
  byId("agreement").replaceChildren();
  correlation.forEach((row, a) => {
    const line = element("tr", {}, element("th", { scope: "row" }, `layer ${layers[a]}`));
    row.forEach((value, b) => {
      const cell = element("td", { class: "cell" }, a === b ? "" : fixed(value));
      paint(cell, a === b ? theme.paper : diverge(value ?? 0, 1));
      notes.push(`layers ${layers[a]} and ${layers[b]} decide alike on ${percent(share[a][b])} of the tokens`
        + (a === b ? "" : `; random gates of their densities on ${percent(random[a][b])}`));
      line.append(cell);
    });
    body.append(line);
  });
  const table = element("table", { "aria-labelledby": "agreement-title" }, headOf("", ...layers.map(String)), body);
  explore(table, [...table.querySelectorAll("td.cell")], (at) => [notes[at]]);
  const scale = element("ol", { "aria-hidden": "true" });
  for (const value of [-1, -0.5, 0, 0.5, 1]) {
    const step = element("li", {}, signed(value, 1));
    paint(step, diverge(value, 1));
    scale.append(step);
  }
  byId("agreement").append(element("div", { class: "legend" }, "correlation", scale), table);
}

function drawHeader() {
  const { model, text } = findings;
  const step = model.step === null ? "" : `, step ${count(model.step)}`;
  byId("model").textContent = `${model.name}${step}: router ${model.router}, ${layers.length} of ${model.num_layers} layers routed`;
  const figures = [
    [fixed(findings.mean_depth), `of ${layers.length} routed layers per token`],
    [fixed(findings.mean_loss, 3), "nats per token"],
    [count(text.tokens), `tokens, ${count(text.documents)} document${text.documents > 1 ? "s" : ""}`],
  ];
  for (const [number, what] of figures) byId("figures").append(element("div", { class: "figure" }, element("b", {}, number), what));
  byId("headlines").append(...findings.headlines.map((line) => element("li", {}, line)));
  byId("warnings").append(...findings.warnings.map((line) => element("p", { class: "warning" }, line)));
  for (const [word, meaning] of Object.entries(words)) byId("words").append(element("dt", {}, word), element("dd", {}, meaning));
}

function recolour() {
  readTheme();
  colourText();
  drawGroups();
  drawAgreement();
}

readTheme();
document.body.classList.toggle("dense", layers.length > 12);
drawHeader();
offer(byId("sources"), "source", texts.map((text, i) => [i, text.name]), drawText);
offer(byId("layers"), "layer", [["all", "all"], ...layers.map((layer, i) => [i, String(layer)])], colourText);
offer(byId("gates"), "gate", [["the model", "the model"], ["a random gate", "a random gate"]], colourText);
offer(byId("measures"), "measure", [["density", "density"], ["difference", "difference from a random gate"]], drawGroups);
drawText();
drawGroups();
drawDepth();
drawCorrelations();
drawAgreement();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
