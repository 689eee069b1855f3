// Blocks and nodes -> elements. What a model wrote becomes text nodes and elements of the few kinds
// below; no attribute but a checked link's address has anything of it.

import { parseBlocks } from "./blocks.js";
import { copyButton, element } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseInline, plainText } from "./inline.js";

const INLINE = { strong: "strong", em: "em", strike: "s" };
const MAX_TEXT_NODE = 50000; // one line of a megabyte makes layout slow

/** A view of a growing text in `root`. Only its last two blocks are parsed again when it grows:
 * what comes after a block can change the one before it (a list goes on), but none before that. */
export function markdownView(root) {
  let settled = 0; // characters whose blocks stay as they are
  let shown = []; // {source, open, block, node} of each block after them
  return (text, open) => {
    const tail = text.slice(settled);
    const blocks = parseBlocks(tail, open);
    const next = blocks.map((block, index) => {
      const source = tail.slice(block.offset, blocks[index + 1]?.offset);
      const old = shown[index];
      if (old && old.source === source && !old.open && !block.open) return old;
      const same = old && patchCode(old, block);
      const node = same ? old.node : renderBlock(block);
      if (!same) {
        if (old) old.node.replaceWith(node);
        else root.append(node);
      }
      return { source, open: block.open, block, node };
    });
    for (const old of shown.slice(next.length)) old.node.remove();
    const newlySettled = Math.max(0, blocks.length - 2);
    if (newlySettled) settled += blocks[newlySettled].offset;
    shown = next.slice(newlySettled);
  };
}

/** Appends to a code block that is still open, so that a selection and the scroll position stay. */
function patchCode(old, block) {
  const isSame =
    old.block.type === "code" && block.type === "code" && block.language === old.block.language;
  if (!isSame || block.closed || old.block.closed || !block.text.startsWith(old.block.text))
    return false;
  if (!block.open) return false;
  const code = old.node.querySelector("code");
  code.append(block.text.slice(old.block.text.length));
  code.normalize();
  return true;
}

function renderBlock(block) {
  if (block.type === "paragraph") return inlineElement("p", block.text, block.open);
  if (block.type === "heading") {
    // The page has its own h1 and h2.
    return inlineElement(`h${Math.min(6, block.level + 2)}`, block.text, block.open);
  }
  if (block.type === "code") return renderCode(block);
  if (block.type === "rule") return element("hr");
  if (block.type === "quote")
    return element("blockquote", { dir: "auto" }, ...block.blocks.map(renderBlock));
  return block.type === "list" ? renderList(block) : renderTable(block);
}

function inlineElement(tag, text, open = false) {
  return element(tag, { dir: "auto" }, ...parseInline(text, open).flatMap(renderNode));
}

function renderNode(node) {
  if (node.type === "text") return textNodes(node.text);
  if (node.type === "code") return [element("code", { dir: "ltr" }, ...textNodes(node.text))];
  if (node.type === "math")
    return [element("code", { className: "math", dir: "ltr", textContent: node.text })];
  if (node.type === "break") return [element("br")];
  const children = node.children.flatMap(renderNode);
  if (node.type !== "link") return [element(INLINE[node.type], {}, ...children)];
  if (node.href === null) return [element("span", { className: "pending-link" }, ...children)];
  const title = node.image ? `Image, not loaded: ${node.href}` : node.href;
  const rel = "noopener noreferrer nofollow";
  return [
    element(
      "a",
      { href: node.href, target: "_blank", rel, title: title.slice(0, 300) },
      ...children,
    ),
  ];
}

function textNodes(text) {
  const pieces = [];
  for (let at = 0; at < text.length; at += MAX_TEXT_NODE)
    pieces.push(text.slice(at, at + MAX_TEXT_NODE));
  return pieces;
}

function renderCode(block) {
  const code = element("code");
  if (block.open && !block.closed) code.append(block.text);
  else {
    for (const [kind, text] of highlight(block.text, block.language)) {
      code.append(
        ...(kind
          ? [element("span", { className: `code-${kind}`, textContent: text })]
          : textNodes(text)),
      );
    }
  }
  const label = block.language ? `Code: ${block.language}` : "Code";
  const pre = element("pre", { tabIndex: 0, ariaLabel: label, role: "region" }, code);
  const head = element(
    "div",
    { className: "code-head" },
    element("span", { textContent: block.language || "text" }),
  );
  head.append(copyButton(() => code.textContent));
  return element("div", { className: "code-block", dir: "ltr" }, head, pre);
}

function renderList(block) {
  const list = element(block.ordered ? "ol" : "ul", { dir: "auto" });
  if (block.ordered && block.first !== 1) list.start = block.first;
  for (const item of block.items) {
    const row = element("li", {}, ...item.blocks.map(renderBlock));
    if (item.done !== null) {
      row.className = "task";
      const label = item.done ? "done" : "not done";
      row.prepend(
        element("input", {
          type: "checkbox",
          checked: item.done,
          disabled: true,
          ariaLabel: label,
        }),
      );
    }
    list.append(row);
  }
  return list;
}

function renderTable(block) {
  const cell = (tag, text, column) => {
    const made = inlineElement(tag, text);
    made.className = `align-${block.aligns[column] ?? "start"}`;
    return made;
  };
  const head = element("tr", {}, ...block.head.map((text, column) => cell("th", text, column)));
  for (const made of head.children) made.scope = "col";
  const rows = block.rows.map((row) =>
    element("tr", {}, ...row.map((text, column) => cell("td", text, column))),
  );
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  const names = block.head.map((text) => plainText(parseInline(text))).join(", ");
  const label = `Table: ${names}`.slice(0, 200);
  return element(
    "div",
    { className: "table-scroll", tabIndex: 0, role: "region", ariaLabel: label },
    table,
  );
}
