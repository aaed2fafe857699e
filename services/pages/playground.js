"use strict";

const $ = (id) => document.getElementById(id);
const messages = [];          // what the model is told, oldest first
let model = null;             // the served name
let running = null;           // AbortController of the answer being written

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      if (response.status === 401) openSettings(true, "key");
      throw new Error(await failure(response));
    }
    model = (await response.json()).data[0].id;
    $("model-name").textContent = model;
    $("light").className = "light up";
    say("");
    await offer();
  } catch (error) {
    $("model-name").textContent = "not connected";
    $("light").className = "light down";
    say(error.message, true);
  }
}

// What this deployment can do, in the two menus.
async function offer() {
  const response = await fetch("v1/capabilities", { headers: headers() });
  if (!response.ok) return;
  const able = await response.json();
  choices("policy", able.kv.policies.map((one) => one.name), able.kv.default.policy);
  choices("method", ["none", ...able.speculation.methods.map((one) => one.name)], able.speculation.default.method);
  const shape = () => {
    const method = able.speculation.methods.find((one) => one.name === $("method").value);
    for (const name of ["width", "depth"]) {
      $(name).placeholder = method ? method[name] : "";
      $(name).max = able.speculation.most_nodes;
      $(name).disabled = !method;
    }
    $("budget").disabled = ["", "full"].includes($("policy").value);
  };
  $("method").onchange = $("policy").onchange = shape;
  shape();
}

function choices(id, names, byDefault) {
  const before = $(id).value;
  const options = ["", ...names].map((name) => Object.assign(document.createElement("option"), {
    value: name, textContent: name || `as the server does (${byDefault})`,
  }));
  $(id).replaceChildren(...options);
  $(id).value = names.includes(before) ? before : "";
}

function openSettings(open, focus) {
  $("settings").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
  if (open && focus) $(focus).focus();
}

function turn(role, text) {
  $("welcome").hidden = true;
  const box = document.createElement("article");
  box.className = `turn ${role}`;
  const who = Object.assign(document.createElement("p"), { className: "who", textContent: role === "user" ? "You" : model });
  const body = Object.assign(document.createElement("p"), { className: "text", textContent: text });
  box.append(who, body);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, body };
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function request() {
  const policy = $("policy").value, method = $("method").value;
  const system = $("system").value.trim();
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    kv: policy ? { policy, budget: policy === "full" ? undefined : number("budget") } : undefined,
    speculation: method ? { method, ...(method === "none" ? {} : { width: number("width"), depth: number("depth") }) } : undefined,
    details: $("details").checked || undefined,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// Yields the parsed events of a server-sent event stream.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Text behind what is there; tokens that were guessed ahead stand out.
function write(body, choice) {
  const tokens = choice.details?.tokens ?? [{ text: choice.delta.content ?? "", origin: "target" }];
  for (const token of tokens) {
    const last = body.lastChild, drafted = token.origin === "draft";
    if (!token.text) continue;
    if (last && (last.className === "draft") === drafted) last.textContent += token.text;
    else {
      const span = Object.assign(document.createElement("span"), { textContent: token.text });
      if (drafted) span.className = "draft";
      body.append(span);
    }
  }
}

// What a bounded cache still holds: a row per layer, a column per position or a few of them.
function showKept(box, kept) {
  let frame = box.querySelector(".kept");
  if (!frame) {
    frame = document.createElement("details");
    frame.className = "kept";
    frame.open = true;
    frame.innerHTML = '<summary></summary><div class="map"><div class="layers"><span>layer 0</span><span></span></div>' +
      '<canvas role="img"></canvas><div class="positions"><span>position 0</span><span></span></div></div>';
    box.append(frame);
  }
  frame.kept = kept;
  const all = kept.layers.length * kept.layers[0].length * 9;
  const held = [...kept.layers.join("")].reduce((sum, digit) => sum + Number(digit), 0);
  const said = `The cache keeps ${Math.round((100 * held) / all)} % of ${kept.positions} positions`;
  frame.querySelector("summary").textContent = said;
  frame.querySelector("canvas").setAttribute("aria-label", `${said}, by layer and position`);
  frame.querySelector(".layers span:last-child").textContent = kept.layers.length - 1;
  frame.querySelector(".positions span:last-child").textContent = kept.positions - 1;
  paint(frame);
}

function paint(frame) {
  const { layers } = frame.kept, canvas = frame.querySelector("canvas");
  canvas.width = layers[0].length;
  canvas.height = layers.length;
  canvas.style.height = `${Math.max(60, Math.min(180, layers.length * 5))}px`;
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  pen.fillStyle = style.getPropertyValue("--page");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = style.getPropertyValue("--accent");
  layers.forEach((digits, layer) => [...digits].forEach((digit, column) => {
    pen.globalAlpha = digit / 9;
    pen.fillRect(column, layer, 1, 1);
  }));
}

function figures(clock, tokens, reason) {
  const parts = [`first token ${Math.round(clock.first - clock.sent)} ms`];
  const seconds = (clock.last - clock.first) / 1000;
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`${tokens} tokens`);
  if (reason) parts.push(reason);
  return parts.join(" · ");
}

const ENDINGS = { stop: "", length: "cut at the token limit", stopped: "stopped" };

async function answer() {
  const mine = running = new AbortController();
  const { box, body } = turn("assistant", "");
  box.classList.add("running");
  const line = Object.assign(document.createElement("p"), { className: "figures" });
  line.setAttribute("aria-live", "off");
  box.append(line);
  const clock = { sent: performance.now(), first: 0, last: 0 };
  let text = "", tokens = 0, reason = "stopped", guesses = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(request()),
      signal: mine.signal,
    });
    if (!response.ok) {
      if (response.status === 401) openSettings(true, "key");
      throw new Error(await failure(response));
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        tokens = event.usage.completion_tokens;
        guesses = event.usage.completion_tokens_details ?? null;
      }
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) reason = choice.finish_reason;
      const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      write(body, choice);
      if (choice.details?.kept) showKept(box, choice.details.kept);
      if (!choice.delta.content) continue;
      clock.last = performance.now();
      clock.first ||= clock.last;
      tokens += choice.details?.tokens.length || 1;
      text += choice.delta.content;
      line.textContent = figures(clock, tokens);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "";
      box.classList.add("failed");
      body.textContent = text ? `${text}\n\n${error.message}` : error.message;
    }
  }
  if (running !== mine) return;          // a new chat was begun meanwhile
  running = null;
  if (clock.first) line.textContent = figures(clock, tokens, ENDINGS[reason] ?? reason);
  if (clock.first && guesses) {
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    const { accepted_prediction_tokens: right, rejected_prediction_tokens: wrong } = guesses;
    line.append(" · ", swatch, `${right} of ${right + wrong} guesses right`);
  }
  if (text) messages.push({ role: "assistant", content: text });
  else messages.pop();
  if (!text && !box.classList.contains("failed")) box.remove();
  box.classList.remove("running");
  $("log").scrollTop = $("log").scrollHeight;
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  if (!model) await connect();
  if (!model) return;
  say("");
  $("prompt").value = "";
  fit();
  messages.push({ role: "user", content: text });
  turn("user", text);
  $("send").hidden = true;
  $("stop").hidden = false;
  await answer();
  $("send").hidden = false;
  $("stop").hidden = true;
  $("prompt").focus();
}

function fit() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function clear() {
  running?.abort();
  running = null;
  messages.length = 0;
  document.querySelectorAll(".turn").forEach((box) => box.remove());
  $("welcome").hidden = false;
  $("prompt").focus();
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("toggle").addEventListener("click", () => openSettings($("settings").hidden, "system"));
$("key").addEventListener("change", connect);
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  document.querySelectorAll(".kept").forEach(paint);
});
document.querySelectorAll(".idea").forEach((idea) =>
  idea.addEventListener("click", () => { $("prompt").value = idea.textContent; send(); }));

connect();
