// Greedy decoding with llama.cpp for peers.py, which says what the arguments and the lines are.
//
//     node llama_worker.mjs PATH-OF-node-llama-cpp/dist/index.js TASK
//
// The weights are a memory-mapped file: what does not fit is read again by the kernel.

import { readFileSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [library, taskFile] = process.argv.slice(2);
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(library).href);
const task = JSON.parse(readFileSync(taskFile, "utf8"));
const endTokens = new Set(task.end_tokens);

const say = (event) => writeSync(1, JSON.stringify({ ...event, at: performance.now() / 1000 }) + "\n");

const llama = await getLlama({
  gpu: false,
  build: "never",
  progressLogs: false,
  logLevel: LlamaLogLevel.error,
  logger: (level, message) => writeSync(2, message + "\n"),
});
const model = await llama.loadModel({
  modelPath: task.model,
  useMmap: true,
  ignoreMemorySafetyChecks: true,
});
const context = await model.createContext({
  contextSize: task.context,
  threads: task.threads,
  ignoreMemorySafetyChecks: true,
});
const sequence = context.getSequence();
for (const [prompt, ids] of task.prompts.entries()) {
  await sequence.clearHistory();
  const began = performance.now();
  say({ prompt });
  let count = 0;
  for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    say({ prompt, token });
    count += 1;
    const late = performance.now() - began > task.seconds_per_prompt * 1000;
    if (count === task.tokens || endTokens.has(token) || late) break;
  }
}
// The native library's threads can outlast the loop.
process.exit(0);
