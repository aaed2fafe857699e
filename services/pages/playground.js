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
  } catch (error) {
    $("model-name").textContent = "not connected";
    $("light").className = "light down";
    say(error.message, true);
  }
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
  const system = $("system").value.trim();
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
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
  let text = "", tokens = 0, reason = "stopped";
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
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) reason = choice.finish_reason;
      if (!choice.delta.content) continue;
      clock.last = performance.now();
      clock.first ||= clock.last;
      tokens += 1;
      text += choice.delta.content;
      const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      body.textContent = text;
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
});
document.querySelectorAll(".idea").forEach((idea) =>
  idea.addEventListener("click", () => { $("prompt").value = idea.textContent; send(); }));

connect();
