// Elements made of text, never of markup: whatever a bundle says is shown as characters. The page's
// policy (require-trusted-types-for) makes the browser refuse innerHTML as well.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; a property that is a function is a listener, `class` and `aria-*` are attributes. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

export const byId = (id) => document.getElementById(id);

const ICONS = {
  ok: "M4.5 12.5l5 5 10-11",
  failed: "M6 6l12 12M18 6L6 18",
  skipped: "M6 12h12",
  "not reached": "M12 12h.01",
};

/** A mark for a status; words always stand beside it. */
export function icon(name, size = 18) {
  return svg(
    "svg",
    { class: "icon", viewBox: "0 0 24 24", width: size, height: size, "aria-hidden": "true" },
    svg("path", { d: ICONS[name] }),
  );
}

/** `ed25519:abcd…` and hashes, shortened in the middle of nowhere that matters. */
export function short(text, length = 14) {
  const characters = [...text];
  return characters.length <= length ? text : `${characters.slice(0, length - 1).join("")}…`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

const CODE = /((?:0x|ed25519:)[0-9a-f]{8,}…?|\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{64}\b)/;

/** A sentence with its hashes, keys and ids set as code. */
export function withCode(sentence) {
  return sentence.split(CODE).map((part, n) => (n % 2 ? h("code", {}, part) : part));
}
