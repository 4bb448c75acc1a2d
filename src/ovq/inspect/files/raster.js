// Slots over the text: who goes where, and when slots are opened and merged away.

const MARGIN = { left: 44, right: 8, top: 8, bottom: 34 };
let plotted = null;

function drawRaster() {
  const { layer, kv, token, slot, memory } = view(), canvas = $("raster");
  const width = canvas.clientWidth, height = canvas.clientHeight, dense = devicePixelRatio || 1;
  if (!width) return;
  canvas.width = width * dense;
  canvas.height = height * dense;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  pen.scale(dense, dense);
  const { lives, moved, isFirst } = history(layer, kv), [first, last] = range(token);
  const most = lives.reduce((high, life) => Math.max(high, life.slot), 0) + 1;
  const x = (place) => MARGIN.left + ((place - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
  const y = (row) => height - MARGIN.bottom - ((row + 0.5) / most) * (height - MARGIN.top - MARGIN.bottom);
  plotted = { x, y, first, last, most, width, height };
  drawAxes(pen, plotted, colour);
  pen.save();
  pen.beginPath();
  pen.rect(MARGIN.left, 0, width - MARGIN.left - MARGIN.right, height - MARGIN.bottom);
  pen.clip();
  const rowHeight = (height - MARGIN.top - MARGIN.bottom) / most, at = (chunk) => x(mergedAfter(layer, kv, chunk));
  // Lines as thin as the rows are close, so that gaps stay visible.
  pen.lineWidth = Math.max(0.4, Math.min(2, rowHeight / 3));
  pen.strokeStyle = colour("line");
  pen.beginPath();
  for (const life of lives) {
    pen.moveTo(at(life.chunk), y(life.slot));
    pen.lineTo(life.to < 0 ? x(NUM_TOKENS) : at(life.end), y(life.slot));
  }
  pen.stroke();
  pen.strokeStyle = colour("moved");
  pen.lineWidth = moved.length > 500 ? 0.5 : 1;
  pen.globalAlpha = moved.length > 500 ? 0.45 : 0.9;
  pen.beginPath();
  for (const move of moved) {
    pen.moveTo(at(move.chunk), y(move.slot));
    pen.lineTo(at(move.chunk), y(move.to));
  }
  pen.stroke();
  pen.globalAlpha = 1;
  const dot = Math.max(1.4, Math.min(5, rowHeight * 0.9, ((width - 60) / (last - first)) * 1.2 + 1));
  for (const kind of [0, 1]) {
    pen.fillStyle = colour(kind ? "open" : "join");
    for (let i = Math.max(0, first); i < last; i++) {
      if (layer.slots[kv * NUM_TOKENS + i] >= 0 && isFirst[i] === kind) pen.fillRect(x(i + 0.5) - dot / 2, y(layer.slots[kv * NUM_TOKENS + i]) - dot / 2, dot, dot);
    }
  }
  drawChoice(pen, { token, slot, memory, layer, kv }, plotted, colour);
  pen.restore();
  const numMoved = moved.length ? `, ${plural(moved.length, "merge")} of a slot into another` : "";
  canvas.setAttribute("aria-label", `Slots over ${plural(NUM_TOKENS, "token")}: ${plural(lives.length, "slot")} opened${numMoved}. The table of slots below says the same in words.`);
  $("key-moved").hidden = moved.length === 0;
}

// The tokens to show.
function range(token) {
  const wanted = $("zoom").value;
  if (wanted === "all" || Number(wanted) >= NUM_TOKENS) return [0, NUM_TOKENS];
  const size = Number(wanted), centre = token < 0 ? 0 : token;
  const first = Math.min(Math.max(0, centre - size / 2), NUM_TOKENS - size);
  return [first, first + size];
}

function drawAxes(pen, { x, y, first, last, most, width, height }, colour) {
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = colour("soft");
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "center";
  const step = niceStep((last - first) / Math.max(2, width / 110));
  for (let place = Math.ceil(first / step) * step; place <= last; place += step) pen.fillText(format(place), Math.min(x(place), width - 18), height - MARGIN.bottom + 14);
  pen.fillText("token", (MARGIN.left + width) / 2, height - 4);
  pen.textAlign = "right";
  const rows = niceStep(most / 6);
  for (let row = 0; row < most; row += rows) pen.fillText(format(row), MARGIN.left - 5, y(row) + 4);
  pen.save();
  pen.translate(11, height / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText("slot", 0, 0);
  pen.restore();
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((i) => i * power).find((each) => each >= least) ?? 10 * power;
}

// The chosen token or slot, and what the slider leaves out.
function drawChoice(pen, { token, slot, memory, layer, kv }, { x, y, height, width }, colour) {
  if (memory.numRead < NUM_TOKENS) {
    pen.fillStyle = colour("page");
    pen.globalAlpha = 0.75;
    pen.fillRect(x(memory.numRead), 0, width, height);
    pen.globalAlpha = 1;
  }
  const at = slot >= 0 ? slot : token >= 0 ? memory.slotOf[token] : -1;
  pen.strokeStyle = colour("ink");
  pen.fillStyle = colour("ink");
  if (token >= 0) {
    pen.lineWidth = 1;
    pen.setLineDash([4, 3]);
    pen.beginPath();
    pen.moveTo(x(token + 0.5), 0);
    pen.lineTo(x(token + 0.5), height);
    pen.stroke();
    pen.setLineDash([]);
  }
  for (const member of at >= 0 ? memory.members.get(at) ?? [] : []) {
    pen.lineWidth = member === token ? 3 : 1.5;
    pen.beginPath();
    pen.arc(x(member + 0.5), y(layer.slots[kv * NUM_TOKENS + member]), member === token ? 6 : 4.5, 0, 2 * Math.PI);
    pen.stroke();
  }
}

// The token whose mark is nearest to the pointer.
function nearest(event) {
  const { layer, kv } = view(), box = $("raster").getBoundingClientRect();
  const px = event.clientX - box.left, py = event.clientY - box.top, { x, y, first, last } = plotted;
  let best = -1, least = 20 ** 2;
  for (let i = first; i < last; i++) {
    if (layer.slots[kv * NUM_TOKENS + i] < 0) continue;
    const distance = (x(i + 0.5) - px) ** 2 + (y(layer.slots[kv * NUM_TOKENS + i]) - py) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

function listenToRaster() {
  const canvas = $("raster");
  canvas.addEventListener("mousemove", (event) => {
    const token = nearest(event);
    if (token < 0) hideTip();
    else showTip(event, ...tipOf(token));
  });
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("click", (event) => choose(nearest(event), { scroll: true }));
  $("zoom").addEventListener("change", drawRaster);
  new ResizeObserver(drawRaster).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawRaster);
}
