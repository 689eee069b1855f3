// Elements, made one by one: text goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Of `properties`, `on` has listeners, `data` data attributes; what the element knows
 * as a property is set as one, anything else is an attribute. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [type, listener] of Object.entries(value)) made.addEventListener(type, listener);
    } else if (name === "data") Object.assign(made.dataset, value);
    else if (name in made && name !== "dir") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Makes `nodes` the children of `parent`. Those that it had stay where they are, with the focus and
 * the scroll position that are in them. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const old of [...parent.children]) if (!wanted.has(old)) old.remove();
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
  });
}

/** A drawing of index.html's sprite. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onClick) {
  const on = { click: onClick };
  return element(
    "button",
    { type: "button", className: "icon-button", title: label, ariaLabel: label, on },
    icon(name),
  );
}

/** Also where there is no clipboard API: on a page that came over HTTP from another host. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", {
    value: text,
    className: "visually-hidden",
    ariaHidden: "true",
  });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!done) throw new Error("copying is not allowed");
}

/** Copies what `text()` gives and shows on the button that it did. */
export function copyButton(text) {
  const button = iconButton("copy", "Copy", async () => {
    const done = await copyText(text()).then(
      () => true,
      () => false,
    );
    button.replaceChildren(icon(done ? "check" : "alert"));
    announce(done ? "Copied" : "Copying failed");
    setTimeout(() => button.replaceChildren(icon("copy")), 1600);
  });
  return button;
}

/** Says `text` to a screen reader, after what it is saying now. */
export function announce(text) {
  const region = document.getElementById("announcer");
  region.append(element("p", { textContent: text }));
  while (region.childElementCount > 8) region.firstElementChild.remove();
}
