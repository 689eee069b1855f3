// Server-sent events: bytes -> {comment} or {data}.

const MAX_EVENT = 16 * 1024 * 1024;

/** Yields the events of a response's body. Raises when one event is beyond all measure. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const feed = eventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* feed(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A function that takes the next piece of text and returns the events that it completes. */
export function eventParser() {
  let parts = []; // of a line that is not complete
  let held = 0;
  let data = [];
  return (piece) => {
    const events = [];
    const lines = piece.split("\n");
    parts.push(lines[0]);
    held += lines[0].length;
    if (held > MAX_EVENT) throw new Error("The server sent an event that is too large.");
    for (let i = 1; i < lines.length; i += 1) {
      const line = parts.join("").replace(/\r$/, "");
      parts = [lines[i]];
      if (line === "" && data.length) {
        events.push({ data: data.join("\n") });
        data = [];
        held = 0;
      } else if (line.startsWith(":")) events.push({ comment: line.slice(1).trim() });
      else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    }
    return events;
  };
}
