// Fields of parsed JSON, each checked as it is taken out; the error's `field` names the place.

import { fromHex } from "./bytes.js";
import { malformed } from "./errors.js";
import { hash } from "./events.js";
import { hasExactly, isInteger, isList, isString } from "./text.js";

export function objectOf(value, fields, where) {
  if (!hasExactly(value, fields)) {
    throw malformed(`${where} must be an object with exactly ${fields.join(", ")}`, { field: where });
  }
  return value;
}

export function listOf(value, limit, where) {
  if (!isList(value) || value.length > limit) {
    const most = limit === Infinity ? "" : ` of at most ${limit} items`;
    throw malformed(`${where} must be a list${most}`, { field: where });
  }
  return value;
}

export function textOf(value, where) {
  if (!isString(value)) throw malformed(`${where} must be a string`, { field: where });
  return value;
}

export function countOf(value, where, low = 0) {
  if (!isInteger(value) || value < low) {
    throw malformed(`${where} must be an integer from ${low}`, { field: where });
  }
  return value;
}

/** 32 bytes of 64 hex digits; throws InvalidEvent. */
export function hashOf(value, where) {
  hash(value, where);
  return fromHex(value);
}

/** `isAfter(a, b)`: does item b come after item a? Each must, so that there is one order. */
export function checkAscending(items, isAfter, where) {
  for (let n = 1; n < items.length; n++) {
    if (!isAfter(items[n - 1], items[n])) {
      throw malformed(
        `${where}[${n}] does not come after ${where}[${n - 1}]: items must ascend and none may ` +
          "stand twice",
        { field: where },
      );
    }
  }
}

/** By UTF-16 code unit: enough for the hex digits and dashes that are compared here. */
export const comesAfter = (a, b) => a < b;
