// What keys mean in a field of text.

/** Whether an input method is at work: its keys choose signs, and end nothing here. Some browsers tell
 * of its last key only by the code. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Enter in `area` calls `send`; with Shift, and on a touch keyboard, it begins a new line. */
export function sendOnEnter(area, send) {
  const isTouch = () => matchMedia("(hover: none) and (pointer: coarse)").matches;
  area.enterKeyHint = isTouch() ? "enter" : "send";
  area.addEventListener("keydown", (event) => {
    if (isComposing(event) || event.key !== "Enter" || event.shiftKey || isTouch()) return;
    event.preventDefault();
    send();
  });
}
