// Long work in short slices: awaited between pieces, it lets the page draw and answer about sixty times
// a second. A message and not a timer wakes us: browsers slow timers down in hidden tabs.

const SLICE_MS = 12;

export class Stopped extends Error {}

/** `isCurrent()` turns false when a newer file took our place; the work then ends. */
export function pacer(isCurrent) {
  const channel = new MessageChannel();
  let resume = null;
  let last = performance.now();
  channel.port1.onmessage = () => resume();
  return async () => {
    if (performance.now() - last < SLICE_MS) return;
    await new Promise((resolve) => {
      resume = resolve;
      channel.port2.postMessage(null);
    });
    if (!isCurrent()) throw new Stopped();
    last = performance.now();
  };
}
