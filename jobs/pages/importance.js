"use strict";
// How much of a metric goes with each setting, and how much would by chance.

function drawImportance(state) {
  const host = $("importance");
  const metrics = state.quantities.filter((one) => one.kind === "metric");
  const key = options(
    $("importance-of"),
    metrics.map((one) => [one.key, one.label]),
    metrics[0]?.key,
  );
  const base = metrics.find((one) => one.key === key);
  const settings = state.quantities.filter((one) => one.kind === "setting");
  if (!base || !settings.length) {
    replace(host, html("p", { class: "empty" }, "Nothing to weigh yet: no trial reports a figure."));
    $("importance-note").textContent = "";
    return;
  }
  const metric = { ...base, way: state.ways.get(base.key) || base.way };
  // Shuffling takes most of the time of drawing: a filter or a new axis changes nothing about it.
  const known = `${metric.key} ${metric.way} ${state.document.updated} ${state.trials.length}`;
  if (state.weighed?.known !== known)
    state.weighed = { known, ...importanceOf(state.trials, metric, settings) };
  const { n, found } = state.weighed;
  const rows = found.map((one) =>
    html(
      "li",
      {},
      html("span", { class: "name", title: one.setting.name }, one.setting.label),
      one.share === undefined ? html("span", { class: "none" }, reason(one)) : bar(one),
      one.share === undefined
        ? null
        : html(
            "span",
            { class: "best-at" },
            `best median ${shown(one.best.median, metric.unit)} at ${elide(one.best.name, 28)}, ` +
              `n = ${one.best.n}`,
          ),
    ),
  );
  replace(host, html("ol", { class: "bars" }, ...rows));
  $("importance-note").textContent =
    `n = ${n} finished trials. Bar: share of the ranks of ${metric.label} that lies between ` +
    "groups alike in this one setting (Kruskal–Wallis η²; more than five numbers make three groups of " +
    "equal count). " +
    `Tick: what 95 % of ${SHUFFLES} shuffles stay below, so one useless setting in 20 is above it. ` +
    "Settings that act only together, and a search that favours some values, can mislead it.";
}

function reason(one) {
  if (one.levels < 2) return "has one value only";
  return `n = ${one.n}: too few to tell, it takes ${Math.max(FEWEST, 2 * one.levels)}`;
}

function bar({ share, chance, setting, n }) {
  const clear = share > chance;
  const text = `${Math.round(share * 100)} %, chance ${Math.round(chance * 100)} %, n = ${n}`;
  return html(
    "span",
    {
      class: `bar${clear ? "" : " weak"}`,
      role: "img",
      "aria-label": `${setting.name}: ${text}`,
      title: text,
    },
    svg(
      "svg",
      { width: "100%", height: 16, "aria-hidden": "true" },
      svg("rect", { class: "ground", width: "100%", height: 12, y: 2, rx: 2 }),
      svg("rect", { class: "value", width: `${(share * 100).toFixed(2)}%`, height: 12, y: 2, rx: 2 }),
      svg("rect", {
        class: "chance",
        x: `${Math.min(99.4, chance * 100).toFixed(2)}%`,
        width: 2,
        height: 16,
      }),
    ),
    html(
      "span",
      { class: "figure", "data-share": share.toFixed(6), "data-setting": setting.name },
      `${Math.round(share * 100)} %`,
    ),
  );
}
