// Numbers in words: the line below an answer, the line below the page.

export function formatRate(rate) {
  return `${rate >= 100 ? Math.round(rate) : rate.toFixed(rate >= 10 ? 1 : 2)} tokens/s`;
}

export function formatCount(count) {
  return Math.round(count).toLocaleString("en-US");
}

export function formatSeconds(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

export function formatBytes(bytes) {
  const units = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ];
  const [unit, size] = units.find(([, least]) => bytes >= least) ?? ["bytes", 1];
  const value = bytes / size;
  return `${size === 1 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${unit}`;
}

/** What an answer took, as the server measured it; without its measure, as the page did. */
export function answerFigures(end, observed) {
  const { usage, metrics, timings } = end;
  const parts = [];
  const measured = metrics?.tokens_per_second ?? timings?.predicted_per_second;
  const rate = measured ?? observed?.rate;
  const predicted = metrics?.subspec?.predicted_tokens_per_second;
  if (Number.isFinite(rate)) {
    const about = Number.isFinite(measured) || observed?.exact ? "" : "≈ ";
    parts.push(
      about +
        formatRate(rate) +
        (Number.isFinite(predicted) ? ` (${predicted.toFixed(1)} predicted)` : ""),
    );
  }
  const drafted = metrics?.speculative_decoding;
  if (Number.isFinite(drafted?.mean_acceptance_length)) {
    parts.push(`${drafted.mean_acceptance_length.toFixed(2)} tokens a step`);
  }
  const share = drafted?.draft_acceptance_rate ?? timings?.draft_n_accepted / timings?.draft_n;
  if (Number.isFinite(share)) parts.push(`${Math.round(share * 100)}% of the draft accepted`);
  const tokens = usage?.completion_tokens ?? timings?.predicted_n;
  if (Number.isFinite(tokens)) parts.push(`${formatCount(tokens)} tokens`);
  const first = metrics?.time_to_first_token_ms ?? timings?.prompt_ms;
  if (Number.isFinite(first)) parts.push(`first after ${formatSeconds(first / 1000)}`);
  return parts.join(" · ");
}

/** How many tokens have come, and how fast those after the first piece did, which may have several.
 * Without counts from the server a token is taken to be four characters. */
export function speedometer(now = () => performance.now()) {
  let first = null; // {tokens, time} of the first piece
  let last = null; // of the newest one
  let characters = 0;
  const piece = (tokens, exact) => {
    const counted = { tokens, time: now(), exact };
    // The count of the first piece comes after its text.
    const isFirst = first === null || (exact && last === first && !first.exact);
    if (isFirst) first = counted;
    last = counted;
  };
  return {
    text(length) {
      characters += length;
      if (!last?.exact) piece(characters / 4, false);
    },
    tokens(count) {
      if (count > (last?.exact ? last.tokens : 0)) piece(count, true);
    },
    read() {
      if (last === null) return { tokens: 0, rate: null, exact: false };
      const seconds = (last.time - first.time) / 1000;
      const rate = seconds > 0.3 ? (last.tokens - first.tokens) / seconds : null;
      return { tokens: last.tokens, rate, exact: last.exact };
    },
  };
}
