// The data of the page, and the memory of a head as it was after any number of chunks.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NUM_TOKENS = DATA.pieces.length;

function unpacked(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Kind(bytes.buffer);
}

const LAYERS = DATA.layers.map((found) => ({
  ...found,
  slots: unpacked(found.slots, Int16Array),
  kept: unpacked(found.kept, Uint16Array),
  entries: unpacked(found.entries, Int16Array),
  weights: unpacked(found.weights, Uint16Array),
  shares: unpacked(found.shares, Uint16Array),
  moves: found.moves.map((of) => unpacked(of, Int16Array)),
}));

const kvHead = (layer, head) => Math.floor(head / (layer.numHeads / layer.numKvHeads));
// How many chunks a head has merged after some tokens; when it merged a chunk, and the first token of that.
const chunksAfter = (layer, kv, numRead) => Math.max(0, Math.floor((numRead - layer.numExact[kv]) / layer.chunkSize) + 1);
const chunksOf = (layer, kv) => chunksAfter(layer, kv, NUM_TOKENS);
const mergedAfter = (layer, kv, chunk) => layer.numExact[kv] + chunk * layer.chunkSize;
const startOf = (layer, chunk) => layer.numSinks + chunk * layer.chunkSize;
// In the place of a slot: kept exactly, dropped, not read yet.
const EXACT = -1, DROPPED = -2, UNREAD = -3;
const hasDropped = (layer, kv) => layer.numSlots[kv] === 0 && chunksOf(layer, kv) > 0;
const keptOf = (layer, kv, token) => layer.kept[kv * NUM_TOKENS + token] / 65535;
const levelOf = (count) => (count < 0 ? 6 : count === 0 ? 0 : count === 1 ? 1 : count <= 4 ? 2 : count <= 16 ? 3 : count <= 64 ? 4 : 5);

// A slot's lives: it is opened by a chunk, and may be merged into another and opened again.
function history(layer, kv) {
  layer.histories ??= [];
  if (layer.histories[kv]) return layer.histories[kv];
  const lives = [], moved = [], current = new Map(), isFirst = new Uint8Array(NUM_TOKENS);
  const numChunks = chunksOf(layer, kv);
  for (let chunk = 0; chunk < numChunks; chunk++) {
    for (const [slot, to] of movesOf(layer, kv, chunk)) {
      const life = current.get(slot);
      Object.assign(life, { end: chunk, to });
      moved.push({ chunk, slot, to });
      current.delete(slot);
    }
    for (let next = startOf(layer, chunk); next < startOf(layer, chunk + 1); next++) {
      const slot = layer.slots[kv * NUM_TOKENS + next];
      if (slot < 0 || current.has(slot)) continue;
      isFirst[next] = 1;
      current.set(slot, { slot, chunk, token: next, end: numChunks, to: -1 });
      lives.push(current.get(slot));
    }
  }
  return (layer.histories[kv] = { lives, moved, isFirst });
}

function movesOf(layer, kv, chunk) {
  layer.moveLists ??= [];
  if (!layer.moveLists[kv]) {
    const lists = Array.from({ length: chunksOf(layer, kv) }, () => []), flat = layer.moves[kv];
    for (let i = 0; i < flat.length; i += 3) lists[flat[i]].push([flat[i + 1], flat[i + 2]]);
    layer.moveLists[kv] = lists;
  }
  return layer.moveLists[kv][chunk];
}

// The memory after some chunks: by slot its tokens, and by token its slot, or why it is in none.
function memoryAt(layer, kv, numChunks) {
  const key = `${kv}/${numChunks}`;
  layer.memories ??= new Map();
  if (layer.memories.has(key)) return layer.memories.get(key);
  const numRead = numChunks === chunksOf(layer, kv) ? NUM_TOKENS : numChunks === 0 ? 0 : mergedAfter(layer, kv, numChunks - 1);
  const members = new Map(), slotOf = new Int16Array(NUM_TOKENS).fill(EXACT).fill(UNREAD, numRead);
  for (let chunk = 0; chunk < numChunks; chunk++) {
    // All at once: what is taken out of a slot leaves it free for the tokens of the chunk.
    const taken = movesOf(layer, kv, chunk).map(([slot, to]) => [members.get(slot), slot, to]);
    for (const [, slot] of taken) members.delete(slot);
    for (const [tokens, , to] of taken) members.set(to, [...(members.get(to) ?? []), ...tokens]);
    for (let token = startOf(layer, chunk); token < startOf(layer, chunk + 1); token++) {
      const slot = layer.slots[kv * NUM_TOKENS + token];
      if (slot < 0) slotOf[token] = slot;
      else if (members.has(slot)) members.get(slot).push(token);
      else members.set(slot, [token]);
    }
  }
  for (const [slot, tokens] of members) {
    tokens.sort((a, b) => a - b);
    for (const token of tokens) slotOf[token] = slot;
  }
  if (layer.memories.size > 8) layer.memories.delete(layer.memories.keys().next().value);
  const countOf = (token) => (slotOf[token] >= 0 ? members.get(slotOf[token]).length : slotOf[token] === DROPPED ? -1 : 0);
  const memory = { members, slotOf, countOf, numChunks, numRead };
  layer.memories.set(key, memory);
  return memory;
}

// What a token reads with a query head, the most first: slots with the tokens behind them, and exact tokens.
function readsOf(layer, head, token) {
  const k = layer.numReads, at = (head * NUM_TOKENS + token) * k, kv = kvHead(layer, head);
  const chunk = chunksAfter(layer, kv, token), memory = memoryAt(layer, kv, chunk), reads = [];
  for (let i = at; i < at + k; i++) {
    const weight = layer.weights[i] / 65535, entry = layer.entries[i];
    if (weight === 0) continue;
    if (entry >= 0) reads.push({ slot: entry, weight, tokens: memory.members.get(entry) });
    else reads.push({ slot: EXACT, weight, tokens: [-1 - entry] });
  }
  const shares = [0, 1, 2].map((i) => layer.shares[(head * NUM_TOKENS + token) * 3 + i] / 65535);
  return { reads, memory, shares, chunk };
}
