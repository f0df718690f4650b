// The settings dialog: what a conversation asks for, and what this browser prefers.

import { say } from "./text.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const problem = document.getElementById("settings-error");

/** A stored preference: of this tab for the key, otherwise of the browser. Storage may be off. */
function place(name) {
  return name === "key" ? sessionStorage : localStorage;
}

export function preference(name) {
  try {
    return place(name).getItem(`glm-ms.${name}`) ?? "";
  } catch {
    return "";
  }
}

export function prefer(name, value) {
  try {
    if (value) place(name).setItem(`glm-ms.${name}`, value);
    else place(name).removeItem(`glm-ms.${name}`);
  } catch {
    // The choice then lasts until the page is left.
  }
}

export function showTheme() {
  document.documentElement.dataset.theme = preference("theme") || "auto";
}

/** The tools of a JSON text as the API wants them; functions without the wrapper of OpenAI get it. */
export function parseTools(text) {
  const tools = JSON.parse(text);
  if (!Array.isArray(tools)) throw new TypeError("[...]");
  return tools.map((tool) => {
    const wrapped = tool?.type === "function" ? tool : { type: "function", function: tool };
    if (typeof wrapped.function?.name !== "string") throw new TypeError('"name"');
    return wrapped;
  });
}

/** The settings of the form. Throws Error with the field and the reason. */
function read() {
  const settings = {};
  for (const name of NUMBERS) {
    const field = form.elements[name];
    if (!field.validity.valid) throw new Error(say("fieldBad", { field: say(name), reason: field.validationMessage }));
    if (field.value !== "") settings[name] = Number(field.value);
  }
  const system = form.elements.system.value;
  if (system.trim()) settings.system = system;
  const stop = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) settings.stop = stop;
  const tools = form.elements.tools.value.trim();
  if (!tools) return settings;
  try {
    if (parseTools(tools).length) settings.tools = tools;
  } catch (error) {
    throw new Error(say("toolsBad", { reason: error.message }));
  }
  return settings;
}

/** Shows the dialog; `save` receives the new settings of the conversation. */
export function openSettings(settings, save, focus = "system") {
  for (const name of [...NUMBERS, "system", "tools"]) form.elements[name].value = settings[name] ?? "";
  form.elements.stop.value = (settings.stop ?? []).join("\n");
  form.elements.theme.value = preference("theme") || "auto";
  form.elements.key.value = preference("key");
  problem.hidden = true;
  form.onsubmit = (event) => {
    event.preventDefault();
    try {
      save(read());
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      return;
    }
    prefer("theme", form.elements.theme.value === "auto" ? "" : form.elements.theme.value);
    prefer("key", form.elements.key.value.trim());
    showTheme();
    dialog.close();
  };
  dialog.showModal();
  form.elements[focus].focus();
}

document.getElementById("cancel-settings").onclick = () => dialog.close();
