"use strict";
// The page of one sweep: what is filtered and chosen, and the document as it grows.

const RUNNING_MS = 3000,
  ENDED_MS = 30000,
  VERSION = 1;

const state = {
  document: null,
  trials: [],
  quantities: [],
  shown: new Set(),
  rows: new Map(),
  words: "",
  statuses: new Set(),
  onFront: false,
  withinLimits: false,
  brushes: new Map(),
  ways: new Map(),
  sort: null,
  selected: null,
  dragging: false,
  beside: true,
  names: new Map(),
  short: (key) => state.names.get(key) || key,
  draw,
  select(trial) {
    const before = state.selected;
    if (trial && !before) state.opener = document.activeElement?.getAttribute("data-focus");
    state.selected = trial;
    draw();
    if (trial) $("details").querySelector("button")?.focus({ preventScroll: true });
    else if (state.opener)
      document.querySelector(`[data-focus="${CSS.escape(state.opener)}"]`)?.focus({ preventScroll: true });
  },
};

function take(sweep) {
  if (sweep.format_version !== VERSION) {
    throw new Error(
      `this page reads format ${VERSION} of a sweep, and the file has format ${shown(sweep.format_version)}`,
    );
  }
  state.document = sweep;
  state.trials = sweep.trials;
  state.quantities = quantitiesOf(sweep);
  state.names = shortNames(state.quantities.filter((one) => one.kind === "setting").map((one) => one.name));
  $("page").hidden = false;
  draw();
  say(told());
}

function draw() {
  if (!state.document) return;
  const words = state.words.toLowerCase().split(/\s+/).filter(Boolean),
    within = withinBrushes(state);
  state.shown = new Set(
    state.trials.filter(
      (trial) =>
        (!state.statuses.size || state.statuses.has(trial.status)) &&
        (!state.onFront || trial.front) &&
        (!state.withinLimits || trial.within_limits) &&
        hasWords(trial, words) &&
        within(trial),
    ),
  );
  for (const part of [
    drawTop,
    drawFilters,
    drawBest,
    drawFront,
    drawImportance,
    drawParallel,
    drawLearning,
    drawTable,
    drawDetails,
  ]) {
    part(state);
  }
}

function drawTop() {
  const { document: sweep, trials } = state;
  document.title = `${sweep.name}: axicon sweep`;
  $("name").textContent = sweep.name;
  const ended = trials.filter((trial) => trial.status !== "running").length;
  const left = sweep.wanted - ended,
    each = ended && sweep.seconds / ended;
  const wait =
    sweep.status === "running" && left > 0 && each
      ? `, about ${duration(Math.round(left * each))} left`
      : "";
  replace($("state"), statusOf(sweep.status));
  $("progress").max = Math.max(sweep.wanted, 1);
  $("progress").value = ended;
  $("counted").textContent =
    `${ended} of ${sweep.wanted} trials, ${duration(Math.round(sweep.seconds))}${wait}`;
  const aims = sweep.objectives.map((one) => `${one.metric} ${one.direction === "min" ? "↓" : "↑"}`);
  const limits = sweep.limits.flatMap((one) =>
    [
      ["max", "≤"],
      ["min", "≥"],
    ]
      .filter(([side]) => finite(one[side]))
      .map(([side, sign]) => `${one.metric} ${sign} ${shown(one[side], unitOf(one.metric))}`),
  );
  const facts = [
    ["verb", sweep.verb],
    ["search", sweep.search],
    ["scheduler", sweep.scheduler],
    ["objectives", aims.join(", ") || "none"],
    ["limits", limits.join(", ") || "none"],
    ["started", moment(sweep.started)],
  ];
  replace($("facts"), ...facts.map(([name, value]) => html("span", {}, html("i", {}, name), " ", value)));
  $("reason").hidden = !sweep.reason;
  $("reason").textContent = sweep.reason || "";
  const about = JSON.stringify([sweep.command, sweep.base]);
  if ($("about").dataset.signature !== about) {
    $("about").dataset.signature = about;
    replace(
      $("about"),
      html("p", {}, "The same command goes on with it; no trial that has ended runs again."),
      command(sweep.command, "copy-command"),
      html("h3", {}, "Base recipe"),
      html("pre", { tabindex: "0" }, JSON.stringify(sweep.base, null, 2)),
    );
  }
}

function drawFilters() {
  const count = (status) => state.trials.filter((trial) => trial.status === status).length;
  const toggle = (text, pressed, press, focus) =>
    html(
      "button",
      {
        type: "button",
        class: "toggle",
        "aria-pressed": String(pressed),
        "data-focus": focus,
        onclick: () => {
          press();
          draw();
        },
      },
      ...text,
    );
  const statuses = Object.keys(SIGNS)
    .filter((status) => count(status) || state.statuses.has(status))
    .map((status) =>
      toggle(
        [
          html("span", { class: `sign ${status}`, "aria-hidden": "true" }, SIGNS[status]),
          `${status} ${count(status)}`,
        ],
        state.statuses.has(status),
        () => {
          if (!state.statuses.delete(status)) state.statuses.add(status);
        },
        `only-${status}`,
      ),
    );
  const any =
    state.words || state.statuses.size || state.onFront || state.withinLimits || state.brushes.size;
  replace(
    $("toggles"),
    ...statuses,
    toggle(
      ["on the front"],
      state.onFront,
      () => {
        state.onFront = !state.onFront;
      },
      "only-front",
    ),
    state.document.limits.length
      ? toggle(
          ["within limits"],
          state.withinLimits,
          () => {
            state.withinLimits = !state.withinLimits;
          },
          "only-limits",
        )
      : null,
    any
      ? html(
          "button",
          { type: "button", class: "small", "data-focus": "clear", onclick: clearFilters },
          "Clear filters",
        )
      : null,
  );
  const brushed = state.brushes.size
    ? `, ${state.brushes.size} axis ${state.brushes.size > 1 ? "ranges" : "range"}`
    : "";
  $("passing").textContent = `${state.shown.size} of ${state.trials.length} shown${brushed}`;
}

function clearFilters() {
  state.words = $("words").value = "";
  state.statuses.clear();
  state.brushes.clear();
  state.onFront = state.withinLimits = false;
  draw();
  $("words").focus();
}

function drawBest() {
  const { document: sweep, quantities } = state;
  const best = state.trials.find((trial) => trial.trial === sweep.best),
    box = $("best");
  const signature = JSON.stringify([best, sweep.status, sweep.objectives]);
  if (box.dataset.signature === signature) return;
  box.dataset.signature = signature;
  if (!best) {
    const why = state.trials.some((trial) => trial.status === "finished")
      ? "No finished trial is within the limits."
      : "No trial has finished yet.";
    return replace(box, html("p", { class: "empty" }, why));
  }
  const figures = quantities.filter((one) => one.kind === "metric" && (one.objective || one.limit));
  replace(
    box,
    html(
      "div",
      { class: "figures" },
      html(
        "div",
        {},
        html("span", { class: "what" }, sweep.status === "running" ? "best so far" : "best"),
        html(
          "button",
          {
            type: "button",
            class: "big",
            "data-focus": "open-best",
            title: best.trial,
            onclick: () => state.select(best.trial),
          },
          `★ ${elide(best.trial, 18)}`,
        ),
      ),
      ...figures.map((one) =>
        html(
          "div",
          {},
          html(
            "span",
            { class: "what" },
            `${elide(one.name, 30)}${one.objective ? (one.way === "min" ? " ↓" : " ↑") : ""}`,
          ),
          html("span", { class: "big" }, shown(one.get(best), one.unit)),
        ),
      ),
    ),
    html(
      "p",
      { class: "chips" },
      ...Object.entries(best.settings).map(([key, value]) =>
        html(
          "span",
          { title: `${key}=${shown(value)}` },
          html("i", {}, state.short(key)),
          ` ${elide(shown(value), 28)}`,
        ),
      ),
    ),
    best.parent ? html("p", { class: "note" }, descentText(state.trials, best)) : null,
    best.serve ? command(best.serve, "copy-best") : null,
  );
}

function told() {
  const when = location.protocol.startsWith("http") ? "Live, last" : "Last";
  return state.document ? `${when} result ${moment(state.document.updated)}` : "";
}

function begin() {
  const embedded = JSON.parse($("document").textContent);
  state.beside = embedded !== null;
  for (const control of document.querySelectorAll(".choose select, .choose input")) {
    control.addEventListener("change", () => {
      control.dataset.chosen = "yes";
      draw();
    });
  }
  $("words").addEventListener("input", () => {
    state.words = $("words").value;
    clearTimeout(state.typing);
    state.typing = setTimeout(draw, 120);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.selected && !event.defaultPrevented) state.select(null);
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      draw();
    }
  });
  try {
    if (embedded) take(embedded);
  } catch (error) {
    say(`${error.message}.`, true);
  }
  if (!location.protocol.startsWith("http")) return;
  follow("sweep.json", {
    take: (text) => take(JSON.parse(text)),
    said: told,
    otherwise: () => (state.document ? `Shown as of ${moment(state.document.updated)}.` : ""),
    every: () => (!state.document || state.document.status === "running" ? RUNNING_MS : ENDED_MS),
  });
}

begin();
