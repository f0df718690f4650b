// Messages as elements. Text of models and users reaches the page as text nodes only, never as HTML.

import { say } from "./text.js";

/** An element with properties and children. */
export function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  const { dataset = {}, ...others } = properties;
  Object.assign(node, others);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

/** Cuts an answer into paragraphs and fenced code: [{ code, language, text }]. A fence may still be open. */
export function split(content) {
  const blocks = [];
  let open = { code: false, language: "", lines: [], fence: "" };
  const close = () => {
    if (open.code || open.lines.some((line) => line.trim())) {
      blocks.push({ code: open.code, language: open.language, text: open.lines.join("\n") });
    }
  };
  for (const line of content.split("\n")) {
    const [, fence = "", language = ""] = /^ {0,3}(`{3,}) *([\w+#.-]*) *$/.exec(line) ?? [];
    const ends = open.code && fence.length >= open.fence.length && !language;
    if ((fence && !open.code) || ends) {
      close();
      open = { code: !ends, language, lines: [], fence };
    } else {
      open.lines.push(line);
    }
  }
  close();
  return blocks;
}

function paragraph(text) {
  const parts = text.replace(/^\n+|\n+$/g, "").split(/`([^`\n]+)`/); // odd places: inline code
  return make("p", {}, ...parts.map((part, n) => (n % 2 ? make("code", {}, part) : part)));
}

function codeBlock({ language, text }, actions) {
  const copy = make("button", { type: "button", onclick: () => actions.copy(text) }, say("copy"));
  const code = make("pre", { tabIndex: 0 }, make("code", {}, text));
  return make("div", { className: "block" }, make("div", { className: "bar" }, make("span", {}, language), copy), code);
}

function callCard(call, message, actions) {
  let shown = call.function.arguments;
  try {
    shown = JSON.stringify(JSON.parse(shown), null, 2);
  } catch {
    // Arguments that are not JSON, or not yet, are shown as they came.
  }
  const summary = make("summary", {}, say("calls", { name: call.function.name }));
  const card = make("details", { className: "call", open: true }, summary, make("pre", {}, make("code", {}, shown)));
  if (actions.wantsResults(message)) {
    const box = make("textarea", { rows: 2, dataset: { call: call.id } });
    card.append(make("label", {}, say("result"), box));
  }
  return card;
}

/** Puts the content into the body; parts that are as before stay, so that a selection in them survives. */
function fillBody(body, message, actions) {
  const blocks = split(message.content);
  const calls = message.tool_calls ?? [];
  const parts = [
    ...blocks.map((block) => [block, () => (block.code ? codeBlock(block, actions) : paragraph(block.text))]),
    ...calls.map((call) => [[call, actions.wantsResults(message)], () => callCard(call, message, actions)]),
  ];
  parts.forEach(([content, build], place) => {
    const source = JSON.stringify([document.documentElement.lang, content]);
    const old = body.children[place];
    if (old?.dataset.source === source) return;
    const node = build();
    node.dataset.source = source;
    if (old) old.replaceWith(node);
    else body.append(node);
  });
  while (body.children.length > parts.length) body.lastChild.remove();
  body.classList.toggle("waiting", message.state === "streaming");
}

function facts(message) {
  if (message.state === "failed") return [make("span", { className: "error" }, message.error)];
  const notes = [];
  if (message.state === "stopped" || message.state === "cut") notes.push(say(message.state));
  if (message.tokens) {
    const speed = (message.tokens / Math.max(message.seconds, 0.001)).toFixed(1);
    notes.push(say("tokens", { count: message.tokens, speed }));
  }
  return notes.length ? [make("span", { className: "meta" }, notes.join(" "))] : [];
}

function buttons(message, actions) {
  const button = (key, act) => make("button", { type: "button", onclick: act, dataset: { action: key } }, say(key));
  const shown = [];
  if (actions.wantsResults(message)) shown.push(button("sendResults", () => actions.sendResults(message)));
  if (message.content) shown.push(button("copy", () => actions.copy(message.content)));
  if (message.role === "user" && !actions.busy()) shown.push(button("edit", () => actions.edit(message)));
  if (message.role === "assistant" && actions.isLast(message) && !actions.busy()) {
    shown.push(button("retry", () => actions.retry(message)));
  }
  return shown;
}

/** The article of a message: `old`, if given, brought up to date, so that what is typed or selected in it survives. */
export function article(old, message, actions) {
  const node = old ?? make("article", { id: `m-${message.id}` });
  if (!old) node.append(make("h2"), make("div", { className: "body" }), make("div", { className: "actions" }));
  const streaming = message.state === "streaming";
  node.dataset.role = message.role;
  node.dataset.state = message.state ?? "done";
  node.querySelector("h2").textContent = say(message.role, { name: message.name ?? "" });
  fillBody(node.querySelector(".body"), message, actions);
  node.querySelector(".actions").replaceChildren(...(streaming ? [] : [...facts(message), ...buttons(message, actions)]));
  return node;
}

/** Turns the article of a user's message into an input; `done` receives the new text. */
export function editor(node, message, done) {
  const body = node.querySelector(".body");
  const rows = Math.min(message.content.split("\n").length + 1, 12);
  const box = make("textarea", { value: message.content, rows, ariaLabel: say("prompt") });
  const old = [...body.childNodes];
  const row = node.querySelector(".actions");
  const oldButtons = [...row.childNodes];
  const leave = () => {
    body.replaceChildren(...old);
    row.replaceChildren(...oldButtons);
  };
  body.replaceChildren(box);
  row.replaceChildren(
    make("button", { type: "button", className: "main", onclick: () => box.value.trim() && done(box.value) }, say("saveEdit")),
    make("button", { type: "button", onclick: leave }, say("cancel")),
  );
  box.onkeydown = (event) => event.key === "Escape" && leave();
  box.focus();
}
