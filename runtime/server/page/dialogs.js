// The dialogs: settings, API key, and one question.

import { apiKey, isKey, keepApiKey } from "./api.js";
import { element } from "./dom.js";
import { FIELDS, saveSettings, valueIn } from "./settings.js";

const byId = (id) => document.getElementById(id);

/** A dialog closes by its Cancel button, by Escape and by a click beside it. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    let pressedBeside = false; // else a selection was drawn out of a field
    dialog.addEventListener("pointerdown", (event) => {
      pressedBeside = isBeside(dialog, event);
    });
    dialog.addEventListener("click", (event) => {
      const leaves = pressedBeside && isBeside(dialog, event);
      if (leaves || event.target.closest("[data-close]")) dialog.close("");
    });
    // Forms are never sent: the policy of the page forbids it, and Enter means the main button.
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("ok");
    });
  }
}

/** Whether it was the backdrop: of clicks there a dialog is the target, but also of those on its
 * padding. */
function isBeside(dialog, { target, clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  const isInside = clientX >= left && clientX <= right && clientY >= top && clientY <= bottom;
  return target === dialog && !isInside;
}

function opened(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}

/** Returns whether the user agreed. */
export function confirmed(title, text, button) {
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-ok").textContent = button;
  return opened(byId("confirm"));
}

/** A new name, or null. */
export async function askedName(name) {
  byId("rename-name").value = name;
  const done = opened(byId("rename"));
  byId("rename-name").select();
  return (await done) ? byId("rename-name").value.trim().slice(0, 200) || null : null;
}

/** Asks for the API key. Returns whether one was given. */
export async function askedKey(isWrong) {
  const dialog = byId("key");
  if (dialog.open) return false;
  const field = byId("key-value");
  field.value = apiKey();
  for (let refused = isWrong; ; refused = true) {
    byId("key-text").textContent = refused
      ? "The server does not accept this key."
      : "This server asks for an API key. It is stored until this tab is closed.";
    if (!(await opened(dialog))) return false;
    const key = field.value.trim();
    if (!isKey(key)) continue;
    keepApiKey(key);
    return true;
  }
}

/** Lets the user change `settings` and the conversation's system prompt. Returns whether. */
export async function editedSettings(settings, conversation, server) {
  const inputs = byId("sampling");
  inputs.replaceChildren(...FIELDS.map((field) => fieldRow(field, settings[field.name])));
  byId("system").value = conversation.system;
  byId("system-default").checked = conversation.system === settings.system;
  byId("thinking-row").hidden = !server.thinking;
  byId("reasoning-fields").hidden = !server.thinking && !server.efforts.length;
  byId("thinking").value = settings.thinking;
  byId("effort-row").hidden = !server.efforts.length;
  const efforts = ["", ...server.efforts].map((name) =>
    element("option", { value: name, textContent: name || "default" }),
  );
  byId("effort").replaceChildren(...efforts);
  byId("effort").value = server.efforts.includes(settings.effort) ? settings.effort : "";
  if (!(await opened(byId("settings")))) return false;
  for (const field of FIELDS)
    settings[field.name] = valueIn(field, byId(`field-${field.name}`).value);
  settings.thinking = byId("thinking").value;
  if (server.efforts.length) settings.effort = byId("effort").value;
  conversation.system = byId("system").value;
  if (byId("system-default").checked) settings.system = conversation.system;
  saveSettings(settings);
  return true;
}

function fieldRow(field, value) {
  const id = `field-${field.name}`;
  const input = element("input", {
    id,
    type: "number",
    min: field.min,
    max: field.max,
    step: field.step,
    value: value ?? "",
    placeholder: "default",
  });
  input.setAttribute("aria-describedby", `${id}-hint`);
  const label = element("label", { htmlFor: id, textContent: field.label });
  const hint = element("small", { id: `${id}-hint`, textContent: field.hint });
  return element("div", { className: "field" }, label, input, hint);
}
