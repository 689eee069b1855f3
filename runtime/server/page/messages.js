// One message as it is shown: its text, its reasoning, what can be done with it.

import { copyButton, element, icon, iconButton } from "./dom.js";
import { formatSeconds } from "./figures.js";
import { isComposing, sendOnEnter } from "./keys.js";
import { markdownView } from "./render.js";

/** `actions`: busy(), siblings(message), edit(message, text), regenerate(message), retry(message),
 * show(message, step), of a sibling that is so many steps away. Returns {root,
 * update(isOpen, notice), isEdited()}; update shows what `message` and its siblings have become,
 * `notice` stands in for text that has not come yet; isEdited tells whether the user has typed
 * something that is not sent. */
export function messageView(message, actions) {
  const isUser = message.role === "user";
  const label = isUser ? "You" : "Answer";
  const root = element("article", {
    className: `message ${message.role}`,
    ariaLabel: label,
    data: { id: message.id },
  });
  return isUser ? userView(root, message, actions) : answerView(root, message, actions);
}

function userView(root, message, actions) {
  const bubble = element("div", { className: "bubble", dir: "auto", textContent: message.text });
  const bar = toolbar(message, actions, [
    copyButton(() => message.text),
    iconButton("edit", "Edit and send again", () => edit()),
  ]);
  let area = null; // while it is edited
  const show = () => root.replaceChildren(bubble, bar.root);
  const edit = () => {
    if (actions.busy()) return;
    area = element("textarea", {
      className: "edit-text",
      value: message.text,
      dir: "auto",
      ariaLabel: "Edit your message",
    });
    const finish = (send) => {
      if (send && actions.busy()) return; // the text stays until it can be sent
      const text = area.value;
      const isSent = send && text.trim() !== "";
      area = null;
      if (isSent) actions.edit(message, text); // while the field has the focus, to hand it on
      show();
      if (!isSent) root.querySelector(".toolbar button:nth-of-type(2)").focus();
    };
    sendOnEnter(area, () => finish(true));
    area.addEventListener("keydown", (event) => {
      if (isComposing(event) || event.key !== "Escape") return;
      event.stopPropagation();
      finish(false);
    });
    const send = element("button", {
      type: "button",
      className: "primary",
      textContent: "Send",
      on: { click: () => finish(true) },
    });
    const cancel = element("button", {
      type: "button",
      textContent: "Cancel",
      on: { click: () => finish(false) },
    });
    root.replaceChildren(
      element(
        "div",
        { className: "edit" },
        area,
        element("div", { className: "row end" }, cancel, send),
      ),
    );
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  };
  show();
  return { root, update: bar.update, isEdited: () => area !== null && area.value !== message.text };
}

function answerView(root, message, actions) {
  const body = element("div", { className: "markdown" });
  const render = markdownView(body);
  const wait = element(
    "p",
    { className: "waiting" },
    element("span", { className: "pulse", ariaHidden: "true" }),
    element("span"),
  );
  const notes = element("div");
  const bar = toolbar(message, actions, [
    copyButton(() => message.text),
    iconButton("again", "Regenerate this answer", () => actions.regenerate(message)),
  ]);
  const below = element("div", { className: "notes" }, notes, bar.root);
  const thinking = reasoningView(message);
  let noted = "";
  root.append(thinking.root, body, wait, below);

  const update = (isOpen, notice = "") => {
    thinking.update(isOpen && !message.text);
    render(message.text, isOpen);
    root.classList.toggle("open", isOpen);
    wait.hidden = !isOpen || Boolean(message.text || message.reasoning);
    wait.lastChild.textContent = notice || "Reading the prompt…";
    below.hidden = isOpen;
    if (isOpen) return;
    bar.update();
    // Drawn again only when they say something else: one of their buttons may have the focus.
    const says = JSON.stringify([message.finish, message.error, message.stats]);
    if (says !== noted) notes.replaceChildren(...notesOf(message, actions));
    noted = says;
  };
  return { root, update, isEdited: () => false };
}

function reasoningView(message) {
  const title = element("span");
  const body = element("div", { className: "markdown" });
  const render = markdownView(body);
  const root = element(
    "details",
    { className: "reasoning" },
    element("summary", {}, icon("chevron"), title),
    body,
  );
  return {
    root,
    update(isOpen) {
      root.hidden = !message.reasoning;
      if (!message.reasoning) return;
      const seconds = message.reasoningSeconds;
      const took = seconds >= 1 ? `Thought for ${formatSeconds(seconds)}` : "Thoughts";
      title.textContent = isOpen ? "Thinking…" : took;
      root.classList.toggle("thinking", isOpen);
      render(message.reasoning, isOpen);
    },
  };
}

function notesOf(message, actions) {
  const notes = [];
  if (message.finish === "length") {
    notes.push(
      element("p", { className: "note", textContent: "The answer reached its token limit." }),
    );
  }
  if (message.finish === "stopped")
    notes.push(element("p", { className: "note", textContent: "Stopped." }));
  if (message.error) {
    const again = element(
      "button",
      { type: "button", on: { click: () => actions.retry(message) } },
      "Try again",
    );
    const text = element("p", { textContent: message.error.text });
    notes.push(
      element(
        "div",
        { className: "error-note", role: "group", ariaLabel: "Error" },
        icon("alert"),
        text,
        again,
      ),
    );
  }
  if (message.stats) notes.push(element("p", { className: "figures", textContent: message.stats }));
  return notes;
}

/** {root, update()}: `buttons`, and the way to the message's siblings where it has some. */
function toolbar(message, actions, buttons) {
  const turn = (name, label, step) =>
    iconButton(name, label, () => {
      const siblings = actions.siblings(message);
      actions.show(siblings[siblings.indexOf(message) + step], step);
    });
  const [previous, next] = [turn("left", "Previous version", -1), turn("right", "Next version", 1)];
  const place = element("span");
  const versions = element("span", { className: "versions" }, previous, place, next);
  const root = element(
    "div",
    { className: "toolbar", role: "group", ariaLabel: "Message actions" },
    ...buttons,
    versions,
  );
  const update = () => {
    const siblings = actions.siblings(message);
    const number = siblings.indexOf(message) + 1;
    versions.hidden = siblings.length < 2;
    place.textContent = `${number} / ${siblings.length}`;
    place.ariaLabel = `Version ${number} of ${siblings.length}`;
    previous.disabled = number <= 1;
    next.disabled = number >= siblings.length;
  };
  update();
  return { root, update };
}
