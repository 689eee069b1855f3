// Colours for code: comments, texts, numbers and keywords, by one pass over it. Enough to read by;
// no grammar of any language.

const MAX_LENGTH = 100000;

const WORDS = {
  python: `
    and as assert async await break case class continue def del elif else except finally for
    from global if import in is lambda match nonlocal not or pass raise return try while
    with yield True False None self`,
  c: `
    abstract as async auto await bool boolean break byte case catch char class const
    constexpr continue default defer delete do double else enum export extends extern false
    final finally float fn for from func function go goto if impl implements import in
    instanceof int interface internal let long loop match mod module mut namespace new nil
    null nullptr of operator override package private protected pub public readonly ref
    return self short signed sizeof static string struct super switch template this throw
    throws trait true try type typedef typeof undefined union unsigned use using val var
    virtual void volatile where while yield`,
  shell: `
    if then else elif fi for while until do done case esac function in select return exit
    local export set unset echo cd source true false`,
  sql: `
    select from where and or not in is null insert into values update set delete create
    table index view drop alter add primary key foreign references join left right inner
    outer full on as group by order having limit offset union all distinct case when then
    else end exists between like asc desc with count sum avg min max`,
  ruby: `
    alias and begin break case class def do else elsif end ensure false for if in module
    next nil not or redo rescue retry return self super then true undef unless until when
    while yield require local function repeat`,
  data: "true false null yes no on off",
};

const HASH = /#[^\n]*/;
const SLASHES = /\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)/;
const DASHES = /--[^\n]*/;
const TRIPLE = /"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)/;
const QUOTED = /"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?/;
const TICKED = /`(?:\\[^]|[^`\\])*`?/;
const NUMBER = /\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b/;
const WORD = /[A-Za-z_$][\w$]*/;

const FAMILIES = [
  ["python py python3 ipython starlark", "python", [TRIPLE, HASH]],
  [
    `
    c h cpp c++ cc hpp cuda cu java javascript js jsx mjs typescript ts tsx rust rs go
    golang swift kotlin kt csharp cs c# php dart scala zig glsl wgsl css scss json5 jsonc
    proto`,
    "c",
    [SLASHES],
  ],
  ["bash sh shell zsh console fish dockerfile makefile make cmake powershell", "shell", [HASH]],
  ["sql postgres mysql sqlite", "sql", [DASHES, SLASHES]],
  ["ruby rb elixir ex perl julia r", "ruby", [HASH]],
  ["lua haskell hs", "ruby", [DASHES]],
  ["json yaml yml toml ini conf", "data", [HASH]],
];

const BY_LANGUAGE = new Map(
  FAMILIES.flatMap(([names, words, comments]) => {
    const family = makeFamily(words, comments);
    return names
      .trim()
      .split(/\s+/)
      .map((name) => [name, family]);
  }),
);

function makeFamily(words, [first, ...more]) {
  const isTriple = first === TRIPLE;
  const comment = isTriple ? more[0] : first;
  const others = [...(isTriple ? [] : more)].map((pattern) => pattern.source);
  const comments = [comment.source, ...others].join("|");
  const texts = [...(isTriple ? [TRIPLE.source] : []), QUOTED.source, TICKED.source].join("|");
  const pattern = [
    `(?<comment>${comments})`,
    `(?<text>${texts})`,
    `(?<number>${NUMBER.source})`,
    `(?<word>${WORD.source})`,
  ].join("|");
  return {
    pattern: new RegExp(pattern, "g"),
    words: new Set(WORDS[words].trim().split(/\s+/)),
    anyCase: words === "sql",
  };
}

/** [kind, text] pairs that together are `code`; kind is "" for what has no colour. */
export function highlight(code, language) {
  const family = BY_LANGUAGE.get(language.toLowerCase());
  if (!family || code.length > MAX_LENGTH) return [["", code]];
  const pieces = [];
  let done = 0;
  for (const found of code.matchAll(family.pattern)) {
    const kind = kindOf(found, code, family);
    if (!kind) continue;
    if (found.index > done) pieces.push(["", code.slice(done, found.index)]);
    pieces.push([kind, found[0]]);
    done = found.index + found[0].length;
  }
  if (done < code.length) pieces.push(["", code.slice(done)]);
  return pieces;
}

function kindOf(found, code, family) {
  const { comment, text, number, word } = found.groups;
  if (comment !== undefined) return "comment";
  if (text !== undefined) return "text";
  if (number !== undefined) return "number";
  if (family.words.has(family.anyCase ? word.toLowerCase() : word)) return "word";
  return code[found.index + word.length] === "(" ? "call" : "";
}
