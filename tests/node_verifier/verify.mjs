#!/usr/bin/env node
// node verify.mjs [--key VKEY]... FILE...
//
// A second verifier of Tributary's formats, written from docs/FORMATS.md and the public
// specifications that it names, and from nothing else. It knows lineage bundles, receipts, proofs of
// one entry (the entry lies beside the proof as FILE.entry), checkpoints, and the vectors of L1
// sections and payout trees. One JSON line a file: {file, verified, error?, step?, ...}. Exit status 1
// when some file does not verify, 2 when it could not be read. A vkey is of a log or of a witness.

import { readFileSync } from 'node:fs'
import { payoutRoot, verifyBundle } from './bundle.mjs'
import { Refused, utf8 } from './bytes.mjs'
import { checkSection } from './l1.mjs'
import { leafHash } from './merkle.mjs'
import { openCheckpoint, parseProof, parseVkey, verifyProof } from './note.mjs'
import { verifyReceipt } from './receipt.mjs'

const KINDS = [ // how a file begins or what it holds, and how it is verified
  [(text) => text.startsWith('c2sp.org/tlog-proof@v1\n'), proof],
  [(text) => text.includes('\n\n\xe2\x80\x94 '), checkpoint], // JSON has no bare line feed here
  [(text) => text.includes('"format":"tributary/receipt/v1"'), receipt],
  [(text) => text.includes('"trees":'), payoutTrees],
  [(text) => text.includes('"section":') && !text.includes('"entries":'), l1Vector],
  [() => true, bundle],
]

class Keys {
  constructor(vkeys) {
    const keys = vkeys.map((vkey) => parseVkey(vkey))
    this.witnesses = keys.filter((key) => key.type === 4)
    this.logs = keys.filter((key) => key.type === 1)
  }

  log(origin) {
    const key = this.logs.find(({ name }) => name === origin)
    if (!key) throw new Refused('bad-signature', `no key of ${origin} is known: pass --key`)
    return key
  }
}

function bundle(bytes, keys) {
  return verifyBundle(bytes, { logKeys: keys.logs, witnessKeys: keys.witnesses })
}

function receipt(bytes, keys) {
  return verifyReceipt(bytes, keys.logs[0] ?? keys.log('the receipt'))
}

function checkpoint(bytes, keys) {
  const text = utf8(bytes, 'the note')
  const { size, witnesses } = openCheckpoint(text, keys.log(text.split('\n')[0]), keys.witnesses)
  return { size: Number(size), witnesses }
}

function proof(bytes, keys, file) {
  const origin = parseProof(bytes).checkpoint.split('\n')[0]
  const leaf = leafHash(readFileSync(`${file}.entry`))
  const { index, size, witnesses } = verifyProof(bytes, leaf, keys.log(origin), keys.witnesses)
  return { index: Number(index), size: Number(size), witnesses }
}

function l1Vector(bytes) {
  const { size, root, section } = JSON.parse(bytes)
  checkSection(section, BigInt(size), Buffer.from(root, 'hex'))
  return { size }
}

function payoutTrees(bytes) {
  let lines = 0
  for (const { values, root, proofs } of JSON.parse(bytes).trees) {
    for (const [i, [account, amount]] of values.entries()) {
      const path = proofs[i].map((hash) => Buffer.from(hash.slice(2), 'hex'))
      if (`0x${payoutRoot(account, amount, path).toString('hex')}` !== root) {
        throw new Refused('not-included', `${account} is not in the tree ${root}`)
      }
      lines++
    }
  }
  return { lines }
}

function verifyFile(file, keys) {
  const bytes = readFileSync(file)
  try {
    const start = bytes.toString('latin1')
    const [, verify] = KINDS.find(([fits]) => fits(start))
    return { file, verified: true, ...verify(bytes, keys, file) }
  } catch (error) {
    if (!(error instanceof Refused)) throw error
    const { error: name, message, step, field, entry } = error
    return { file, verified: false, error: name, step, field, entry, message }
  }
}

function main(args) {
  const [vkeys, files] = [[], []]
  while (args.length) {
    const arg = args.shift()
    if (arg === '--key') vkeys.push(args.shift())
    else files.push(arg)
  }
  const keys = new Keys(vkeys)
  let status = files.length ? 0 : 2
  for (const file of files) {
    try {
      const verdict = verifyFile(file, keys)
      if (!verdict.verified) status ||= 1
      console.log(JSON.stringify(verdict))
    } catch (error) { // our fault or the disk's: never a verdict
      status = 2
      console.log(JSON.stringify({ file, verified: false, error: 'failed', message: error.stack }))
    }
  }
  return status
}

process.exitCode = main(process.argv.slice(2))
