// The list of conversations, and their way out of the browser and back.

import { askedName, confirmed } from "./dialogs.js";
import { element, iconButton } from "./dom.js";
import {
  deleteConversation,
  exportText,
  importText,
  newId,
  saveConversation,
} from "./conversations.js";

const byId = (id) => document.getElementById(id);
const MAX_FILE_BYTES = 64 * 1024 * 1024;

/** Draws the list. `actions`: open(conversation), deleted(conversation), renamed(conversation). */
export function drawList(list, conversations, current, actions) {
  const focused = document.activeElement?.closest("#conversations li");
  const place = [...list.children].indexOf(focused);
  const button = focused && [...focused.children].indexOf(document.activeElement);
  list.replaceChildren(
    ...conversations.map((conversation) => row(conversation, conversation === current, actions)),
  );
  if (!focused) return;
  const rows = [...list.children];
  const same = rows.find((one) => one.dataset.id === focused.dataset.id);
  const near = rows[Math.min(place, rows.length - 1)]; // of one that was deleted
  (same?.children[button] ?? near?.firstElementChild ?? byId("new-chat")).focus();
}

function row(conversation, isCurrent, actions) {
  const title = conversation.title || "New conversation";
  const open = element("button", {
    type: "button",
    className: "open-chat",
    dir: "auto",
    textContent: title,
    title,
  });
  open.addEventListener("click", () => actions.open(conversation));
  if (isCurrent) open.ariaCurrent = "page";
  const rename = iconButton("edit", `Rename “${title}”`, async () => {
    const name = await askedName(conversation.title);
    if (name === null) return;
    conversation.title = name;
    actions.renamed(conversation);
  });
  const remove = iconButton("trash", `Delete “${title}”`, async () => {
    const text = `“${title}” and all its answers are deleted from this browser.`;
    if (!(await confirmed("Delete this conversation?", text, "Delete"))) return;
    deleteConversation(conversation.id);
    actions.deleted(conversation);
  });
  return element("li", { data: { id: conversation.id } }, open, rename, remove);
}

export function exportFile(conversations) {
  const blob = new Blob([exportText(conversations)], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  const day = new Date().toISOString().slice(0, 10);
  element("a", { href: url, download: `subspec-conversations-${day}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** Adds a file's conversations; one that is there already and differs is added under a new id.
 * Returns {added, failed, damaged}: how many the browser had no room for, and how many could not be
 * read. Raises an Error. */
export async function importFile(file, conversations) {
  if (file.size > MAX_FILE_BYTES) throw new Error("The file is too large.");
  const here = importText(exportText(conversations)).conversations; // with their fields in order
  const known = new Map(
    here.map((conversation) => [conversation.id, JSON.stringify(conversation)]),
  );
  const added = [];
  let failed = 0;
  const found = importText(await file.text());
  for (const conversation of found.conversations) {
    if (known.get(conversation.id) === JSON.stringify(conversation)) continue;
    if (known.has(conversation.id)) conversation.id = newId();
    known.set(conversation.id, JSON.stringify(conversation));
    added.push(conversation);
    if (!saveConversation(conversation)) failed += 1;
  }
  return { added, failed, damaged: found.damaged };
}
