// keccak256 of the EVM (padding 0x01; SHA3-256 has 0x06), after FIPS 202 section 3. Sixty-four-bit
// lanes as BigInt: slow, and easy to compare with the standard.

const MASK = (1n << 64n) - 1n
const RATE = 136 // bytes: 1600 bits less twice 256
const rotate = (lane, by) => ((lane << by) | (lane >> (64n - by))) & MASK

// Round constants from the LFSR of 3.2.5, and the offsets of 3.2.2 in the order of the walk.
const ROUNDS = []
for (let round = 0, register = 1; round < 24; round++) {
  let constant = 0n
  for (let j = 0; j < 7; j++) {
    if (register & 1) constant |= 1n << BigInt((1 << j) - 1)
    register = register & 0x80 ? ((register << 1) ^ 0x171) & 0xff : register << 1
  }
  ROUNDS.push(constant)
}

function permute(a) { // a[x + 5 * y]
  for (const constant of ROUNDS) {
    const c = [0, 1, 2, 3, 4].map((x) => a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20])
    for (let i = 0; i < 25; i++) a[i] ^= c[(i + 4) % 5] ^ rotate(c[(i + 1) % 5], 1n) // theta
    let x = 1, y = 0, moved = a[1]
    for (let t = 0; t < 24; t++) { // rho and pi
      ;[x, y] = [y, (2 * x + 3 * y) % 5]
      const next = a[x + 5 * y]
      a[x + 5 * y] = rotate(moved, BigInt((((t + 1) * (t + 2)) / 2) % 64))
      moved = next
    }
    for (let row = 0; row < 25; row += 5) { // chi
      const r = a.slice(row, row + 5)
      for (let i = 0; i < 5; i++) a[row + i] = r[i] ^ (~r[(i + 1) % 5] & MASK & r[(i + 2) % 5])
    }
    a[0] ^= constant // iota
  }
}

export function keccak256(...parts) {
  const message = Buffer.concat(parts)
  const padded = Buffer.alloc((Math.floor(message.length / RATE) + 1) * RATE)
  message.copy(padded)
  padded[message.length] ^= 0x01
  padded[padded.length - 1] ^= 0x80
  const state = new Array(25).fill(0n)
  for (let block = 0; block < padded.length; block += RATE) {
    for (let i = 0; i < RATE / 8; i++) state[i] ^= padded.readBigUInt64LE(block + 8 * i)
    permute(state)
  }
  const digest = Buffer.alloc(32)
  for (let i = 0; i < 4; i++) digest.writeBigUInt64LE(state[i], 8 * i)
  return digest
}
