// The OpenAI surface as the page uses it: one streamed chat request, errors in words.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Yields the chunks of a streamed answer. Throws ApiError, or AbortError when the signal fires.
export async function* streamChat(body, { key, signal }) {
  const response = await send(body, key, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer was complete.");
}

async function send(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch("../v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. It may be starting, or the connection may be down.");
  }
  if (response.ok) return response;
  throw new ApiError(await describe(response), response.status);
}

async function describe(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

// The data of server-sent events, whose lines may arrive in any pieces.
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke while the answer was coming.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export async function readLoad() {
  const response = await fetch("load", { cache: "no-store" });
  if (!response.ok) throw new ApiError(await describe(response), response.status);
  return response.json();
}
