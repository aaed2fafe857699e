"use strict";
// The trials as a table, and one of them in full.

const SIGNS = { finished: "●", running: "◌", stopped: "■", failed: "✕" };

function columnsOf(state) {
  const value = (one) => {
    const format = columnFormat(state.trials.map(one.get), one.unit);
    return {
      key: one.key,
      name: one.name,
      label: one.label,
      unit: format.unit,
      number: numeric(one, state.trials),
      get: one.get,
      text: (trial) =>
        one.kind === "metric" && one.get(trial) === null ? "not finite" : format.text(one.get(trial)),
    };
  };
  const same = new Set(sameForAll(state));
  const kind = (name) => state.quantities.filter((one) => one.kind === name && !same.has(one)).map(value);
  return [
    { key: "trial", label: "trial", get: (trial) => trial.trial },
    { key: "status", label: "status", get: (trial) => trial.status },
    ...kind("metric"),
    ...kind("time"),
    ...kind("setting"),
    {
      key: "reason",
      label: "why it ended",
      get: (trial) => trial.reason ?? undefined,
      text: (trial) => trial.reason || "",
    },
  ];
}

// Figures that every trial has alike, such as those of the model they start from: one sentence, not a column.
function sameForAll(state) {
  const told = state.trials.filter((trial) => Object.keys(trial.metrics).length);
  if (told.length < 2) return [];
  return state.quantities.filter((one) => {
    const values = told.map(one.get);
    return (
      one.kind === "metric" && !one.objective && !values.some(missing) && distinct(values).length === 1
    );
  });
}

function compare(get, down) {
  const order = (a, b) =>
    finite(a) && finite(b) ? a - b : shown(a).localeCompare(shown(b), "en", { numeric: true });
  return (one, other) => {
    const [a, b] = [get(one), get(other)];
    // What has no value comes last in either order.
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return down ? order(b, a) : order(a, b);
  };
}

function drawTable(state) {
  const columns = columnsOf(state);
  const aim = state.quantities.find((one) => one.objective);
  const sort =
    state.sort || (aim ? { key: aim.key, down: aim.way === "max" } : { key: "trial", down: false });
  const column = columns.find((one) => one.key === sort.key) || columns[0];
  const rows = state.trials.filter((trial) => state.shown.has(trial));
  // Among equals the best comes first, then the front: sorting keeps this order.
  const rank = (trial) => (trial.trial === state.document.best ? 0 : trial.front ? 1 : 2);
  rows.sort((a, b) => rank(a) - rank(b)).sort(compare(column.get, sort.down));
  const box = $("rows").closest(".table"),
    { scrollTop, scrollLeft } = box;
  replace($("head"), ...columns.map((one) => heading(state, one, sort)));
  replace($("rows"), ...rows.map((trial) => rowOf(state, columns, trial)));
  Object.assign(box, { scrollTop, scrollLeft });
  const same = sameForAll(state).map(
    (one) =>
      `${one.name} ${shown(one.get(state.trials.find((trial) => !missing(one.get(trial)))), one.unit)}`,
  );
  $("same").textContent = same.length ? `The same for all: ${same.join(", ")}.` : "";
  const none = $("none");
  none.hidden = rows.length > 0;
  none.textContent = state.trials.length ? "No trial passes the filters." : "No trial has started yet.";
}

function heading(state, column, sort) {
  const sorted = sort.key === column.key;
  const button = html(
    "button",
    { type: "button", "data-focus": `sort-${column.key}`, title: column.name || column.label },
    html("span", { class: "label" }, elide(column.label, 26)),
    column.unit ? html("span", { class: "unit" }, column.unit) : null,
    html("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (sort.down ? "▼" : "▲") : ""),
  );
  button.addEventListener("click", () => {
    state.sort = { key: column.key, down: sorted ? !sort.down : false };
    state.draw();
  });
  return html(
    "th",
    {
      scope: "col",
      class: column.number ? "number" : null,
      "aria-sort": sorted ? (sort.down ? "descending" : "ascending") : "none",
    },
    button,
  );
}

// A row is made again only when something in it has changed, so a selection of text in it stays.
function rowOf(state, columns, trial) {
  const best = trial.trial === state.document.best;
  const texts = columns.slice(2).map((column) => column.text(trial));
  const beyond = !trial.within_limits && trial.status !== "running";
  const signature = JSON.stringify([
    trial.status,
    best,
    trial.front,
    beyond,
    state.selected === trial.trial,
    columns.map((column) => column.key),
    texts,
  ]);
  const kept = state.rows.get(trial.trial);
  if (kept?.signature === signature) return kept.row;
  const open = html(
    "button",
    {
      type: "button",
      class: "open",
      "data-focus": `row-${trial.trial}`,
      title: trial.trial,
      onclick: () => state.select(trial.trial),
    },
    elide(trial.trial, 16),
  );
  const badges = [
    best && html("span", { class: "badge best" }, "★ best"),
    trial.front && !best && html("span", { class: "badge" }, "front"),
    beyond && trial.status === "finished" && html("span", { class: "badge beyond" }, "over a limit"),
  ];
  const cells = columns.slice(2).map((column, i) =>
    html(
      "td",
      {
        class: column.number ? "number" : column.key === "reason" ? "reason" : "text",
        title: texts[i].length > 24 ? texts[i] : null,
      },
      texts[i],
    ),
  );
  const row = html(
    "tr",
    {
      class: [trial.status, best && "best", state.selected === trial.trial && "selected"]
        .filter(Boolean)
        .join(" "),
    },
    html("th", { scope: "row" }, open),
    html("td", { class: "status" }, statusOf(trial.status), ...badges),
    ...cells,
  );
  state.rows.set(trial.trial, { signature, row });
  return row;
}

function statusOf(status) {
  return html(
    "span",
    { class: `status ${status}` },
    html(
      "span",
      { class: "sign", "aria-hidden": "true" },
      Object.hasOwn(SIGNS, status) ? SIGNS[status] : "?",
    ),
    status,
  );
}

// The panel beside the page: all that is known of one trial.
function drawDetails(state) {
  const box = $("details"),
    trial = state.trials.find((one) => one.trial === state.selected);
  box.hidden = !trial;
  if (!trial) return;
  const signature = JSON.stringify([trial, state.document.best]);
  if (box.dataset.signature === signature) return;
  box.dataset.signature = signature;
  const list = (pairs) =>
    html("dl", {}, ...pairs.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));
  const figures = state.quantities
    .filter((one) => one.kind === "metric")
    .map((one) => {
      const value = one.get(trial);
      const over =
        one.limit &&
        finite(value) &&
        (value > (one.limit.max ?? value) || value < (one.limit.min ?? value));
      return [
        one.name,
        value === null ? "not finite" : shown(value, one.unit) + (over ? ", over its limit" : ""),
      ];
    });
  const close = html(
    "button",
    { type: "button", class: "small", "data-focus": "close", onclick: () => state.select(null) },
    "Close",
  );
  replace(
    box,
    html("header", {}, html("h2", { id: "details-title" }, `Trial ${trial.trial}`), close),
    html(
      "p",
      {},
      statusOf(trial.status),
      trial.trial === state.document.best
        ? " ★ best of the sweep"
        : trial.front
          ? " on the front"
          : trial.status === "finished" && !trial.within_limits
            ? " beyond a limit"
            : "",
    ),
    trial.reason
      ? html(
          "section",
          {},
          html("h3", {}, trial.status === "failed" ? "Why it failed" : "Why it ended"),
          html("p", { class: `why ${trial.status}` }, trial.reason),
        )
      : null,
    html(
      "section",
      {},
      html("h3", {}, "Figures"),
      list([
        ...figures,
        trial.parent ? ["began from", descentText(state.trials, trial)] : null,
        ["time taken", missing(trial.seconds) ? "–" : shown(trial.seconds, "s")],
        ["started", moment(trial.started)],
      ].filter(Boolean)),
    ),
    html(
      "section",
      {},
      html("h3", {}, "Settings"),
      list(Object.entries(trial.settings).map(([key, value]) => [key, shown(value)])),
    ),
    html(
      "section",
      {},
      html("h3", {}, "Serve it"),
      trial.serve
        ? command(trial.serve, "copy-serve")
        : html(
            "p",
            { class: "soft" },
            trial.status === "finished"
              ? "It made no model to serve."
              : trial.status === "running"
                ? "Not yet: it is running."
                : "There is no model: it did not finish.",
          ),
    ),
    html(
      "section",
      {},
      html("h3", {}, "Files"),
      trial.files.length
        ? html("ul", { class: "files" }, ...trial.files.map((path) => html("li", {}, fileOf(state, path))))
        : html("p", { class: "soft" }, "none"),
    ),
    html("p", { class: "soft digest" }, `Resolved recipe, sha256 ${trial.recipe_sha256 || "–"}`),
  );
}

// A link where the page lies beside the files. A server shows the page alone, so there it is a name.
function fileOf(state, path) {
  const parts = path.split("/");
  const beside =
    state.beside && !path.startsWith("/") && parts.every((part) => part && part !== "." && part !== "..");
  return beside
    ? html("a", { href: `./${parts.map(encodeURIComponent).join("/")}` }, path)
    : html("code", {}, path);
}

function moment(text) {
  const date = new Date(text);
  return Number.isNaN(date.getTime())
    ? "–"
    : date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}
