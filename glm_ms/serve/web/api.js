// The two calls that the page makes: the list of models, and a streamed chat completion.

/** An answer other than 200, or a stream that ended early. status is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

// Relative addresses: the page works below a path of a proxy as well.
async function call(path, { key, headers = {}, ...options }) {
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, error.message);
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 500) || response.statusText;
  try {
    message = JSON.parse(text).error.message ?? message;
  } catch {
    // Not the server but something in front of it, such as a proxy, answered: its own text is shown.
  }
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  throw new ApiError(response.status, message, Number.isFinite(wait) ? wait : null);
}

/** Names of the loaded models and adapters. */
export async function models(key) {
  const response = await call("v1/models", { key });
  return (await response.json()).data.map((model) => model.id);
}

/** Yields the chunks of a chat completion. The signal stops it; the server then frees the place of the request. */
export async function* chat(body, { key, session, signal }) {
  const response = await call("v1/chat/completions", {
    key,
    signal,
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Session-Id": session },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code ?? 500, chunk.error.message ?? data);
    finished ||= chunk.choices?.some((choice) => choice.finish_reason) ?? false;
    yield chunk;
  }
  if (!finished) throw new ApiError(0, "the stream ended without [DONE]");
}

/** The data of each server-sent event of a byte stream, however its bytes are cut into pieces. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, error.message);
      }
      if (piece.done) return;
      const lines = (rest + piece.value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
