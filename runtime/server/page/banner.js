// The line above the messages: what is wrong with the page as a whole. One at a time, by its kind.

const banner = document.getElementById("banner");

export function showBanner(kind, text, button, onClick) {
  const says = banner.querySelector("p");
  if (banner.hidden || says.textContent !== text) says.textContent = text; // is read aloud once
  banner.dataset.kind = kind;
  const [action] = banner.getElementsByTagName("button");
  action.textContent = button;
  action.onclick = onClick;
  banner.hidden = false;
}

export function hideBanner(kind) {
  if (banner.dataset.kind !== kind) return;
  banner.hidden = true;
  banner.dataset.kind = "";
}
