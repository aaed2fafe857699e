"use strict";
// Numbers, units and scales: what is the same in every chart and column.

const finite = (value) => typeof value === "number" && Number.isFinite(value);
const missing = (value) => value === null || value === undefined;

const UNITS = new Map(
  Object.entries({ ms: "ms", gib: "GiB", mib: "MiB", gb: "GB", mb: "MB", percent: "%" }),
);
// The unit that a name tells: `bytes`, `seconds`, `tokens_per_s.1`, `peak_gib`.
function unitOf(name) {
  const words = name.toLowerCase().split(/[^a-z0-9]+/);
  const per = words.indexOf("per");
  if (per > 0 && words[per + 1]) return `${words[per - 1]}/${words[per + 1]}`;
  if (words.includes("bytes")) return "B";
  const last = words.at(-1);
  if (["seconds", "secs", "s"].includes(last)) return "s";
  return UNITS.get(last) || "";
}

// In which multiple of a unit a range up to `largest` reads well.
function multiple(unit, largest) {
  if (unit === "B") {
    const power = Math.max(0, Math.min(5, Math.floor(Math.log10(Math.max(largest, 1)) / 3)));
    return { factor: 1000 ** power, name: `${["", "k", "M", "G", "T", "P"][power]}B` };
  }
  if (unit === "s") {
    if (largest >= 7200) return { factor: 3600, name: "h" };
    if (largest >= 300) return { factor: 60, name: "min" };
    if (largest < 0.5 && largest > 0) return { factor: 0.001, name: "ms" };
  }
  return { factor: 1, name: unit };
}

function number(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3)
    return value
      .toExponential(digits - 2)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (seconds < 1) return `${number(seconds * 1000, 3)} ms`;
  if (seconds < 59.95) return `${number(seconds, 3)} s`;
  seconds = Math.round(seconds);
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${seconds % 60} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

// One value by itself, with its unit.
function shown(value, unit = "") {
  if (missing(value)) return "–";
  if (value === "Infinity" || value === Infinity) return "∞";
  if (value === "-Infinity" || value === -Infinity) return "−∞";
  if (typeof value === "number" && Number.isNaN(value)) return "NaN";
  if (typeof value === "object") return inWords(value);
  if (typeof value !== "number") return String(value);
  if (unit === "s" && value >= 0) return duration(value);
  const { factor, name } = multiple(unit, Math.abs(value));
  return `${number(value / factor)}${name ? ` ${name}` : ""}`;
}

// A list, or a method with its settings, as one would type it: `zo_sgd lr=0.002 eps=0.01`.
function inWords(value) {
  if (Array.isArray(value)) return value.map((item) => shown(item)).join(", ");
  const { method, ...settings } = value;
  const words = Object.entries(settings).map(([key, item]) => `${key}=${shown(item)}`);
  return [...(missing(method) ? [] : [shown(method)]), ...words].join(" ");
}

// How a column of values is written: one multiple and as many decimals for all, so that digits are aligned.
function columnFormat(values, unit) {
  const numbers = values.filter(finite).map(Math.abs);
  const largest = Math.max(...numbers, 0);
  const smallest = Math.min(...numbers.filter((value) => value > 0), largest);
  const { factor, name } = multiple(unit, largest);
  const whole = unit !== "B" && numbers.every(Number.isInteger);
  const wide = !whole && (largest / smallest > 1000 || largest / factor >= 1e7 || largest / factor < 1e-2);
  const decimals = whole ? 0 : Math.max(0, Math.min(4, 3 - Math.floor(Math.log10(largest / factor || 1))));
  const text = (value) => {
    if (!finite(value)) return shown(value);
    if (wide) return number(value / factor);
    return (value / factor).toFixed(decimals);
  };
  return { unit: name, text };
}

// A sequence of 1, 2 or 5 times a power of ten that cuts [low, high] into about `count` pieces.
function niceSteps(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough * 0.7) * power;
  const decimals = Math.min(12, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && found.length < 50; i++) {
    found.push({ value: i * step, text: (i * step).toFixed(decimals) });
  }
  return found;
}

function logSteps(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.8) return niceSteps(low, high, count).filter((tick) => tick.value > 0);
  const every = Math.max(1, Math.ceil(decades / Math.max(count, 2)));
  const factors = decades < 1.6 ? [1, 2, 5] : decades < 3 ? [1, 3] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001)
        found.push({
          value,
          text: value < 1e5 ? number(value, 3) : value.toExponential(0).replace("+", ""),
        });
    }
  }
  return found;
}

// From values to pixels. Returns `at`, its inverse `back`, ticks, and the name of the unit they are in.
function scaleOf(values, { from, to, log = false, unit = "", room = 0.05, count = 5, whole = false }) {
  const numbers = values.filter(finite);
  let low = Math.min(...numbers),
    high = Math.max(...numbers);
  if (!numbers.length) [low, high] = log ? [1, 10] : [0, 1];
  const logarithmic = log && low > 0;
  if (low === high) {
    const around = whole ? 1 : Math.abs(low) * 0.1 || 0.5;
    [low, high] = logarithmic ? [low / 1.2, high * 1.2] : [low - around, high + around];
  } else if (logarithmic) {
    const margin = (high / low) ** room;
    [low, high] = [low / margin, high * margin];
  } else {
    const margin = (high - low) * room;
    [low, high] = [low - margin, high + margin];
  }
  // Ends that are not finite would have no ticks, or ticks without end.
  [low, high] = [Math.max(low, logarithmic ? 1e-300 : -1e300), Math.min(high, 1e300)];
  const { factor, name } = multiple(unit, Math.max(Math.abs(low), Math.abs(high)));
  const bend = logarithmic ? Math.log : (value) => value;
  const unbend = logarithmic ? Math.exp : (value) => value;
  const start = bend(low),
    span = bend(high) - start;
  const steps = (logarithmic ? logSteps : niceSteps)(low / factor, high / factor, count);
  return {
    at: (value) => from + ((bend(value) - start) / span) * (to - from),
    back: (pixel) => unbend(start + ((pixel - from) / (to - from)) * span),
    ticks: steps
      .filter(({ value }) => !whole || Math.abs(value - Math.round(value)) < 1e-9)
      .map(({ value, text }) => ({
        value: value * factor,
        text: whole ? number(Math.round(value)) : text,
      })),
    unit: name,
    logarithmic,
    low,
    high,
  };
}

// Values without an order of magnitude, or few numbers: one place each.
function ladderOf(values, { from, to }) {
  const names = values.map((value) => shown(value));
  const gap = (to - from) / Math.max(names.length, 1);
  return {
    at: (value) => from + (names.indexOf(shown(value)) + 0.5) * gap,
    ticks: values.map((value) => ({ value, text: shown(value) })),
    unit: "",
    ladder: true,
  };
}

// So large a range that only a logarithm shows all of it.
function wantsLog(values) {
  const numbers = values.filter(finite);
  return numbers.length > 1 && Math.min(...numbers) > 0 && Math.max(...numbers) / Math.min(...numbers) > 50;
}

function elide(text, length) {
  if (text.length <= length) return text;
  const tail = Math.floor((length - 1) / 2);
  return `${text.slice(0, length - 1 - tail)}…${tail ? text.slice(-tail) : ""}`;
}

// The shortest ends of dotted names that tell them apart.
function shortNames(keys) {
  const end = (key, parts) => key.split(".").slice(-parts).join(".");
  return new Map(
    keys.map((key) => {
      let parts = 1;
      while (
        keys.some((other) => other !== key && end(other, parts) === end(key, parts)) &&
        end(key, parts) !== key
      ) {
        parts++;
      }
      return [key, end(key, parts)];
    }),
  );
}
