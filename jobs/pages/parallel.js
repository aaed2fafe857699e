"use strict";
// Parallel coordinates: a line per trial through its settings and figures. Dragging along an axis keeps what
// passes there, in every part of the page. On a narrow screen the axes lie one under the other.

const BRUSH_STEP = 0.05;

function drawParallel(state) {
  const host = $("parallel");
  if (state.dragging) return;
  const { trials, shown: passing } = state;
  const used = (one) =>
    trials.filter((trial) => trial.status !== "running" || one.kind === "setting").map(one.get);
  const axes = state.quantities
    .filter((one) => {
      const values = used(one).filter((value) => !missing(value));
      if (one.kind === "setting")
        return distinct(values).length > 1 || (trials.length < 2 && values.length);
      return (one.objective || one.limit || one.kind === "time") && values.some(finite);
    })
    .sort((a, b) => (a.kind === "setting" ? 0 : 1) - (b.kind === "setting" ? 0 : 1));
  if (!axes.length) {
    replace(host, html("p", { class: "empty" }, "Nothing to draw yet: no trial has settings of its own."));
    return;
  }
  const upright = host.clientWidth >= 620;
  const gap = upright ? Math.max(92, (host.clientWidth - 60) / axes.length) : 58;
  const width = upright ? Math.max(host.clientWidth, gap * axes.length) : Math.max(260, host.clientWidth);
  const height = upright ? 330 : axes.length * gap + 26;
  const root = svg("svg", {
    width,
    height,
    class: "chart parallel",
    role: "group",
    "aria-label": "Parallel coordinates",
  });
  const lines = axes.map((axis, i) => axisOf(axis, used(axis), i, { upright, gap, width, height }));

  const first = state.quantities.find((one) => one.objective) || axes.find((one) => one.kind !== "setting");
  const values = first ? trials.map(first.get).filter(finite) : [];
  const tone = values.length ? scaleOf(values, { from: 0, to: 1, room: 0, log: wantsLog(values) }) : null;
  const rank = (trial) => (trial.trial === state.document.best ? 2 : passing.has(trial) ? 1 : 0);
  const drawn = [];
  for (const trial of [...trials].sort((a, b) => rank(a) - rank(b))) {
    const stops = lines.map((line) => line.point(line.axis.get(trial)));
    if (stops.filter(Boolean).length < 2) continue;
    const value = first && first.get(trial),
      best = trial.trial === state.document.best;
    const path = svg("path", {
      d: pathThrough(stops, upright),
      class: [
        "line",
        !passing.has(trial) && "faint",
        best && "best",
        trial.status,
        state.selected === trial.trial && "selected",
      ]
        .filter(Boolean)
        .join(" "),
    });
    if (passing.has(trial) && !best && tone && finite(value))
      path.style.stroke = rampColour(tone.at(value));
    root.append(path);
    if (passing.has(trial))
      for (const stop of stops) if (stop) drawn.push({ trial, path, px: stop[0], py: stop[1] });
  }
  for (const line of lines) root.append(axisDrawing(state, line, upright));
  listen(state, root, drawn, axes);
  const scrolled = host.scrollLeft;
  replace(host, root);
  host.scrollLeft = scrolled;
  if (tone) tone.of = first.unit;
  replace($("parallel-key"), tone ? rampKey(first.label, tone) : null);
}

function axisOf(axis, values, index, { upright, gap, width, height }) {
  const known = values.filter((value) => !missing(value));
  const place = upright ? { from: height - 22, to: 50 } : { from: 10, to: width - 10 };
  const numbers = known.every(finite);
  const scale =
    axis.choice || !numbers
      ? ladderOf(distinct(known), place)
      : scaleOf(known, {
          ...place,
          unit: axis.unit,
          log: axis.log || wantsLog(known),
          room: 0.02,
          count: upright ? 5 : width / 90,
        });
  const across = upright ? gap * (index + 0.5) : index * gap + 34;
  const point = (value) => {
    if (missing(value) || (!scale.ladder && !finite(value))) return null;
    const along = scale.at(value);
    return upright ? [across, along] : [along, across];
  };
  return { axis, scale, across, point, place, width: gap };
}

// A stop that is missing breaks the line rather than bending it.
function pathThrough(stops, upright) {
  let path = "",
    before = null;
  for (const stop of stops) {
    if (stop && before) {
      const middle = upright ? (before[0] + stop[0]) / 2 : (before[1] + stop[1]) / 2;
      path += upright
        ? `C${middle} ${before[1]} ${middle} ${stop[1]} ${stop[0]} ${stop[1]}`
        : `C${before[0]} ${middle} ${stop[0]} ${middle} ${stop[0]} ${stop[1]}`;
    } else if (stop) path += `M${stop[0]} ${stop[1]}`;
    before = stop;
  }
  return path;
}

function axisDrawing(state, line, upright) {
  const { axis, scale, across, place, width } = line;
  const [start, end] = [Math.min(place.from, place.to), Math.max(place.from, place.to)];
  const brush = state.brushes.get(axis.key);
  const range = brush
    ? `kept from ${brush.map((share) => atShare(scale, place, share)).join(" to ")}`
    : "everything kept";
  const group = svg("g", {
    class: "brushable",
    tabindex: "0",
    role: "group",
    "data-focus": axis.key,
    "aria-describedby": "brush-help",
    "aria-label": `${axis.name}: ${range}`,
  });
  const title = axis.label + (scale.unit ? `, ${scale.unit}` : "");
  if (upright) {
    group.append(
      svg("line", { class: "axis", x1: across, x2: across, y1: start, y2: end }),
      svg(
        "text",
        { class: "title", x: across, y: 30, "text-anchor": "middle" },
        svg("title", {}, axis.name),
        elide(title, Math.floor(width / 6.6)),
      ),
    );
    for (const tick of scale.ticks) {
      group.append(
        svg(
          "text",
          { class: "tick", x: across + 6, y: scale.at(tick.value) + 4 },
          elide(tick.text, Math.floor(width / 8.2)),
        ),
      );
    }
  } else {
    group.append(
      svg("line", { class: "axis", x1: start, x2: end, y1: across, y2: across }),
      svg(
        "text",
        { class: "title", x: start, y: across - 9 },
        svg("title", {}, axis.name),
        elide(title, 44),
      ),
    );
    for (const tick of thinned(scale, 6.6)) {
      const text = elide(tick.text, 12);
      const half = 3.3 * text.length; // at the ends a text is moved inwards, not cut
      const x = Math.max(half, Math.min(end + 10 - half, scale.at(tick.value)));
      group.append(svg("text", { class: "tick", x, y: across + 14, "text-anchor": "middle" }, text));
    }
  }
  const rectangle = (from, to, breadth) =>
    upright
      ? { x: across - breadth, width: 2 * breadth, y: Math.min(from, to), height: Math.abs(to - from) }
      : { y: across - breadth, height: 2 * breadth, x: Math.min(from, to), width: Math.abs(to - from) };
  if (brush) {
    const [a, b] = brush.map((share) => place.from + share * (place.to - place.from));
    group.append(svg("rect", { class: "brush", ...rectangle(a, b, 7) }));
  }
  const area = svg("rect", {
    class: `grip ${upright ? "upright" : "level"}`,
    ...rectangle(start, end, 14),
  });
  group.append(area);
  drag(state, line, area, group, upright);
  group.addEventListener("keydown", (event) => moveBrush(state, axis.key, event));
  return group;
}

// A brush is kept as two shares of its axis, from its lower end.
function atShare(scale, place, share) {
  const pixel = place.from + share * (place.to - place.from);
  if (!scale.ladder) return shown(scale.back(pixel));
  const close = [...scale.ticks].sort(
    (a, b) => Math.abs(scale.at(a.value) - pixel) - Math.abs(scale.at(b.value) - pixel),
  );
  return close[0].text;
}

function drag(state, line, area, group, upright) {
  const { axis, place } = line;
  const shareAt = (event) => {
    const box = area.ownerSVGElement.getBoundingClientRect();
    const pixel = upright ? event.clientY - box.top : event.clientX - box.left;
    return Math.max(0, Math.min(1, (pixel - place.from) / (place.to - place.from)));
  };
  area.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    group.focus({ preventScroll: true });
    area.setPointerCapture(event.pointerId);
    state.dragging = true;
    const from = shareAt(event);
    const shade = svg("rect", { class: "brush" });
    group.insertBefore(shade, area);
    const move = (event) => {
      const [a, b] = [from, shareAt(event)].sort((one, two) => one - two);
      const pixels = [a, b]
        .map((share) => place.from + share * (place.to - place.from))
        .sort((one, two) => one - two);
      const [along, length, across] = [pixels[0], pixels[1] - pixels[0], line.across - 7];
      add(
        shade,
        upright
          ? { x: across, width: 14, y: along, height: length }
          : { y: across, height: 14, x: along, width: length },
        [],
      );
      return [a, b];
    };
    const done = (event) => {
      const [a, b] = event.type === "pointerup" ? move(event) : [0, 0];
      area.removeEventListener("pointermove", move);
      state.dragging = false;
      // A press without a drag takes the brush away.
      if (b - a < 0.01) state.brushes.delete(axis.key);
      else state.brushes.set(axis.key, [a, b]);
      state.draw();
    };
    area.addEventListener("pointermove", move);
    area.addEventListener("pointerup", done, { once: true });
    area.addEventListener("pointercancel", done, { once: true });
  });
}

function moveBrush(state, key, event) {
  const up = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape" || event.key === "Delete") state.brushes.delete(key);
  else if (up) {
    let [a, b] = state.brushes.get(key) || (up > 0 ? [0, 0.5] : [0.5, 1]);
    if (event.shiftKey) b = Math.max(a + BRUSH_STEP, Math.min(1, b + up * BRUSH_STEP));
    else {
      const by = Math.max(-a, Math.min(1 - b, up * BRUSH_STEP));
      [a, b] = state.brushes.has(key) ? [a + by, b + by] : [a, b];
    }
    state.brushes.set(key, [a, b]);
  } else return;
  event.preventDefault();
  state.draw();
}

// Whether a trial lies within every brush. A trial without a value on a brushed axis does not.
function withinBrushes(state) {
  const tests = [...state.brushes].flatMap(([key, [a, b]]) => {
    const axis = state.quantities.find((one) => one.key === key);
    if (!axis) return [];
    const values = state.trials
      .filter((trial) => trial.status !== "running" || axis.kind === "setting")
      .map(axis.get);
    const { point } = axisOf(axis, values, 0, { upright: true, gap: 0, width: 0, height: 1000 });
    // The same axis, 1000 pixels high: shares do not depend on it.
    const place = { from: 1000 - 22, to: 50 };
    return [
      (trial) => {
        const at = point(axis.get(trial));
        const share = at && (at[1] - place.from) / (place.to - place.from);
        return at !== null && share >= a - 1e-9 && share <= b + 1e-9;
      },
    ];
  });
  return (trial) => tests.every((test) => test(trial));
}

function listen(state, root, drawn, axes) {
  let hot = null;
  const cool = () => {
    hot?.classList.remove("hot");
    hot = null;
    tip.hide();
  };
  root.addEventListener("pointermove", (event) => {
    if (state.dragging) return cool();
    const one = nearest(root, drawn, event, 14);
    cool();
    if (!one) return;
    hot = one.path;
    hot.classList.add("hot");
    tip.show(
      event.clientX,
      event.clientY,
      `Trial ${one.trial.trial}`,
      axes.slice(0, 12).map((axis) => [axis.label, elide(shown(axis.get(one.trial), axis.unit), 32)]),
    );
  });
  root.addEventListener("pointerleave", cool);
}
