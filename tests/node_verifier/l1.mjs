// The L1 section: that a block of an EVM chain holds (size, root) in slots 0 and 1 of a contract.
// RLP and the hexary trie after the Ethereum yellow paper, appendices B and D.

import { Refused, expectFields, isHex0x, malformed } from './bytes.mjs'
import { keccak256 } from './keccak.mjs'

const STATE_ROOT = 3 // fields of a header, of an account
const NUMBER = 8
const MAX_HEADER = 2048 // bytes
const MAX_NODE = 1024
const MAX_NODES = 64
const STORAGE_ROOT = 2

// One RLP item and where it ends: bytes, or a list of items. Only the shortest spelling is read.
function readItem(bytes, at) {
  const bad = () => { throw malformed('not canonical RLP') }
  if (at >= bytes.length) bad()
  const first = bytes[at]
  if (first < 0x80) return [bytes.subarray(at, at + 1), at + 1]
  const isList = first >= 0xc0
  let [start, length] = [at + 1, first - (isList ? 0xc0 : 0x80)]
  if (length > 55) {
    const width = length - 55
    if (width > 4 || start + width > bytes.length || bytes[start] === 0) bad()
    length = bytes.readUIntBE(start, width)
    start += width
    if (length < 56) bad()
  }
  const end = start + length
  if (end > bytes.length) bad()
  if (!isList) {
    if (length === 1 && bytes[start] < 0x80) bad()
    return [bytes.subarray(start, end), end]
  }
  const items = []
  for (let next = start; next < end;) {
    const [item, after] = readItem(bytes.subarray(0, end), next)
    items.push(item)
    next = after
  }
  return [items, end]
}

function decodeRlp(bytes) {
  const [item, end] = readItem(bytes, 0)
  if (end !== bytes.length) throw malformed('bytes follow the RLP item')
  return item
}

const nibbles = (bytes) => [...bytes.toString('hex')].map((digit) => parseInt(digit, 16))

// The value at a key of the trie with this root; each proof node hashes to what led to it.
function trieValue(root, key, proof, field) {
  const no = (message) => { throw malformed(message, field) }
  let [path, reference] = [nibbles(keccak256(key)), root]
  for (const [i, encoded] of proof.entries()) {
    if (!keccak256(encoded).equals(reference)) throw mismatch(`node ${i} is not the trie's`, field)
    const node = decodeRlp(encoded)
    if (node.length === 17 && Array.isArray(node)) {
      if (path.length === 0) no('ends in a branch')
      reference = node[path[0]]
      path = path.slice(1)
    } else if (node.length === 2 && Array.isArray(node) && Buffer.isBuffer(node[0])) {
      const [flag, ...digits] = nibbles(node[0])
      const isLeaf = flag >= 2
      const step = flag & 1 ? digits : digits.slice(1)
      if (flag > 3 || (!(flag & 1) && digits[0] !== 0)) no('a path without its prefix')
      if (step.join() !== path.slice(0, step.length).join()) throw mismatch('the trie does not hold the key', field)
      path = path.slice(step.length)
      if (isLeaf) {
        if (path.length || i !== proof.length - 1 || !Buffer.isBuffer(node[1])) no('no leaf of this key')
        return node[1]
      }
      reference = node[1]
    } else no('neither branch, extension nor leaf')
    if (reference.length === 0) throw mismatch('the trie does not hold the key', field)
    if (!Buffer.isBuffer(reference) || reference.length !== 32) no('leads nowhere')
  }
  return no('ends before the value')
}

const mismatch = (message, field) =>
  new Refused('anchor-mismatch', `${field}: ${message}`, { field })

const bytesOf = (text, field, { length, max = length }) => {
  if (!isHex0x(text, length) || text.length > 2 + 2 * max) throw malformed('not hex', field)
  return Buffer.from(text.slice(2), 'hex')
}

const proofOf = (list, field) => {
  if (!Array.isArray(list) || list.length < 1 || list.length > MAX_NODES) throw malformed('no list of nodes', field)
  return list.map((node) => bytesOf(node, field, { max: MAX_NODE }))
}

function parseSection(section) {
  const at = (name) => `l1.section.${name}`
  expectFields(section, ['chain_id', 'block_number', 'contract', 'block_hash', 'header_rlp',
    'account_proof', 'storage_proofs'], 'l1.section')
  expectFields(section.storage_proofs, ['size', 'root'], at('storage_proofs'))
  for (const name of ['chain_id', 'block_number']) {
    if (!Number.isSafeInteger(section[name]) || section[name] < 0) throw malformed('no integer', at(name))
  }
  return {
    blockNumber: section.block_number,
    contract: bytesOf(section.contract, at('contract'), { length: 20 }),
    blockHash: bytesOf(section.block_hash, at('block_hash'), { length: 32 }),
    header: bytesOf(section.header_rlp, at('header_rlp'), { max: MAX_HEADER }),
    account: proofOf(section.account_proof, at('account_proof')),
    size: proofOf(section.storage_proofs.size, 'storage_proofs.size'),
    root: proofOf(section.storage_proofs.root, 'storage_proofs.root'),
  }
}

// That the block holds this size (BigInt) and root; nothing about which chain the block is of.
export function checkSection(section, size, root) {
  const { blockNumber, contract, blockHash, header, ...proofs } = parseSection(section)
  if (!keccak256(header).equals(blockHash)) throw mismatch('not the hash of the header', 'block_hash')
  const fields = decodeRlp(header)
  const isHeader = Array.isArray(fields) && fields.length > NUMBER && fields[STATE_ROOT].length === 32
  if (!isHeader) throw malformed('no header', 'header_rlp')
  if (toBigInt(fields[NUMBER]) !== BigInt(blockNumber)) throw mismatch('another block', 'block_number')
  const account = decodeRlp(trieValue(fields[STATE_ROOT], contract, proofs.account, 'account_proof'))
  if (!Array.isArray(account) || account.length !== 4) throw malformed('no account', 'account_proof')
  for (const [slot, name] of ['size', 'root'].entries()) {
    const key = Buffer.alloc(32)
    key[31] = slot
    const word = decodeRlp(trieValue(account[STORAGE_ROOT], key, proofs[name], `storage_proofs.${name}`))
    if (!Buffer.isBuffer(word) || word.length < 1 || word.length > 32 || word[0] === 0) throw malformed('no word', `storage_proofs.${name}`)
    const wanted = name === 'size' ? size : toBigInt(root)
    if (toBigInt(word) !== wanted) throw mismatch('the chain holds another', `storage_proofs.${name}`)
  }
}

const toBigInt = (bytes) => (bytes.length ? BigInt('0x' + bytes.toString('hex')) : 0n)
