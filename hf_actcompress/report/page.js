"use strict";
// Tables: a click on a heading sorts by it, a second click turns the order round; rows without a value stay last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numbers = head.classList.contains("number"), column = head.cellIndex;
    const value = (row) => row.cells[column].dataset.v;
    const order = (a, b) => numbers ? a - b : a.localeCompare(b, "en", { numeric: true });
    const rows = [...body.rows].sort((p, q) => {
      const a = value(p), b = value(q);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return down ? order(b, a) : order(a, b);
    });
    body.append(...rows);
  });
}

// Plots: the nearest point, or all lines at the nearest step, under the pointer; arrow keys do the same.
const tip = document.getElementById("tip"), say = document.getElementById("say");
const SVG = "http://www.w3.org/2000/svg";

function element(name, text, kind) {
  const made = document.createElement(name);
  if (kind) { const dot = document.createElement("i"); dot.className = "s-" + kind; made.append(dot); }
  made.append(text);
  return made;
}

function mark(group, name, values) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  group.append(made);
}

for (const chart of document.querySelectorAll(".chart")) {
  const hits = JSON.parse(chart.dataset.hits), alongX = chart.dataset.mode === "x";
  const focus = chart.querySelector(".focus"), box = chart.viewBox.baseVal;
  const order = hits.map((_, i) => i).sort((a, b) => hits[a][0] - hits[b][0]);
  let at = -1;

  function show(i) {
    if (i === at && !tip.hidden) return;
    at = i;
    focus.replaceChildren();
    const list = document.createElement("dl"), hit = hits[i];
    if (alongX) {
      mark(focus, "path", { d: `M${hit[0]} 12V${box.height - 44}` });
      list.append(element("dt", hit[2]), element("dd", ""));
      for (const [name, value, kind, y] of hit[1]) {
        list.append(element("dt", name, kind), element("dd", value));
        mark(focus, "circle", { cx: hit[0], cy: y, r: 4 });
      }
    } else {
      mark(focus, "circle", { cx: hit[0], cy: hit[1], r: 8.5 });
      hit[3].forEach(([name, value], n) => list.append(element("dt", name, n ? "" : hit[2]), element("dd", value)));
    }
    tip.replaceChildren(list);
    tip.hidden = false;
    const frame = chart.getBoundingClientRect(), scale = frame.width / box.width;
    const x = frame.left + hit[0] * scale, y = frame.top + (alongX ? 30 : hit[1]) * scale;
    const width = tip.offsetWidth, height = tip.offsetHeight, room = document.documentElement.clientWidth;
    const right = x + 16 + width < room - 8;
    tip.style.left = Math.max(8, Math.min(right ? x + 16 : x - 16 - width, room - width - 8)) + "px";
    tip.style.top = Math.max(8, Math.min(y - height / 2, innerHeight - height - 8)) + "px";
  }

  function hide() {
    at = -1;
    focus.replaceChildren();
    tip.hidden = true;
  }

  chart.addEventListener("pointermove", (event) => {
    const frame = chart.getBoundingClientRect(), scale = box.width / frame.width;
    const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
    let best = -1, least = alongX ? Infinity : 45 ** 2;
    hits.forEach((hit, i) => {
      const away = (hit[0] - x) ** 2 + (alongX ? 0 : (hit[1] - y) ** 2);
      if (away < least) { least = away; best = i; }
    });
    if (best < 0) hide(); else show(best);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const now = order.indexOf(at);
    show(order[now < 0 ? (step > 0 ? 0 : order.length - 1) : Math.max(0, Math.min(order.length - 1, now + step))]);
    say.textContent = [...tip.querySelectorAll("dt, dd")].map((part) => part.textContent).join(" ");
  });
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// Runs: a search field shows those that hold the text.
for (const field of document.querySelectorAll("[data-find]")) {
  const runs = [...document.querySelectorAll(field.dataset.find)], count = document.querySelector(".count");
  const words = runs.map((run) => run.textContent.toLowerCase());
  const find = () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    runs.forEach((run, i) => { run.hidden = !words[i].includes(wanted); shown += !run.hidden; });
    count.textContent = `${shown} of ${runs.length} runs`;
  };
  field.addEventListener("input", find);
  find();
}
