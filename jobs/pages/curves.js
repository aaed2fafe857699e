"use strict";
// Curves over steps: of the trials of a sweep, and of one finetuning run.

// `series`: [{name, points: [[x, y]…], class, dots, end, press}], drawn in this order.
function drawCurves(host, { series, x, y, height, focus }) {
  const all = series.flatMap((one) => one.points.filter((point) => point.every(finite)));
  if (!all.length) {
    replace(host, html("p", { class: "empty" }, "Nothing to draw yet: no step was reported."));
    return;
  }
  const view = frame(host, {
    x: { values: all.map((point) => point[0]), unit: "", label: x, whole: true },
    y: {
      values: all.map((point) => point[1]),
      unit: y.unit || "",
      label: y.label,
      log: y.log,
      note: y.note,
    },
    height: height || Math.max(240, Math.min(340, host.clientWidth * 0.45)),
    label: `${y.label} by ${x}`,
  });
  const spots = [];
  for (const one of series) {
    let path = "",
      pen = false,
      last = null;
    const before = spots.length;
    for (const [step, value] of one.points) {
      if (!finite(step) || !finite(value)) {
        pen = false;
        continue;
      } // a gap, not a bridge
      const px = view.x.at(step),
        py = view.y.at(value);
      path += `${pen ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
      pen = true;
      last = { px, py };
      spots.push({ one, px, py, step, value });
      if (one.dots) view.root.append(mark("finished", px, py, 3.2, { class: `end ${one.class}` }));
    }
    if (!last) continue;
    const drawn = svg("path", { d: path, class: `curve ${one.class || ""}` });
    view.root.append(drawn);
    for (const spot of spots.slice(before)) spot.path = drawn;
    const end = one.points.length === 1 ? "finished" : one.end;
    if (end) view.root.append(mark(end, last.px, last.py, 3.2, { class: `end ${end} ${one.class || ""}` }));
  }
  const cursor = svg("circle", { class: "cursor", r: 6, visibility: "hidden" });
  view.root.append(cursor);
  let hot = null,
    at = -1;
  const off = () => {
    hot?.classList.remove("hot");
    hot = null;
    cursor.setAttribute("visibility", "hidden");
    tip.hide();
  };
  const show = (spot, left, top) => {
    off();
    hot = spot.path;
    hot.classList.add("hot");
    cursor.setAttribute("cx", spot.px);
    cursor.setAttribute("cy", spot.py);
    cursor.setAttribute("visibility", "visible");
    tip.show(left, top, spot.one.name, [
      [x, number(spot.step, 6)],
      [y.label, shown(spot.value, y.unit)],
    ]);
  };
  add(
    view.root,
    {
      tabindex: "0",
      "data-focus": focus,
      onpointermove: (event) => {
        const spot = nearest(view.root, spots, event, 40);
        if (spot) show(spot, event.clientX, event.clientY);
        else off();
      },
      onpointerleave: off,
      onblur: off,
      onclick: (event) => {
        const spot = nearest(view.root, spots, event, 40);
        if (spot?.one.press) {
          off();
          spot.one.press();
        }
      },
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (event.key === "Escape") off();
        if (event.key === "Enter" && at >= 0) spots[at].one.press?.();
        if (!step) return;
        event.preventDefault();
        at = at < 0 ? 0 : (at + step + spots.length) % spots.length;
        const spot = spots[at],
          box = view.root.getBoundingClientRect();
        show(spot, box.left + spot.px, box.top + spot.py);
        $("said").textContent =
          `${spot.one.name}, ${x} ${number(spot.step, 6)}: ${shown(spot.value, y.unit)}`;
      },
    },
    [],
  );
  replace(host, view.root);
}

// Metrics that trials report on the way, the objectives first.
function drawLearning(state) {
  const { trials, shown: passing, document: sweep } = state;
  const named = new Set();
  for (const trial of trials)
    for (const step of trial.steps) for (const name of Object.keys(step.metrics)) named.add(name);
  $("learning-part").hidden = !named.size;
  if (!named.size) return;
  const aims = sweep.objectives.map((one) => one.metric).filter((name) => named.has(name));
  const names = [...aims, ...[...named].filter((name) => !aims.includes(name))];
  const metric = options(
    $("learning-of"),
    names.map((name) => [name, name]),
    names[0],
  );
  const rank = (trial) => (trial.trial === sweep.best ? 2 : passing.has(trial) ? 1 : 0);
  const series = [...trials]
    .sort((a, b) => rank(a) - rank(b))
    .map((trial) => ({
      name: `Trial ${trial.trial}, ${trial.status}`,
      points: [...(descentOf(trials, trial)[1]?.steps.slice(-1) ?? []), ...trial.steps]
        .filter((step) => Object.hasOwn(step.metrics, metric))
        .map((step) => [step.step, step.metrics[metric]]),
      class: [
        trial.status,
        !passing.has(trial) && "faint",
        trial.trial === sweep.best && "best",
        state.selected === trial.trial && "selected",
      ]
        .filter(Boolean)
        .join(" "),
      end: ["stopped", "failed"].includes(trial.status) ? trial.status : null,
      press: () => state.select(trial.trial),
    }))
    .filter((one) => one.points.length);
  const values = series.flatMap((one) => one.points.map((point) => point[1])).filter(finite);
  const box = $("learning-log"),
    possible = values.length > 0 && values.every((value) => value > 0);
  if (!box.dataset.chosen) box.checked = wantsLog(values);
  box.closest("label").hidden = !possible;
  drawCurves($("learning"), {
    series,
    x: "step",
    y: { label: metric, unit: unitOf(metric), log: possible && box.checked },
    focus: "learning",
  });
}
