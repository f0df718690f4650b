// From a stored conversation to a request, and from the chunks of the answer back to a stored message.

import { parseTools } from "./settings.js";

/** The body of a chat completion. Questions that got no answer are left out. */
export function requestOf(conversation, model) {
  const { system, tools, ...sampling } = conversation.settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const message of conversation.messages) {
    if (message.state === "streaming") continue;
    const empty = message.role === "assistant" && !message.content && !message.tool_calls?.length;
    if (!empty) messages.push(plain(message));
    else if (messages.at(-1)?.role === "user") messages.pop();
  }
  return { ...sampling, model, messages, ...(tools ? { tools: parseTools(tools) } : {}) };
}

/** A message as the API has it. */
export function plain({ role, content, tool_calls, tool_call_id }) {
  return {
    role,
    content,
    ...(tool_calls?.length ? { tool_calls } : {}),
    ...(tool_call_id ? { tool_call_id } : {}),
  };
}

/** Adds a chunk of a stream to the answer: text, parts of tool calls, the reason of its end, usage. */
export function addChunk(answer, chunk) {
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  for (const { delta, finish_reason } of chunk.choices ?? []) {
    answer.content += delta?.content ?? "";
    for (const part of delta?.tool_calls ?? []) addCall(answer, part);
    if (finish_reason) answer.finish = finish_reason;
  }
}

function addCall(answer, part) {
  answer.tool_calls ??= [];
  const call = (answer.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  call.id ||= part.id ?? "";
  call.function.name += part.function?.name ?? "";
  call.function.arguments += part.function?.arguments ?? "";
}
