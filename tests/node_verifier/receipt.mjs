// Receipts: what a log promised when it stored entries, under the log's key.

import { Refused, canonical, expectFields, expectList, fromBase64, inconsistent, isHex, isHex0x,
  malformed, parseCanonical } from './bytes.mjs'
import { ed25519 } from './note.mjs'

const FORMAT = 'tributary/receipt/v1'
const FIELDS = ['format', 'log', 'first_index', 'leaf_hashes', 'recorded_at', 'included_by', 'sig', 'evm']

// Throws Refused; else the promise. The chain key's signature needs a chain to mean anything: it is
// read and reported as skipped, never as passed.
export function verifyReceipt(bytes, logKey) {
  if (bytes.length > 65_536) throw malformed('more than 65,536 bytes')
  const receipt = parseCanonical(bytes, 'the receipt')
  expectFields(receipt, FIELDS, 'the receipt')
  if (receipt.format !== FORMAT) throw malformed('unknown', 'format')
  for (const name of ['first_index', 'recorded_at', 'included_by']) {
    if (!Number.isSafeInteger(receipt[name]) || receipt[name] < 0) throw malformed('no integer', name)
  }
  expectList(receipt.leaf_hashes, { min: 1, max: 500 }, 'leaf_hashes')
  if (!receipt.leaf_hashes.every((hash) => isHex(hash, 32))) throw malformed('not hashes', 'leaf_hashes')
  if (receipt.evm !== null) checkEvm(receipt.evm)
  if (receipt.log !== logKey.name) throw inconsistent(`a receipt of the log ${receipt.log}`, 'log')
  const { sig, evm, ...promise } = receipt
  const signature = fromBase64(sig)
  if (signature?.length !== 64) throw malformed('not 64 bytes in base64', 'sig')
  if (!ed25519(logKey.key, Buffer.from(`${FORMAT}\n${canonical(promise)}`), signature)) {
    throw new Refused('bad-signature', 'not signed by the log', { field: 'sig' })
  }
  return { steps: ['ok', 'skipped'], first_index: promise.first_index, leaves: promise.leaf_hashes.length }
}

function checkEvm(evm) {
  expectFields(evm, ['chain_id', 'contract', 'signer', 'sig'], 'evm')
  if (!Number.isSafeInteger(evm.chain_id) || evm.chain_id < 1) throw malformed('no integer', 'evm.chain_id')
  if (!isHex0x(evm.contract, 20)) throw malformed('no address', 'evm.contract')
  if (!isHex0x(evm.signer, 20)) throw malformed('no address', 'evm.signer')
  if (!isHex0x(evm.sig, 65) || !/(1b|1c)$/.test(evm.sig)) throw malformed('not r, s, v', 'evm.sig')
}
