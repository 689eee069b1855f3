// The browser's two stores. One that forbids them raises at their very names, and another has none:
// there the page keeps what it has until its tab is closed.

function opened(name) {
  try {
    globalThis[name].getItem("subspec");
    return globalThis[name];
  } catch {
    return memory();
  }
}

/** What the page uses of a Storage, without one. */
function memory() {
  const kept = new Map();
  return {
    get length() {
      return kept.size;
    },
    key: (index) => [...kept.keys()][index] ?? null,
    getItem: (key) => kept.get(key) ?? null,
    setItem: (key, value) => kept.set(key, value),
    removeItem: (key) => kept.delete(key),
    isMemory: true,
  };
}

export const local = opened("localStorage");
export const session = opened("sessionStorage");

/** Whether conversations end with the tab. */
export const keepsNothing = local.isMemory === true;
