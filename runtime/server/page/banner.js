// The line above the messages: what is wrong with the page as a whole. One of a kind; of several
// kinds the newest is shown, and the one before it when that goes.

const banner = document.getElementById("banner");
const raised = new Map(); // kind -> {text, button, onClick}

export function showBanner(kind, text, button, onClick) {
  if (raised.get(kind)?.text !== text) raised.delete(kind);
  raised.set(kind, { text, button, onClick });
  draw();
}

export function hideBanner(kind) {
  if (raised.delete(kind)) draw();
}

function draw() {
  const shown = [...raised.values()].at(-1);
  const says = banner.querySelector("p");
  const isNew = banner.hidden || says.textContent !== shown?.text;
  if (shown && isNew) says.textContent = shown.text; // is read aloud once
  banner.hidden = !shown;
  if (!shown) return;
  const [action] = banner.getElementsByTagName("button");
  action.textContent = shown.button;
  action.onclick = shown.onClick;
}
