#!/usr/bin/env node
// The compiler as Foundry and build.py want to call it: `--version`, and `--standard-json` on
// stdin. Behind it stands the WebAssembly build of solc from npm, so one integrity-checked file
// serves every platform and nothing is downloaded at build time. Any other argument (Foundry adds
// --allow-paths and --base-path) is ignored: every source arrives inside the JSON.
"use strict";
const { readFileSync, writeSync } = require("node:fs");
const solc = require("solc");

function write(text) {
  const bytes = Buffer.from(text);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(1, bytes, at);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error; // a full pipe: the reader is slower than we are
    }
  }
}

const args = process.argv.slice(2);
if (args.includes("--version")) {
  write(`solc, the solidity compiler\nVersion: ${solc.version()}\n`);
} else if (args.includes("--standard-json")) {
  write(solc.compile(readFileSync(0, "utf8")));
} else {
  process.stderr.write("usage: solc.cjs --version | --standard-json < input.json\n");
  process.exit(2);
}
