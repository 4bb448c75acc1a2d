// What is shown, and what changes it.

const now = { layer: LAYERS.find((each) => each.layer === DATA.first.layer), head: DATA.first.head, chunks: 0, token: DATA.first.token, slot: -1 };
now.chunks = chunksOf(now.layer, kvHead(now.layer, now.head));

// All that the parts of the page draw from.
function view() {
  const kv = kvHead(now.layer, now.head), mode = $("mode").value;
  // The share of a value that is kept is known for the end of the text alone.
  const memory = memoryAt(now.layer, kv, mode === "kept" ? chunksOf(now.layer, kv) : now.chunks);
  const slot = now.slot >= 0 ? now.slot : now.token >= 0 ? memory.slotOf[now.token] : -1;
  const marked = new Set(slot >= 0 ? memory.members.get(slot) ?? [] : []);
  return { ...now, kv, mode, memory, marked };
}

function choose(token, { scroll = false } = {}) {
  Object.assign(now, { token, slot: -1 });
  refresh();
  if (token >= 0 && scroll) scrollTo(token);
  say();
}

function chooseSlot(slot) {
  now.slot = now.slot === slot ? -1 : slot;
  refresh();
  const first = view().memory.members.get(slot)?.[0];
  if (now.slot >= 0 && first !== undefined) scrollTo(first);
}

function setTime(chunks) {
  now.chunks = chunks;
  refresh();
}

function setHead(layer, head) {
  const before = chunksOf(now.layer, kvHead(now.layer, now.head)), most = chunksOf(layer, kvHead(layer, head));
  const chunks = now.chunks === before ? most : Math.round((now.chunks / before) * most);
  Object.assign(now, { layer, head, slot: -1, chunks });
  refresh();
}

// For those who hear the page.
function say() {
  const { token, memory } = view();
  if (token < 0) return;
  const slot = memory.slotOf[token], where = slot < 0 ? OUTSIDE[slot] : nameOf(slot, memory.members.get(slot).length);
  $("live").textContent = `Token ${token}, ${flat(DATA.pieces[token])}: ${where}`;
}

function drawControls() {
  const { layer, head, kv, mode, memory } = view();
  const heads = Array.from({ length: layer.numHeads }, (_, i) => {
    const shared = layer.numHeads > layer.numKvHeads ? ` (dictionary ${kvHead(layer, i)})` : "";
    return make("option", { value: i, selected: i === head }, `${i}${shared}`);
  });
  $("head").replaceChildren(...heads);
  $("layer").value = layer.layer;
  $("time").max = chunksOf(layer, kv);
  $("time").value = memory.numChunks;
  $("time-text").textContent = `${format(memory.numRead)} of ${plural(NUM_TOKENS, "token")}`;
}

function refresh() {
  hideTip();
  drawControls();
  drawKey();
  colourText();
  drawToken();
  drawGlance();
  drawHeads();
  drawRaster();
  drawSlots();
}

function start() {
  const { layer } = now, rule = DATA.merge === "existing" ? "existing (the paper's)" : DATA.merge;
  $("about").textContent = `${flat(DATA.name) || "A text"}, ${plural(NUM_TOKENS, "token")}, read by ${flat(DATA.model) || "a model"}: slots in ${LAYERS.length} of ${plural(DATA.numLayers, "layer")}, in layer ${layer.layer} at most ${plural(Math.max(...layer.numSlots), "slot")} per head, chunks of ${plural(layer.chunkSize, "token")}, merge rule: ${rule}. Made by ovq ${DATA.version}.`;
  if (DATA.numGiven > NUM_TOKENS) {
    $("cut").hidden = false;
    $("cut").textContent = `Only the first ${format(NUM_TOKENS)} of ${format(DATA.numGiven)} tokens were read. --max-tokens sets how many.`;
  }
  $("conv").textContent = DATA.convSize > 1 ? `Here the convolution has ${DATA.convSize} taps: what is kept in the place of a token comes from it and the ${plural(DATA.convSize - 1, "token")} before.` : "";
  $("layer").append(...LAYERS.map((each) => make("option", { value: each.layer }, String(each.layer))));
  $("layer").addEventListener("change", () => setHead(LAYERS.find((each) => each.layer === Number($("layer").value)), Math.min(now.head, now.layer.numHeads - 1)));
  $("head").addEventListener("change", () => setHead(now.layer, Number($("head").value)));
  $("mode").addEventListener("change", refresh);
  $("time").addEventListener("input", () => setTime(Number($("time").value)));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  // The bar, as high as it is, does not cover what gets the focus.
  new ResizeObserver(() => { document.documentElement.style.scrollPaddingTop = `${$("controls").offsetHeight + 8}px`; }).observe($("controls"));
  // A few heads are compared at a glance; many would hide the text.
  $("all-heads").open = LAYERS.reduce((sum, each) => sum + each.numKvHeads, 0) <= 12;
  fillText();
  listen();
  listenToRaster();
  refresh();
  if (now.token >= 0) scrollTo(now.token);
}

start();
