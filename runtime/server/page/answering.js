// One answer from its request to its end: streams into a message, waits and asks again where the
// server says to, and says how fast it goes.

import { ServerError, streamAnswer } from "./api.js";
import { answerFigures, speedometer } from "./figures.js";

// Of what may pass: how often it is asked again, after how many seconds if the server does not say,
// and in which words.
const PASSING = {
  queue_full: { most: 5, seconds: 5, text: "The server's queue is full" },
  overloaded: { most: 5, seconds: 2, text: "The server has too many requests" },
  loading: { most: 600, seconds: 2, text: "The model is still loading" },
};
const FRAME_MS = 40;

/** Fills `message` as the answer comes. `body()` makes the request, anew for each try: the server may
 * have said more about itself since. onChange(notice, speed) is called at most 25 times a second,
 * and rarely enough to leave the processor nine tenths of its time. Returns how it ended:
 * {error: ServerError or null, model: who answered, or null}. */
export async function answer(message, body, signal, onChange) {
  const paint = painter(onChange);
  const meter = speedometer();
  let error = null;
  let model = null;
  try {
    for (let attempt = 1; ; attempt += 1) {
      try {
        model = await receive(message, body(), signal, meter, paint);
        break;
      } catch (failure) {
        const seconds = retrySeconds(failure, attempt, message);
        if (seconds === null) throw failure;
        await countDown(failure, seconds, signal, paint);
      }
    }
  } catch (failure) {
    if (signal.aborted) {
      message.finish = "stopped";
      message.stats = answerFigures({}, meter.read());
    } else {
      error =
        failure instanceof ServerError ? failure : new ServerError("refused", String(failure));
      message.error = { kind: error.kind, text: explained(error) };
    }
  } finally {
    paint.stop();
  }
  return { error, model };
}

/** Returns the name of the model that answered. */
async function receive(message, body, signal, meter, paint) {
  let model = null;
  const began = performance.now();
  for await (const event of streamAnswer(body, signal)) {
    if (event.waiting !== undefined) paint(waitingText(event.waiting));
    if (event.tokens !== undefined) meter.tokens(event.tokens);
    if (event.reasoning !== undefined) {
      message.reasoning = (message.reasoning ?? "") + event.reasoning;
      message.reasoningSeconds = (performance.now() - began) / 1000;
      meter.text(event.reasoning.length);
    }
    if (event.text !== undefined) {
      // White space between the reasoning and the answer is nobody's.
      message.text += message.text ? event.text : event.text.trimStart();
      meter.text(event.text.length);
    }
    if (event.finish !== undefined) {
      model = event.model;
      message.finish = event.finish ?? "stop";
      message.stats = answerFigures(event, meter.read());
      if (Number.isFinite(event.usage?.total_tokens))
        message.contextTokens = event.usage.total_tokens;
    } else paint(undefined, meter.read());
  }
  return model;
}

function waitingText(place) {
  if (place === 0) return "Reading the prompt…";
  return place === 1 ? "Waiting: next in the queue…" : `Waiting: number ${place} in the queue…`;
}

/** After how many seconds to ask again, or null: not by itself. */
function retrySeconds(failure, attempt, message) {
  if (message.text || message.reasoning) return null;
  const passing = PASSING[failure.kind];
  return passing && attempt <= passing.most ? (failure.retryAfter ?? passing.seconds) : null;
}

async function countDown(failure, seconds, signal, paint) {
  for (let left = seconds; left > 0; left -= 1) {
    paint(`${PASSING[failure.kind].text}; trying again in ${left} s…`);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener(
        "abort",
        () => {
          clearTimeout(timer);
          resolve();
        },
        { once: true },
      );
    });
    signal.throwIfAborted();
  }
}

function explained(error) {
  const sentence = /[.!?]$/.test(error.message) ? error.message : `${error.message}.`;
  if (error.kind === "auth") return "The server asks for an API key.";
  const more = {
    context:
      " Start a new conversation, shorten this one, or plan the model with a longer context.",
    queue_full: " The queue stayed full.",
    resources: " The server is short of memory or processes now: try again later.",
    cut: " What had come is kept.",
    engine: " What had come is kept.",
    failed: " The server's log says why; it must be started again.",
  };
  return sentence + (more[error.kind] ?? "");
}

/** Calls `draw` with the newest values, soon but not often: the time between two calls is ten times
 * what the last one took. */
function painter(draw) {
  let timer = null;
  let pause = 0;
  let notice = "";
  let speed = null;
  const paint = (newNotice, newSpeed) => {
    notice = newNotice ?? notice;
    speed = newSpeed ?? speed;
    timer ??= setTimeout(() => {
      timer = null;
      const began = performance.now();
      draw(notice, speed);
      pause = Math.max(FRAME_MS, 9 * (performance.now() - began));
    }, pause);
  };
  paint.stop = () => clearTimeout(timer);
  return paint;
}

/** Where to stop reading aloud: after the last whole sentence or line of `text` behind `from`. */
export function spokenEnd(text, from) {
  const rest = text.slice(from, from + 4000);
  const ends = [...rest.matchAll(/[.!?:]\s|\n/g)];
  return ends.length ? from + ends.at(-1).index + 1 : from;
}
