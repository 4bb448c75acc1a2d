// All slots of a head: how much is exact and how much is blurred, counts, ages, and a table.

// By level, how many of the tokens read so far, and the mean share of their values that is kept.
function levelsOf(layer, kv, memory) {
  const number = DATA.levels.map(() => 0), kept = DATA.levels.map(() => 0);
  for (let token = 0; token < memory.numRead; token++) {
    const level = levelOf(memory.countOf(token));
    number[level] += 1;
    kept[level] += keptOf(layer, kv, token);
  }
  return { number, kept: kept.map((sum, i) => sum / number[i]), total: Math.max(1, memory.numRead) };
}

const CLASSES = ["l0", "l1", "l2", "l3", "l4", "l5", "l6"];

function drawGlance() {
  const { layer, kv, memory } = view(), { number, kept, total } = levelsOf(layer, kv, memory);
  const isEnd = memory.numRead === NUM_TOKENS;
  $("glance-head").textContent = `layer ${layer.layer}, head ${view().head}`;
  $("glance-bar").replaceChildren(...stackOf(number.map((n) => n / total), CLASSES));
  $("glance-bar").setAttribute("aria-label", DATA.levels.map((name, i) => `${name}: ${percent(number[i] / total)}`).join("; "));
  const cells = (...texts) => texts.map((text) => make("td", { className: "number" }, text));
  const rows = DATA.levels.map((name, i) => make("tr", {}, make("td", {}, make("i", { className: `swatch l${i}` }), name),
    ...cells(format(number[i]), percent(number[i] / total), isEnd && number[i] ? percent(kept[i]) : "-")));
  const all = kept.reduce((sum, each, i) => sum + (number[i] ? each * number[i] : 0), 0) / total;
  rows.push(make("tr", {}, make("td", {}, "all"), ...cells(format(memory.numRead), "", isEnd ? percent(all) : "-")));
  $("glance-table").tBodies[0].replaceChildren(...rows);
}

function drawHeads() {
  const chosen = view(), list = [];
  for (const layer of LAYERS) {
    const ends = memoryOfHeads(layer);
    for (let head = 0; head < layer.numHeads; head += layer.numHeads / layer.numKvHeads) {
      const kv = kvHead(layer, head), { number, kept, total } = ends[kv];
      const bar = make("span", { className: "stack", role: "img", "aria-label": DATA.levels.map((name, i) => `${name}: ${percent(number[i] / total)}`).join("; ") });
      bar.append(...stackOf(number.map((n) => n / total), CLASSES));
      const all = kept.reduce((sum, each, i) => sum + (number[i] ? each * number[i] : 0), 0) / total;
      const last = head + layer.numHeads / layer.numKvHeads - 1;
      const name = `layer ${layer.layer}, head ${head}${last > head ? `-${last}` : ""}`;
      const isChosen = layer === chosen.layer && kv === chosen.kv;
      list.push(make("button", { type: "button", className: "head", "aria-pressed": isChosen, onclick: () => setHead(layer, head) }, make("span", {}, name), bar, make("span", { className: "small" }, `${percent(all)} kept`)));
    }
  }
  redraw($("heads"), ...list);
}

// At the end of the text, by key/value head; counted once.
function memoryOfHeads(layer) {
  layer.ends ??= Array.from({ length: layer.numKvHeads }, (_, kv) => levelsOf(layer, kv, memoryAt(layer, kv, chunksOf(layer, kv))));
  return layer.ends;
}

function drawSlots() {
  const { memory } = view(), found = [...memory.members].map(([slot, tokens]) => slotRow(slot, tokens));
  const counts = ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128", "129+"].map((name) => [name, 0]);
  for (const each of found) counts[Math.min(8, Math.ceil(Math.log2(each.count)))][1] += 1;
  const parts = 12, merged = startOf(view().layer, memory.numChunks), byPart = (field) => {
    const bars = Array.from({ length: parts }, (_, i) => [i % 3 ? "" : format(Math.round((merged * i) / parts)), 0]);
    for (const each of found) bars[Math.min(parts - 1, Math.floor((each[field] / merged) * parts))][1] += 1;
    return bars;
  };
  $("charts").replaceChildren(
    barChart("Tokens per slot", counts, "slots, by how many tokens they hold"),
    barChart("Oldest token of a slot", byPart("oldest"), "slots, by the position of that token"),
    barChart("Mean position of a slot's tokens", byPart("mean"), "slots, by that position"),
  );
  drawTable(found);
}

function slotRow(slot, tokens) {
  const { layer, kv } = view(), mean = (value) => tokens.reduce((sum, token) => sum + value(token), 0) / tokens.length;
  return { slot, tokens, count: tokens.length, oldest: tokens[0], newest: tokens[tokens.length - 1], mean: mean((token) => token), kept: mean((token) => keptOf(layer, kv, token)) };
}

function barChart(title, bars, note) {
  const highest = Math.max(1, ...bars.map(([, n]) => n));
  const chart = make("div", { className: "bars", role: "img", "aria-label": `${title}. ${bars.map(([name, n], i) => `${name || `part ${i + 1}`}: ${n}`).join(", ")}` });
  for (const [, n] of bars) {
    const bar = make("i", {}, make("span", {}, n ? format(n) : ""));
    bar.style.height = `${(84 * n) / highest}%`;
    chart.append(bar);
  }
  return make("div", {}, make("h3", {}, title), chart, make("div", { className: "labels" }, ...bars.map(([name]) => make("span", {}, name))), make("p", { className: "small" }, note));
}

const COLUMNS = [["slot", "slot"], ["count", "tokens"], ["oldest", "oldest"], ["newest", "newest"], ["mean", "mean position"], ["kept", "value kept"]];
const order = { field: "count", down: true, all: false };

function drawTable(found) {
  const { memory } = view(), isEnd = memory.numRead === NUM_TOKENS, sign = order.down ? -1 : 1;
  found.sort((a, b) => sign * (a[order.field] - b[order.field]) || a.slot - b.slot);
  const header = COLUMNS.map(([field, name]) => {
    const sorted = field === order.field ? (order.down ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button", onclick: () => { Object.assign(order, { field, down: field === order.field ? !order.down : field !== "slot" }); drawTable(found); } }, name + (sorted === "none" ? "" : order.down ? " \u2193" : " \u2191"));
    return make("th", { className: "number", "aria-sort": sorted }, button);
  });
  const cell = (...content) => make("td", { className: "number" }, ...content);
  const rows = (order.all ? found : found.slice(0, 100)).map((each) => make("tr", {}, cell(slotButton(each.slot)), cell(format(each.count)), cell(format(each.oldest)), cell(format(each.newest)), cell(format(Math.round(each.mean))),
    cell(isEnd ? percent(each.kept) : "-"), make("td", { className: "text" }, each.tokens.slice(0, 24).map((token) => flat(DATA.pieces[token]) || "\u00b7").join(DATA.hasIds ? " " : " | "))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...header, make("th", {}, "its tokens"))), make("tbody", {}, ...rows));
  const more = make("button", { type: "button", className: "link", onclick: () => { order.all = true; drawTable(found); } }, `Show all ${format(found.length)} slots`);
  redraw($("slot-table"), table, ...(found.length > rows.length ? [more] : []));
}
