// The page: the conversation and its controls.

import { streamChat } from "./api.js";
import { Answer, element } from "./answer.js";
import { startLive } from "./live.js";
import { tip } from "./tip.js";

const KEY = "draftline.api-key";
const at = (id) => document.getElementById(id);

const server = { model: null, needsKey: false };
let messages = []; // of the conversation, without the system prompt
let running = null; // the AbortController of the answer that is coming

// -- the conversation --------------------------------------------------------------------------------------------------

function addUserTurn(text) {
  const turn = element("article", "turn user");
  turn.append(element("div", "words", text));
  at("turns").append(turn);
  return turn;
}

async function ask(text) {
  at("welcome").hidden = true;
  // The conversation goes on from here; what failed before can no longer be tried again in its place.
  for (const button of document.querySelectorAll(".failure button")) button.remove();
  const question = addUserTurn(text);
  const answer = new Answer();
  at("turns").append(answer.root);
  follow(true);
  const history = [...messages, { role: "user", content: text }];
  const controller = new AbortController();
  running = controller;
  showRunning();
  try {
    for await (const chunk of streamChat(request(history), { key: at("key").value.trim(), signal: controller.signal })) {
      const isNear = isAtEnd();
      answer.take(chunk);
      follow(isNear);
    }
    answer.finish();
  } catch (error) {
    const isStopped = error.name === "AbortError";
    answer.finish(isStopped ? "stopped" : "");
    if (!isStopped) fail(answer, question, error, text);
  }
  // A conversation that was left behind meanwhile is not this one.
  if (running !== controller) return;
  running = null;
  if (answer.text) messages = [...history, { role: "assistant", content: answer.text }];
  showRunning();
  follow(isAtEnd());
}

function request(history) {
  const system = at("system").value.trim();
  return {
    model: server.model ?? "",
    messages: system ? [{ role: "system", content: system }, ...history] : history,
    temperature: Number(at("temperature").value),
    max_tokens: Math.max(1, Math.round(Number(at("max-tokens").value)) || 256),
    stream: true,
    stream_options: { include_usage: true, include_token_origin: true },
    // Who tries something out here has not agreed to be trained on.
    store: false,
  };
}

function fail(answer, question, error, text) {
  const before = messages;
  answer.fail(error.message, () => {
    if (running) return;
    messages = before;
    question.remove();
    answer.root.remove();
    ask(text);
  });
  if (error.status === 401) {
    openSettings();
    at("key").focus();
  }
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  messages = [];
  at("turns").replaceChildren();
  at("welcome").hidden = false;
  tip.hide();
  showRunning();
  at("message").focus();
}

function showRunning() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
}

// -- scrolling: follow the answer, unless the reader has gone elsewhere -------------------------------------------------

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = at("scroll");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function follow(wanted) {
  if (wanted) at("scroll").scrollTop = at("scroll").scrollHeight;
}

// -- controls ----------------------------------------------------------------------------------------------------------

function openSettings() {
  at("settings").open = true;
  showSide(true);
}

function showSide(isOpen) {
  at("side").classList.toggle("open", isOpen);
  at("toggle-side").setAttribute("aria-expanded", String(isOpen));
}

function submit() {
  const text = at("message").value.trim();
  if (!text || running) return;
  at("message").value = "";
  ask(text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("message").addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("stop").addEventListener("click", stop);
at("new-chat").addEventListener("click", newChat);
at("examples").addEventListener("click", (event) => {
  if (event.target.matches("button") && !running) ask(event.target.textContent);
});
at("colour").addEventListener("change", () => at("turns").classList.toggle("plain", !at("colour").checked));
at("temperature").addEventListener("input", () => (at("temperature-value").textContent = at("temperature").value));
at("toggle-side").addEventListener("click", () => showSide(!at("side").classList.contains("open")));
at("scroll").addEventListener("scroll", () => tip.hide(), { passive: true });

at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("input", () => sessionStorage.setItem(KEY, at("key").value.trim()));

// -- what the server says of itself -------------------------------------------------------------------------------------

function showServer(load) {
  server.model = load.model;
  at("fact-model").textContent = load.model;
  at("fact-draft").textContent = load.draft ?? "none";
  at("fact-policy").textContent = load.policy || "–";
  at("max-tokens").max = load.max_context;
  if (load.needs_key && !server.needsKey) {
    server.needsKey = true;
    at("key-field").hidden = false;
    if (!at("key").value) at("settings").open = true;
  }
  showStatus("connected", "good");
}

function showStatus(text, tone) {
  if (at("status").textContent !== text) at("status").textContent = text;
  at("status").className = `status ${tone}`;
}

startLive({ onLoad: showServer, onFailure: () => showStatus("not reachable", "bad") });
