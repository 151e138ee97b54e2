"use strict";
// Puts what the server says into the places that name it. All texts and coordinates are made there.

const all = (selector, root = document) => root.querySelectorAll(selector);
const status = document.getElementById("status");

function show(figures) {
  for (const e of all("[data-text]")) {
    const text = figures.text[e.dataset.text] ?? "–";
    if (e.textContent !== text) e.textContent = text;
  }
  for (const e of all("[data-points]")) e.setAttribute("points", figures.points[e.dataset.points]);
  for (const e of all("[data-width]")) e.setAttribute("width", figures.width[e.dataset.width]);
  for (const e of all("tbody[data-rows]")) fill(e, figures.rows[e.dataset.rows]);
}

// Rows are kept and changed, so that a selection or a reader's place in the table survives.
function fill(body, rows) {
  const model = document.getElementById(`row-${body.dataset.rows}`).content.firstElementChild;
  const empty = body.querySelector(".empty");
  empty.hidden = rows.length > 0;
  const there = [...all("tr:not(.empty)", body)];
  rows.forEach((row, place) => {
    const line = there[place] ?? body.appendChild(model.cloneNode(true));
    if (row.state) line.dataset.state = row.state;
    all("[data-cell]", line).forEach((cell, n) => {
      if (cell.textContent !== row.cells[n]) cell.textContent = row.cells[n];
    });
    if (row.bar !== undefined) line.querySelector("rect").setAttribute("width", row.bar);
  });
  there.slice(rows.length).forEach((line) => line.remove());
}

function say(state, text) {
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

let source = null;

function listen() {
  source = new EventSource(document.body.dataset.events);
  source.onmessage = (event) => {
    show(JSON.parse(event.data));
    say("live", "Live");
  };
  source.onerror = () => {
    // A browser tries again by itself, except after an answer that was a refusal.
    if (source.readyState === EventSource.CLOSED) {
      say("stale", "Not live: too many watch");
      setTimeout(listen, 30_000);
    } else {
      say("stale", "Reconnecting");
    }
  };
}

// A page that nobody sees leaves its place to another.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) source?.close();
  else if (source?.readyState === EventSource.CLOSED) listen();
});

listen();
