"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const STORE = "terraloom:" + data.sample;
const DIGITS = "1234567890";
const LETTERS = "abdegijknpqrvwy";
const KEYS = [...DIGITS, ...LETTERS];
const CONFIDENCE_KEYS = { l: "low", m: "medium", h: "high" };
const ZOOMS = [1, 2, 4];
const points = data.points;
const index = new Map(points.map((p, n) => [p.id, n]));
const classes = new Set([...data.classes.map((c) => c.name), data.cannotTell]);

// answers[name][id] = {class, confidence, comment, date, values: {column: text}}
let answers = {};
let who = "";
let at = 0;
let list = [];
let filter = "all";
let look = { zoom: 1, outline: true, smooth: false, bright: 1 };
let auto = false;
let unsaved = false;
let kept = true;
const images = new Map();

// --- what is stored ----------------------------------------------------------------------------

function restore() {
  try {
    const text = localStorage.getItem(STORE);
    const found = text ? JSON.parse(text) : {};
    answers = found.answers || {};
    who = found.who || "";
    look = { ...look, ...(found.look || {}) };
    auto = Boolean(found.auto);
    document.documentElement.dataset.theme = found.theme || preferred();
    at = index.get(found.at) ?? 0;
  } catch {
    kept = false;
    document.documentElement.dataset.theme = preferred();
  }
}

function preferred() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function keep() {
  const theme = document.documentElement.dataset.theme;
  const state = { answers, who, look, auto, theme, at: points[at] ? points[at].id : "" };
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
    kept = true;
  } catch {
    if (kept) say("This browser keeps nothing for this page: save your answers to a file often.");
    kept = false;
  }
}

const mine = () => (answers[who] = answers[who] || {});
const given = (id) => (answers[who] || {})[id];
const others = () => Object.keys(answers).filter((n) => n !== data.consensus && size(n));
const size = (name) => Object.keys(answers[name] || {}).length;

// --- which points ------------------------------------------------------------------------------

// A unit of the reserve is asked for only when one of its stratum cannot be told.
function asked() {
  const found = points.filter((p) => !p.reserve);
  const spare = new Map();
  for (const p of points) if (p.reserve) spare.set(p.group, [...(spare.get(p.group) || []), p]);
  for (const p of found) {
    const answer = given(p.id);
    const rest = spare.get(p.group);
    if (answer && answer.class === data.cannotTell && rest && rest.length) found.push(rest.shift());
  }
  return found;
}

function differing() {
  const names = others();
  return points.filter((p) => {
    const said = new Set(names.map((n) => (answers[n][p.id] || {}).class).filter(Boolean));
    return said.size > 1;
  });
}

const FILTERS = {
  all: ["all points", () => true],
  open: ["not answered", (p) => !given(p.id)],
  unsure: ["low confidence", (p) => (given(p.id) || {}).confidence === "low"],
  comment: ["with a comment", (p) => (given(p.id) || {}).comment],
  told: ["cannot tell", (p) => (given(p.id) || {}).class === data.cannotTell],
};

function refresh() {
  const pool = who === data.consensus ? differing() : asked();
  const test = FILTERS[filter][1];
  const here = points[at];
  list = pool.filter((p) => test(p) || p === here);
  if (!pool.includes(here)) at = index.get((list[0] || pool[0] || points[0]).id);
  const done = pool.filter((p) => given(p.id)).length;
  const place = list.indexOf(points[at]) + 1;
  byId("position").textContent =
    (list.length ? `${place} of ${list.length}` : "none") + ` · ${done} of ${pool.length} answered`;
  byId("done").style.width = `${pool.length ? (100 * done) / pool.length : 0}%`;
  const bar = document.querySelector(".bar");
  bar.setAttribute("aria-valuenow", done);
  bar.setAttribute("aria-valuemax", pool.length);
  const differ = differing().length;
  byId("resolve").hidden = others().length < 2;
  byId("resolve").textContent =
    who === data.consensus ? "End resolving" : `Resolve ${differ} disagreement${differ === 1 ? "" : "s"}`;
}

function step(by) {
  const here = list.indexOf(points[at]);
  const to = here < 0 ? 0 : here + by;
  if (to < 0 || to >= list.length) {
    const open = asked().find((p) => !given(p.id));
    if (by > 0 && filter !== "all") say("That was the last point of this list.");
    else if (by > 0) say(open ? "That was the last point; some are not answered." : "All points are answered: save them to a file.");
    return;
  }
  say("");
  at = index.get(list[to].id);
  show();
}

// --- images ------------------------------------------------------------------------------------

function picture(n) {
  if (!images.has(n)) {
    const image = new Image();
    image.src = points[n].image;
    images.set(n, image);
    if (images.size > 24) images.delete(images.keys().next().value);
  }
  return images.get(n);
}

function draw() {
  const point = points[at];
  const box = byId("views");
  box.replaceChildren();
  if (!point.views.length || !point.image) {
    const none = document.createElement("p");
    none.className = "empty";
    none.textContent = "No image shows this point.";
    box.append(none);
    return;
  }
  // Colours below each other, dates beside each other.
  const dates = new Set(point.views.map((v) => data.views[v].when).filter(Boolean)).size;
  box.style.setProperty("--columns", dates > 2 ? Math.min(dates, 4) : 3);
  const image = picture(at);
  const paint = () => {
    if (points[at] !== point) return;
    [...box.querySelectorAll("canvas")].forEach((canvas, k) => paintView(canvas, image, k, data.views[point.views[k]]));
  };
  for (const number of point.views) {
    const view = data.views[number];
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const wide = view.metres > data.side * data.pixel * 1.5;
    canvas.width = canvas.height = 512;
    canvas.addEventListener("click", zoom);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${view.when} ${view.colours}`);
    const caption = document.createElement("figcaption");
    const strong = document.createElement("b");
    strong.textContent = view.when || (wide ? "wider view" : "");
    const text = document.createElement("span");
    const metres = wide ? view.metres : view.metres / look.zoom;
    text.textContent = `${view.colours}, ${metres >= 1000 ? +(metres / 1000).toFixed(2) + " km" : Math.round(metres) + " m"}`;
    caption.append(strong, text);
    figure.append(canvas, caption);
    box.append(figure);
  }
  if (image.complete) paint();
  else image.addEventListener("load", paint, { once: true });
  if (at + 1 < points.length) picture(at + 1);
}

function paintView(canvas, image, k, view) {
  const side = data.side;
  const times = view.metres / (side * data.pixel);
  const wide = times > 1.5;
  const shown = wide ? side : side / look.zoom;
  const start = side / 2 - (shown / side) * (side / 2);
  const c = canvas.getContext("2d");
  c.imageSmoothingEnabled = look.smooth || wide;
  c.imageSmoothingQuality = "high";
  c.filter = look.bright === 1 ? "none" : `brightness(${look.bright})`;
  c.drawImage(image, k * side + start, start, shown, shown, 0, 0, canvas.width, canvas.height);
  c.filter = "none";
  if (!look.outline) return;
  const scale = canvas.width / shown;
  const size = wide ? scale / times : scale;
  const corner = (side / 2 - start) * scale;
  c.lineWidth = 5;
  c.strokeStyle = "rgba(0,0,0,.75)";
  mark(c, corner, size, wide);
  c.lineWidth = 2;
  c.strokeStyle = "#ffe14d";
  mark(c, corner, size, wide);
}

function mark(c, corner, size, wide) {
  if (wide) {
    const reach = (data.side / look.zoom / data.context) * (512 / data.side);
    c.strokeRect(256 - reach / 2, 256 - reach / 2, reach, reach);
    return;
  }
  const pad = 1.5;
  c.strokeRect(corner - pad, corner - pad, size + 2 * pad, size + 2 * pad);
  const middle = corner + size / 2;
  const gap = Math.max(size, 14);
  c.beginPath();
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
    c.moveTo(middle + dx * gap, middle + dy * gap);
    c.lineTo(middle + dx * (gap + 16), middle + dy * (gap + 16));
  }
  c.stroke();
}

function zoom() {
  look.zoom = ZOOMS[(ZOOMS.indexOf(look.zoom) + 1) % ZOOMS.length];
  controls();
  draw();
  keep();
}

function toggle(name) {
  look[name] = !look[name];
  controls();
  draw();
  keep();
}

function brightness(by) {
  look.bright = Math.min(3, Math.max(0.4, +(look.bright * by).toFixed(2)));
  if (Math.abs(look.bright - 1) < 0.06) look.bright = 1;
  draw();
  keep();
}

function controls() {
  byId("zoom-text").textContent = `${look.zoom}×`;
  byId("outline").setAttribute("aria-pressed", look.outline);
  byId("smooth").setAttribute("aria-pressed", look.smooth);
  byId("auto").checked = auto;
}

// --- the answer --------------------------------------------------------------------------------

function show() {
  refresh();
  const point = points[at];
  const answer = given(point.id) || {};
  byId("unit").textContent = point.id;
  const place = `${point.lat.toFixed(6)}, ${point.lon.toFixed(6)}`;
  byId("geo").textContent = place;
  byId("geo").href = `geo:${point.lat},${point.lon}`;
  for (const b of document.querySelectorAll("#classes button"))
    b.setAttribute("aria-checked", b.dataset.name === answer.class);
  for (const b of document.querySelectorAll("#confidence button"))
    b.setAttribute("aria-checked", b.dataset.name === answer.confidence);
  byId("comment").value = answer.comment || "";
  for (const field of document.querySelectorAll("#values input"))
    field.value = (answer.values || {})[field.name] || "";
  byId("mapped").hidden = true;
  showOthers(point);
  controls();
  draw();
  keep();
}

function showOthers(point) {
  const box = byId("others");
  box.hidden = who !== data.consensus;
  if (box.hidden) return;
  box.replaceChildren();
  for (const name of others()) {
    const a = answers[name][point.id];
    const line = document.createElement("p");
    const measured = a ? data.values.filter((v) => (a.values || {})[v.column]) : [];
    const extra = measured.map((v) => `, ${v.label} ${a.values[v.column]} ${v.unit}`.trimEnd()).join("");
    line.textContent = a ? `${name}: ${a.class}, ${a.confidence}${extra}${a.comment ? " (" + a.comment + ")" : ""}` : `${name}: no answer`;
    box.append(line);
  }
}

function today() {
  const d = new Date();
  const two = (n) => String(n).padStart(2, "0");
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
}

function named() {
  if (who) return true;
  document.querySelector(".name").classList.add("ask");
  byId("who").focus();
  say("First your name: answers of different people are kept apart by it.");
  return false;
}

function set(change) {
  if (!named()) return;
  const id = points[at].id;
  const old = given(id);
  if (!old && !change.class) {
    say("Choose a class first.");
    return;
  }
  mine()[id] = { confidence: "high", comment: "", ...old, ...change, date: today() };
  unsaved = true;
  say("");
  if (auto && change.class) {
    keep();
    step(1);
  } else show();
}

function clear() {
  delete mine()[points[at].id];
  unsaved = true;
  show();
}

// --- files -------------------------------------------------------------------------------------

function rows() {
  return points
    .filter((p) => given(p.id))
    .map((p) => ({ id: p.id, ...pick(given(p.id)), lon: p.lon, lat: p.lat, sample: data.sample }));
}

function pick(a) {
  const measured = Object.fromEntries(data.values.map((v) => [v.column, (a.values || {})[v.column] || ""]));
  return { class: a.class, ...measured, interpreter: who, confidence: a.confidence, date: a.date, comment: a.comment };
}

const COLUMNS = ["id", "class", ...data.values.map((v) => v.column), "interpreter", "confidence", "date", "comment", "lon", "lat", "sample"];

function csv() {
  const cell = (v) => (/[",\r\n]/.test(String(v)) ? `"${String(v).replaceAll('"', '""')}"` : String(v));
  return [COLUMNS.join(","), ...rows().map((r) => COLUMNS.map((c) => cell(r[c])).join(","))].join("\n") + "\n";
}

function geojson() {
  const features = rows().map(({ lon, lat, sample, ...properties }) => ({
    type: "Feature",
    geometry: { type: "Point", coordinates: [lon, lat] },
    properties,
  }));
  return JSON.stringify({ type: "FeatureCollection", sample: data.sample, features }, null, 1) + "\n";
}

function save(text, ending, type) {
  if (!named()) return;
  if (!size(who)) {
    say("There is no answer to save yet.");
    return;
  }
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([text], { type }));
  const name = who.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "answers";
  a.download = `${data.campaign}-${data.sample.slice(0, 8)}-${name}.${ending}`;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 60000);
  unsaved = false;
  say(`Saved ${rows().length} answers of ${who} as ${a.download}.`);
}

function parseCsv(text) {
  const table = [];
  let row = [];
  let cell = "";
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    const ch = text[i];
    if (quoted) {
      if (ch === '"' && text[i + 1] === '"') (cell += '"'), i++;
      else if (ch === '"') quoted = false;
      else cell += ch;
    } else if (ch === '"') quoted = true;
    else if (ch === ",") row.push(cell), (cell = "");
    else if (ch === "\n") row.push(cell), table.push(row), (row = []), (cell = "");
    else if (ch !== "\r") cell += ch;
  }
  if (cell || row.length) row.push(cell), table.push(row);
  const head = (table.shift() || []).map((h) => h.replace(/^\ufeff/, "").trim());
  return table.filter((r) => r.some(Boolean)).map((r) => Object.fromEntries(head.map((h, k) => [h, r[k] ?? ""])));
}

function parse(text) {
  if (!text.trimStart().startsWith("{")) return parseCsv(text);
  const found = JSON.parse(text);
  return found.features.map((f) => ({ sample: found.sample, ...f.properties }));
}

async function load(files) {
  const lines = [];
  for (const file of files) {
    try {
      lines.push(take(parse(await file.text()), file.name));
    } catch (error) {
      lines.push(`${file.name} was not read: ${error.message}`);
    }
  }
  if (!who) name(Object.keys(answers)[0] || "");
  show();
  say(lines.join("\n"));
}

function take(found, file) {
  if (!found.length || !("id" in found[0]) || !("class" in found[0]))
    throw new Error("it needs the columns id and class");
  const other = found.find((r) => r.sample && r.sample !== data.sample);
  if (other) throw new Error(`it answers another sample (${other.sample}); this page is of ${data.sample}`);
  const faults = [];
  const names = new Set();
  let n = 0;
  for (const r of found) {
    if (!r.class) continue;
    if (!index.has(r.id)) faults.push(`${r.id} is no point of this sample`);
    else if (!classes.has(r.class)) faults.push(`${r.id}: ${r.class} is not in the legend`);
    else {
      const person = r.interpreter || who || "interpreter";
      names.add(person);
      (answers[person] = answers[person] || {})[r.id] = {
        class: r.class,
        confidence: data.confidence.includes(r.confidence) ? r.confidence : "",
        comment: r.comment || "",
        date: r.date || "",
        values: Object.fromEntries(data.values.map((v) => [v.column, String(r[v.column] ?? "")])),
      };
      n++;
    }
  }
  const more = faults.length > 6 ? `; and ${faults.length - 6} more` : "";
  return `${file}: ${n} answers of ${[...names].join(", ") || "nobody"}` +
    (faults.length ? `; left out: ${faults.slice(0, 6).join("; ")}${more}` : "");
}

// --- the page ----------------------------------------------------------------------------------

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

function name(text) {
  who = text.trim();
  byId("who").value = who;
  if (who) document.querySelector(".name").classList.remove("ask");
}

function resolve() {
  if (who === data.consensus) name(others()[0] || "");
  else {
    name(data.consensus);
    filter = "all";
    byId("filter").value = filter;
    const first = differing().find((p) => !given(p.id)) || differing()[0];
    if (first) at = index.get(first.id);
    else say("All interpreters agree.");
  }
  show();
}

function revealMap() {
  const point = points[at];
  if (!("map" in point)) return;
  byId("mapped").textContent = `The map says: ${point.map}`;
  byId("mapped").hidden = !byId("mapped").hidden;
}

function theme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  keep();
}

function button(parent, className, key, label, dataName, act) {
  const b = document.createElement("button");
  b.type = "button";
  b.className = className;
  b.setAttribute("role", "radio");
  b.dataset.name = dataName;
  if (key) {
    const kbd = document.createElement("kbd");
    kbd.textContent = key;
    b.append(kbd, " ");
  }
  if (label instanceof Node) b.append(label);
  else b.append(label);
  b.addEventListener("click", act);
  parent.append(b);
  return b;
}

function choice(key, text, color) {
  const b = button(byId("classes"), "choice", key, "", text, () => set({ class: text }));
  const swatch = document.createElement("i");
  if (color) swatch.style.background = color;
  else swatch.className = "none";
  const label = document.createElement("span");
  label.textContent = text;
  if (!key) b.append(document.createElement("span"));
  b.append(swatch, label);
}

function measure(value) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "number";
  field.step = "any";
  field.name = value.column;
  if (value.range) [field.min, field.max] = value.range;
  field.addEventListener("change", () => {
    const text = field.value.trim();
    if (text && !field.checkValidity()) {
      say(`${value.label}: a number${value.range ? ` from ${value.range[0]} to ${value.range[1]}` : ""}.`);
      return;
    }
    set({ values: { ...(given(points[at].id) || {}).values, [value.column]: text } });
  });
  const unit = document.createElement("span");
  unit.textContent = value.unit;
  label.append(value.label, field, unit);
  byId("values").append(label);
}

const actions = new Map();

function build() {
  data.classes.forEach((c, k) => {
    const key = KEYS[k] || "";
    choice(key, c.name, c.color);
    if (key) actions.set(key, () => set({ class: c.name }));
  });
  choice("x", data.cannotTell, "");
  byId("classes").classList.toggle("many", data.classes.length > 11);
  for (const level of data.confidence)
    button(byId("confidence"), "", level[0], level, level, () => set({ confidence: level }));
  data.values.forEach(measure);
  for (const [value, [text]] of Object.entries(FILTERS)) byId("filter").add(new Option(text, value));

  const onlyOpen = () => pickFilter(filter === "open" ? "all" : "open");
  const plain = [
    ["x", data.cannotTell, () => set({ class: data.cannotTell })],
    ...Object.entries(CONFIDENCE_KEYS).map(([k, v]) => [k, `confidence ${v}`, () => set({ confidence: v })]),
    ["c", "write a comment; Esc ends it", () => byId("comment").focus()],
    ["u", "only points that are not answered, or all", onlyOpen],
    ["z", "zoom: 1, 2, 4 times", zoom],
    ["o", "outline of the pixel on or off", () => toggle("outline")],
    ["s", "smooth images or plain pixels", () => toggle("smooth")],
    ["[", "darker", () => brightness(1 / 1.15)],
    ["]", "brighter", () => brightness(1.15)],
    ["t", "light or dark page", theme],
    ["?", "these keys", () => byId("keys").showModal()],
  ];
  if (points.some((p) => "map" in p)) plain.push(["f", "class of the map, shown after you decided", revealMap]);
  if (data.values.length)
    plain.push(["=", "write what was measured; Esc ends it", () => document.querySelector("#values input").focus()]);
  for (const [key, , act] of plain) actions.set(key, act);
  const keysOf = data.classes.length > 1 ? `${KEYS[0]} – ${KEYS[Math.min(data.classes.length, KEYS.length) - 1]}` : KEYS[0];
  const lines = [[keysOf, "choose a class"], ["→ Enter", "next point"], ["←", "point before"], ["Del", "clear the answer"], ...plain];
  for (const [key, text] of lines) {
    const dt = document.createElement("dt");
    const kbd = document.createElement("kbd");
    kbd.textContent = key;
    dt.append(kbd);
    const dd = document.createElement("dd");
    dd.textContent = text;
    byId("key-list").append(dt, dd);
  }
}

function pickFilter(value) {
  filter = value;
  byId("filter").value = value;
  const pool = asked();
  const first = pool.find((p) => FILTERS[filter][1](p));
  if (first && !FILTERS[filter][1](points[at])) at = index.get(first.id);
  if (!first && filter !== "all") say("There is no such point.");
  show();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox";
  if (typing) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.tagName === "INPUT")) event.target.blur();
    return;
  }
  const enter = event.key === "Enter" && event.target.tagName !== "BUTTON";
  if (event.key === "ArrowRight" || enter) step(1);
  else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "Delete" || event.key === "Backspace") clear();
  else {
    const act = actions.get(event.key.length === 1 ? event.key.toLowerCase() : "");
    if (!act) return;
    act();
  }
  event.preventDefault();
}

restore();
build();
name(who);
byId("who").addEventListener("change", () => {
  name(byId("who").value);
  say("");
  show();
});
byId("comment").addEventListener("change", () => set({ comment: byId("comment").value.trim() }));
byId("filter").addEventListener("change", () => {
  pickFilter(byId("filter").value);
  byId("filter").blur();
});
byId("save-csv").addEventListener("click", () => save(csv(), "csv", "text/csv"));
byId("save-geojson").addEventListener("click", () => save(geojson(), "geojson", "application/geo+json"));
byId("load").addEventListener("change", () => {
  load([...byId("load").files]);
  byId("load").value = "";
});
byId("resolve").addEventListener("click", resolve);
byId("theme").addEventListener("click", theme);
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("zoom").addEventListener("click", zoom);
byId("outline").addEventListener("click", () => toggle("outline"));
byId("smooth").addEventListener("click", () => toggle("smooth"));
byId("darker").addEventListener("click", () => brightness(1 / 1.15));
byId("brighter").addEventListener("click", () => brightness(1.15));
byId("back").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("clear").addEventListener("click", clear);
byId("auto").addEventListener("change", () => {
  auto = byId("auto").checked;
  keep();
});
byId("copy").addEventListener("click", async () => {
  const text = byId("geo").textContent;
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied ${text}`);
  } catch {
    say(`Latitude, longitude: ${text}`);
  }
});
document.addEventListener("keydown", onKey);
addEventListener("beforeunload", (event) => {
  if (unsaved && !kept) event.preventDefault();
});
show();
if (!who) document.querySelector(".name").classList.add("ask");
