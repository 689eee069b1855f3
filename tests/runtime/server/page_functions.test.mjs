// The page's functions that need no page; test_page.py runs this file.

import assert from "node:assert/strict";
import { test } from "node:test";

import { answer, spokenEnd } from "./answering.js";
import { describeServer, getJson, keepApiKey } from "./api.js";
import { parseBlocks } from "./blocks.js";
import {
  addMessage,
  branchOf,
  deleteConversation,
  exportText,
  importText,
  loadConversations,
  newConversation,
  removeMessage,
  saveConversation,
  showBranch,
  takeStored,
} from "./conversations.js";
import { answerFigures, formatBytes, speedometer } from "./figures.js";
import { highlight } from "./highlight.js";
import { parseInline, plainText, safeHref } from "./inline.js";
import { requestBody, valueIn } from "./settings.js";
import { eventParser } from "./sse.js";
import { keepsNothing, local } from "./storage.js";

/** Nodes in a short form: strong(a em(b)). */
function short(nodes) {
  return nodes
    .map((node) => {
      const inside = node.children ? short(node.children) : (node.text ?? "");
      if (node.type === "text") return inside;
      return node.type === "link" ? `link[${node.href}](${inside})` : `${node.type}(${inside})`;
    })
    .join("");
}

const shown = (text, open) => short(parseInline(text, open));
const kinds = (text, open) =>
  parseBlocks(text, open)
    .map((block) => block.type)
    .join(" ");

test("emphasis, code and links", () => {
  assert.equal(shown("a **b *c* d** e"), "a strong(b em(c) d) e");
  assert.equal(shown("***both***"), "em(strong(both))");
  assert.equal(shown("**5*3 = 15**"), "strong(5*3 = 15)");
  assert.equal(shown("**w*h** and **l*w*h**"), "strong(w*h) and strong(lem(w)h)");
  assert.equal(shown("*a **b** c* a**b_c_*d*"), "em(a strong(b) c) a**b_c_em(d)");
  assert.equal(shown("snake_case_name 2 * 3 * 4 __b__"), "snake_case_name 2 * 3 * 4 strong(b)");
  assert.equal(shown("~~gone~~ ~5"), "strike(gone) ~5");
  assert.equal(shown("`a * b` ``c ` d``"), "code(a * b) code(c ` d)");
  assert.equal(shown("\\*no\\* \\\\"), "*no* \\");
  assert.equal(
    shown('[a **b**](https://x.test/y_(z) "t")'),
    "link[https://x.test/y_(z)](a strong(b))",
  );
  assert.equal(
    shown("see https://x.test/a_b)."),
    "see link[https://x.test/a_b](https://x.test/a_b)).",
  );
  assert.equal(shown("**https://x.test**"), "strong(link[https://x.test](https://x.test))");
  assert.equal(shown("a<br>b\nc"), "abreak()bbreak()c");
  assert.equal(
    shown("$a_1 * b_1$ costs $5 or $6, \\(x_1\\)"),
    "math($a_1 * b_1$) costs $5 or $6, math(\\(x_1\\))",
  );
});

test("an address that could run or leave is no link", () => {
  for (const bad of [
    "javascript:1",
    "JAVASCRIPT:1",
    "data:text/html,x",
    "//x.test",
    "/a",
    "http://",
    "file:///a",
    "https:/x",
    "blob:x",
  ]) {
    assert.equal(safeHref(bad), null, bad);
    assert.doesNotMatch(shown(`[a](${bad})`), /^link/);
  }
  assert.equal(safeHref(" https://x.test"), null);
  assert.equal(safeHref("https://x.test\n"), null);
  assert.equal(safeHref("mailto:a@x.test"), "mailto:a@x.test");
  assert.equal(shown("![alt](https://x.test/i.png)"), "link[https://x.test/i.png](alt)");
  assert.equal(
    shown("[![alt](https://x.test/i.png)](https://x.test)"),
    "link[https://x.test](alt)",
  );
});

test("what is still being written is shown as if it were closed", () => {
  assert.equal(shown("a **b", true), "a strong(b)");
  assert.equal(shown("a **b*", true), "a strong(b)");
  assert.equal(shown("a **", true), "a ");
  assert.equal(shown("a `b", true), "a code(b)");
  assert.equal(shown("a [b](https://x", true), "a link[null](b)");
  assert.equal(shown("a **b", false), "a **b");
  assert.equal(kinds("text\n\n``", true), "paragraph");
  assert.equal(kinds("| a | b |", true), "table");
  assert.equal(kinds("| a | b |\n|--", true), "table");
  const [code] = parseBlocks("```py\nx = 1\n``", true);
  assert.deepEqual([code.text, code.closed], ["x = 1", false]);
});

test("blocks", () => {
  assert.equal(
    kinds("# A\ntext\nmore\n- a\n1. b\n\n> q\n---\n~~~\nc\n~~~"),
    "heading paragraph list list quote rule code",
  );
  const [list] = parseBlocks("1. a\n   - b\n\n     more\n2. c\n\n   d\n");
  assert.equal(list.items.length, 2);
  assert.deepEqual(
    list.items[0].blocks.map((block) => block.type),
    ["paragraph", "list"],
  );
  assert.deepEqual(
    list.items[1].blocks.map((block) => block.text),
    ["c", "d"],
  );
  const [tasks] = parseBlocks("- [x] a\n- [ ] b\n- c");
  assert.deepEqual(
    tasks.items.map((item) => item.done),
    [true, false, null],
  );
  const [table] = parseBlocks("a | b\n--|:-:\n1 | x \\| y\n2");
  assert.deepEqual(
    [table.head, table.aligns, table.rows],
    [["a", "b"], ["start", "center"], [["1", "x | y"]]],
  );
  const [calls] = parseBlocks("|Op|Says|\n|-|-|\n|`a || b`|or|\n|`` `|` `\\|` ``|\\`|\n|`|`|` `|");
  assert.deepEqual(calls.rows, [
    ["`a || b`", "or"],
    ["`` `|` `|` ``", "\\`"],
    ["`|`", "` `"],
  ]);
  assert.equal(kinds("Use `a | b`:\n---"), "paragraph rule");
  const [few] = parseBlocks("|a|b|\n|-|-|\n|1|2|3|\n|`x|y|");
  assert.deepEqual(few.rows, [
    ["1", "2"],
    ["`x", "y"],
  ]);
  assert.equal(parseBlocks("```make\na:\n\tb\n```")[0].text, "a:\n\tb");
  assert.equal(parseBlocks("- a\n  ```\n    b\n  ```")[0].items[0].blocks[1].text, "  b");
});

test("no character of a plain text is lost", () => {
  const alphabet = "ab *_`~[]()!<>$\\#|-1.\n";
  let seed = 7;
  for (let run = 0; run < 3000; run += 1) {
    let text = "";
    for (let i = 0; i < 40; i += 1) {
      seed = (seed * 1103515245 + 12345) % 2147483648;
      text += alphabet[seed % alphabet.length];
    }
    const letters = (value) => value.replace(/[^ab]/g, "");
    assert.equal(letters(plainText(parseInline(text))), letters(text), JSON.stringify(text));
    parseBlocks(text, true);
  }
});

test("long hostile texts are read in a linear time", () => {
  const size = 200000; // the square of it would take minutes
  const units = [
    "x",
    "[",
    "*",
    "**a ",
    "**a*b",
    "a**b*",
    "*a**b_c~~d",
    "***a**b_ ",
    "*a_b ",
    "[a](",
    "](a",
    "![",
    "http://",
    "xhttp://a ",
    "$a",
    "`",
    "\\(",
    "<",
    "|",
    "> ",
    "- ",
    " #",
    "- a\n",
    "|a|b|\n|-|-|\n",
    "|`a|b`",
    "|`a\n",
    "```\n",
    "_a_ ",
    "*_",
    "\n",
    " ",
    "1. ",
    "\t- a\n",
  ];
  const cases = [
    ...units.map((unit) => unit.repeat(size / unit.length)),
    Array.from({ length: 630 }, (_, i) => "`".repeat(i + 1)).join(" "),
  ];
  for (const text of cases) {
    for (const open of [false, true]) {
      const began = performance.now();
      for (const block of parseBlocks(text, open))
        if (block.text !== undefined) parseInline(block.text, open);
      assert.ok(performance.now() - began < 5000, JSON.stringify(text.slice(0, 20)));
    }
  }
});

test("colours change no character", () => {
  const code = "def f(x): # a 'b'\n  return '''y\n\"''' + 0x1F\n`";
  for (const language of ["python", "c", "bash", "sql", "json", "unknown"]) {
    assert.equal(
      highlight(code, language)
        .map(([, text]) => text)
        .join(""),
      code,
    );
  }
  assert.deepEqual(
    highlight("if x: # no", "py").filter(([kind]) => kind),
    [
      ["word", "if"],
      ["comment", "# no"],
    ],
  );
});

test("events are found wherever the pieces were cut", () => {
  const stream = ': ping\n\ndata: {"a":1}\r\n\r\ndata: b\ndata: c\n\ndata:[DONE]\n\n';
  for (let size = 1; size < 12; size += 1) {
    const feed = eventParser();
    const events = [];
    for (let at = 0; at < stream.length; at += size)
      events.push(...feed(stream.slice(at, at + size)));
    assert.deepEqual(events, [
      { comment: "ping" },
      { data: '{"a":1}' },
      { data: "b\nc" },
      { data: "[DONE]" },
    ]);
  }
  assert.throws(() => eventParser()("x".repeat(17 * 1024 * 1024)), /too large/);
});

test("branches and exports", () => {
  const conversation = newConversation("s");
  const first = addMessage(conversation, null, { role: "user", text: " A\n question " });
  const answer = addMessage(conversation, first.id, { role: "assistant", text: "one" });
  addMessage(conversation, first.id, { role: "assistant", text: "two" });
  assert.equal(conversation.title, "A question");
  assert.deepEqual(
    branchOf(conversation).map((message) => message.text),
    [" A\n question ", "two"],
  );
  showBranch(conversation, answer);
  assert.equal(branchOf(conversation).at(-1).text, "one");
  const lone = { ...conversation, messages: conversation.messages.slice(1) };
  assert.deepEqual(importText(exportText([lone, conversation, {}])), {
    conversations: [conversation],
    damaged: 2,
  });
  for (const damaged of ["", "[]", "{}"]) assert.throws(() => importText(damaged), /./);
});

test("a message that others follow is never taken out", () => {
  const conversation = newConversation("");
  const asked = addMessage(conversation, null, { role: "user", text: "One" });
  const failed = addMessage(conversation, asked.id, { role: "assistant" });
  const more = addMessage(conversation, failed.id, { role: "user", text: "Two" });
  removeMessage(conversation, failed);
  assert.deepEqual(branchOf(conversation), [asked, failed, more]);
  removeMessage(conversation, more);
  removeMessage(conversation, failed);
  assert.deepEqual(branchOf(conversation), [asked]);
  assert.equal(importText(exportText([conversation])).damaged, 0);
});

test("requests", () => {
  const server = { model: "m", thinking: false, efforts: [] };
  const settings = {
    temperature: 0,
    top_p: null,
    top_k: null,
    min_p: null,
    max_tokens: null,
    seed: null,
    thinking: "on",
    effort: "low",
  };
  const branch = [
    { role: "user", text: "a" },
    { role: "assistant", text: "" },
    { role: "user", text: "b" },
  ];
  const body = requestBody(server, settings, " ", branch);
  assert.ok(!("model" in body));
  assert.deepEqual(body.messages, [
    { role: "user", content: "a" },
    { role: "user", content: "b" },
  ]);
  assert.deepEqual(
    [body.temperature, body.top_p, body.reasoning_effort, body.chat_template_kwargs],
    [0, undefined, undefined, undefined],
  );
  const field = { min: 0, max: 2, step: 1 };
  assert.deepEqual(
    ["", "1", 3, 1.5, "x", null].map((value) => valueIn(field, value)),
    [null, 1, null, null, null, null],
  );
});

/** What the page makes of a refusal: its kind, how often a question is asked until the page says that
 * it waits, and what is shown if it does not. */
async function refusal(status, error) {
  let asked = 0;
  globalThis.fetch = async () => {
    asked += 1;
    return new Response(JSON.stringify({ error }), { status, headers: { "Retry-After": "1" } });
  };
  const message = { text: "" };
  const stop = new AbortController();
  await answer(
    message,
    () => ({}),
    stop.signal,
    () => stop.abort(), // at the first word about waiting
  );
  const { kind } = await getJson("/").catch((raised) => raised);
  delete globalThis.fetch;
  return { kind, asked: asked - 1, shown: message.error?.text };
}

test("only what may pass is asked again", async () => {
  const kinds = {
    overloaded: { kind: "overloaded", shown: undefined },
    queue_full: { kind: "queue_full", shown: undefined },
    503: { kind: "loading", shown: undefined },
    resources: {
      kind: "resources",
      shown: "No memory. The server is short of memory or processes now: try again later.",
    },
  };
  for (const [code, { kind, shown }] of Object.entries(kinds)) {
    const met = await refusal(503, { code, message: "No memory" });
    assert.deepEqual(met, { kind, asked: 1, shown });
  }
});

test("how a server verifies is known by its props only", async () => {
  for (const verify of ["exact", "lossy", undefined]) {
    globalThis.fetch = async (path) =>
      new Response(JSON.stringify(path === "/props" ? { subspec: { verify } } : { data: [] }));
    assert.equal((await describeServer()).verify, verify ?? null);
  }
  globalThis.fetch = async (path) =>
    path === "/props" ? new Response("", { status: 500 }) : new Response('{"data": []}');
  assert.equal((await describeServer()).verify, null);
  delete globalThis.fetch;
});

test("a key that no header can carry is a wrong key", async () => {
  keepApiKey("“secret”");
  await assert.rejects(getJson("/"), { kind: "auth" });
  keepApiKey("");
});

test("figures", () => {
  assert.equal(formatBytes(7912000000), "7.9 GB");
  assert.equal(answerFigures({ metrics: { tokens_per_second: 2.5 } }), "2.50 tokens/s");
  assert.equal(
    answerFigures({ timings: { predicted_per_second: 20, draft_n: 10, draft_n_accepted: 4 } }),
    "20.0 tokens/s · 40% of the draft accepted",
  );
  let now = 0;
  const meter = speedometer(() => now);
  meter.text(4);
  now = 2000;
  meter.text(40);
  meter.tokens(21);
  assert.deepEqual(meter.read(), { tokens: 21, rate: 10, exact: true });
  assert.equal(spokenEnd("One. Two", 0), 4);
});

test("the live speed is that of the server's tokens, whatever pieces they come in", () => {
  let now = 0;
  const meter = speedometer(() => now);
  assert.deepEqual(meter.read(), { tokens: 0, rate: null, exact: false });
  meter.text(50);
  meter.tokens(9); // the first round has several
  assert.deepEqual(meter.read(), { tokens: 9, rate: null, exact: true });
  for (const count of [10, 17, 17, 29]) {
    now += 500;
    meter.text(1);
    meter.tokens(count);
  }
  assert.deepEqual(meter.read(), { tokens: 29, rate: 10, exact: true });
});

test("without a store of the browser what is kept is found until the end", () => {
  assert.equal(keepsNothing, true);
  const conversation = newConversation("");
  addMessage(conversation, null, { role: "user", text: "One" });
  assert.equal(saveConversation(conversation), true);
  assert.deepEqual(
    loadConversations().map((one) => one.title),
    ["One"],
  );
  deleteConversation(conversation.id);
  assert.deepEqual(loadConversations(), []);
});

test("what another tab has written is neither lost nor taken back", () => {
  const here = newConversation("");
  const first = addMessage(here, null, { role: "user", text: "One" });
  saveConversation(here);
  const key = `subspec.chat.${here.id}`;
  const there = JSON.parse(local.getItem(key)); // as another tab has it
  const theirs = { id: "b".repeat(24), parent: first.id, role: "assistant", text: "Th", created: 1 };
  there.messages.push(theirs);
  there.leaf = theirs.id;
  there.title = "Renamed";
  local.setItem(key, JSON.stringify(there));

  const failed = addMessage(here, first.id, { role: "assistant" });
  const again = addMessage(here, first.id, { role: "assistant", text: "Mine" });
  removeMessage(here, failed);
  saveConversation(here);
  const kept = JSON.parse(local.getItem(key));
  assert.deepEqual(
    kept.messages.map((message) => message.text),
    ["One", "Th", "Mine"],
  );

  theirs.text = "Theirs goes on";
  local.setItem(key, JSON.stringify({ ...there, messages: [...there.messages] }));
  takeStored(here, there, true);
  assert.deepEqual([here.title, here.leaf], ["Renamed", first.id]);
  assert.equal(here.messages.find((message) => message.id === theirs.id).text, "Theirs goes on");
  assert.ok(here.messages.includes(again));
  takeStored(here, there, false);
  assert.equal(here.leaf, theirs.id);
});
