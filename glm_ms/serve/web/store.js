// Conversations in the local storage of the browser: one entry each, so that tabs write different entries.

const PREFIX = "glm-ms.chat.";
const CONVERSATION_KEYS = ["id", "created", "updated", "settings", "messages"];
const ROLES = ["user", "assistant", "tool"];
const memory = new Map(); // what the browser does not store: it refuses, or its storage is full

function storage() {
  try {
    localStorage.getItem(PREFIX);
    return localStorage;
  } catch {
    return null;
  }
}

export const stored = () => storage() !== null;
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (n) => (n % 36).toString(36)).join("");
export const isChat = (key) => key === null || key.startsWith(PREFIX); // null: everything was removed

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), created: now, updated: now, settings: structuredClone(settings), messages: [] };
}

/** The conversation of a text, or null if the text is none. */
export function parse(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  const whole =
    value !== null &&
    typeof value === "object" &&
    CONVERSATION_KEYS.every((key) => key in value) &&
    typeof value.id === "string" &&
    /^[\w-]{1,64}$/.test(value.id) &&
    typeof value.settings === "object" &&
    value.settings !== null &&
    Array.isArray(value.messages) &&
    value.messages.every(isMessage);
  return whole ? value : null;
}

function isMessage(message) {
  return (
    ROLES.includes(message?.role) &&
    typeof message.id === "string" &&
    typeof message.content === "string" &&
    (message.tool_calls ?? []).every((call) => typeof call?.function?.arguments === "string")
  );
}

function keys() {
  const place = storage();
  const found = place ? Array.from({ length: place.length }, (_, n) => place.key(n)) : [];
  return [...new Set([...found, ...memory.keys()])];
}

/** All conversations, the last used first. */
export function list() {
  return keys()
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => load(key.slice(PREFIX.length)))
    .filter((conversation) => conversation !== null)
    .sort((one, other) => other.updated - one.updated);
}

export function load(id) {
  const text = memory.get(PREFIX + id) ?? storage()?.getItem(PREFIX + id) ?? null;
  return text === null ? null : parse(text);
}

/** Writes a conversation. Throws QuotaExceededError where the storage is full; this tab then still has it. */
export function save(conversation) {
  const key = PREFIX + conversation.id;
  memory.set(key, JSON.stringify(conversation));
  const place = storage();
  if (place === null) return;
  place.setItem(key, memory.get(key));
  memory.delete(key);
}

/** Applies `edit` to the newest state, which another tab may have written. Null if the conversation is gone. */
export function change(id, edit) {
  const conversation = load(id);
  if (conversation === null) return null;
  edit(conversation);
  conversation.updated = Date.now();
  save(conversation);
  return conversation;
}

export function remove(id) {
  storage()?.removeItem(PREFIX + id);
  memory.delete(PREFIX + id);
}

/** The first message of the user, on one line. */
export function title(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  return Array.from(first.trim().replace(/\s+/g, " ")).slice(0, 80).join("");
}
