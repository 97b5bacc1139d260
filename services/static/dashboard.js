"use strict";
// Every two seconds the parts of the page come anew; only those that differ are replaced, where the reader is stays.
const EVERY_MS = 2000;
const shown = new Map();
let silentSince = null;

function replace(part, html) {
  const open = [...part.querySelectorAll("details[open]")].map((d) => d.id);
  const scrolled = [...part.querySelectorAll(".scroll")];
  const left = scrolled.map((s) => s.scrollLeft);
  const focused = scrolled.indexOf(document.activeElement);
  part.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  part.querySelectorAll(".scroll").forEach((s, i) => {
    s.scrollLeft = left[i] ?? 0;
    if (i === focused) s.focus({ preventScroll: true });
  });
}

async function refresh() {
  const silent = document.getElementById("silent");
  try {
    const reply = await fetch("sections", { signal: AbortSignal.timeout(10000) });
    if (!reply.ok) throw new Error(String(reply.status));
    for (const [id, html] of Object.entries(await reply.json())) {
      if (shown.get(id) !== html) replace(document.getElementById(id), html);
      shown.set(id, html);
    }
    silentSince = null;
    silent.hidden = true;
  } catch {
    silentSince ??= new Date().toISOString().slice(11, 19);
    silent.textContent = `The control process does not answer since ${silentSince} UTC; what is below is older.`;
    silent.hidden = false;
  }
}

async function live() {
  if (!document.hidden) await refresh();
  setTimeout(live, EVERY_MS);
}

live();
