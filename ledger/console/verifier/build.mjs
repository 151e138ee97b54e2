// Build verifier.html: `npm ci && npm run build`. `--check` compares with the committed file and exits 1
// on a difference; `--core FILE` writes src/core alone as one ES module, for tests.
//
// One file with everything inside, not minified: what checks other people's claims should be readable
// with "view source". The content security policy names script and style by their hashes, so nothing
// that is added later runs, and nothing can be fetched or sent.

import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const read = (path) => readFileSync(here(path), "utf8");
const VENDORED = ["@noble/ed25519", "@noble/hashes"];
const OUT = here("verifier.html");

async function bundle(entry, format) {
  const { outputFiles } = await build({
    entryPoints: [entry],
    absWorkingDir: here("."),
    bundle: true,
    charset: "utf8",
    format,
    legalComments: "none", // the full licence texts are in the page
    target: "es2022",
    write: false,
  });
  return outputFiles[0].text;
}

function licences() {
  return VENDORED.map((name) => {
    const { version } = JSON.parse(read(`node_modules/${name}/package.json`));
    return `${name} ${version}\n\n${read(`node_modules/${name}/LICENSE`).trim()}`;
  })
    .join("\n\n\n")
    .replace(/[&<>]/g, (character) => `&#${character.charCodeAt(0)};`);
}

function page(style, script) {
  const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
  const policy = [
    "default-src 'none'",
    `script-src ${hash(script)}`,
    `style-src ${hash(style)}`,
    "img-src data:",
    "connect-src 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
  ].join("; ");
  const parts = { POLICY: policy, STYLE: style, SCRIPT: script, LICENCES: licences() };
  return read("src/ui/page.html").replace(/\{\{([A-Z]+)\}\}/g, (_, name) => parts[name]);
}

async function main([option, target]) {
  if (option === "--core") {
    writeFileSync(target, await bundle("src/core/index.js", "esm"));
    return;
  }
  const script = `\n${await bundle("src/ui/main.js", "iife")}`;
  if (/<\/script|<!--/i.test(script)) throw new Error("the script would end its own element");
  const html = page(`\n${read("src/ui/style.css")}`, script);
  if (option === "--check") {
    if (readFileSync(OUT, "utf8") === html) return;
    console.error("verifier.html is not what the sources build to: npm run build, and commit");
    process.exitCode = 1;
    return;
  }
  writeFileSync(OUT, html);
}

await main(process.argv.slice(2));
