// What the user set: sampling, and how a request is made of it.

import { local } from "./storage.js";

const KEY = "subspec.settings";

/** name: the field of the request. An empty value is left to the server. */
export const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    hint: "0 always takes the likeliest token",
  },
  {
    name: "top_p",
    label: "Top-p",
    min: 0.01,
    max: 1,
    step: 0.01,
    hint: "Smallest set of tokens with this cumulative probability",
  },
  {
    name: "top_k",
    label: "Top-k",
    min: 0,
    max: 1000,
    step: 1,
    hint: "Number of likeliest tokens to sample from; 0: all",
  },
  {
    name: "min_p",
    label: "Min-p",
    min: 0,
    max: 1,
    step: 0.01,
    hint: "Minimum probability relative to the likeliest token's",
  },
  {
    name: "max_tokens",
    label: "Max tokens",
    min: 1,
    max: 1000000,
    step: 1,
    hint: "Empty: the rest of the context",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: 4294967295,
    step: 1,
    hint: "The same seed gives the same answer",
  },
];

export function loadSettings() {
  let kept = {};
  try {
    kept = JSON.parse(local.getItem(KEY)) ?? {};
  } catch {
    // Settings that cannot be read are settings that were not made.
  }
  const settings = {
    system: typeof kept.system === "string" ? kept.system : "",
    thinking: "",
    effort: "",
  };
  for (const field of FIELDS) settings[field.name] = valueIn(field, kept[field.name]);
  if (["on", "off"].includes(kept.thinking)) settings.thinking = kept.thinking;
  if (typeof kept.effort === "string") settings.effort = kept.effort.slice(0, 40);
  return settings;
}

/** The number, or null if it is none or out of the field's range. */
export function valueIn(field, value) {
  if (value === null || value === undefined || value === "") return null;
  const number = Number(value);
  const whole = field.step !== 1 || Number.isInteger(number);
  return number >= field.min && number <= field.max && whole ? number : null;
}

/** Returns whether there was room for them. */
export function saveSettings(settings) {
  try {
    local.setItem(KEY, JSON.stringify(settings));
    return true;
  } catch {
    return false;
  }
}

/** The body of POST /v1/chat/completions for an answer to the last message of `branch`. It names no
 * model: the server takes that for the one it has, which may be another than it was. */
export function requestBody(server, settings, system, branch) {
  const messages = branch
    .filter((message) => message.role === "user" || message.text)
    .map((message) => ({ role: message.role, content: message.text }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const { name } of FIELDS) if (settings[name] !== null) body[name] = settings[name];
  if (server.thinking && settings.thinking) {
    body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  }
  if (server.efforts.includes(settings.effort)) body.reasoning_effort = settings.effort;
  return body;
}
