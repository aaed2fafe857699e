"use strict";
// Any two metrics against each other, a third as colour or size, and what no other trial beats.

function drawFront(state) {
  const { document: sweep, trials, shown: passing } = state;
  const host = $("front");
  const able = state.quantities.filter((one) => one.kind !== "setting" || numeric(one, trials));
  const metrics = able.filter((one) => one.kind === "metric"),
    rest = able.filter((one) => one.kind !== "metric");
  const name = (one) => [one.key, one.kind === "setting" ? one.name : one.label];
  const order = {
    key: "order",
    label: "trial",
    kind: "order",
    unit: "",
    get: (trial) => trials.indexOf(trial) + 1,
  };
  const chosen = (id, choices, fallback) => {
    const key = options($(id), choices, fallback);
    return [order, ...able].find((one) => one.key === key);
  };
  const aims = metrics.filter((one) => one.objective);
  const across = chosen(
    "front-x",
    [...metrics, ...rest].map(name).concat([["order", "order of trials"]]),
    aims.length > 1 ? aims[0].key : "order",
  );
  const down = chosen("front-y", [...metrics, ...rest].map(name), (aims[1] || aims[0])?.key);
  const third = chosen("front-z", [["", "status"], ...[...metrics, ...rest].map(name)], aims[2]?.key ?? "");
  $("front-as").closest("label").hidden = !third;
  for (const [id, axis] of [
    ["front-x-way", across],
    ["front-y-way", down],
    ["front-z-way", third],
  ])
    wayButton(state, id, axis);

  const axes = [across, down, third]
    .filter((one) => one && one.kind !== "order")
    .map((one) => ({ ...one, way: state.ways.get(one.key) || one.way }));
  const placed = trials.filter(
    (trial) => across && down && finite(across.get(trial)) && finite(down.get(trial)),
  );
  if (!placed.length) {
    replace(host, html("p", { class: "empty" }, "Nothing to draw yet: no trial reports both of these."));
    $("front-note").textContent = "";
    return;
  }
  const goals = axes.filter((axis) => axis.way);
  const aimed =
    goals.length === sweep.objectives.length &&
    goals.every(
      (axis) =>
        axis.objective && axis.way === sweep.objectives.find((o) => o.metric === axis.name).direction,
    );
  const front = aimed ? new Set(trials.filter((trial) => trial.front)) : frontOf(trials, goals);

  const logOf = (id, values) => {
    const box = $(id),
      possible = values.every((value) => value > 0);
    if (!box.dataset.chosen) box.checked = wantsLog(values);
    box.closest("label").hidden = !possible;
    return possible && box.checked;
  };
  const xs = placed.map(across.get),
    ys = placed.map(down.get);
  const note = (axis) => {
    const way = state.ways.get(axis.key) || axis.way;
    return way ? (way === "min" ? ", less is better" : ", more is better") : "";
  };
  const view = frame(host, {
    x: {
      whole: across.kind === "order",
      values: xs,
      unit: across.unit,
      label: across.label,
      note: note(across),
      log: logOf("front-x-log", xs),
    },
    y: { values: ys, unit: down.unit, label: down.label, note: note(down), log: logOf("front-y-log", ys) },
    height: Math.max(280, Math.min(420, host.clientWidth * 0.62)),
    label: `${down.label} against ${across.label}`,
  });
  drawLimits(view, across, down);

  const zs = third ? placed.map(third.get).filter(finite) : [];
  const tone = third && zs.length ? scaleOf(zs, { from: 0, to: 1, log: wantsLog(zs), room: 0 }) : null;
  if (tone) tone.of = third.unit;
  const sized = tone && $("front-as").value === "size";
  const points = placed.map((trial) => ({
    trial,
    px: view.x.at(across.get(trial)),
    py: view.y.at(down.get(trial)),
    inOrder: across.kind === "order",
  }));
  drawFrontLine(view, points, front, goals);
  // Those on the front are drawn last, so nothing covers them.
  const weight = (point) =>
    point.trial.trial === sweep.best ? 3 : front.has(point.trial) ? 2 : passing.has(point.trial) ? 1 : 0;
  points.sort((a, b) => weight(a) - weight(b));
  for (const { trial, px, py } of points) {
    const value = third && third.get(trial),
      known = tone && finite(value);
    const size =
      sized && known ? 3 + 8 * Math.sqrt(Math.max(0, tone.at(value))) : front.has(trial) ? 5.5 : 4.5;
    const best = trial.trial === sweep.best;
    const classes = [
      "dot",
      trial.status,
      front.has(trial) && "front",
      !passing.has(trial) && "faint",
      !trial.within_limits && trial.status !== "running" && "beyond",
      state.selected === trial.trial && "selected",
      tone && !known && "unknown",
    ];
    const fill = tone && known && !sized ? rampColour(tone.at(value)) : null;
    const dot = mark(trial.status, px, py, size, { class: classes.filter(Boolean).join(" ") });
    if (fill) dot.style.fill = fill;
    view.root.append(dot);
    if (best) {
      const end = px > view.box.right - 80;
      view.root.append(
        svg("circle", { cx: px, cy: py, r: size + 4.5, class: "ring" }),
        svg(
          "text",
          {
            x: px + (end ? -12 : 12),
            y: py - 9,
            class: "best-label",
            "text-anchor": end ? "end" : "start",
          },
          `★ ${elide(trial.trial, 12)}`,
        ),
      );
    }
  }
  readable(
    state,
    view,
    points.filter((point) => passing.has(point.trial)).sort((a, b) => a.px - b.px),
    axes,
  );
  replace(host, view.root);
  const lacking = trials.length - placed.length;
  const meaning =
    goals.length < 2
      ? across.kind === "order" && goals.length
        ? "The line is the best so far. "
        : ""
      : `${front.size} on the front${goals.length > 2 ? " of three" : ""}: ` +
        "no other trial is as good in all of these and better in one. ";
  const text =
    meaning +
    (lacking ? `${lacking} of ${trials.length} trials lack one of these figures and are not drawn.` : "");
  replace(
    $("front-note"),
    tone && !sized ? rampKey(third.label, tone) : null,
    tone && sized
      ? html(
          "span",
          {},
          `Size: ${third.label}, ${shown(tone.low, third.unit)} to ${shown(tone.high, third.unit)}. `,
        )
      : null,
    document.createTextNode(text),
  );
}

// Which way is better, where the sweep does not say, can be turned round.
function wayButton(state, id, axis) {
  const button = $(id);
  button.hidden = !axis || !(axis.kind === "metric" || axis.kind === "time");
  if (button.hidden) return;
  const way = state.ways.get(axis.key) || axis.way || "min";
  button.textContent = way === "min" ? "↓" : "↑";
  button.title =
    way === "min" ? "less is better; press to turn round" : "more is better; press to turn round";
  button.setAttribute("aria-label", `${axis.label}: ${button.title}`);
  button.onclick = () => {
    state.ways.set(axis.key, way === "min" ? "max" : "min");
    state.draw();
  };
}

function drawLimits(view, across, down) {
  const { left, right, top, bottom } = view.box;
  for (const [axis, scale, vertical] of [
    [across, view.x, true],
    [down, view.y, false],
  ]) {
    for (const side of ["min", "max"]) {
      const value = axis.limit && axis.limit[side];
      if (!finite(value)) continue;
      const at = scale.at(value);
      if (!(at > Math.min(vertical ? left : top, right) && at < (vertical ? right : bottom))) continue;
      view.root.append(
        vertical
          ? svg("line", { class: "limit", x1: at, x2: at, y1: top, y2: bottom })
          : svg("line", { class: "limit", x1: left, x2: right, y1: at, y2: at }),
      );
      const text = `${side === "max" ? "at most" : "at least"} ${shown(value, axis.unit)}`;
      view.root.append(
        vertical
          ? svg("text", { class: "limit-label", x: at - 5, y: bottom - 6, "text-anchor": "end" }, text)
          : svg("text", { class: "limit-label", x: right - 2, y: at - 5, "text-anchor": "end" }, text),
      );
    }
  }
}

// Steps between neighbours on the front: what lies beyond a corner, no trial reaches.
function drawFrontLine(view, points, front, goals) {
  const order = goals.length === 1 && points.every((point) => point.inOrder);
  let ordered = points.filter((point) => front.has(point.trial)).sort((a, b) => a.px - b.px || a.py - b.py);
  if (order) ordered = bestSoFar(points, goals[0].way);
  else if (goals.length !== 2 || ordered.length < 2) return;
  if (!ordered.length) return;
  const first = order || goals[0].way === "min";
  let path = `M${ordered[0].px} ${ordered[0].py}`;
  for (const point of ordered.slice(1))
    path += first ? `H${point.px}V${point.py}` : `V${point.py}H${point.px}`;
  if (order) path += `H${view.box.right}`;
  view.root.append(svg("path", { class: "front-line", d: path }));
}

function bestSoFar(points, way) {
  const found = [];
  // Pixels grow downwards: less is lower on the screen.
  for (const point of [...points].sort((a, b) => a.px - b.px)) {
    if (point.trial.status !== "finished" || !point.trial.within_limits) continue;
    const last = found.at(-1);
    if (!last || (way === "min" ? point.py > last.py : point.py < last.py)) found.push(point);
  }
  return found;
}

// Pointer and keyboard: the nearest trial is told; Enter or a press opens it.
function readable(state, view, points, axes) {
  const { root } = view;
  const ring = svg("circle", { class: "cursor", r: 9, visibility: "hidden" });
  root.append(ring);
  let at = -1;
  const rows = (trial) => [
    ["status", trial.status],
    ...axes.map((axis) => [axis.label, shown(axis.get(trial), axis.unit)]),
    ...Object.entries(trial.settings)
      .slice(0, 8)
      .map(([key, value]) => [state.short(key), elide(shown(value), 32)]),
  ];
  const point = (one, x, y) => {
    ring.setAttribute("cx", one.px);
    ring.setAttribute("cy", one.py);
    ring.setAttribute("visibility", "visible");
    tip.show(x, y, `Trial ${one.trial.trial}`, rows(one.trial));
  };
  const off = () => {
    ring.setAttribute("visibility", "hidden");
    tip.hide();
  };
  add(
    root,
    {
      tabindex: "0",
      "data-focus": "front",
      "aria-describedby": "front-help",
      onpointermove: (event) => {
        const one = nearest(root, points, event);
        if (one) point(one, event.clientX, event.clientY);
        else off();
      },
      onpointerleave: off,
      onblur: off,
      onclick: (event) => {
        const one = nearest(root, points, event);
        if (one) {
          off();
          state.select(one.trial.trial);
        }
      },
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        if (step && points.length) {
          at = at < 0 ? (step > 0 ? 0 : points.length - 1) : (at + step + points.length) % points.length;
          const one = points[at],
            box = root.getBoundingClientRect();
          point(one, box.left + one.px, box.top + one.py);
          $("said").textContent = `Trial ${one.trial.trial}: ${rows(one.trial)
            .map((row) => row.join(" "))
            .join(", ")}`;
          event.preventDefault();
        } else if (event.key === "Enter" && at >= 0) {
          off();
          state.select(points[at].trial.trial);
        } else if (event.key === "Escape") off();
      },
    },
    [],
  );
}
