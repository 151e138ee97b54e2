// The lineage drawn: columns of nodes, streams between them, in SVG. Each node is a button: Tab and the
// arrow keys reach it, Enter opens it.

import { svg } from "./dom.js";
import { KINDS, graphOf } from "./graph_model.js";

const [HEIGHT, GAP_X, GAP_Y, MARGIN] = [76, 34, 18, 14];
const [NARROWEST, WIDEST, PAGE] = [150, 184, 1_140]; // of a node, and what the page has for all
const SMALLEST_SCALE = 0.8; // then it scrolls
const PADDING = 31;
const FONTS = { title: "600 14.5px", sub: "400 12.5px", label: "400 12.5px" }; // as in style.css
const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

/** Draws into `host` and returns the nodes; `onSelect(node)` is called when one is opened. */
export function drawGraph(host, found, onSelect) {
  const { nodes, edges } = graphOf(found);
  const { width, height, nodeWidth } = place(nodes, edges);
  const drawn = new Map();
  const select = (node) => {
    for (const [other, element] of drawn) {
      element.setAttribute("aria-pressed", String(other === node));
    }
    for (const { path, edge } of paths) {
      path.classList.toggle("lit", edge.from === node || edge.to === node);
    }
    onSelect(node);
  };
  const paths = edges.map((edge) => ({ edge, path: drawEdge(edge) }));
  for (const node of nodes) drawn.set(node, drawNode(node, select, (key) => step(key, node)));
  function step([dx, dy], from) {
    const next = nearest(nodes, from, dx, dy);
    if (next) drawn.get(next).focus();
  }
  const picture = svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      role: "group",
      "aria-label": `Lineage: ${nodes.length} nodes, from left to right`,
    },
    paths.map(({ path }) => path),
    [...drawn.values()],
  );
  picture.style.width = "100%";
  picture.style.maxWidth = `${width}px`;
  picture.style.minWidth = `${width * SMALLEST_SCALE}px`;
  host.replaceChildren(picture);
  /** Scrolls a node to the middle of a picture that is wider than the page. */
  const center = (node) => {
    const scale = picture.getBoundingClientRect().width / width;
    host.scrollLeft = (node.x + nodeWidth / 2) * scale - host.clientWidth / 2;
  };
  return { nodes, select, center };
}

/** Columns that hold nothing are left out; each is centred, in the order that crosses least. */
function place(nodes, edges) {
  const columns = [];
  for (const node of nodes) (columns[KINDS[node.kind].column] ??= []).push(node);
  const used = columns.filter(Boolean);
  const room = (PAGE - 2 * MARGIN + GAP_X) / used.length - GAP_X;
  const nodeWidth = Math.round(Math.min(WIDEST, Math.max(NARROWEST, room)));
  const tallest = Math.max(...used.map((column) => column.length));
  const height = 2 * MARGIN + tallest * HEIGHT + (tallest - 1) * GAP_Y;
  used.forEach((column, n) => {
    sortColumn(column, edges);
    const own = column.length * HEIGHT + (column.length - 1) * GAP_Y;
    column.forEach((node, row) => {
      node.width = nodeWidth;
      node.x = MARGIN + n * (nodeWidth + GAP_X);
      node.y = (height - own) / 2 + row * (HEIGHT + GAP_Y);
    });
  });
  return { width: 2 * MARGIN + used.length * (nodeWidth + GAP_X) - GAP_X, height, nodeWidth };
}

/** By the mean height of what a node rests on; what rests on nothing keeps its place below. */
function sortColumn(column, edges) {
  const rank = new Map(
    column.map((node, n) => {
      const from = edges.filter((edge) => edge.to === node && edge.from.y !== undefined);
      const mean = from.reduce((sum, edge) => sum + edge.from.y, 0) / from.length;
      return [node, from.length ? mean : node.kind === "other" ? Infinity : n];
    }),
  );
  column.sort((a, b) => (rank.get(a) === rank.get(b) ? 0 : rank.get(a) - rank.get(b)));
}

function drawEdge({ from, to, count }) {
  const [x1, y1] = [from.x + from.width, from.y + HEIGHT / 2];
  const [x2, y2] = [to.x, to.y + HEIGHT / 2];
  const bend = Math.max(24, (x2 - x1) / 2);
  const element = svg("path", {
    class: "edge",
    d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`,
  });
  element.style.strokeWidth = String(1.6 + Math.min(3.4, Math.log2(count) * 0.8));
  return element;
}

function drawNode(node, select, move) {
  const { label, title, sub, x, y, width, isSubject, isBroken } = node;
  const status = [isSubject && "subject of the bundle", isBroken && "failed here"].filter(Boolean);
  const name = [label, title, sub, ...status].filter(Boolean).join(", ");
  return svg(
    "g",
    {
      class: `node kind-${node.kind}${isSubject ? " subject" : ""}${isBroken ? " broken" : ""}`,
      transform: `translate(${x} ${y})`,
      role: "button",
      tabindex: "0",
      "aria-pressed": "false",
      "aria-label": name,
      click: () => select(node),
      keydown: (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          select(node);
        } else if (KEYS[event.key]) {
          event.preventDefault();
          move(KEYS[event.key]);
        }
      },
    },
    node.members && svg("rect", { class: "behind", x: 5, y: 5, width, height: HEIGHT, rx: 10 }),
    svg("rect", { class: "box", width, height: HEIGHT, rx: 10 }),
    svg("rect", { class: "stripe", x: 8, y: 13, width: 4, height: HEIGHT - 26, rx: 2 }),
    svg("text", { class: "label", x: 20, y: 23 }, fit(label, "label", width - PADDING)),
    svg("text", { class: "title", x: 20, y: 43 }, fit(title, "title", width - PADDING)),
    svg("text", { class: "sub", x: 20, y: 61 }, fit(sub, "sub", width - PADDING)),
    status.length ? drawFlag(isBroken ? "✕ failed here" : "● subject", isBroken ? 92 : 72, width) : null,
  );
}

/** A tag on the upper edge of the box. */
function drawFlag(words, width, boxWidth) {
  return svg(
    "g",
    { class: "flag", transform: `translate(${boxWidth - width - 10} -10)` },
    svg("rect", { width, height: 20, rx: 10 }),
    svg("text", { x: width / 2, y: 14, "text-anchor": "middle" }, words),
  );
}

const ruler = document.createElement("canvas").getContext("2d");

/** The text, or as much of it as a box has room for. */
function fit(text, style, room) {
  ruler.font = `${FONTS[style]} ${getComputedStyle(document.body).fontFamily}`;
  let characters = [...text];
  const isTooWide = (t) => ruler.measureText(t).width > room;
  if (!isTooWide(text)) return text;
  while (characters.length && isTooWide(`${characters.join("")}…`)) characters = characters.slice(0, -1);
  return `${characters.join("")}…`;
}

function nearest(nodes, from, dx, dy) {
  const ahead = nodes.filter((node) => (dx ? (node.x - from.x) * dx > 0 : node.x === from.x && (node.y - from.y) * dy > 0));
  const distance = (node) => Math.abs(node.x - from.x) * 4 + Math.abs(node.y - from.y);
  return ahead.sort((a, b) => distance(a) - distance(b))[0];
}
