// Conversations: trees of messages, kept in the browser, one key each.
//
// A message names its parent; an edit or another answer is a sibling, so nothing that was said is
// lost. `leaf` is the last message of the branch that is shown. Several tabs may write to one
// conversation: each adds messages, and only the tab that made one changes it.

import { local } from "./storage.js";

const PREFIX = "subspec.chat.";
const FORMAT = "subspec-conversations";
const MAX_IMPORT = 20000; // messages in one conversation
const ROLES = ["user", "assistant"];
const made = new Set(); // ids of messages that this tab made
const removed = new Set(); // and of those that it took out

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(system) {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, messages: [], leaf: null };
}

/** The messages from the first to `leaf`. */
export function branchOf(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const branch = [];
  const seen = new Set();
  let message = byId.get(conversation.leaf);
  while (message && !seen.has(message.id)) {
    seen.add(message.id);
    branch.push(message);
    message = byId.get(message.parent);
  }
  return branch.reverse();
}

export function siblingsOf(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent);
}

export function addMessage(conversation, parent, fields) {
  const message = { id: newId(), parent, text: "", created: Date.now(), ...fields };
  made.add(message.id);
  conversation.messages.push(message);
  conversation.leaf = message.id;
  conversation.updated = Date.now();
  if (!conversation.title && fields.role === "user") conversation.title = titleOf(fields.text);
  return message;
}

/** Shows the branch of `message`, down to the newest answer below it. */
export function showBranch(conversation, message) {
  let leaf = message;
  for (;;) {
    const below = conversation.messages.findLast((other) => other.parent === leaf.id);
    if (!below) break;
    leaf = below;
  }
  conversation.leaf = leaf.id;
}

export function titleOf(text) {
  const line = text.trim().slice(0, 400).replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** Every conversation of the browser, the newest first. What cannot be read is left alone. */
export function loadConversations() {
  const found = [];
  for (let i = 0; i < local.length; i += 1) {
    const id = conversationId(local.key(i));
    const conversation = id === null ? null : loadConversation(id);
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

function parse(text) {
  try {
    return checked(JSON.parse(text));
  } catch {
    return null;
  }
}

/** The conversation as it is stored, or null. */
export function loadConversation(id) {
  const conversation = parse(local.getItem(PREFIX + id));
  return conversation?.id === id ? conversation : null;
}

/** Writes it down, with what other tabs have added to it since. Returns whether there was room. */
export function saveConversation(conversation) {
  const stored = loadConversation(conversation.id);
  if (stored) addMessages(conversation, stored.messages);
  try {
    local.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

/** Takes what another tab has stored of it: its messages, its title, and the branch that it shows,
 * unless this tab is busy with its own. */
export function takeStored(conversation, stored, isBusy) {
  addMessages(conversation, stored.messages);
  conversation.title = stored.title;
  conversation.system = stored.system;
  conversation.updated = Math.max(conversation.updated, stored.updated);
  if (!isBusy) conversation.leaf = stored.leaf;
}

function addMessages(conversation, stored) {
  const own = new Map(conversation.messages.map((message) => [message.id, message]));
  const parents = new Set(stored.map((message) => message.parent));
  const messages = stored
    .filter(({ id }) => !removed.has(id) || parents.has(id))
    .map((message) => {
      const known = own.get(message.id);
      if (known && !made.has(message.id)) Object.assign(known, message);
      return known ?? message;
    });
  const kept = new Set(messages);
  // Parents first, as the stored ones are.
  conversation.messages = [...messages, ...[...own.values()].filter((one) => !kept.has(one))];
}

export function deleteConversation(id) {
  local.removeItem(PREFIX + id);
}

/** Takes a message out, unless others follow it: without a parent they could not be read again. */
export function removeMessage(conversation, message) {
  if (conversation.messages.some((other) => other.parent === message.id)) return;
  removed.add(message.id);
  conversation.messages = conversation.messages.filter((other) => other !== message);
  conversation.leaf = message.parent;
}

/** The id of the conversation that is stored under `key`, or null. */
export function conversationId(key) {
  return key.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
}

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** An exported file as {conversations, damaged}: damaged is how many could not be read. Raises an
 * Error that says what is wrong with the file. */
export function importText(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("The file is not an export of this page.");
  }
  const conversations = file.conversations.map(checked).filter((one) => one !== null);
  return { conversations, damaged: file.conversations.length - conversations.length };
}

/** A copy with the known fields only, or null if one is not what it must be. */
function checked(value) {
  const isText = (field) => typeof field === "string";
  if (!value || !/^[0-9a-f]{8,64}$/.test(value.id) || !Array.isArray(value.messages)) return null;
  if (value.messages.length > MAX_IMPORT || !isText(value.title)) return null;
  const messages = [];
  const known = new Set([null]);
  for (const message of value.messages) {
    // A parent comes before its children: no cycles.
    if (!message || !isText(message.id) || !known.has(message.parent) || known.has(message.id))
      return null;
    if (!ROLES.includes(message.role) || !isText(message.text)) return null;
    known.add(message.id);
    messages.push(checkedMessage(message));
  }
  return {
    id: value.id,
    title: value.title.slice(0, 200),
    system: isText(value.system) ? value.system : "",
    created: Number(value.created) || 0,
    updated: Number(value.updated) || 0,
    messages,
    leaf: known.has(value.leaf) ? value.leaf : (messages.at(-1)?.id ?? null),
  };
}

function checkedMessage(message) {
  const copy = {
    id: message.id,
    parent: message.parent,
    role: message.role,
    text: message.text,
    created: Number(message.created) || 0,
  };
  if (typeof message.reasoning === "string") copy.reasoning = message.reasoning;
  if (Number.isFinite(message.reasoningSeconds)) copy.reasoningSeconds = message.reasoningSeconds;
  if (Number.isFinite(message.contextTokens)) copy.contextTokens = message.contextTokens;
  if (typeof message.finish === "string") copy.finish = message.finish.slice(0, 40);
  if (typeof message.stats === "string") copy.stats = message.stats.slice(0, 400);
  if (message.error && typeof message.error.text === "string") {
    copy.error = { kind: String(message.error.kind), text: message.error.text.slice(0, 2000) };
  }
  return copy;
}
