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

/** Tokens since the first one, and their rate. Without counts from the server a token is taken to
 * be four characters. */
export function speedometer(now = () => performance.now()) {
  let first = null;
  let counted = null; // {tokens, at the first count}
  let characters = 0;
  let last = null;
  return {
    text(length) {
      last = now();
      first ??= last;
      characters += length;
    },
    tokens(count) {
      counted = count;
    },
    read() {
      const seconds = first === null ? 0 : (last - first) / 1000;
      const tokens = counted ?? characters / 4;
      const rate = seconds > 0.3 && tokens > 1 ? (tokens - 1) / seconds : null;
      return { tokens, rate, exact: counted !== null };
    },
  };
}
