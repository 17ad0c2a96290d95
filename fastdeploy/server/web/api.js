// The server's API as the page uses it: the list of models, and a streamed chat.

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status; // 0: there was no answer
    this.retryAfter = retryAfter; // seconds, as the server says them
  }
}

async function call(path, key, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. It may have stopped, or the connection is gone.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 500) || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not the server's own words: something between here and there has answered.
  }
  throw new ApiError(message, response.status, response.headers.get("retry-after"));
}

export async function models(key) {
  return (await (await call("v1/models", key)).json()).data;
}

// Yields the events of one answer. Raises ApiError, also for an error inside the stream and for a
// stream that breaks off.
export async function* chat(body, key, signal) {
  const response = await call("v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, 500);
    yield event;
  }
  throw new ApiError("The connection was lost in the middle of the answer.");
}

async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return; // broken off
      }
      if (part.done) return;
      rest += decoder.decode(part.value, { stream: true }).replaceAll("\r", "");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a stream that has failed cannot be cancelled
  }
}
