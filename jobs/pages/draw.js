"use strict";
// Elements, the frame of a chart, and what is read off it.

const $ = (id) => document.getElementById(id);

function add(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (missing(value) || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => !missing(child) && child !== false));
  return node;
}
// Text is always a text node: nothing that a document says is read as HTML.
const html = (name, attributes, ...children) => add(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  add(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// Put `children` in the place of what is in `host`, and the focus and the scroll back where they were.
function replace(host, ...children) {
  const key = host.contains(document.activeElement) && document.activeElement.getAttribute("data-focus");
  host.replaceChildren(...children.filter(Boolean));
  if (key) host.querySelector(`[data-focus="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

function options(select, choices, fallback) {
  const before = select.value;
  const same =
    select.options.length === choices.length &&
    choices.every(([value], i) => select.options[i].value === value);
  if (!same) {
    select.replaceChildren(...choices.map(([value, text]) => html("option", { value }, text)));
    const kept = choices.some(([value]) => value === before) && select.dataset.chosen;
    select.value = kept ? before : (fallback ?? choices[0]?.[0] ?? "");
  }
  select.closest("label").hidden = choices.length < 2;
  return select.value;
}

const tip = {
  show(x, y, title, rows) {
    const box = $("tip");
    box.replaceChildren(
      html("b", {}, title),
      ...rows.map(([name, value]) => html("span", {}, html("i", {}, name), value)),
    );
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    box.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
    box.style.top = `${Math.max(4, Math.min(y - height / 2, innerHeight - height - 4))}px`;
  },
  hide() {
    $("tip").hidden = true;
  },
};

// The frame of a chart with two axes. `x` and `y` are {values, unit, log, label, ladder}.
// Returns {root, x, y, box}: root takes what is drawn, x and y are scales.
function frame(host, { x, y, height, label }) {
  const width = Math.max(240, host.clientWidth);
  const top = 26,
    bottom = height - 40,
    right = width - 14;
  const down = scaleOf(y.values, { from: bottom, to: top, unit: y.unit, log: y.log, count: height / 55 });
  const left = 14 + 6.6 * Math.max(2, ...down.ticks.map((tick) => tick.text.length));
  const place = { from: left, to: right };
  const across = x.ladder
    ? ladderOf(x.ladder, place)
    : scaleOf(x.values, { ...place, unit: x.unit, log: x.log, whole: x.whole, count: width / 90 });
  const title = (axis, scale) => `${axis.label}${scale.unit ? `, ${scale.unit}` : ""}${axis.note || ""}`;
  const fit = (text, pixels) => elide(text, Math.max(8, Math.floor(pixels / 6.4)));
  const root = svg(
    "svg",
    { width, height, class: "chart", role: "group", "aria-label": label },
    svg(
      "g",
      { class: "grid" },
      ...down.ticks.map((tick) =>
        svg("line", { x1: left, x2: right, y1: down.at(tick.value), y2: down.at(tick.value) }),
      ),
      ...across.ticks.map((tick) =>
        svg("line", { y1: top, y2: bottom, x1: across.at(tick.value), x2: across.at(tick.value) }),
      ),
    ),
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    ...down.ticks.map((tick) =>
      svg("text", { x: left - 7, y: down.at(tick.value) + 4, "text-anchor": "end" }, tick.text),
    ),
    ...thinned(across, 7).map((tick) =>
      svg(
        "text",
        { x: across.at(tick.value), y: bottom + 17, "text-anchor": "middle" },
        elide(tick.text, 14),
      ),
    ),
    svg(
      "text",
      { class: "title", x: 2, y: 13 },
      svg("title", {}, y.label),
      fit(title(y, down), right - 10),
    ),
    svg(
      "text",
      { class: "title", x: right, y: bottom + 34, "text-anchor": "end" },
      svg("title", {}, x.label),
      fit(title(x, across), right - left),
    ),
  );
  return { root, x: across, y: down, box: { left, right, top, bottom, width, height } };
}

// Those ticks whose texts do not run into each other.
function thinned(scale, perCharacter) {
  const kept = [];
  let free = -Infinity;
  for (const tick of scale.ticks) {
    const half = (Math.min(14, tick.text.length) * perCharacter) / 2,
      at = scale.at(tick.value);
    if (at - half < free) continue;
    kept.push(tick);
    free = at + half + 6;
  }
  return kept;
}

// From dark violet to yellow, as even in lightness as viridis: read without seeing hues. A share of the ink
// keeps the violet visible on a dark card and the yellow on a light one.
const RAMP = ["#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#f1e51d"];
function rampColour(share) {
  const place = Math.max(0, Math.min(1, share)) * (RAMP.length - 1),
    index = Math.min(RAMP.length - 2, Math.floor(place));
  const parts = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const [one, two] = [parts(RAMP[index]), parts(RAMP[index + 1])];
  const mixed = one.map((value, i) => Math.round(value + (two[i] - value) * (place - index))).join(",");
  return `color-mix(in oklab, rgb(${mixed}) 72%, var(--ink))`;
}

// What a colour means: a strip with the ends of its range, as HTML.
function rampKey(label, scale) {
  const steps = 24;
  const strip = svg(
    "svg",
    { width: 96, height: 10, "aria-hidden": "true" },
    ...Array.from({ length: steps }, (_, i) => {
      const part = svg("rect", { x: (i * 96) / steps, width: 96 / steps + 0.5, height: 10 });
      part.style.fill = rampColour(i / (steps - 1));
      return part;
    }),
  );
  return html(
    "span",
    { class: "key" },
    `${label} `,
    html("span", {}, shown(scale.low, scale.of)),
    strip,
    html("span", {}, shown(scale.high, scale.of)),
  );
}

// The mark of a trial: its shape says its status, so colour is never the only sign.
function mark(status, x, y, size, attributes) {
  const r = size;
  if (status === "failed") {
    return svg("path", {
      d: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`,
      ...attributes,
    });
  }
  if (status === "stopped") {
    return svg("rect", {
      x: x - r * 0.85,
      y: y - r * 0.85,
      width: r * 1.7,
      height: r * 1.7,
      ...attributes,
    });
  }
  return svg("circle", { cx: x, cy: y, r, ...attributes });
}

// The nearest of `points` ({px, py}) to the pointer, none when all are far.
function nearest(root, points, event, reach = 30) {
  const box = root.getBoundingClientRect();
  const x = event.clientX - box.left,
    y = event.clientY - box.top;
  let found = null,
    least = reach * reach;
  for (const point of points) {
    const distance = (point.px - x) ** 2 + (point.py - y) ** 2;
    if (distance < least) [found, least] = [point, distance];
  }
  return found;
}

async function copyText(button, text) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https a browser has no clipboard for scripts; what is selected can still be copied.
    const range = document.createRange();
    range.selectNodeContents(button.parentElement.querySelector("code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => {
    button.textContent = "Copy";
  }, 1600);
}

// A command in one line that can be copied.
function command(text, focus) {
  const button = html("button", { type: "button", class: "small", "data-focus": focus }, "Copy");
  button.addEventListener("click", () => copyText(button, text));
  return html("div", { class: "command" }, html("code", { tabindex: "0" }, text), button);
}
