// The server: one streamed answer, what it says about itself, and its errors as one kind of error.

import { readEvents } from "./sse.js";
import { session } from "./storage.js";

/** kind: "auth", "loading", "queue_full", "overloaded", "resources" (it has too little of something
 * now), "context", "gone" (no answer, or the server ends), "cut" (the stream ended before the answer
 * did), "engine" (it failed while answering), "failed" (it has failed for good: nothing to wait for),
 * "model" (it has another one) or "refused". */
export class ServerError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter; // seconds
  }
}

const KEY = "subspec.key";
const EFFORTS = ["low", "medium", "high"];

export function apiKey() {
  return session.getItem(KEY) ?? "";
}

export function keepApiKey(key) {
  session.setItem(KEY, key);
}

/** Whether a header can carry it. */
export function isKey(text) {
  return /^[!-~]*$/.test(text);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (!isKey(apiKey())) throw new ServerError("auth", "The API key is not printable ASCII.");
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("gone", "The server does not answer. Is subspec-serve still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const body = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(body).error ?? {};
  } catch {
    // Not our server's words: a proxy's page, say.
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfter = Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), 3600) : null;
  const message = typeof error.message === "string" ? error.message : `HTTP ${response.status}`;
  return new ServerError(kindOf(response.status, error), message.slice(0, 2000), retryAfter);
}

function kindOf(status, error) {
  if (status === 401 || status === 403) return "auth";
  if (error.code === "queue_full" || status === 429) return "queue_full";
  if (error.code === "context_length_exceeded") return "context";
  if (error.code === "engine_failed") return "failed";
  if (error.code === "model_not_found") return "model";
  if (error.code === "shutting_down") return "gone";
  if (error.code === "overloaded" || error.code === "resources") return error.code;
  if (status === 503) return "loading";
  if (status === 502 || status === 504) return "gone";
  return "refused";
}

export async function getJson(path) {
  const response = await request(path, { signal: AbortSignal.timeout(15000) });
  try {
    return await response.json();
  } catch {
    throw new ServerError("refused", `${path} is not JSON`);
  }
}

/** The model and what else the page shows of the server. Raises ServerError. */
export async function describeServer() {
  const models = await getJson("/v1/models");
  const model = models?.data?.[0] ?? {};
  const props = await getJson("/props").catch(() => ({}));
  const caps = props.chat_template_caps ?? {};
  return {
    model: String(model.id ?? "model"),
    context: numberOf(model.meta?.n_ctx, model.max_model_len, model.context_length),
    thinking: caps.supports_enable_thinking === true,
    efforts: caps.supports_reasoning_effort === true ? EFFORTS : [],
    verify: props.subspec?.verify ?? null, // "exact" or "lossy"; null: it does not say
    memory: memoryOf(props),
  };
}

export async function currentMemory() {
  return memoryOf(await getJson("/props").catch(() => ({})));
}

function memoryOf(props) {
  const memory = props.memory ?? {};
  const budget = numberOf(memory.budget_bytes);
  const peak = numberOf(memory.peak_bytes);
  return budget === null ? null : { budget, peak: peak || null }; // 0: nothing has loaded yet
}

function numberOf(...values) {
  return values.find((value) => Number.isFinite(value)) ?? null;
}

/** Yields {waiting}, {text}, {reasoning}, {tokens}, then one {finish, model, usage, metrics,
 * timings}. Raises ServerError, and AbortError when the signal says stop. */
export async function* streamAnswer(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const end = { finish: null, model: null, usage: null, metrics: null, timings: null };
  try {
    for await (const event of readEvents(response.body)) {
      if (event.comment !== undefined) {
        const place = /\b(?:queue|position)\D{0,20}(\d{1,6})/i.exec(event.comment);
        yield { waiting: place ? Number(place[1]) : 0 };
      } else if (event.data === "[DONE]") {
        yield end;
        return;
      } else yield* readChunk(parseChunk(event.data), end);
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError" || signal.aborted) throw error;
    throw new ServerError("cut", "The connection to the server was lost.");
  }
  if (end.finish === null) {
    throw new ServerError("cut", "The server ended the stream before the answer was complete.");
  }
  yield end;
}

function parseChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("engine", "The server sent a piece that is not JSON.");
  }
  if (chunk?.error) {
    const message = String(chunk.error.message ?? "The engine failed.").slice(0, 2000);
    throw new ServerError(
      chunk.error.code === "context_length_exceeded" ? "context" : "engine",
      message,
    );
  }
  return chunk ?? {};
}

function* readChunk(chunk, end) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (typeof reasoning === "string" && reasoning) yield { reasoning };
  if (typeof delta.content === "string" && delta.content) yield { text: delta.content };
  if (typeof choice?.finish_reason === "string") end.finish = choice.finish_reason;
  if (typeof chunk.model === "string") end.model = chunk.model;
  for (const name of ["usage", "metrics", "timings"]) {
    if (chunk[name] && typeof chunk[name] === "object") end[name] = chunk[name];
  }
  const tokens = numberOf(chunk.usage?.completion_tokens, chunk.timings?.predicted_n);
  if (tokens !== null) yield { tokens };
}
