"use strict";
// A document that is read over http again and again. What has not changed is not drawn again.

const KEY = "axicon-key";

function say(text, bad = false) {
  $("live").textContent = text;
  $("live").classList.toggle("bad", bad);
}

// `take` is given the text when it is a new one, `said` tells what to show after a success, `otherwise` what
// to add to a failure, `every` the milliseconds to the next time.
function follow(path, { take, said, every, otherwise = () => "" }) {
  const field = $("key");
  let before = "";
  let tag = null;
  let timer = 0;
  let turn = 0;
  // Kept for this tab, so that a key is typed once for the list and its sweeps.
  field.value = sessionStorage.getItem(KEY) || "";

  async function read() {
    clearTimeout(timer);
    const mine = ++turn;
    try {
      const text = await fetched();
      if (mine !== turn) return; // a later one is on its way
      if (text !== before) {
        take(text);
        before = text;
      }
      say(said());
    } catch (error) {
      if (mine !== turn) return;
      tag = null;
      say(`Not live: ${error.message}. ${otherwise()}`, true);
    }
    timer = setTimeout(() => {
      if (!document.hidden) read();
    }, every());
  }

  async function fetched() {
    const key = field.value.trim();
    const headers = {
      ...(key && { Authorization: `Bearer ${key}` }),
      ...(tag && { "If-None-Match": tag }),
    };
    // Past the browser's own store: it asks by the second of the last change, and would miss a second change
    // within that second for good.
    const answer = await fetch(path, { cache: "no-store", headers });
    $("key-box").hidden = answer.status !== 401;
    if (answer.status === 304) return before;
    if (answer.status === 401) {
      throw new Error(key ? "this API key is not valid" : "this server asks for an API key");
    }
    if (!answer.ok) throw new Error(await refusal(answer));
    const text = await answer.text();
    tag = answer.headers.get("ETag");
    return text;
  }

  field.addEventListener("change", () => {
    sessionStorage.setItem(KEY, field.value.trim());
    read();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) read();
  });
  read();
}

async function refusal(answer) {
  try {
    return (await answer.json()).error.message.replace(/\.$/, "");
  } catch {
    return `the server answered ${answer.status}`;
  }
}
