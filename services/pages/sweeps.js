"use strict";
// The list of sweeps, the newest result first.

const EVERY_MS = 5000;

function rowOf(one) {
  const link = html(
    "a",
    { href: `sweeps/${encodeURIComponent(one.sweep)}/sweep.html`, "data-focus": one.sweep },
    one.name || one.sweep,
  );
  if (one.status === "unreadable") {
    return html(
      "tr",
      {},
      html("th", { scope: "row" }, one.sweep),
      html("td", { colspan: 7, class: "soft" }, "sweep.json cannot be read"),
    );
  }
  const figures = Object.entries(one.figures)
    .map(([name, value]) => `${name} ${shown(value, unitOf(name))}`)
    .join(", ");
  return html(
    "tr",
    {},
    html("th", { scope: "row" }, link),
    html("td", {}, statusOf(one.status)),
    html("td", {}, one.verb),
    html("td", { class: "number" }, `${one.ended} of ${one.wanted}`),
    html("td", { class: "number" }, String(one.failed)),
    html("td", { class: "wrap" }, one.best ? `${one.best}: ${figures}` : "–"),
    html("td", { class: "number" }, duration(Math.round(one.seconds))),
    html("td", {}, moment(one.updated)),
  );
}

follow("sweeps/index.json", {
  take(text) {
    const { sweeps } = JSON.parse(text);
    sweeps.sort((a, b) => String(b.updated || "").localeCompare(String(a.updated || "")));
    replace($("rows"), ...sweeps.map(rowOf));
    $("none").hidden = sweeps.length > 0;
  },
  said: () => "Live",
  every: () => EVERY_MS,
});
