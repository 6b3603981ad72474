// The server's OpenAI-style API. Its address is the page's own, so that a proxy's path prefix does no harm.

import { events } from "./sse.js";

const ROOT = new URL("../v1/", import.meta.url);

/** What the server, or the way to it, answered instead of an answer. */
export class ServerError extends Error {
  constructor(message, { status, code, param } = {}) {
    super(message);
    Object.assign(this, { name: "ServerError", status, code, param });
  }
}

/** The models that the key may use: their ids, and the routers that they offer. */
export async function listModels(key) {
  const response = await send("models", { key });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new ServerError("The server did not send a list of models. Is this a SpectR server?");
  return data.map(({ id, routers, outlier_score: outlierScore }) => ({
    id: String(id),
    routers: Array.isArray(routers) ? routers.map(String) : [],
    ...(outlierScore != null && { outlierScore: String(outlierScore) }),
  }));
}

/** Chunks of a streamed chat completion. Throws ServerError, or AbortError when the signal says stop. */
export async function* streamChat(body, { key, signal }) {
  const response = await send("chat/completions", { key, signal, body: { ...body, stream: true } });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw serverError(chunk.error, response.status);
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer was complete. Check the server's log and ask again.");
}

async function send(path, { key, signal, body }) {
  if (/[^\x21-\x7e]/.test(key))
    throw new ServerError("The API key contains characters that are not allowed. Copy it again.");
  const headers = {
    ...(key && { Authorization: `Bearer ${key}` }),
    ...(body && { "Content-Type": "application/json" }),
  };
  const options = {
    method: body ? "POST" : "GET",
    headers,
    signal,
    body: body && JSON.stringify(body),
    credentials: "omit",
  };
  const response = await fetch(new URL(path, ROOT), options).catch(unreachable);
  if (!response.ok) throw await refusal(response);
  return response;
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new ServerError(`No answer from ${ROOT.host}. Is the server still running?`);
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    return serverError(JSON.parse(text).error, response.status);
  } catch {
    const words = `The server answered ${response.status} ${response.statusText}`.trim();
    return new ServerError(text && text.length < 300 ? `${words}: ${text}` : words, { status: response.status });
  }
}

function serverError(error, status) {
  const message = typeof error === "string" ? error : String(error.message);
  return new ServerError(message, { status, code: error.code, param: error.param });
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError(`The server sent something that is not JSON: ${data.slice(0, 80)}`);
  }
}
