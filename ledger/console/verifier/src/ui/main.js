// The page: takes a file by picker, drop or paste, verifies it, shows the verdict. It has no network and
// wants none (see the policy in page.html).

import { MAX_BUNDLE_BYTES } from "../core/bundle_format.js";
import { utf8 } from "../core/bytes.js";
import { sha256Hex } from "../core/hash.js";
import { printable, trim } from "../core/text.js";
import { verifyBundle } from "../core/verify.js";
import { byId } from "./dom.js";
import { Stopped, pacer } from "./pace.js";
import { showPlan, showProblem, showResult, showRunning, showVerdict } from "./result.js";
import { readTrust } from "./trust.js";

const TITLE = document.title;
const SHOW_RUNNING_AFTER_MS = 150;

let turn = 0; // of the file that is wanted now; older ones stop
let current = null; // {name, data}

function takeFile(file) {
  if (file.size > MAX_BUNDLE_BYTES) {
    turn++;
    return fail("Too large", `${printable(file.name)} has ${size(file.size)}; a bundle has at most ${size(MAX_BUNDLE_BYTES)}.`);
  }
  return take(file.name, () => file.arrayBuffer());
}

async function take(name, read) {
  const mine = ++turn;
  clear();
  try {
    const data = new Uint8Array(await read());
    if (mine === turn) await check({ name: printable(name), data });
  } catch (error) {
    if (mine === turn) fail("Could not be read", `${printable(name)}: ${error.message}`);
  }
}

async function check(file) {
  const mine = ++turn;
  clear();
  current = file;
  const trust = readTrust();
  showCurrent(file);
  if (!trust) return fail("Not checked yet", "One of your keys cannot be understood: see the note beside it.");
  const started = performance.now();
  const pace = pacer(() => mine === turn);
  const onStep = (_, number) => {
    if (performance.now() - started > SHOW_RUNNING_AFTER_MS) {
      byId("verdict").replaceChildren(showRunning(file.name, number));
    }
  };
  byId("verdict").replaceChildren(showRunning(file.name, 1));
  // Two frames, so that the reader sees what is going on before the first long piece of work.
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  try {
    const found = await verifyBundle(file.data, trust, { pace, onStep });
    if (mine === turn) show(file, found);
  } catch (error) {
    if (error instanceof Stopped || mine !== turn) return undefined;
    fail("No verdict", `A fault of this page, not of the file: ${printable(String(error), 300)}`);
  }
  return undefined;
}

function show(file, found) {
  byId("verdict").replaceChildren(showVerdict(found));
  byId("result").replaceChildren(...showResult(found));
  document.title = `${found.verdict.verified ? "Verified" : "Not verified"}: ${file.name}`;
  document.documentElement.dataset.state = found.verdict.verified ? "verified" : "failed";
}

function fail(title, words) {
  clear();
  byId("verdict").replaceChildren(showProblem(title, words));
  document.title = `${title}: ${TITLE}`;
  document.documentElement.dataset.state = "problem";
}

/** No older verdict stands while a newer one is worked out. */
function clear() {
  delete document.documentElement.dataset.state;
  byId("verdict").replaceChildren();
  byId("result").replaceChildren();
  document.title = TITLE;
}

function showCurrent({ name, data }) {
  byId("drop").hidden = true;
  byId("plan").hidden = true;
  byId("current").hidden = false;
  byId("name").textContent = name;
  byId("about").textContent = `${size(data.length)}, SHA-256 ${sha256Hex(data).slice(0, 16)}…`;
}

function size(bytes) {
  if (bytes < 1_024) return `${bytes} bytes`;
  return bytes < 2 ** 20 ? `${(bytes / 1_024).toFixed(1)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

byId("plan").replaceChildren(showPlan());

// --- ways in ---

const pick = () => byId("file").click();
byId("choose").addEventListener("click", pick);
byId("another").addEventListener("click", pick);
byId("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file) takeFile(file);
});
byId("verify-text").addEventListener("click", () => {
  // Spaces around come from copying and belong to no bundle; the rest is taken to the byte.
  const text = trim(byId("text").value);
  take("pasted text", async () => utf8(text).buffer);
});
for (const id of ["vkey", "witnesses", "l1"]) {
  byId(id).addEventListener("change", () => (current ? check(current) : readTrust()));
}

let depth = 0; // dragenter and dragleave also fire for every child
const veil = (by) => {
  depth = by === 0 ? 0 : Math.max(0, depth + by);
  byId("veil").hidden = depth === 0;
};
const hasFile = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => hasFile(event) && veil(1));
addEventListener("dragleave", (event) => hasFile(event) && veil(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  veil(0);
  const [file] = event.dataTransfer?.files ?? [];
  if (file) takeFile(file);
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (file) takeFile(file);
});
