"use strict";
// What can be asked of the trials of a sweep, without drawing anything: figures, filters, fronts, importance.

// Everything a trial has a value of. `get` gives a number, text, null (reported, not finite) or undefined.
function quantitiesOf(document) {
  const trials = document.trials,
    ways = new Map(document.objectives.map((one) => [one.metric, one.direction]));
  const limits = new Map(document.limits.map((one) => [one.metric, one]));
  const metrics = [...ways.keys()];
  for (const trial of trials) {
    for (const name of Object.keys(trial.metrics)) if (!metrics.includes(name)) metrics.push(name);
  }
  const settings = document.parameters.map((one) => one.key);
  for (const trial of trials) {
    for (const key of Object.keys(trial.settings)) if (!settings.includes(key)) settings.push(key);
  }
  const kinds = new Map(document.parameters.map((one) => [one.key, one])),
    short = shortNames(settings);
  const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);
  return [
    ...metrics.map((name) => ({
      key: `metric:${name}`,
      name,
      label: name,
      kind: "metric",
      unit: unitOf(name),
      limit: limits.get(name),
      objective: ways.has(name),
      way: ways.get(name) || likelyWay(name),
      get: (trial) => own(trial.metrics, name),
    })),
    {
      key: "seconds",
      name: "seconds",
      label: "time taken",
      kind: "time",
      unit: "s",
      way: "min",
      get: (trial) => trial.seconds ?? undefined,
    },
    ...settings.map((name) => ({
      key: `setting:${name}`,
      name,
      label: short.get(name),
      kind: "setting",
      unit: "",
      log: kinds.get(name)?.kind === "log_uniform",
      choice: kinds.get(name)?.kind === "choice",
      get: (trial) => own(trial.settings, name) ?? undefined,
    })),
  ];
}

const MORE = new Set(
  "accuracy acc score f1 bleu reward recall precision match per sparsity auroc agreement speedup".split(
    " ",
  ),
);
// For a metric without a stated direction. The page shows it, and it can be turned round.
function likelyWay(name) {
  return name
    .toLowerCase()
    .split(/[^a-z0-9]+/)
    .some((word) => MORE.has(word))
    ? "max"
    : "min";
}

const numeric = (quantity, trials) => {
  const values = trials.map(quantity.get).filter((value) => !missing(value));
  return values.length > 0 && values.every(finite);
};

// Distinct values, numbers in order and before texts.
function distinct(values) {
  const found = new Map(values.filter((value) => !missing(value)).map((value) => [shown(value), value]));
  return [...found.values()].sort((a, b) =>
    finite(a) && finite(b)
      ? a - b
      : finite(a)
        ? -1
        : finite(b)
          ? 1
          : shown(a).localeCompare(shown(b), "en", { numeric: true }),
  );
}

// A trial and those from whose ends it came, itself first: a segment of a member of a population.
function descentOf(trials, trial) {
  const byNumber = new Map(trials.map((one) => [one.trial, one])),
    found = [];
  for (let one = trial; one && !found.includes(one); one = byNumber.get(one.parent)) found.push(one);
  return found;
}

// Each segment with the step at which it ended and the one it began from.
function descentText(trials, trial) {
  const end = (one) => (one.steps.length ? ` (to step ${one.steps[one.steps.length - 1].step})` : "");
  return descentOf(trials, trial)
    .map((one) => `${one.trial}${end(one)}`)
    .join(" ← ");
}

// Whether a trial has all words: of its number, status, reason and `setting=value`.
function hasWords(trial, words) {
  if (!words.length) return true;
  const settings = Object.entries(trial.settings).map(([key, value]) => `${key}=${shown(value)}`);
  const text = [trial.trial, trial.status, trial.reason || "", ...settings].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

// The trials that no other one beats in all of `axes`, by the rule of the sweep: finished, within the limits.
function frontOf(trials, axes) {
  const rows = trials.filter(
    (trial) =>
      trial.status === "finished" && trial.within_limits && axes.every((axis) => finite(axis.get(trial))),
  );
  const cost = (trial) => axes.map((axis) => (axis.way === "max" ? -axis.get(trial) : axis.get(trial)));
  const costs = new Map(rows.map((trial) => [trial, cost(trial)]));
  const beats = (one, other) =>
    one.every((value, i) => value <= other[i]) && one.some((value, i) => value < other[i]);
  return new Set(rows.filter((trial) => !rows.some((other) => beats(costs.get(other), costs.get(trial)))));
}

// Ranks from 1, equal values sharing their mean rank.
function ranksOf(values) {
  const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]);
  const ranks = new Array(values.length);
  for (let i = 0; i < order.length;) {
    let end = i;
    while (end < order.length && values[order[end]] === values[order[i]]) end++;
    for (let k = i; k < end; k++) ranks[order[k]] = (i + end + 1) / 2;
    i = end;
  }
  return ranks;
}

// A group for each value; numbers with more than five values are cut into three groups of about equal count.
function groupsOf(values) {
  const levels = distinct(values);
  if (levels.length <= 5 || !levels.every(finite)) {
    return {
      of: values.map((value) => levels.findIndex((level) => shown(level) === shown(value))),
      names: levels.map((level) => shown(level)),
    };
  }
  const sorted = [...values].sort((a, b) => a - b);
  const cuts = [1, 2].map((third) => sorted[Math.floor((third * sorted.length) / 3)]);
  const of = values.map((value) => (value < cuts[0] ? 0 : value < cuts[1] ? 1 : 2));
  const [one, two] = cuts.map((cut) => number(cut, 3));
  return { of, names: [`< ${one}`, `${one} to ${two}`, `≥ ${two}`] };
}

// Part of the sum of squares of `ranks` that lies between groups: Kruskal and Wallis's H over n - 1.
function between(ranks, of, groups) {
  const sums = new Float64Array(groups),
    counts = new Float64Array(groups);
  for (let i = 0; i < ranks.length; i++) {
    sums[of[i]] += ranks[i];
    counts[of[i]]++;
  }
  const mean = (ranks.length + 1) / 2;
  const total = ranks.reduce((sum, rank) => sum + (rank - mean) ** 2, 0);
  let explained = 0;
  for (let g = 0; g < groups; g++)
    if (counts[g]) explained += counts[g] * (sums[g] / counts[g] - mean) ** 2;
  return total ? explained / total : 0;
}

// mulberry32: the same shuffles each time the page is drawn.
function randomFrom(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const SHUFFLES = 199;
const FEWEST = 8;
// For each setting the share of a metric's ranks that groups alike in it explain, and the share that 19 of 20
// shuffles stay below: a setting without any effect is above it once in 20 times.
function importanceOf(trials, metric, settings) {
  const rows = trials.filter((trial) => trial.status === "finished" && finite(metric.get(trial)));
  const found = settings.map((setting) => {
    const used = rows.filter((trial) => !missing(setting.get(trial)));
    const { of, names } = groupsOf(used.map(setting.get));
    // With a group for nearly each trial the groups explain everything, whatever they are.
    if (names.length < 2 || used.length < Math.max(FEWEST, 2 * names.length))
      return { setting, n: used.length, levels: names.length };
    const values = used.map(metric.get),
      ranks = ranksOf(values);
    const share = between(ranks, of, names.length),
      random = randomFrom(1),
      chance = [];
    const shuffled = [...ranks];
    for (let round = 0; round < SHUFFLES; round++) {
      for (let i = shuffled.length - 1; i > 0; i--) {
        const k = Math.floor(random() * (i + 1));
        [shuffled[i], shuffled[k]] = [shuffled[k], shuffled[i]];
      }
      chance.push(between(shuffled, of, names.length));
    }
    chance.sort((a, b) => a - b);
    const medians = names.map((name, g) => ({ name, ...middle(values.filter((_, i) => of[i] === g)) }));
    const better = (a, b) => (metric.way === "max" ? b.median - a.median : a.median - b.median);
    const best = medians.filter((group) => group.n).sort(better)[0];
    return {
      setting,
      n: used.length,
      levels: names.length,
      share,
      chance: chance[Math.floor(0.95 * SHUFFLES)],
      best,
    };
  });
  return { n: rows.length, found: found.sort((a, b) => (b.share ?? -1) - (a.share ?? -1)) };
}

function middle(values) {
  const sorted = [...values].sort((a, b) => a - b),
    half = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  return { median, n: sorted.length };
}
