// Block markdown: lines -> blocks. Linear in the text; nesting is bounded.
//
// A block is one of {type: "paragraph" | "heading", text, level}, {type: "code", language, text},
// {type: "rule"}, {type: "quote", blocks}, {type: "list", ordered, first, items} and
// {type: "table", aligns, head, rows}. `offset` is where it begins in the text, `open` tells that
// it touches the end of a text that is still being written.

import { matchingTicks } from "./inline.js";

const MAX_DEPTH = 8;
const MAX_COLUMNS = 64;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const TASK = /^\[([ xX])\] +/;
const HALF_A_MARK = /^\s*(#{1,6}|[-*+_]{1,3}|`{1,2}|~{1,2})\s*$/;

export function parseBlocks(text, open = false) {
  const lines = text.split("\n");
  const offsets = [];
  let offset = 0;
  for (const line of lines) {
    offsets.push(offset);
    offset += line.length + 1;
  }
  const clean = lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
  const blocks = blocksOf(clean, 0, open);
  return blocks.map((block) => ({ ...block, offset: offsets[block.line] }));
}

function blocksOf(lines, depth, open) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth, open);
    if (block !== null) blocks.push({ ...block, line: at, open: open && next >= lines.length });
    at = next;
  }
  return blocks;
}

/** The block that begins at a line that is not blank, and the line after it. */
function blockAt(lines, at, depth, open) {
  const line = lines[at];
  const last = open && at === lines.length - 1;
  if (last && HALF_A_MARK.test(line)) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence, open);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[2] ?? "").trim().replace(/(^|\s)#{1,32}$/, "");
    return [{ type: "heading", level: heading[1].length, text }, at + 1];
  }
  if (isRule(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return quoteAt(lines, at, depth, open);
    if (ITEM.test(line)) return listAt(lines, at, depth, open);
  }
  if (startsTable(lines, at, open)) return tableAt(lines, at);
  return paragraphAt(lines, at);
}

function isRule(line) {
  return line.length < 200 && RULE.test(line);
}

function codeAt(lines, at, fence, open) {
  const [, indent, mark, info] = fence;
  const closing = new RegExp(`^ {0,3}${mark[0]}{${Math.min(mark.length, 1000)},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const body = lines
    .slice(at + 1, end)
    .map((l) => (l.startsWith(indent) ? l.slice(indent.length) : l));
  // The first characters of the closing fence are not code.
  if (open && end === lines.length && /^\s*[`~]+$/.test(body.at(-1) ?? "")) body.pop();
  const language = info.trim().split(/[\s{]/)[0].slice(0, 40);
  return [{ type: "code", language, text: body.join("\n"), closed: end < lines.length }, end + 1];
}

function quoteAt(lines, at, depth, open) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: blocksOf(inner, depth + 1, open && end >= lines.length) }, end];
}

function listAt(lines, at, depth, open) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const kind = marker.at(-1);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const found = ITEM.exec(lines[next]);
    const belongs = found && found[2].at(-1) === kind && width(found[1]) <= width(indent) + 1;
    if (!belongs || isRule(lines[next])) break;
    const end = itemEnd(lines, next, width(found[1]));
    items.push(itemOf(lines.slice(next, end), found, depth, open && end >= lines.length));
    next = end;
  }
  const ordered = /\d/.test(marker[0]);
  return [{ type: "list", ordered, first: ordered ? Number.parseInt(marker, 10) : 1, items }, next];
}

function itemOf(lines, found, depth, open) {
  const inner = lines.map((line) => dedent(line, width(found[0])));
  inner[0] = lines[0].slice(found[0].length);
  const task = TASK.exec(inner[0]);
  if (task) inner[0] = inner[0].slice(task[0].length);
  return { done: task ? task[1] !== " " : null, blocks: blocksOf(inner, depth + 1, open) };
}

/** The line after an item: what is indented belongs to it, and so does text right below it. */
function itemEnd(lines, at, indent) {
  let end = at + 1;
  let blank = false;
  let after = end; // the line after the last one that is not blank
  while (end < lines.length) {
    const line = lines[end];
    if (line.trim() === "") blank = true;
    else if (indentOf(line) >= indent + 2 || (!blank && !interrupts(line) && !ITEM.test(line))) {
      blank = false;
      after = end + 1;
    } else break;
    end += 1;
  }
  // Blank lines between items belong to the list; those at its end to nobody.
  return end < lines.length && ITEM.test(lines[end]) ? end : after;
}

function indentOf(line) {
  return width(line.slice(0, line.length - line.trimStart().length));
}

/** Columns; a tab is four. */
function width(text) {
  let columns = text.length;
  for (const character of text) if (character === "\t") columns += 3;
  return columns;
}

/** `line` without its first `columns` columns of white space. */
function dedent(line, columns) {
  let at = 0;
  for (let column = 0; column < columns && (line[at] === " " || line[at] === "\t"); at += 1) {
    column += line[at] === "\t" ? 4 : 1;
  }
  return line.slice(at);
}

function interrupts(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line);
}

function paragraphAt(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !interrupts(lines[end])) {
    const item = ITEM.exec(lines[end]);
    if (item && item[3] !== "" && /^([-*+]|1[.)])$/.test(item[2])) break;
    if (startsTable(lines, end, false)) break;
    end += 1;
  }
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n").trim() }, end];
}

function startsTable(lines, at, open) {
  if (!lines[at].includes("|")) return false;
  const below = lines[at + 1];
  const isEnd = open && at + 2 >= lines.length;
  // While it is written, a row that begins with a bar is a table's head already.
  if (isEnd && lines[at].trimStart().startsWith("|")) {
    if (below === undefined) return /\|.*\|/.test(lines[at]);
    if (/^[\s|:-]*$/.test(below)) return true;
  }
  // Without a bar it is a rule, below a text with a bar in its code, say.
  if (!below?.includes("-") || !below.includes("|") || !/^[\s|:-]+$/.test(below)) return false;
  const marks = cellsOf(below);
  return marks.length === cellsOf(lines[at]).length && marks.every((m) => /^:?-+:?$/.test(m));
}

/** The cells of a row; a bar inside of a code span or after a backslash does not end one. */
function cellsOf(line) {
  const row = line.trim();
  const ticks = matchingTicks(row);
  const cells = [];
  let cell = "";
  for (let at = row[0] === "|" ? 1 : 0; at < row.length; at += 1) {
    const span = ticks.get(at);
    if (span && span.close > 0) {
      cell += row.slice(at, span.close + span.length).replaceAll("\\|", "|");
      at = span.close + span.length - 1;
    } else if (row[at] === "\\" && at + 1 < row.length) {
      cell += row[at + 1] === "|" ? "|" : row.slice(at, at + 2);
      at += 1;
    } else if (row[at] === "|" && cells.length < MAX_COLUMNS) {
      cells.push(cell.trim());
      cell = "";
    } else cell += row[at];
  }
  if (cell.trim() !== "" || cells.length === 0) cells.push(cell.trim());
  return cells;
}

function tableAt(lines, at) {
  const head = cellsOf(lines[at]);
  const aligns = cellsOf(lines[at + 1] ?? "").map((mark) => {
    if (mark.endsWith(":")) return mark.startsWith(":") ? "center" : "end";
    return "start";
  });
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) {
    const cells = cellsOf(lines[end]).slice(0, head.length);
    rows.push(head.map((_, column) => cells[column] ?? ""));
    end += 1;
  }
  return [{ type: "table", aligns, head, rows }, end];
}
