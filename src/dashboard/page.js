"use strict";
// Draws pictures, and sends what buttons ask for. What is shown is decided by the program that sends the
// pictures. All text is set as text: names and events may be anybody's.

const SVG = "http://www.w3.org/2000/svg";
const WORDS = { ok: "well", warning: "warning", critical: "critical", unknown: "unknown" };
const key = document.body.dataset.key;
const by = (id) => document.getElementById(id);

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function draw(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// What does not change is left alone: for those who read aloud, and for the focus.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function dress(node, name) {
  if (node.className !== name) node.className = name;
}

// As many children as there are items, each brought up to date.
function fill(parent, items, create, update) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, at) => {
    let node = parent.children[at];
    if (!node) {
      node = create(item);
      parent.append(node);
    }
    update(node, item, at);
  });
}

function part(node, name) {
  return node.querySelector("." + name);
}

// One side.

function createSide() {
  const side = make("article", "side");
  const top = make("div", "side-top");
  top.append(make("h2"), make("span", "mark"));
  const slot = make("div", "slot");
  slot.append(make("b"), make("span", "guest"));
  side.append(top, make("p", "head"), slot, make("dl", "facts"), make("div", "plots"), make("div", "buttons"));
  return side;
}

const SLOTS = { here: "Guest", kept: "Guest, kept", elsewhere: "No guest", gone: "No guest" };

function updateSide(node, side, at) {
  dress(node, "side " + side.place);
  node.setAttribute("aria-label", "side " + side.name);
  say(node.querySelector("h2"), side.name);
  const mark = part(node, "mark");
  dress(mark, "mark " + side.level);
  say(mark, WORDS[side.level]);
  say(part(node, "head"), side.head);
  say(node.querySelector(".slot b"), SLOTS[side.place]);
  say(part(node, "guest"), side.guest);
  updateFacts(part(node, "facts"), side.facts);
  fill(part(node, "plots"), side.plots, createPlot, updatePlot);
  updateButtons(part(node, "buttons"), side, at);
}

function updateFacts(list, facts) {
  const rows = facts.flatMap((fact) => [
    ["DT", "", fact.label],
    ["DD", fact.level === "ok" ? "" : fact.level, fact.text],
  ]);
  fill(list, rows, ([tag]) => make(tag), (node, [, name, text]) => {
    dress(node, name);
    say(node, text);
  });
}

function createPlot() {
  const plot = make("div", "plot");
  const svg = draw("svg", { viewBox: "0 0 60 20", preserveAspectRatio: "none", role: "img" });
  svg.append(
    draw("path", { class: "area" }),
    draw("path", { class: "edge" }),
    draw("line", { class: "floor", x1: 0, x2: 60, y1: 20, y2: 20 }),
  );
  const most = make("p", "most");
  most.append(make("span"), make("span"));
  plot.append(make("h3"), make("p", "value"), svg, most);
  return plot;
}

const NAMES = {
  lag: "Lag of the backup",
  log: "Log",
  acknowledgement: "Acknowledgement",
  outputs: "Outputs",
};

function updatePlot(node, plot) {
  const name = NAMES[plot.label] || plot.label;
  say(node.querySelector("h3"), name);
  say(part(node, "value"), plot.value);
  const svg = node.querySelector("svg");
  svg.setAttribute("aria-label", `${name} in the last minutes, at most ${plot.most}`);
  svg.setAttribute("viewBox", `0 0 ${plot.columns.length} 20`);
  let area = "";
  let edge = "";
  let open = false;
  plot.columns.forEach((thousandths, x) => {
    if (thousandths === null) {
      if (open) area += `V20Z`;
      open = false;
      return;
    }
    const y = (20 - thousandths * 0.019).toFixed(2);
    area += open ? `V${y}H${x + 1}` : `M${x} 20V${y}H${x + 1}`;
    edge += open ? `V${y}H${x + 1}` : `M${x} ${y}H${x + 1}`;
    open = true;
  });
  if (open) area += "V20Z";
  part(svg, "area").setAttribute("d", area);
  part(svg, "edge").setAttribute("d", edge);
  const [most, span] = part(node, "most").children;
  say(most, `most ${plot.most}`);
  say(span, "now");
}

// Buttons.

const busy = new Set();

function updateButtons(box, side, at) {
  const wanted = side.buttons.map((button) => button.act);
  for (const node of [...box.children]) {
    if (!wanted.includes(node.dataset.act)) {
      const had = node === document.activeElement;
      node.remove();
      // The focus stays near: with the next button, or else with the side.
      if (had) refocus(box);
    }
  }
  side.buttons.forEach((button, place) => {
    let node = [...box.children].find((child) => child.dataset.act === button.act);
    if (!node) {
      node = make("button", button.act === "stop" ? "grave" : "", button.label);
      node.type = "button";
      node.dataset.act = button.act;
      node.title = button.hint;
      node.addEventListener("click", () => press(node, at, button.act, side.name));
      box.insertBefore(node, box.children[place] || null);
    }
    node.setAttribute("aria-label", `${button.label}: ${side.name}`);
    node.setAttribute("aria-disabled", String(busy.has(at + button.act)));
  });
}

function refocus(box) {
  const side = box.closest(".side");
  const next = box.querySelector("button");
  if (next) {
    next.focus();
  } else {
    side.tabIndex = -1;
    side.focus();
  }
}

async function press(node, side, act, name) {
  if (busy.has(side + act)) return;
  if (act === "stop" && !(await isSure(name))) return;
  busy.add(side + act);
  node.setAttribute("aria-disabled", "true");
  tell(`${node.textContent}: ${name} …`, false);
  try {
    const answer = await fetch("act", {
      method: "POST",
      headers: { "content-type": "application/json", "x-vmft-key": key },
      body: JSON.stringify({ side, act }),
    });
    const text = (await answer.text()).trim();
    tell(`${node.textContent}: ${name}: ${text}`, !answer.ok);
  } catch {
    tell(`${node.textContent}: ${name}: the dashboard does not answer`, true);
  }
  busy.delete(side + act);
  node.setAttribute("aria-disabled", "false");
}

function tell(text, isWrong) {
  dress(by("done"), isWrong ? "done wrong" : "done");
  say(by("done"), text);
}

function isSure(name) {
  const dialog = by("sure");
  say(by("sure-what"), `Stop the guest on ${name}? It ends, and both sides of the pair with it.`);
  return new Promise((resolve) => {
    const end = (is) => () => {
      dialog.close();
      resolve(is);
    };
    by("sure-no").onclick = end(false);
    by("sure-yes").onclick = end(true);
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
    by("sure-no").focus();
  });
}

// The log between the sides, drawn behind their boxes: from guest to guest.

let links = [];

function drawLinks() {
  const [wires, labels, sides] = [by("wires"), by("labels"), by("sides").children];
  const origin = by("stage").getBoundingClientRect();
  const shapes = [];
  const texts = [];
  links.forEach((link, number) => {
    if (!sides[link.from] || !sides[link.to]) return;
    const ends = [link.from, link.to].map((at) => ({
      box: sides[at].getBoundingClientRect(),
      slot: part(sides[at], "slot").getBoundingClientRect(),
    }));
    const [a, b] = ends;
    const isBeside = Math.abs(a.box.top - b.box.top) < 8;
    const middle = (rect) => (rect.top + rect.bottom) / 2 - origin.top;
    const shift = number * 16;
    if (isBeside) {
      const right = b.box.left > a.box.left;
      const y = middle(a.slot) + shift;
      const from = (right ? a.box.right : a.box.left) - origin.left;
      const to = (right ? b.box.left : b.box.right) - origin.left;
      const sign = right ? 1 : -1;
      arrows(shapes, link, [from, y], [to, y], [sign, 0], [0, 7]);
      // In the gap before its end, whatever it passes behind.
      const gap = Math.min(Math.abs(to - from), 136);
      texts.push({ link, x: to - (sign * gap) / 2, y: y - 22 - shift, beside: false });
    } else {
      const down = b.box.top > a.box.top;
      // Straight down where the boxes overlap; they do, but for rows of many.
      const left = Math.max(a.box.left, b.box.left) - origin.left + 40 + shift;
      const right = Math.min(a.box.right, b.box.right) - origin.left - 20;
      const x = Math.min(left, Math.max(right, b.box.left - origin.left + 20));
      const fromX = Math.min(Math.max(x, a.box.left - origin.left + 20), a.box.right - origin.left - 20);
      const from = (down ? a.box.bottom : a.box.top) - origin.top;
      const to = (down ? b.box.top : b.box.bottom) - origin.top;
      const sign = down ? 1 : -1;
      arrows(shapes, link, [fromX, from], [x, to], [0, sign], [9, 0]);
      const gap = Math.min(Math.abs(to - from), 58);
      texts.push({ link, x: x + 26, y: to - (sign * gap) / 2, beside: true });
    }
  });
  wires.replaceChildren(...shapes);
  fill(labels, texts, () => {
    const label = make("div", "label");
    label.append(make("span"), make("small"));
    return label;
  }, (node, { link, x, y, beside }) => {
    dress(node, beside ? "label beside" : "label");
    node.style.left = `${x}px`;
    node.style.top = `${y}px`;
    say(node.firstChild, `log ${link.log}`);
    say(node.lastChild, link.acknowledged ? `acks in ${link.acknowledged}` : "");
  });
}

// There the log, and beside it the acknowledgements back. `along` and `across` are directions.
function arrows(shapes, link, from, to, along, across) {
  const at = (point, length, aside) =>
    [0, 1].map((axis) => point[axis] + along[axis] * length + across[axis] * aside);
  const line = (name, one, other) => draw("path", { class: name, d: `M${one}L${other}` });
  const tip = (name, end, sign, size) => draw("path", {
    class: name,
    d: `M${end}L${[0, 1].map((axis) =>
      end[axis] - along[axis] * sign * size * 1.6 + Math.sign(across[axis]) * size)}L${[0, 1].map((axis) =>
      end[axis] - along[axis] * sign * size * 1.6 - Math.sign(across[axis]) * size)}Z`,
  });
  shapes.push(
    line(link.flows ? "wire flows" : "wire", at(from, 2, 0), at(to, -10, 0)),
    tip("tip", at(to, -3, 0), 1, 5),
    line("acks", at(to, -2, 1), at(from, 9, 1)),
    tip("acks-tip", at(from, 3, 1), -1, 3.5),
  );
}

// The rest.

function ms(value) {
  return `${value.toFixed(1)} ms`;
}

function updateFailover(failover) {
  by("failover").hidden = !failover;
  if (!failover) return;
  say(by("failover-what"), failover.title + (failover.is_open ? " (no output yet)" : ""));
  fill(by("failover-bar"), failover.parts, () => make("span"), (node, item, at) => {
    dress(node, `part-${(at % 5) + 1}`);
    node.style.flexGrow = String(Math.max(item.ms, 0.001));
  });
  const rows = failover.parts.map((item) => ({ ...item, isTotal: false }));
  rows.push({ name: "total", ms: failover.total_ms, isTotal: true });
  fill(by("failover-parts"), rows, () => {
    const row = make("li");
    row.append(make("span"), make("span", "name"), make("span", "ms"));
    return row;
  }, (node, item, at) => {
    dress(node, item.isTotal ? "total" : "");
    dress(node.firstChild, item.isTotal ? "" : `swatch part-${(at % 5) + 1}`);
    say(node.firstChild, item.isTotal ? "" : String(at + 1));
    say(part(node, "name"), item.name);
    say(part(node, "ms"), ms(item.ms));
  });
  by("failover-steps").hidden = failover.steps.length === 0;
  fill(by("failover-steps"), failover.steps, () => {
    const row = make("li");
    row.append(make("time"), make("span", "text"));
    return row;
  }, (node, step) => {
    say(node.firstChild, ms(step.at_ms));
    say(part(node, "text"), step.text);
  });
  say(by("failover-source"), `From the last sign of the side that was lost; told by ${failover.source}.`);
}

function updateEvents(events) {
  by("no-events").hidden = events.length > 0;
  fill(by("events"), events, () => {
    const row = make("li");
    row.append(make("time"), make("span", "mark"), make("span", "side-name"), make("span", "text"));
    return row;
  }, (node, event) => {
    say(node.firstChild, event.time);
    const mark = part(node, "mark");
    dress(mark, `mark ${event.level}`);
    mark.setAttribute("aria-label", WORDS[event.level]);
    say(part(node, "side-name"), event.side);
    say(part(node, "text"), event.text);
  });
}

function updateGenerations(generations) {
  fill(by("generations"), generations, () => {
    const row = make("li");
    row.append(make("span", "number"), make("span", "who"), make("time"), make("span", "how"));
    return row;
  }, (node, reign) => {
    say(part(node, "number"), String(reign.generation));
    say(part(node, "who"), reign.side);
    say(node.querySelector("time"), reign.since);
    say(part(node, "how"), reign.how);
  });
}

function show(picture) {
  dress(by("headline"), picture.headline.level === "ok" ? "" : picture.headline.level);
  say(by("headline"), picture.headline.text);
  document.title = `${picture.headline.level === "ok" ? "✓" : "▲"} ${picture.headline.text}`;
  say(by("time"), picture.time);
  fill(by("sides"), picture.sides, createSide, updateSide);
  updateFailover(picture.failover);
  updateEvents(picture.events);
  updateGenerations(picture.generations);
  by("console").hidden = picture.console.length === 0;
  say(by("console-lines"), picture.console.join("\n"));
  links = picture.links;
  drawLinks();
}

// The stream of pictures. Nobody is asked for a page that nobody sees.

let stream = null;

function open() {
  if (stream || document.hidden) return;
  stream = new EventSource(key ? `pictures?key=${key}` : "pictures");
  stream.onmessage = (message) => {
    document.body.classList.remove("is-away");
    by("away").hidden = true;
    show(JSON.parse(message.data));
  };
  stream.onerror = () => {
    document.body.classList.add("is-away");
    by("away").hidden = false;
    say(by("away"), "The dashboard does not answer. What you see is what it said last.");
    if (stream.readyState === EventSource.CLOSED) {
      // It was refused, say: too many look. Tried again, but not at once.
      stream = null;
      setTimeout(open, 3000);
    }
  };
}

function close() {
  if (stream) stream.close();
  stream = null;
}

document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
if (by("first").textContent) show(JSON.parse(by("first").textContent));
new ResizeObserver(drawLinks).observe(by("stage"));
open();
