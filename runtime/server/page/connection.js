// Finding out who the server is, and asking for its key.

import { describeServer } from "./api.js";
import { hideBanner, showBanner } from "./banner.js";
import { askedKey } from "./dialogs.js";

const MAX_PAUSE_MS = 15000;

/** A function that asks the server who it is, again and again until it answers, and then calls
 * onServer with what describeServer returns. An engine that has failed is not waited for: the user
 * says when to try again. */
export function connection(onServer) {
  let connecting = false;
  let keyWasGiven = false;

  async function connect() {
    if (connecting) return;
    connecting = true;
    const server = await described();
    connecting = false;
    if (server === null) return;
    hideBanner("server");
    onServer(server);
  }

  async function askForKey() {
    if (!(await askedKey(keyWasGiven))) return;
    keyWasGiven = true;
    connect();
  }

  /** null: the server wants a key first. */
  async function described() {
    for (let pause = 1000; ; pause = Math.min(2 * pause, MAX_PAUSE_MS)) {
      try {
        return await describeServer();
      } catch (error) {
        if (error.kind === "auth") {
          showBanner("server", "The server asks for an API key.", "Enter the key", askForKey);
          askForKey();
          return null;
        }
        await waited(pause, error);
      }
    }
  }

  return connect;
}

/** Shows the error for `pause` milliseconds, or until the user wants to try again. */
function waited(pause, error) {
  const texts = {
    gone: "The server does not answer.",
    loading: "The model is loading…",
    overloaded: "The server has too many requests.",
    failed: "The engine has failed: restart the server.",
  };
  return new Promise((resolve) => {
    if (error.kind !== "failed") setTimeout(resolve, pause);
    showBanner("server", texts[error.kind] ?? error.message, "Try now", resolve);
  });
}
