// What stands behind a node of the picture: its events, field by field, in full.

import { formatOpen, percent, time } from "../core/text.js";
import { h, plural, short } from "./dom.js";

const MAX_LISTED = 200;
const MAX_SHARES_SHOWN = 12;

/** The panel of a node: of one thing its events, of many a list to choose from. */
export function showNode(node, onSelect) {
  if (!node.members) return node.entries.map(showEntry);
  return [
    h("div", { class: "event" },
      h("h3", {}, node.title, h("span", {}, node.sub)),
      h("div", { class: "list" },
        node.members.slice(0, MAX_LISTED).map((member) =>
          h("div", {}, h("button", { type: "button", class: "link", click: () => onSelect(member) },
            [`#${member.entries[0]?.index ?? "–"}`, member.title, member.sub].filter(Boolean).join("  ·  "))),
        ),
        node.members.length > MAX_LISTED &&
          h("p", { class: "hint" }, `and ${plural(node.members.length - MAX_LISTED, "more", "more")}, all in the list of entries below`),
      ),
    ),
  ];
}

/** One event: who said what, and when. */
export function showEntry({ index, recordedAt, event }) {
  if (!event) {
    return h("div", { class: "event" },
      h("h3", {}, `Entry ${index}`, h("span", {}, "cannot be read as an event")));
  }
  return h("div", { class: "event" },
    h("h3", {}, event.type, h("span", {}, `entry ${index}`)),
    h("dl", {},
      pair("recorded", `${time(recordedAt / 1_000_000n)} (the log's clock)`),
      pair("signed", `${time(BigInt(event.at) / 1_000_000n)} (the signer's clock)`),
      pair("signer", event.actor, true),
      pair("event id", event.id, true),
      Object.entries(event.body).map(([name, value]) => bodyPair(name, value)),
    ),
  );
}

function pair(name, value, isMono = false) {
  return [h("dt", {}, name), h("dd", { class: isMono ? "mono" : null }, value)];
}

function bodyPair(name, value) {
  const words = name.replace(/_(?:ppm|bps|wei)$/, "").replaceAll("_", " ").replace("wei per", "per");
  if (name === "shares") return [h("dt", {}, words), h("dd", {}, showShares(value))];
  if (name.endsWith("_wei") || name.endsWith("_wei_per_token")) {
    return pair(words, `${formatOpen(value)}  (${value} wei)`);
  }
  if (name.endsWith("_ppm")) return pair(words, `${percent(value)} %`);
  if (name.endsWith("_bps")) return pair(words, `${percent(value * 100)} %`);
  if (Array.isArray(value)) return pair(words, value.length ? value.join("\n") : "none", true);
  if (typeof value === "object" && value !== null) return pair(words, JSON.stringify(value, null, 1), true);
  const isCode = typeof value === "string" && /^(?:0x|ed25519:)?[0-9a-f-]{32,}$/.test(value);
  return pair(words, String(value), isCode);
}

function showShares(shares) {
  const sorted = [...shares].sort((a, b) => b.ppm - a.ppm);
  const bar = (ppm) => {
    const fill = h("i");
    fill.style.width = `${ppm / 10_000}%`;
    return h("span", { class: "bar" }, fill);
  };
  const rest = sorted.length - MAX_SHARES_SHOWN;
  return [
    h("ul", { class: "shares" },
      sorted.slice(0, MAX_SHARES_SHOWN).map(({ contributor, ppm }) =>
        h("li", {},
          h("span", { class: "mono", title: contributor }, short(contributor, 21)),
          bar(ppm),
          h("span", { class: "amount" }, `${percent(ppm)} %`)))),
    rest > 0 && h("p", { class: "hint" }, `and ${plural(rest, "more", "more")}`),
  ];
}
