// Inline markdown: text -> nodes. Every step is linear in the text, nesting is bounded.
//
// A node is one of {type: "text" | "code" | "math", text}, {type: "break"},
// {type: "strong" | "em" | "strike", children} and {type: "link", href, children}; href is null
// while a link's address is still being written.

const SPECIAL = /[\\`*_~[\]!<$\n]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const LETTER = /[\p{L}\p{N}]/u;
const MAX_BRACKETS = 32;
const MAX_DEPTH = 16;
const MAX_RUN = 8;
const MAX_ADDRESS = 2048;
const MAX_MATH = 300;

/** The address if a link may lead there, else null: http, https and mailto only. */
export function safeHref(address) {
  if (!/^(https?:\/\/|mailto:)[^\s\u0000-\u001f]+$/i.test(address)) return null;
  return URL.canParse(address) ? address : null;
}

/** Nodes of `text`. open: the text is still being written, so what its last line leaves unclosed is
 * shown as if it were closed. */
export function parseInline(text, open = false) {
  const tokens = scan(text, open);
  if (open && tokens.at(-1)?.type === "run") tokens.pop();
  return nest(tokens, open ? text.lastIndexOf("\n") + 1 : Infinity);
}

function scan(text, open) {
  const tokens = [];
  const brackets = [];
  const nextTicks = matchingTicks(text);
  const missing = new Set(); // closing marks that do not occur any more
  const find = (mark, from) => {
    if (missing.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) missing.add(mark);
    return at;
  };
  const plain = (value) => {
    const last = tokens.at(-1);
    if (last?.type === "text") last.text += value;
    else if (value) tokens.push({ type: "text", text: value });
  };

  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) {
      plain(text.slice(at));
      break;
    }
    plain(text.slice(at, found.index));
    at = found.index;
    const mark = found[0];
    if (mark === "\n") {
      trimEnd(tokens);
      tokens.push({ type: "break" });
      at += 1;
      while (text[at] === " ") at += 1;
    } else if (mark === "\\") {
      at = scanEscape(text, at, find, tokens, plain);
    } else if (mark === "`") {
      at = scanCode(text, at, nextTicks, open, tokens, plain);
    } else if (mark === "$") {
      at = scanDollar(text, at, find, tokens, plain);
    } else if (mark === "*" || mark === "_" || mark === "~") {
      at = scanRun(text, at, mark, tokens, plain);
    } else if (mark === "<") {
      const rule = /^<br ?\/?>/i.exec(text.slice(at, at + 6));
      if (rule) tokens.push({ type: "break" });
      else plain("<");
      at += rule ? rule[0].length : 1;
    } else if (mark === "[" || (mark === "!" && text[at + 1] === "[")) {
      const length = mark === "[" ? 1 : 2;
      if (brackets.length < MAX_BRACKETS) {
        brackets.push({ index: tokens.length, image: length === 2 });
        tokens.push(
          { type: "text", text: text.slice(at, at + length) },
          { type: "text", text: "" },
        );
      } else plain(text.slice(at, at + length));
      at += length;
    } else if (mark === "]") {
      at = scanLinkEnd(text, at, brackets, open, tokens, plain);
    } else if (mark === "!") {
      plain("!");
      at += 1;
    } else {
      at = scanAddress(text, at, tokens, plain);
    }
  }
  return tokens;
}

function trimEnd(tokens) {
  const last = tokens.at(-1);
  if (last?.type === "text") last.text = last.text.replace(/ {1,8}$/, "");
}

/** For the start of every run of backticks, {length, close}: the start of the next run of the same
 * length, or -1. */
export function matchingTicks(text) {
  const runs = [...text.matchAll(/`+/g)].map((run) => [run.index, run[0].length]);
  const later = new Map();
  const next = new Map();
  for (const [start, length] of runs.reverse()) {
    next.set(start, { length, close: later.get(length) ?? -1 });
    later.set(length, start);
  }
  return next;
}

function scanEscape(text, at, find, tokens, plain) {
  const after = text[at + 1];
  if (after === "(" || after === "[") {
    const close = find(after === "(" ? "\\)" : "\\]", at + 2);
    if (close > 0) {
      tokens.push({ type: "math", text: text.slice(at, close + 2) });
      return close + 2;
    }
  }
  if (after === "\n") return at + 1;
  if (after !== undefined && PUNCTUATION.test(after)) {
    plain(after);
    return at + 2;
  }
  plain("\\");
  return at + 1;
}

function scanCode(text, at, nextTicks, open, tokens, plain) {
  const { length, close } = nextTicks.get(at) ?? { length: 1, close: -1 };
  if (close < 0) {
    const rest = text.slice(at + length);
    if (!open || rest.includes("\n")) {
      plain(text.slice(at, at + length));
      return at + length;
    }
    if (rest) tokens.push({ type: "code", text: rest });
    return text.length;
  }
  const inner = text.slice(at + length, close).replaceAll("\n", " ");
  const padded =
    inner.length > 2 && inner[0] === " " && inner.at(-1) === " " && inner.trim() !== "";
  tokens.push({ type: "code", text: padded ? inner.slice(1, -1) : inner });
  return close + length;
}

function scanDollar(text, at, find, tokens, plain) {
  if (text[at + 1] === "$") {
    const close = find("$$", at + 2);
    if (close > at + 2) {
      tokens.push({ type: "math", text: text.slice(at, close + 2) });
      return close + 2;
    }
    plain("$$");
    return at + 2;
  }
  const line = text.slice(at + 1, at + 1 + MAX_MATH);
  const length = line.indexOf("$");
  const inner = line.slice(0, length);
  const closes = length > 0 && !inner.includes("\n") && !SPACE.test(inner[0] + inner.at(-1));
  if (closes && !/[0-9$]/.test(line[length + 1] ?? "")) {
    tokens.push({ type: "math", text: `$${inner}$` });
    return at + length + 2;
  }
  plain("$");
  return at + 1;
}

function scanRun(text, at, mark, tokens, plain) {
  let end = at;
  while (text[end] === mark) end += 1;
  const count = end - at;
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  let canOpen = !SPACE.test(after) && !(PUNCTUATION.test(after) && LETTER.test(before));
  let canClose = !SPACE.test(before) && !(PUNCTUATION.test(before) && LETTER.test(after));
  if (mark === "_") {
    canOpen &&= !LETTER.test(before);
    canClose &&= !LETTER.test(after);
  }
  const means = mark === "~" ? count === 2 : count <= MAX_RUN;
  if (means && (canOpen || canClose || end === text.length)) {
    tokens.push({
      type: "run",
      mark,
      count,
      left: count,
      canOpen,
      canClose,
      tried: 0,
      at,
      opens: [],
      closes: [],
    });
  } else plain(text.slice(at, end));
  return end;
}

/** `]`: the end of a link or image if an address follows. An image becomes a link, too. */
function scanLinkEnd(text, at, brackets, open, tokens, plain) {
  const bracket = brackets.pop();
  if (bracket === undefined || text[at + 1] !== "(") {
    plain("]");
    return at + 1;
  }
  const end = addressEnd(text, at + 2);
  const pending = end < 0 && open && text.length - at < MAX_ADDRESS && !/\s/.test(text.slice(at));
  if (end < 0 && !pending) {
    plain("]");
    return at + 1;
  }
  const raw = pending ? "" : text.slice(at + 2, end).trim();
  const href = safeHref(addressOf(raw));
  if (href === null && !pending) {
    plain(text.slice(at, end + 1));
    return end + 1;
  }
  const inside = tokens.splice(bracket.index).slice(1);
  const children = nest(inside, Infinity);
  if (bracket.image) {
    const label = plainText(children) || "image";
    tokens.push({ type: "link", href, image: true, children: [{ type: "text", text: label }] });
  } else {
    brackets.length = 0;
    tokens.push({ type: "link", href, children: withoutLinks(children) });
  }
  return pending ? text.length : end + 1;
}

/** The address in what stands between the brackets: with or without <>, a quoted title after it. */
function addressOf(raw) {
  const space = raw.search(/\s/);
  const title = space < 0 ? "" : raw.slice(space).trim();
  if (title && !/^("[^"]*"|'[^']*'|\([^)]*\))$/.test(title)) return "";
  return (space < 0 ? raw : raw.slice(0, space)).replace(/^<(.*)>$/, "$1");
}

/** Where the `)` of an address is, or -1. Looks at a bounded number of characters. */
function addressEnd(text, from) {
  let depth = 1;
  const limit = Math.min(text.length, from + MAX_ADDRESS);
  for (let at = from; at < limit && depth <= MAX_BRACKETS; at += 1) {
    if (text[at] === "\n") return -1;
    if (text[at] === "(") depth += 1;
    if (text[at] === ")") depth -= 1;
    if (depth === 0) return at;
  }
  return -1;
}

function scanAddress(text, at, tokens, plain) {
  const run = /[^\s<>"`\]]*/y;
  run.lastIndex = at;
  const whole = run.exec(text)[0];
  let address = whole.length > MAX_ADDRESS ? "" : whole.replace(/[.,;:!?*_~']{1,8}$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  const href = at > 0 && LETTER.test(text[at - 1]) ? null : safeHref(address);
  if (href === null) {
    plain(whole); // all of it: addresses within it are not looked for again
    return at + whole.length;
  }
  tokens.push({ type: "link", href: address, children: [{ type: "text", text: address }] });
  return at + address.length;
}

export function plainText(nodes) {
  return nodes.map((n) => n.text ?? (n.children ? plainText(n.children) : " ")).join("");
}

function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return withoutLinks(node.children);
    return [node.children ? { ...node, children: withoutLinks(node.children) } : node];
  });
}

/** Pairs the runs of `*`, `_` and `~`, then builds the tree. Runs from offset `closeFrom` on that
 * nothing closes are closed at the end. */
function nest(tokens, closeFrom) {
  const openers = [];
  for (const run of tokens) {
    if (run.type !== "run") continue;
    while (run.canClose && run.left > 0) {
      const found = openerOf(run, openers);
      if (found < 0) break;
      const opener = openers[found];
      const count = Math.min(2, opener.left, run.left);
      opener.opens.push(kindOf(run.mark, count));
      run.closes.push(true);
      opener.left -= count;
      run.left -= count;
      openers.length = opener.left === 0 ? found : found + 1;
    }
    if (run.canOpen && run.left > 0) openers.push(run);
  }
  for (const opener of openers) {
    while (opener.at >= closeFrom && opener.left > 0) {
      const count = Math.min(2, opener.left);
      opener.opens.push(kindOf(opener.mark, count));
      opener.left -= count;
    }
  }
  return build(tokens);
}

/** The place of the opener that `run` closes, or -1. An opener that was passed by pairs with no other
 * run of that sort, and neither does any below it: none is looked at twice, so the search is linear. */
function openerOf(run, openers) {
  const sort = 1 << (6 * "*_~".indexOf(run.mark) + 3 * run.canOpen + (run.count % 3));
  for (let at = openers.length - 1; at >= 0; at -= 1) {
    if (isPair(openers[at], run)) return at;
    if (openers[at].tried & sort) return -1;
    openers[at].tried |= sort;
  }
  return -1;
}

/** CommonMark's rule of three keeps `**a*b**` from being read as `**a*` and `b**`: where one of the
 * two runs could open as well as close, their lengths must not sum to a multiple of three, unless
 * both are one. */
function isPair(opener, run) {
  if (opener.mark !== run.mark) return false;
  const isClear = !opener.canClose && !run.canOpen;
  return isClear || (opener.count + run.count) % 3 !== 0 || opener.count % 3 === 0;
}

function kindOf(mark, count) {
  if (mark === "~") return "strike";
  return count === 2 ? "strong" : "em";
}

function build(tokens) {
  const root = [];
  const levels = [root];
  for (const token of tokens) {
    if (token.type !== "run") {
      if (token.text !== "") levels.at(-1).push(token);
      continue;
    }
    for (let i = 0; i < token.closes.length && levels.length > 1; i += 1) levels.pop();
    if (token.left) levels.at(-1).push({ type: "text", text: token.mark.repeat(token.left) });
    for (const type of token.opens.reverse()) {
      const children = levels.length > MAX_DEPTH ? levels.at(-1) : [];
      if (levels.length <= MAX_DEPTH) levels.at(-1).push({ type, children });
      levels.push(children);
    }
  }
  return root;
}
