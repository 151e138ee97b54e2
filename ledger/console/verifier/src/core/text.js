// Text written by strangers: how long it is and how it may be shown. Lengths are in Unicode code
// points, as in ledger/domain, and not in UTF-16 units.

const UNPRINTABLE = /[\p{C}\p{Z}]/u;
const SPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/;
const NOT_IN_NAMES = /[\p{Z}\p{Cs}+\t-\r\x1c-\x1f\x85]/u;

export const isString = (value) => typeof value === "string";
export const isInteger = (value) => Number.isSafeInteger(value);
export const isList = Array.isArray;
export const isObject = (value) =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Does the object have exactly these fields? */
export function hasExactly(value, fields) {
  return isObject(value) && Object.keys(value).length === fields.length &&
    fields.every((name) => Object.hasOwn(value, name));
}

/** Is the text 'low' to 'high' code points long? */
export function isWithin(text, low, high) {
  if (text.length > 2 * high) return false;
  const length = text.length <= low ? text.length : [...text].length;
  return low <= length && length <= high;
}

/** Every control or otherwise unprintable character as '?', cut to 'limit' code points. */
export function printable(text, limit = 80) {
  let characters = [...text.slice(0, 2 * limit + 2)];
  if (characters.length > limit) characters = [...characters.slice(0, limit - 1), "…"];
  return characters.map((c) => (c !== " " && UNPRINTABLE.test(c) ? "?" : c)).join("");
}

export const isBlank = (text) => [...text].every((c) => SPACE.test(c));

export function trim(text) {
  let [start, end] = [0, text.length];
  while (start < end && SPACE.test(text[start])) start++;
  while (end > start && SPACE.test(text[end - 1])) end--;
  return text.slice(start, end);
}

/** Key names of signed notes: not empty, no Unicode space, no plus sign. */
export const isKeyName = (name) => name !== "" && !NOT_IN_NAMES.test(name);

// --- numbers and times for people ---

const WEI_DIGITS = 18;
const LAST_SECOND_OF_9999 = 253_402_300_799n;

/** `1 event`, `2 events`. */
export const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

/** Parts per million with two decimals of a percent, an exact half to the even digit. */
export function percent(ppm) {
  const isHalf = ppm % 1_250 === 0 && (ppm / 1_250) % 2 === 1;
  const below = (ppm - 50) / 100;
  return (isHalf ? (below % 2 ? below + 1 : below) / 100 : ppm / 10_000).toFixed(2);
}

/** Base units for people: `1.5 OPEN`. Exact, never rounded. */
export function formatOpen(wei) {
  const digits = BigInt(wei).toString().padStart(WEI_DIGITS + 1, "0");
  const fraction = digits.slice(-WEI_DIGITS).replace(/0+$/, "");
  return `${digits.slice(0, -WEI_DIGITS)}${fraction && `.${fraction}`} OPEN`;
}

/** POSIX seconds (BigInt) as UTC; numbers that no calendar has come back as they are. */
export function time(seconds) {
  if (seconds > LAST_SECOND_OF_9999) return `time ${seconds}`;
  const iso = new Date(Number(seconds) * 1_000).toISOString();
  return `${iso.slice(0, 10)} ${iso.slice(11, 19)} UTC`;
}
