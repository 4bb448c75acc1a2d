// The text, coloured; pointing and choosing.

const spans = DATA.pieces.map((piece, token) => {
  const isOdd = piece === "" || (piece !== "" && shown(piece) !== piece && !/[\n\t]/.test(piece));
  return make("span", { id: `t${token}`, role: "option", dir: "auto", className: isOdd ? "t odd" : "t" }, shown(piece));
});
const baseClass = spans.map((span) => span.className);

function fillText() {
  $("text").classList.toggle("ids", DATA.hasIds);
  $("text").append(...spans);
}

function colourText() {
  const { layer, kv, memory, token, marked, mode } = view();
  const read = mode === "reads" && token >= 0 ? readWeights() : null;
  for (let i = 0; i < NUM_TOKENS; i++) {
    const slot = memory.slotOf[i];
    let name = baseClass[i];
    if (i >= layer.numSinks && (i - layer.numSinks) % layer.chunkSize === 0) name += " start";
    if (mode === "reads") name += read ? readClass(read[i]) : "";
    else if (slot === UNREAD) name += " later";
    else if (mode === "slot") name += ` ${look(slot)}`;
    else if (mode === "level") name += ` l${levelOf(memory.countOf(i))}`;
    else name += ` ${keptClass(layer, kv, i)}`;
    if (marked.has(i)) name += " member";
    if (i === token) name += " chosen";
    spans[i].className = name;
    spans[i].setAttribute("aria-selected", i === token);
  }
  $("text").classList.toggle("marking", marked.size > 0 && mode !== "reads");
  if (token >= 0) $("text").setAttribute("aria-activedescendant", `t${token}`);
  else $("text").removeAttribute("aria-activedescendant");
}

const keptClass = (layer, kv, token) => `k${Math.min(4, Math.floor(5 * keptOf(layer, kv, token)))}`;
// Relative to the largest weight: where a query reads much at once, all weights are small.
const readClass = (share) => (share >= 0.5 ? " w4" : share >= 0.25 ? " w3" : share >= 0.1 ? " w2" : share > 0 ? " w1" : "");

// By token, the weight of the exact token or of the slot that it is behind, as a share of the largest.
function readWeights() {
  const { layer, head, token } = view(), found = new Float32Array(NUM_TOKENS), { reads } = readsOf(layer, head, token);
  for (const { weight, tokens } of reads) for (const each of tokens) found[each] = weight / reads[0].weight;
  return found;
}

// What the colours mean.
function drawKey() {
  const { mode, layer, kv } = view(), entry = (name, text) => make("li", {}, make("i", { className: `swatch ${name}` }), text);
  const items = {
    slot: () => [
      make("li", {}, ...[0, 1, 2, 3, 4, 5, 6, 7].map((i) => make("i", { className: `swatch f${i}` })), "with the line below: one style per slot, repeated after 64"),
      entry("pending", "exact"),
      ...(hasDropped(layer, kv) ? [entry("dropped", "dropped")] : []),
    ],
    level: () => DATA.levels.map((name, i) => entry(`l${i}`, name)),
    kept: () => ["0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"].map((name, i) => entry(`k${i}`, `${name}${i === 0 ? " of the value kept, at the end of the text" : ""}`)),
    reads: () => [[4, "half of the largest weight or more, on the token or on its slot"], [3, "a quarter"], [2, "a tenth"], [1, "less, but in the list"]].map(([i, name]) => entry(`w${i}`, name)),
  };
  $("key").replaceChildren(make("ul", { className: "key" }, ...items[mode]()));
  if (mode === "reads" && view().token < 0) $("key").append(make("p", { className: "small" }, "Choose a token to see what it attends to."));
  if (mode === "kept") $("time").disabled = true;
  else $("time").disabled = chunksOf(layer, kv) === 0;
}

function listen() {
  const text = $("text"), tokenAt = (event) => {
    const span = event.target.closest?.(".t");
    return span && text.contains(span) ? Number(span.id.slice(1)) : -1;
  };
  text.addEventListener("mousemove", (event) => {
    const token = tokenAt(event);
    if (token < 0) hideTip();
    else showTip(event, ...tipOf(token));
  });
  text.addEventListener("mouseleave", hideTip);
  text.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token >= 0) choose(token === view().token ? -1 : token);
  });
  text.addEventListener("keydown", (event) => {
    const { token, layer } = view(), last = NUM_TOKENS - 1;
    const to = {
      ArrowLeft: token - 1, ArrowRight: token + 1, ArrowUp: token - layer.chunkSize, ArrowDown: token + layer.chunkSize,
      PageUp: token - layer.chunkSize, PageDown: token + layer.chunkSize, Home: 0, End: last, Escape: -1,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.key === "Escape") choose(-1);
    else choose(token < 0 && event.key !== "End" ? 0 : Math.min(last, Math.max(0, to)), { scroll: true });
  });
}

// Moves the box of the text alone, not the page.
function scrollTo(token) {
  const box = $("text"), span = spans[token];
  const top = span.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 2 * span.offsetHeight) {
    box.scrollTop = top - box.clientHeight / 2;
  }
}
