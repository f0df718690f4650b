// The chat page: what each control does. Conversations are in store.js, the calls of the server in api.js.

import { ApiError, chat, models } from "./api.js";
import { addChunk, requestOf } from "./request.js";
import { openSettings, prefer, preference, showTheme } from "./settings.js";
import * as store from "./store.js";
import { say, setLanguage } from "./text.js";
import { article, editor, make } from "./view.js";

const MAX_TRIES = 6; // of a request that a busy server refuses
const WAITING = [429, 503]; // status of a server that is full, or that loads its model
const SAVE_MS = 250; // an answer that streams is stored at most this often
const BEAT_MS = 2000; // and at least this often, which tells other tabs that it still streams
const STALE_MS = 10000; // an answer without such a sign belongs to a tab that has gone
const WATCH_MS = 2000; // between two questions whether the server is back

const $ = (id) => document.getElementById(id);
const log = $("log");
const prompt = $("prompt");
const running = new Map(); // id of a conversation -> { controller, answer } of this tab
let current = store.newConversation();
let names = []; // loaded models
let watching = false;

// Notices

/** A line above the input; `act` gives it a button. An empty text removes it. */
function notice(text, { error = false, label = "", act = null } = {}) {
  const [line, button] = $("notice").children;
  $("notice").hidden = !text;
  $("notice").classList.toggle("error", error);
  line.textContent = text;
  button.hidden = act === null;
  button.textContent = label;
  button.onclick = () => {
    notice("");
    act();
  };
}

const announce = (text) => ($("status").textContent = text); // read out by screen readers

/** Runs a change of the storage; a full storage is reported, the page continues with what is in memory. */
function storing(work) {
  try {
    return work();
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    notice(say("full"), { error: true });
    return undefined;
  }
}

function explain(error) {
  if (!(error instanceof ApiError)) return String(error);
  if (error.status === 0) return say("broken");
  return error.status === 401 ? say("denied") : say("failed", { status: error.status, reason: error.message });
}

// What is shown

const isRunning = () => running.has(current.id);

function runsElsewhere() {
  const last = current.messages.at(-1);
  return last?.state === "streaming" && !isRunning() && Date.now() - last.beat < STALE_MS;
}

const actions = {
  busy: () => isRunning() || runsElsewhere(),
  isLast: (message) => current.messages.at(-1)?.id === message.id,
  wantsResults: (message) =>
    message.tool_calls?.length > 0 && message.state !== "streaming" && actions.isLast(message),
  copy: (text) =>
    Promise.resolve(navigator.clipboard?.writeText(text) ?? Promise.reject(new Error("no clipboard"))).then(
      () => announce(say("copied")),
      () => notice(say("copyFailed"), { error: true }),
    ),
  edit: (message) => editor($(`m-${message.id}`), message, (text) => resend(message, text)),
  retry: (message) => cutAndAsk(message.id, []),
  sendResults,
};

function show() {
  settleStale();
  const bottom = atBottom();
  const empty = current.messages.length ? [] : [make("p", { className: "empty" }, say("empty"))];
  log.replaceChildren(...current.messages.map((message) => article($(`m-${message.id}`), message, actions)), ...empty);
  $("send").hidden = isRunning();
  $("stop").hidden = !isRunning();
  $("send").disabled = runsElsewhere();
  for (const id of ["clear", "export"]) $(id).disabled = !current.messages.length || actions.busy();
  showModels();
  showList();
  if (bottom) log.scrollTop = log.scrollHeight;
}

/** An answer whose tab has gone was stopped, whatever its last stored state says. */
function settleStale() {
  if (isRunning() || runsElsewhere()) return;
  for (const message of current.messages) if (message.state === "streaming") message.state = "stopped";
}

const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

function showModels() {
  const wanted = current.settings.model ?? names[0];
  const options = names.map((name) => new Option(name, name));
  if (wanted && !names.includes(wanted)) options.push(new Option(say("notLoaded", { model: wanted }), wanted));
  $("model").replaceChildren(...options);
  $("model").value = wanted ?? "";
}

function showList() {
  const rows = store.list().map((conversation) => {
    const title = store.title(conversation) || say("untitled");
    const open = make("button", { type: "button", className: "title", title, onclick: () => go(conversation.id) }, title);
    if (conversation.id === current.id) open.setAttribute("aria-current", "true");
    const label = say("remove", { title });
    const remove = make("button", { type: "button", ariaLabel: label, title: label, onclick: () => removeOne(conversation) }, "✕");
    return make("li", {}, open, remove);
  });
  $("list").replaceChildren(...rows);
}

// Conversations

/** The address names the conversation: a reload opens it again, and tabs show different ones. */
function go(id) {
  openSide(false);
  if (location.hash === `#${id}`) return;
  location.hash = id;
}

function openAddressed() {
  const id = location.hash.slice(1);
  if (id === current.id) return;
  current = store.load(id) ?? store.newConversation(current.settings);
  notice("");
  show();
  log.scrollTop = log.scrollHeight;
  prompt.focus();
}

function begin() {
  current = store.newConversation(current.settings);
  history.pushState(null, "", location.pathname + location.search);
  openSide(false);
  show();
  prompt.focus();
}

function removeOne(conversation) {
  running.get(conversation.id)?.controller.abort();
  store.remove(conversation.id);
  if (conversation.id === current.id) begin();
  else show();
  notice(say("removed"), { label: say("undo"), act: () => restore(conversation) });
}

function clear() {
  openSide(false);
  const before = structuredClone(current);
  edit((conversation) => (conversation.messages = []));
  notice(say("cleared"), { label: say("undo"), act: () => restore(before) });
}

function restore(conversation) {
  storing(() => store.save(conversation));
  current = conversation;
  history.replaceState(null, "", `#${conversation.id}`);
  show();
}

/** Changes the shown conversation, from its newest state. It is stored once it has a message. */
function edit(change) {
  current = store.load(current.id) ?? current;
  change(current);
  current.updated = Date.now();
  if (current.messages.length || store.load(current.id)) storing(() => store.save(current));
  show();
}

function exportOne() {
  openSide(false);
  const name = `glm_ms ${store.title(current).slice(0, 30).replace(/[^\p{L}\p{N} ]/gu, "")}`.trim();
  const url = URL.createObjectURL(new Blob([JSON.stringify(current, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

async function importOne(file) {
  openSide(false);
  const found = store.parse(await file.text());
  if (found === null) {
    notice(say("importBad", { file: file.name }), { error: true });
    return;
  }
  restore(store.load(found.id) === null ? found : { ...found, id: store.newId() });
}

// Questions and answers

function send(text) {
  const last = current.messages.at(-1);
  if (!text.trim() || actions.busy()) return;
  if (last && actions.wantsResults(last)) {
    notice(say("resultsFirst"), { error: true });
    log.querySelector("[data-call]")?.focus();
    return;
  }
  prompt.value = "";
  fitPrompt();
  cutAndAsk(null, [{ id: store.newId(), role: "user", content: text }]);
}

function sendResults(message) {
  const added = message.tool_calls.map((call) => {
    const content = log.querySelector(`[data-call="${CSS.escape(call.id)}"]`).value;
    return { id: store.newId(), role: "tool", content, tool_call_id: call.id, name: call.function.name };
  });
  if (added.some((result) => !result.content.trim())) notice(say("resultsFirst"), { error: true });
  else cutAndAsk(null, added);
}

const resend = (message, text) => cutAndAsk(message.id, [{ id: store.newId(), role: "user", content: text }]);

/** Removes the messages from `from` on (null: none), adds messages and asks for an answer. */
function cutAndAsk(from, added) {
  notice("");
  const answer = { id: store.newId(), role: "assistant", content: "", state: "streaming", beat: Date.now() };
  running.set(current.id, { controller: new AbortController(), answer });
  edit(({ messages }) => {
    const place = from === null ? -1 : messages.findIndex((message) => message.id === from);
    if (place >= 0) messages.splice(place);
    messages.push(...added, answer);
  });
  history.replaceState(null, "", `#${current.id}`);
  log.scrollTop = log.scrollHeight;
  receive(structuredClone(current), running.get(current.id));
}

/** Asks and receives; the answer is stored while it streams, whichever conversation is shown. */
async function receive(conversation, job) {
  const { controller, answer } = job;
  const beat = setInterval(() => keep(conversation.id, job), BEAT_MS);
  announce(say("answering"));
  try {
    await stream(conversation, job);
    answer.state = answer.finish === "length" ? "cut" : "done";
  } catch (error) {
    answer.state = controller.signal.aborted ? "stopped" : "failed";
    if (!controller.signal.aborted) fail(answer, error);
  }
  clearInterval(beat);
  running.delete(conversation.id);
  keep(conversation.id, job);
  announce(answer.state === "failed" ? answer.error : say(answer.state === "done" ? "finished" : answer.state));
  if (conversation.id === current.id) show();
}

async function stream(conversation, job) {
  const { controller, answer } = job;
  const body = requestOf(conversation, conversation.settings.model ?? names[0]);
  const begun = performance.now();
  let saved = 0;
  for await (const chunk of patient(body, conversation.id, controller.signal)) {
    const now = performance.now();
    addChunk(answer, chunk);
    answer.seconds = (now - begun) / 1000;
    if (conversation.id === current.id) drawSoon(answer);
    if (now - saved > SAVE_MS) {
      saved = now;
      keep(conversation.id, job);
    }
  }
}

/** A chat completion that waits where the queue of the server is full, or its model is not loaded yet. */
async function* patient(body, session, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      yield* chat(body, { key: preference("key"), session, signal });
      return;
    } catch (error) {
      if (!WAITING.includes(error.status) || tries === MAX_TRIES) throw error;
      const seconds = Math.min(Math.max(error.retryAfter ?? 1, 0.5), 30);
      notice(say("busy", { seconds }));
      await pause(seconds * 1000, signal);
      notice("");
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    const leave = () => {
      clearTimeout(timer);
      notice("");
      reject(signal.reason);
    };
    signal.addEventListener("abort", leave, { once: true });
  });
}

function fail(answer, error) {
  answer.error = explain(error);
  if (error.status === 0 || error.status >= 500) watch();
  if (error.status === 401) notice(answer.error, { error: true, label: say("settings"), act: () => settings("key") });
}

/** Stores the answer in its place; stops it if the conversation was removed, here or in another tab. */
function keep(id, { controller, answer }) {
  answer.beat = Date.now();
  const put = ({ messages }) => {
    const place = messages.findIndex((message) => message.id === answer.id);
    if (place >= 0) messages[place] = structuredClone(answer);
    else controller.abort();
  };
  storing(() => store.change(id, put) ?? controller.abort());
  if (id === current.id) current = store.load(id) ?? current;
}

let drawing = false;
function drawSoon(answer) {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const node = $(`m-${answer.id}`);
    if (!node || answer.state !== "streaming") return;
    const bottom = atBottom();
    article(node, answer, actions);
    if (bottom) log.scrollTop = log.scrollHeight;
  });
}

// The server

async function loadModels() {
  try {
    names = await models(preference("key"));
    showModels();
    return true;
  } catch (error) {
    if (error.status === 0 || error.status >= 500) watch();
    else notice(explain(error), { error: true, label: say("settings"), act: () => settings("key") });
    return false;
  }
}

/** Asks until the server answers again. */
async function watch() {
  if (watching) return;
  watching = true;
  notice(say("unreachable"), { error: true });
  let found = false;
  while (!found) {
    await pause(WATCH_MS, new AbortController().signal);
    found = await models(preference("key")).then(
      (list) => (names = list),
      (error) => error.status > 0 && error.status < 500,
    );
  }
  watching = false;
  notice(say("back"));
  loadModels();
}

// Controls

function settings(focus) {
  const save = (chosen) => {
    const { model } = current.settings;
    edit((conversation) => (conversation.settings = { ...chosen, ...(model ? { model } : {}) }));
    setTimeout(loadModels); // the key is stored after this
  };
  openSettings(current.settings, save, focus);
}

function openSide(open) {
  $("side").toggleAttribute("data-open", open);
  $("open-side").setAttribute("aria-expanded", String(open));
  if (open) $("close-side").focus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function speak(language) {
  const shown = setLanguage(language);
  $("language").textContent = shown === "zh" ? "English" : "中文";
  $("language").lang = shown === "zh" ? "en" : "zh-CN";
  show();
}

function switchLanguage() {
  const other = document.documentElement.lang === "zh-CN" ? "en" : "zh";
  prefer("language", other);
  speak(other);
}

function onKey(event) {
  // Enter that chooses a word in a Chinese input method is not meant for the page.
  const composing = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || composing) return;
  event.preventDefault();
  send(prompt.value);
}

function onStorage({ key }) {
  if (key === "glm-ms.theme") showTheme();
  if (!store.isChat(key) || isRunning()) {
    showList();
    return;
  }
  const newest = store.load(current.id);
  if (newest) current = newest;
  else if (current.messages.length) current = store.newConversation(current.settings); // removed in another tab
  show();
  if (runsElsewhere()) {
    notice(say("elsewhere"));
    setTimeout(() => !actions.busy() && show(), STALE_MS);
  } else if ($("notice").firstElementChild.textContent === say("elsewhere")) notice("");
}

/** A page that is left stores what it has received. */
function onLeave() {
  for (const [id, job] of running) {
    job.answer.state = "stopped";
    keep(id, job);
    job.controller.abort();
  }
}

function connect() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    send(prompt.value);
  };
  $("stop").onclick = () => running.get(current.id)?.controller.abort();
  $("new").onclick = begin;
  $("clear").onclick = clear;
  $("export").onclick = exportOne;
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = ({ target }) => {
    if (target.files.length) importOne(target.files[0]);
    target.value = ""; // the same file may be chosen again
  };
  $("open-settings").onclick = () => settings();
  $("language").onclick = switchLanguage;
  $("open-side").onclick = () => openSide(true);
  $("close-side").onclick = () => openSide(false);
  $("model").onchange = ({ target }) => edit((conversation) => (conversation.settings.model = target.value));
  prompt.onkeydown = onKey;
  prompt.oninput = fitPrompt;
  addEventListener("keydown", (event) => event.key === "Escape" && openSide(false));
  addEventListener("hashchange", openAddressed);
  addEventListener("storage", onStorage);
  addEventListener("pagehide", onLeave);
}

current = store.load(location.hash.slice(1)) ?? current;
connect();
showTheme();
speak(preference("language"));
if (!store.stored()) notice(say("unstored"), { error: true });
loadModels();
log.scrollTop = log.scrollHeight;
