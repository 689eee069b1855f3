// The page: what is shown, and what a click or a key does.

import { currentMemory } from "./api.js";
import { answer, spokenEnd } from "./answering.js";
import {
  addMessage,
  branchOf,
  conversationId,
  loadConversation,
  loadConversations,
  newConversation,
  removeMessage,
  saveConversation,
  showBranch,
  siblingsOf,
  takeStored,
} from "./conversations.js";
import { hideBanner, showBanner } from "./banner.js";
import { connection } from "./connection.js";
import { askedKey, editedSettings, prepareDialogs } from "./dialogs.js";
import { announce, arrange } from "./dom.js";
import { formatBytes, formatCount, formatRate } from "./figures.js";
import { isComposing, sendOnEnter } from "./keys.js";
import { closeMenu, closedMenu, prepareMenu } from "./menu.js";
import { messageView } from "./messages.js";
import { loadSettings, requestBody } from "./settings.js";
import { drawList, exportFile, importFile } from "./sidebar.js";
import { keepsNothing, session } from "./storage.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const scroller = byId("scroller");
const SAVE_EVERY_MS = 2000;
const SPEAK_EVERY_MS = 4000;
const NEAR_END = 80; // pixels
const CLAIMS = new Map([
  ["exact", "Every answer is exactly the full model’s."],
  ["lossy", "Answers may differ from the full model’s."],
]);

const state = {
  settings: loadSettings(),
  server: { model: "", context: null, thinking: false, efforts: [], verify: null, memory: null },
  conversations: loadConversations(),
  current: null,
  running: null, // {conversation, message, abort, notice}
  views: new Map(), // of the messages that are shown, and of edits that were begun elsewhere
  follows: true, // the newest text stays in sight
  lastTop: 0, // where the text was scrolled to
};

/* What is shown */

function showConversation(conversation) {
  state.current = conversation;
  redraw();
  toEnd();
}

/** Shows what the current conversation has become. Messages that were shown already keep their
 * elements, so that nobody who reads, selects or types among them is disturbed. */
function redraw() {
  const branch = branchOf(state.current);
  const edited = [...state.views].filter(([, view]) => view.isEdited());
  const views = branch.map((message) => state.views.get(message) ?? messageView(message, actions));
  views.forEach((view, at) =>
    view.update(state.running?.message === branch[at], state.running?.notice),
  );
  arrange(
    byId("messages"),
    views.map((view) => view.root),
  );
  state.views = new Map([...edited, ...branch.map((message, at) => [message, views[at]])]);
  byId("empty").hidden = branch.length > 0;
  showTitles();
  showResources();
  if (state.follows) toEnd();
}

function showTitles() {
  const { title } = state.current;
  document.title = title ? `${title} · subspec` : "subspec";
  showList();
}

function showList() {
  const kept = state.conversations;
  drawList(byId("conversations"), kept, state.current, {
    open(conversation) {
      showConversation(conversation);
      closeMenu();
      prompt.focus();
    },
    renamed(conversation) {
      keep(conversation);
      showTitles();
    },
    deleted(conversation) {
      if (state.running?.conversation === conversation) state.running.abort.abort();
      state.conversations = state.conversations.filter((other) => other !== conversation);
      if (conversation === state.current) startConversation();
      else showList();
      hideBanner("storage");
    },
  });
}

function startConversation() {
  showConversation(newConversation(state.settings.system));
}

/** Writes a conversation down; one without messages is not kept. */
function keep(conversation) {
  if (!conversation.messages.length) return;
  const isDeleted = conversation !== state.current && !state.conversations.includes(conversation);
  if (isDeleted) return;
  state.conversations = [
    conversation,
    ...state.conversations.filter((other) => other !== conversation),
  ];
  state.conversations.sort((a, b) => b.updated - a.updated);
  if (saveConversation(conversation)) hideBanner("storage");
  else
    showBanner(
      "storage",
      "The browser’s storage is full: this conversation is not saved. Export or delete some.",
      "Export",
      () => exportFile(state.conversations),
    );
}

function showComposer() {
  const busy = state.running !== null;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = !prompt.value.trim();
  document.body.classList.toggle("busy", busy);
  if (hadFocus) (busy ? byId("stop") : prompt).focus();
}

function growPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 0.4 * window.innerHeight)}px`;
}

function showResources() {
  const parts = [];
  const used = branchOf(state.current).findLast((message) => message.contextTokens)?.contextTokens;
  const { context, verify, memory } = state.server;
  if (verify === "lossy") parts.push("Lossy: answers may differ from the exact model’s");
  if (used && context) parts.push(`Context ${formatCount(used)} of ${formatCount(context)}`);
  else if (context) parts.push(`Context ${formatCount(context)}`);
  if (memory) {
    const peak = memory.peak === null ? "" : `${formatBytes(memory.peak)} of `;
    parts.push(`Memory ${peak}${formatBytes(memory.budget)}`);
  }
  byId("resources").textContent = parts.join(" · ");
}

function toEnd() {
  state.follows = true;
  scrollToEnd();
  byId("to-end").hidden = true;
}

function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  state.lastTop = scroller.scrollTop;
}

const connect = connection((server) => {
  state.server = server;
  byId("model").textContent = server.model;
  byId("model").title = server.model;
  byId("claim").textContent = CLAIMS.get(server.verify) ?? "";
  showResources();
});

/* Answers */

const actions = {
  busy: () => state.running !== null,
  siblings: (message) => siblingsOf(state.current, message),
  edit(message, text) {
    if (state.running) return;
    generate(addMessage(state.current, message.parent, { role: "user", text }));
  },
  regenerate(message) {
    const asked = state.current.messages.find((other) => other.id === message.parent);
    if (!state.running && asked) generate(asked);
  },
  retry(message) {
    if (state.running) return;
    if (!message.text && !message.reasoning) removeMessage(state.current, message);
    actions.regenerate(message);
  },
  show(message, step) {
    if (state.running) return;
    showBranch(state.current, message);
    keep(state.current);
    redraw();
    // The same button is pressed again by the same key, until there is nowhere to go.
    const buttons = [...state.views.get(message).root.querySelectorAll(".versions button")];
    if (step > 0) buttons.reverse();
    buttons.find((button) => !button.disabled)?.focus();
  },
};

function send() {
  const text = prompt.value;
  if (state.running || !text.trim()) return;
  prompt.value = "";
  growPrompt();
  const parent = branchOf(state.current).at(-1)?.id ?? null;
  generate(addMessage(state.current, parent, { role: "user", text }));
}

async function generate(asked) {
  const conversation = state.current;
  conversation.leaf = asked.id;
  const branch = branchOf(conversation);
  const body = () => requestBody(state.server, state.settings, conversation.system, branch);
  const message = addMessage(conversation, asked.id, { role: "assistant" });
  const running = { conversation, message, abort: new AbortController(), notice: "" };
  state.running = running;
  keep(conversation);
  const hadFocus = byId("messages").contains(document.activeElement);
  showConversation(conversation);
  showComposer();
  if (hadFocus) byId("stop").focus(); // what had it is gone, or hidden until the end
  announce("Message sent");
  let saved = performance.now();
  const speak = speaker(message);
  const { error, model } = await answer(message, body, running.abort.signal, (notice, speed) => {
    running.notice = notice;
    onScroll(); // one whose event is still to come
    state.views.get(message)?.update(true, notice);
    if (state.follows) scrollToEnd();
    showSpeed(speed, notice, message);
    speak();
    if (performance.now() - saved < SAVE_EVERY_MS) return;
    keep(conversation);
    saved = performance.now();
  });
  state.running = null;
  keep(conversation);
  state.views.get(message)?.update(false);
  if (state.current === conversation && state.follows) toEnd();
  showList();
  showComposer();
  byId("live").textContent = "";
  speak(
    error
      ? "The answer failed"
      : message.finish === "stopped"
        ? "Stopped"
        : "The answer is complete",
  );
  if (error) afterError(error, message);
  else if (model && model !== state.server.model) connect();
  else refreshMemory();
}

function afterError(error, message) {
  if (["gone", "cut", "failed", "model"].includes(error.kind)) connect();
  if (error.kind !== "auth") return;
  askedKey(false).then((given) => {
    if (!given) return;
    connect();
    if (branchOf(state.current).includes(message)) actions.retry(message);
  });
}

function showSpeed(speed, notice, message) {
  let text = notice;
  if (message.text || message.reasoning) text = message.text ? "Answering" : "Thinking";
  if (speed?.rate) {
    const about = speed.exact ? "" : "≈ ";
    text = `${about}${formatRate(speed.rate)} · ${about}${formatCount(speed.tokens)} tokens`;
  }
  byId("live").textContent = text;
}

/** A function that reads aloud what has come since it last did, sentences at a time. */
function speaker(message) {
  let spoken = 0;
  let last = performance.now();
  return (closing = "") => {
    if (!closing && performance.now() - last < SPEAK_EVERY_MS) return;
    const end = closing
      ? Math.min(message.text.length, spoken + 4000)
      : spokenEnd(message.text, spoken);
    if (end > spoken) announce(message.text.slice(spoken, end));
    if (closing) announce(closing);
    spoken = end;
    last = performance.now();
  };
}

async function refreshMemory() {
  state.server.memory = (await currentMemory().catch(() => null)) ?? state.server.memory;
  showResources();
}

/* Files and other tabs */

async function importChosen() {
  const input = byId("import-file");
  const [file] = input.files;
  input.value = "";
  if (!file) return;
  try {
    const { added, failed, damaged } = await importFile(file, state.conversations);
    state.conversations = [...state.conversations, ...added].sort((a, b) => b.updated - a.updated);
    showList();
    announce(`${added.length} conversations imported`);
    if (failed)
      showBanner(
        "storage",
        `The browser’s storage is full: ${failed} of them are not saved.`,
        "Close",
        () => hideBanner("storage"),
      );
    const left = damaged === 1 ? "1 conversation was" : `${damaged} conversations were`;
    if (damaged)
      showBanner("import", `${left} damaged in the file, and left out.`, "Close", () =>
        hideBanner("import"),
      );
  } catch (error) {
    showBanner("import", error.message, "Close", () => hideBanner("import"));
  }
}

/** Another tab wrote a conversation, or cleared all: what it changed appears here, but one that is
 * being answered or edited keeps its branch. */
function takeOver({ key }) {
  const id = key === null ? null : conversationId(key);
  if (key !== null && id === null) return;
  const { current, running } = state;
  const isChanged = (one) => key === null || one.id === id;
  const isEdited = document.querySelector(".edit-text") !== null;
  const isBusy = (one) => one === running?.conversation || (one === current && isEdited);
  const stored = id === null ? null : loadConversation(id);
  const known = [...state.conversations, current].find(isChanged);
  if (stored && known) takeStored(known, stored, isBusy(known));
  const stays = (one) => !isChanged(one) || one === running?.conversation;
  const kept = new Set(state.conversations.filter(stays));
  if (stored) kept.add(known ?? stored);
  state.conversations = [...kept].sort((a, b) => b.updated - a.updated);
  if (isChanged(current)) redraw();
  else showList();
}

/* Keys and clicks */

function onKey(event) {
  if (isComposing(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (!closedMenu()) state.running?.abort.abort();
  } else if (event.key === "/" && document.activeElement === document.body) {
    event.preventDefault();
    prompt.focus();
  }
}

/** The newest text is left by any way up, however short, and found again by a way down to it. */
function onScroll() {
  const { scrollTop } = scroller;
  const left = scroller.scrollHeight - scrollTop - scroller.clientHeight;
  const moved = scrollTop - state.lastTop;
  if (Math.abs(moved) <= 1) return; // rounding; slow ways add up
  state.lastTop = scrollTop;
  if (moved > 0) state.follows ||= left < NEAR_END;
  else state.follows = left <= 1; // at the end: the text has become shorter
  byId("to-end").hidden = state.follows;
}

function listen() {
  sendOnEnter(prompt, send);
  prompt.addEventListener("input", () => {
    growPrompt();
    showComposer();
  });
  document.addEventListener("keydown", onKey);
  scroller.addEventListener("scroll", onScroll, { passive: true });
  window.addEventListener("storage", takeOver);
  window.addEventListener("pagehide", () => {
    if (state.running) keep(state.running.conversation);
  });
  const clicks = {
    send,
    stop: () => state.running?.abort.abort(),
    "to-end": toEnd,
    "new-chat": () => {
      startConversation();
      closeMenu();
      prompt.focus();
    },
    export: () => exportFile(state.conversations),
    import: () => byId("import-file").click(),
    "open-settings": async () => {
      if (await editedSettings(state.settings, state.current, state.server)) keep(state.current);
    },
  };
  for (const [id, onClick] of Object.entries(clicks)) byId(id).addEventListener("click", onClick);
  byId("import-file").addEventListener("change", importChosen);
}

prepareDialogs();
listen();
prepareMenu();
startConversation();
const last = state.conversations.find((one) => one.id === session.getItem("subspec.open"));
if (last) showConversation(last);
window.addEventListener("pagehide", () => session.setItem("subspec.open", state.current.id));
showComposer();
prompt.focus();
if (keepsNothing)
  showBanner(
    "blocked",
    "This browser blocks storage: conversations are lost when this tab is closed. Export what you need.",
    "Close",
    () => hideBanner("blocked"),
  );
connect();
