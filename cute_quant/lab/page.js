"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const LANES = 32, ROW = 24, STRIP = 22, NOTE = 150, MAX_LINES = 64, MAX_STRIPS = 16;
const chosen = {...data.start};
const field = {thread: byId("thread"), row: byId("row"), column: byId("column")};
let model = null, parts = null, kept = null, shown = null;

// CuTe layouts: "shape:stride" as CuTe prints it, where "16@1" is a stride of coordinate 1.

function parse(text) {
  let at = 0;
  const mode = () => {
    if (text[at] !== "(") {
      const [word, step, axis] = /^(\d+)(?:@(\d+))?/.exec(text.slice(at));
      at += word.length;
      return {step: +step, axis: +(axis || 0)};
    }
    const modes = [];
    do { at++; modes.push(mode()); } while (text[at] === ",");
    at++;
    return modes;
  };
  const shape = mode();
  at++;
  return {shape, stride: mode()};
}
const size = shape => Array.isArray(shape) ? shape.reduce((n, s) => n * size(s), 1) : shape.step;
function evaluate({shape, stride}, coordinate) {
  const result = [0, 0];
  const add = (c, s, d) => {
    if (!Array.isArray(s)) { result[d.axis] += c * d.step; return; }
    s.forEach((inner, i) => {
      // An index of nested modes runs over the first one fastest.
      add(Array.isArray(c) ? c[i] : c % size(inner), inner, d[i]);
      if (!Array.isArray(c)) c = Math.floor(c / size(inner));
    });
  };
  add(coordinate, shape, stride);
  return result;
}

// The model of a choice: threads, accesses and scales.

const tileKey = c => [c.format, ...Object.keys(data.start).slice(1).map(n => c[n])].join(",");
const key = (row, group) => `${row},${group}`;

function makeModel(choice) {
  const entry = data.tiles[tileKey(choice)], format = data.formats[choice.format];
  const [summary, ...texts] = entry.slice(0, 6).map(i => data.strings[i]);
  const [loadBytes, storeBytes, mn, k] = entry.slice(6);
  const [threadValue, copy, warps, lanes, sf] = texts.map(parse);
  const values = choice.values_per_thread, rows = choice.rows_per_thread;
  const lanesPerGroup = size(lanes.shape[0]), warpGroups = size(lanes.shape[1]);
  const columns = LANES * values, threads = [];
  for (let warp = 0; warp < size(warps.shape); warp++) {
    const [firstRow, columnTile] = evaluate(warps, warp);
    for (let lane = 0; lane < LANES; lane++) {
      const [writer, laneGroup] = evaluate(lanes, lane), group = laneGroup + columnTile * warpGroups;
      const segments = [], partners = [];
      for (let r = 0; r < rows; r++) {
        const [row, column] = evaluate(threadValue, [lane, [0, r]]);
        segments.push([firstRow + row, columnTile * columns + column, values]);
      }
      for (let offset = 1; offset < lanesPerGroup; offset *= 2)
        partners.push(LANES * warp + (lane ^ offset));
      threads.push({
        number: LANES * warp + lane, warp, lane, segments, partners,
        groups: segments.map(s => [s[0], group]),
        writes: segments.filter((_, r) => r % lanesPerGroup === writer).map(s => [s[0], group]),
      });
    }
  }
  const column = (lane, value) => evaluate(copy, [lane, value])[0];
  const requests = (bits, nbytes) => {
    const count = 8 * nbytes / bits, found = [];
    for (let v = 0; v < values; v += count)
      found.push(Array.from({length: LANES}, (_, lane) =>
        [column(lane, v) * bits / 8, (column(lane, v + count - 1) + 1) * bits / 8]));
    return found;
  };
  const accesses = [];
  for (const [kind, bits, most] of
    [["loads of x", 8 * data.itemsize, loadBytes], ["stores of q", format.valueBits, storeBytes]])
    for (const [arch, widest] of Object.entries(data.loads)) {
      const found = requests(bits, Math.min(most, widest));
      const same = accesses.find(a => a.kind === kind && a.requests.length === found.length);
      if (same) same.architectures.push(arch);
      else accesses.push({kind, architectures: [arch], requests: found});
    }
  const scaleRows = size(sf.shape[0]), scaleGroups = size(sf.shape[1]), scales = new Map();
  for (let row = 0; row < scaleRows; row++)
    for (let group = 0; group < scaleGroups; group++) {
      const [byte, element] = evaluate(sf, [row, group]);
      scales.set(key(row, group), {
        row, group, unit: Math.floor(group / format.perUnit),
        offset: element * format.scaleBytes + byte,
        padding: row >= mn || group >= Math.ceil(k / format.group),
      });
    }
  const holders = new Map(), writers = new Map();
  for (const t of threads) {
    for (const place of t.groups) {
      const name = key(...place);
      if (!holders.has(name)) holders.set(name, []);
      holders.get(name).push(t);
    }
    for (const place of t.writes) writers.set(key(...place), t);
  }
  return {
    choice: {...choice}, format, summary, texts, mn, k, threads, accesses, scales, scaleRows,
    scaleGroups, holders, writers, lanesPerGroup, loadBytes, values,
    rows: choice.row_warps * rows, columns: choice.column_warps * columns,
  };
}

// Drawings, as wide as the page has room for.

const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const colour = (group, lane) => "ab"[lane % 2] + group % 4;
function box(x, y, width, height, fill, stroke, dataset = {}) {
  const names = Object.entries(dataset).map(([n, v]) => ` data-${n}="${escaped(v)}"`).join("");
  return `<rect x="${x}" y="${y}" width="${width}" height="${height}" `
    + `class="f-${fill}${stroke ? ` s-${stroke}` : ""}"${names}/>`;
}
function words(x, y, text, {size = 12, anchor = "start", colour = "ink", bold = false} = {}) {
  return `<text x="${x}" y="${y}" font-size="${size}" text-anchor="${anchor}" `
    + `class="f-${colour}${bold ? " bold" : ""}">${escaped(text)}</text>`;
}
function svg(title, width, height, shapes) {
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" `
    + `viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(title)}">`
    + shapes.join("") + "</svg>";
}
const muted = {size: 11, colour: "muted"};
const span = (first, count) => count > 1 ? `${first} … ${first + count - 1}` : `${first}`;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

function tileDrawing(m, width) {
  const wide = width > 700, label = wide ? 160 : 44, line = width - label - (wide ? 110 : 2);
  let columns = Math.max(128, m.values);
  while (columns > m.values && line * m.values / columns < 20) columns /= 2;
  const cell = line / columns, lines = new Map(), shapes = [];
  for (const t of m.threads)
    t.segments.forEach((s, i) => {
      const at = s[0] * m.columns + Math.floor(s[1] / columns) * columns;
      if (!lines.has(at)) lines.set(at, []);
      lines.get(at).push([t, s, t.groups[i][1]]);
    });
  const order = [...lines.keys()].sort((a, b) => a - b);
  let y = 0, last = -1;
  for (const at of order.slice(0, MAX_LINES)) {
    const row = Math.floor(at / m.columns), first = at % m.columns;
    if (row !== last) {
      if (last >= 0) y += 10;
      if (!wide) { shapes.push(words(0, y + 13, `row ${row}`, {bold: true})); y += 18; }
    }
    last = row;
    if (wide) {
      shapes.push(words(0, y + 16, `row ${row}`, {bold: true}));
      shapes.push(words(58, y + 16, span(first, columns), muted));
      const groups = [...new Set(lines.get(at).map(part => part[2]))];
      shapes.push(words(label + line + 10, y + 15,
        `group${groups.length > 1 ? "s" : ""} ${span(groups[0], groups.length)}`, muted));
    } else shapes.push(words(label - 6, y + 15, first, {...muted, anchor: "end"}));
    for (const [t, s, group] of lines.get(at)) {
      const x = label + s[1] % columns * cell, w = s[2] * cell;
      shapes.push(box(x, y, w, ROW - 2, colour(group, t.lane), "line",
        {t: t.number, row: s[0], col: s[1], n: s[2]}));
      for (let tick = m.loadBytes / data.itemsize; tick < s[2]; tick += m.loadBytes / data.itemsize)
        shapes.push(box(x + tick * cell - .5, y + ROW - 6, 1, 4, "ink"));
      shapes.push(words(x + w / 2, y + 15, w > 34 ? `${t.warp}:${t.lane}` : t.lane,
        {size: 11, anchor: "middle"}));
    }
    y += ROW;
  }
  if (order.length > MAX_LINES) {
    shapes.push(words(label, y + 16, `… and ${order.length - MAX_LINES} more lines, to row `
      + `${m.rows - 1}, column ${m.columns - 1}`, muted));
    y += ROW;
  }
  return svg("Elements of a CTA by thread", width, y + 2, shapes);
}

function sectorsOf(ranges) {
  const touched = new Set();
  for (const [first, end] of ranges)
    for (let s = Math.floor(first / data.sector); s * data.sector < end; s++) touched.add(s);
  const moved = ranges.reduce((n, [first, end]) => n + end - first, 0);
  return `${touched.size} sectors, ${Math.round(100 * moved / (data.sector * touched.size))}% used`;
}
// The bytes that lane 0 stores, each with its high four bits on the left.
function nibbleBoxes(m, shapes, left, width, y) {
  shapes.push(words(0, y + 14, "values of lane 0 in q: two a byte, the earlier one in its low four bits",
    {bold: true, size: left ? 12 : 10}));
  y += 22;
  const side = 26, bytes = Math.min(m.values / 2, Math.floor((width - left - 2) / (2 * side)));
  for (let byte = 0; byte < bytes; byte++) {
    const x = left + 2 * byte * side;
    for (const high of [1, 0]) {
      const column = 2 * byte + high, at = x + (1 - high) * side;
      shapes.push(box(at, y, side, STRIP - 4, colour(0, high), "line", {nibble: column}));
      shapes.push(words(at + side / 2, y + 13, column, {size: 9, anchor: "middle"}));
    }
    shapes.push(words(x + side, y + STRIP + 8, `byte ${byte}`,
      {size: 9, anchor: "middle", colour: "muted"}));
  }
  return y + STRIP + 14;
}
function walkDrawing(m, width) {
  const wide = width > 700, label = wide ? 160 : 44, line = width - label - (wide ? NOTE : 2);
  const shapes = [];
  let y = 0;
  for (const {kind, architectures, requests} of m.accesses) {
    const sectors = Math.ceil(Math.max(...requests.flat().map(r => r[1])) / data.sector);
    let count = sectors;
    while (count > 1 && line / count < 22) count = Math.ceil(count / 2);
    const scale = line / (count * data.sector);
    shapes.push(words(0, y + 14, `${kind}, ${architectures.join(" and ")}`, {bold: true}));
    y += 22;
    requests.slice(0, MAX_STRIPS).forEach((ranges, number) => {
      const note = sectorsOf(ranges);
      if (wide) {
        shapes.push(words(0, y + 15, `instruction ${number}`, muted));
        shapes.push(words(label + line + 10, y + 14, note, muted));
      } else {
        shapes.push(words(0, y + 13, `instruction ${number}: ${note}`, muted));
        y += 18;
      }
      for (let first = 0; first < sectors; first += count) {
        const strip = y + first / count * STRIP;
        if (sectors > count)
          shapes.push(words(label - 6, strip + 14, first * data.sector, {...muted, anchor: "end"}));
        for (let s = 0; s < Math.min(count, sectors - first); s++)
          shapes.push(box(label + s * data.sector * scale, strip, data.sector * scale, STRIP - 4,
            "faint", "line"));
      }
      ranges.forEach(([first, end], lane) => {
        const strip = Math.floor(first / (count * data.sector));
        const x = label + (first - strip * count * data.sector) * scale, w = (end - first) * scale;
        shapes.push(box(x, y + strip * STRIP, w, STRIP - 4,
          colour(Math.floor(lane / m.lanesPerGroup), lane), w > 6 ? "line" : "", {l: lane}));
        if (w > 10)
          shapes.push(words(x + w / 2, y + strip * STRIP + 13, lane, {size: 9, anchor: "middle"}));
      });
      y += Math.ceil(sectors / count) * STRIP;
    });
    if (requests.length > MAX_STRIPS) {
      shapes.push(words(label, y + 13, `… and ${requests.length - MAX_STRIPS} more like these`, muted));
      y += STRIP;
    }
    y += 10;
  }
  if (m.format.valueBits === 4) y = nibbleBoxes(m, shapes, wide ? label : 0, width, y);
  return svg("Bytes of a warp by instruction", width, y, shapes);
}

function shownScaleRows(m) { return Math.min(m.scaleRows, Math.max(m.rows, 8) + 4, MAX_LINES); }
function scaleDrawing(m, width) {
  const wide = width > 700, label = wide ? 84 : 62, gap = wide ? 74 : 50, f = m.format;
  const units = Math.ceil(m.scaleGroups / f.perUnit), rows = shownScaleRows(m), shapes = [];
  const cell = Math.max(26, Math.min(44, (width - label) / Math.max(units, 1) / f.perUnit - gap / f.perUnit));
  const step = f.perUnit * cell + gap;
  const perBand = Math.max(1, Math.floor((width - label) / step)), band = rows * ROW + 34;
  const ownGroups = m.columns / f.group;
  for (let first = 0; first < units; first += perBand) {
    const top = first / perBand * band;
    for (let row = 0; row < rows; row++)
      shapes.push(words(0, top + 24 + row * ROW + 15, row < m.mn ? `row ${row}` : `row ${row}, none`,
        {size: wide || row < m.mn ? 11 : 10, bold: row < m.mn}));
    for (let unit = first; unit < Math.min(first + perBand, units); unit++) {
      const left = label + (unit - first) * step + gap - 14;
      shapes.push(words(left, top + 16, `${f.unit} ${unit}`, {size: 11, bold: true}));
      for (let row = 0; row < rows; row++)
        for (let i = 0; i < f.perUnit && unit * f.perUnit + i < m.scaleGroups; i++) {
          const s = m.scales.get(key(row, unit * f.perUnit + i)), y = top + 24 + row * ROW;
          const x = left + i * cell, own = row < m.rows && s.group < ownGroups;
          if (i === 0) shapes.push(words(left - 6, y + 15, s.offset, {size: 10, anchor: "end", colour: "muted"}));
          shapes.push(box(x, y, cell, ROW - 3, s.padding ? "faint" : `a${s.group % 4}`,
            own ? "ink" : "line", {scale: key(row, s.group)}));
          shapes.push(words(x + cell / 2, y + 15, s.padding ? "0" : `g${s.group}`,
            {size: 11, anchor: "middle", colour: s.padding ? "muted" : "ink"}));
        }
    }
  }
  let y = Math.ceil(units / perBand) * band;
  if (rows < m.scaleRows) {
    shapes.push(words(0, y - 2, `… and rows to ${m.scaleRows - 1}`, muted));
    y += 8;
  }
  return svg("Scales in memory", width, y, shapes);
}

function draw() {
  const m = model;
  for (const [id, drawing] of [["tile", tileDrawing], ["walk", walkDrawing], ["scales", scaleDrawing]]) {
    const place = byId(id).querySelector(".drawing");
    place.innerHTML = drawing(m, place.clientWidth);
  }
  parts = {t: new Map(), l: new Map(), scale: new Map()};
  for (const kind in parts)
    for (const node of document.querySelectorAll(`[data-${kind}]`)) {
      const name = node.dataset[kind];
      if (!parts[kind].has(name)) parts[kind].set(name, []);
      parts[kind].get(name).push(node);
    }
}
function describe() {
  const m = model, c = m.choice;
  const say = (id, text) => { byId(id).querySelector("p").textContent = text; };
  byId("summary").textContent = m.summary;
  list(byId("layouts"), [
    ["(lane, value) → (row, column)", m.texts[0]],
    ["warp → (row, tile of columns)", m.texts[2]],
    ["(row, group) → (byte, element of sf)", m.texts[4]],
    ["in Python", `make_layout(${m.format.python}`
      + Object.keys(data.start).slice(1).map(n => `, ${n}=${c[n]}`).join("") + `${data.fixed})`],
  ], "code");
  say("tile", `A CTA of ${plural(c.row_warps * c.column_warps, "warp")}: ${c.row_warps} along M, `
    + `${c.column_warps} along N. In a box: warp and lane, or lane. Ticks: ${m.loadBytes} bytes, `
    + "one load where the GPU has it.");
  say("walk", "A strip is an instruction of a warp, a frame a sector of 32 bytes, a box the bytes of "
    + "a lane. Bytes of a sector that an instruction leaves are requested by another one.");
  say("scales", `sf of an (${m.mn}, ${m.k}) input: ${plural(Math.ceil(m.k / m.format.group), "group")} `
    + `of ${m.format.group} a row, ${m.format.kind}. The first CTA stores the framed scales: rows `
    + `0 … ${m.rows - 1}, groups 0 … ${m.columns / m.format.group - 1}. Left of each unit: its byte `
    + "of sf. Grey: padding, stored as 0.");
  field.thread.max = m.threads.length - 1;
  field.row.max = m.rows - 1;
  field.column.max = m.columns - 1;
}

// Choices.

const select = Object.fromEntries(
  ["format", "lanes", ...Object.keys(data.start).slice(1)].map(name => [name, byId(name)]));
function fillChoices() {
  const group = data.formats[chosen.format].group;
  const refused = change => !Array.isArray(data.tiles[tileKey({...chosen, ...change})]);
  const fill = (name, options, current) => {
    select[name].replaceChildren(...options.map(([value, change]) => {
      const other = value !== current;
      const option = new Option(value + (other && refused(change) ? " (refused)" : ""), value);
      option.selected = !other;
      return option;
    }));
  };
  for (const name in data.choices)
    fill(name, data.choices[name].map(value => [value, {[name]: value}]), chosen[name]);
  const held = data.choices.values_per_thread.filter(n => group % n === 0).reverse();
  fill("lanes", held.map(n => [group / n, {values_per_thread: n}]), group / chosen.values_per_thread);
}
function choose() {
  const entry = data.tiles[tileKey(chosen)], valid = Array.isArray(entry);
  fillChoices();
  byId("refusal").textContent = valid ? "" : `Refused: ${data.strings[entry]}. `
    + "The pictures show the layout chosen before.";
  if (!valid) return;
  model = makeModel(chosen);
  describe();
  draw();
  kept && kept.thread < model.threads.length ? show({thread: kept.thread}) : clear();
}
for (const name in select)
  select[name].addEventListener("change", () => {
    const value = select[name].value;
    if (name === "format") chosen.format = value;
    else if (name === "lanes") chosen.values_per_thread = data.formats[chosen.format].group / value;
    else chosen[name] = +value;
    choose();
  });

// What is pointed at.

function mark(kind, value, name) {
  for (const node of parts[kind].get(String(value)) || []) node.classList.add(name);
}
function wipe() {
  for (const node of document.querySelectorAll(".lit, .mate")) node.classList.remove("lit", "mate");
  for (const node of document.querySelectorAll(".element")) node.remove();
}
function dim(others) { document.querySelector("main").classList.toggle("chosen", others); }
function list(node, lines, tag) {
  node.replaceChildren(...lines.flatMap(([term, text]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term;
    (tag ? dd.appendChild(document.createElement(tag)) : dd).textContent = text;
    return [dt, dd];
  }));
}
function scaleText(place) {
  const s = model.scales.get(place);
  if (!s) return "not in this example";
  const where = model.format.packed ? `byte ${s.offset % 4} of word ${s.unit}, ` : "";
  return `${where}byte ${s.offset} of sf${s.padding ? "; padding, 0" : ""}`;
}
function pointAt(number, row, column) {
  const node = (parts.t.get(String(number)) || []).find(n => +n.dataset.row === row
    && +n.dataset.col <= column && column < +n.dataset.col + +n.dataset.n);
  if (!node) return;
  const element = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const width = node.width.baseVal.value / +node.dataset.n, value = column - +node.dataset.col;
  const set = (name, v) => element.setAttribute(name, v);
  set("x", node.x.baseVal.value + value * width); set("width", width);
  set("y", node.y.baseVal.value + node.height.baseVal.value - 5); set("height", 5);
  set("class", "element");
  node.parentNode.append(element);
}
function showThread(number, row, column) {
  const t = model.threads[number];
  if (!t) return;
  wipe();
  dim(true);
  for (const mate of t.partners) mark("t", mate, "mate");
  mark("t", number, "lit");
  mark("l", t.lane, "lit");
  for (const [r, g] of t.groups) mark("scale", key(r, g), "lit");
  const [first] = t.segments, bytes = data.itemsize;
  if (row === undefined) [row, column] = first;
  const i = t.segments.findIndex(s => s[0] === row), place = key(...t.groups[Math.max(i, 0)]);
  pointAt(number, row, column);
  const writer = model.writers.get(place);
  const loads = model.accesses.filter(a => a.kind === "loads of x").flatMap(a =>
    a.architectures.map(arch => `${a.requests.length} × `
      + `${a.requests[0][0][1] - a.requests[0][0][0]} bytes on ${arch}`));
  list(byId("details"), [
    ["thread", `${number}: warp ${t.warp}, lane ${t.lane}`],
    ["element", `row ${row}, column ${column}: value ${column - first[1]} of ${first[2]}, `
      + `byte ${column * bytes} of the row`],
    ...(model.format.valueBits === 4 ? [["in q",
      `byte ${column >> 1} of the row, its ${column % 2 ? "high" : "low"} four bits`]] : []),
    ["holds", t.segments.map(s => `row ${s[0]}, columns ${span(s[1], s[2])}`).join("; ")],
    ["loads", `bytes ${span(first[1] * bytes, first[2] * bytes)} of each row: ${loads.join(", ")}`],
    ["shuffles", t.partners.length ? `with lanes ${t.partners.map(n => n % LANES).join(", ")}` : "with none"],
    ["scale", `group ${place.split(",")[1]}: ${scaleText(place)}`
      + (writer ? `; stored by thread ${writer.number}` : "")],
  ]);
  field.thread.value = number; field.row.value = row; field.column.value = column;
  shown = {thread: number, row, column};
}
function showScale(place) {
  wipe();
  dim(true);
  mark("scale", place, "lit");
  const [row, group] = place.split(","), threads = model.holders.get(place) || [];
  const writer = model.writers.get(place);
  for (const t of threads) { mark("t", t.number, t === writer ? "lit" : "mate"); mark("l", t.lane, "lit"); }
  list(byId("details"), [
    ["scale", `row ${row}, group ${group}: ${scaleText(place)}`],
    ["group", threads.length ? `threads ${span(threads[0].number, threads.length)}` : "of another CTA"],
    ["stored by", writer ? `thread ${writer.number}: warp ${writer.warp}, lane ${writer.lane}`
      : "another CTA"],
  ]);
  shown = {scale: place};
}
function clear() {
  kept = null;
  showThread(0);
  dim(false);
  shown = null;
}
function show(what) {
  if (what.scale) showScale(what.scale);
  else showThread(what.thread, what.row, what.column);
}
function found(event) {
  const node = event.target.closest("[data-t], [data-l], [data-scale]");
  if (!node) return null;
  const d = node.dataset;
  if (d.scale !== undefined) return {scale: d.scale};
  if (d.l !== undefined) return {thread: (shown && shown.thread >> 5 || 0) * LANES + +d.l};
  const area = node.getBoundingClientRect();
  const value = Math.min(d.n - 1, Math.max(0, Math.floor((event.clientX - area.left) / area.width * d.n)));
  return {thread: +d.t, row: +d.row, column: +d.col + value};
}
document.addEventListener("pointermove", event => {
  const what = found(event);
  if (!kept && what) show(what);
});
document.addEventListener("click", event => {
  const what = found(event);
  if (what) { kept = what; show(what); }
});
byId("clear").addEventListener("click", clear);
field.thread.addEventListener("input", () => {
  const number = field.thread.valueAsNumber;
  if (model.threads[number]) { kept = {thread: number}; show(kept); }
});
for (const name of ["row", "column"])
  field[name].addEventListener("input", () => {
    const row = field.row.valueAsNumber || 0, column = field.column.valueAsNumber || 0;
    const t = model.threads.find(t => t.segments.some(
      s => s[0] === row && s[1] <= column && column < s[1] + s[2]));
    if (t) { kept = {thread: t.number, row, column}; show(kept); }
  });
function keep(event, what) {
  event.preventDefault();
  if (what) { kept = what; show(what); }
}
const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
for (const id of ["tile", "walk"])
  byId(id).addEventListener("keydown", event => {
    if (!STEPS[event.key]) return;
    const [warps, lanes] = STEPS[event.key];
    const now = shown && shown.thread !== undefined ? shown : null;
    if (now && event.shiftKey && lanes) {
      const s = model.threads[now.thread].segments.find(s => s[0] === now.row);
      const column = Math.min(s[1] + s[2] - 1, Math.max(s[1], now.column + lanes));
      return keep(event, {thread: now.thread, row: now.row, column});
    }
    const thread = now ? now.thread + warps * LANES + lanes : 0;
    keep(event, model.threads[thread] && {thread});
  });
byId("scales").addEventListener("keydown", event => {
  if (!STEPS[event.key]) return;
  const [rows, groups] = STEPS[event.key];
  const [row, group] = shown && shown.scale ? shown.scale.split(",").map(Number) : [-rows, -groups];
  const scale = key(row + rows, group + groups);
  keep(event, row + rows < shownScaleRows(model) && model.scales.has(scale) && {scale});
});
document.addEventListener("keydown", event => { if (event.key === "Escape") clear(); });
for (const form of document.forms) form.addEventListener("submit", event => event.preventDefault());
let width = 0;
new ResizeObserver(() => {
  const room = byId("tile").clientWidth;
  if (room === width) return;
  width = room;
  const now = shown;
  draw();
  now ? show(now) : clear();
}).observe(byId("tile"));
choose();
