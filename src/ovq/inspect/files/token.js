// What is said of the chosen token: where it is kept, and what it attends to.

function drawToken() {
  const { layer, head, kv, memory, token, slot } = view(), body = $("token-body");
  if (token < 0 && slot < 0) {
    redraw(body, make("p", { className: "hint" }, "None is chosen yet. Click one in the text, or press the arrow keys there."));
    $("token-title").textContent = "The chosen token";
    return;
  }
  if (token < 0) {
    const tokens = memory.members.get(slot);
    $("token-title").textContent = `Slot ${slot}`;
    redraw(
      body,
      make("p", {}, slotButton(slot), tokens ? ` ${plural(tokens.length, "token")}` : " is not in use here."),
      ...(tokens ? [memberList(tokens, { near: 0, most: 40 })] : []),
    );
    return;
  }
  const [before, own, after] = context(token, 14), found = readsOf(layer, head, token);
  $("token-title").textContent = `Token ${format(token)}`;
  redraw(
    body,
    make("p", { className: "big" }, make("span", { className: "small" }, before.trimStart()), make("b", {}, own), make("span", { className: "small" }, after)),
    ...keptPart(layer, kv, memory, token),
    ...readPart(found, token),
  );
}

const slotButton = (slot) => make("button", { type: "button", className: `slot ${look(slot)}`, title: "Mark its tokens in the text", onclick: () => chooseSlot(slot) }, `slot ${slot}`);

function keptPart(layer, kv, memory, token) {
  const slot = memory.slotOf[token], title = make("h3", {}, "Where it is kept"), fate = layer.numSlots[kv] === 0 ? "dropped" : "merged";
  if (slot === UNREAD) return [title, make("p", {}, `After ${format(memory.numRead)} tokens it was not ${fate} yet.`)];
  if (slot === EXACT) return [title, make("p", {}, token < layer.numSinks ? `Exactly: it is one of the first tokens, which are never ${fate}.` : `Exactly: its chunk is not ${fate} yet.`)];
  if (slot === DROPPED) return [title, make("p", {}, "Not at all: this head has no slots. It keeps its first and its last tokens.")];
  const tokens = memory.members.get(slot), isEnd = memory.numRead === NUM_TOKENS;
  const kept = isEnd ? `; ${percent(keptOf(layer, kv, token))} of its value is kept` : "";
  const what = tokens.length === 1 ? " alone: exactly" : ` with ${plural(tokens.length - 1, "other token")}${kept}`;
  return [title, make("p", {}, slotButton(slot), what, "."), memberList(tokens.filter((other) => other !== token), { near: token, most: 4 })];
}

function readPart({ reads, shares, chunk }, token) {
  const { layer, head, kv, mode } = view(), before = plural(chunk * layer.chunkSize, "token");
  const gone = layer.numSlots[kv] === 0 ? `This head has no slots and has dropped ${before}` : `Slots hold the ${before} merged before`;
  const names = ["exact tokens", "slots of one token", "slots of several tokens"];
  const list = make("ul", { className: "reads" });
  for (const { slot, weight, tokens } of reads) {
    const track = make("span", { className: "track" }, make("i"));
    track.firstChild.style.width = `${(100 * weight) / reads[0].weight}%`;
    const what = slot < 0 ? make("span", { className: "slot pending" }, token === tokens[0] ? "itself" : "exact") : slotButton(slot);
    const count = slot < 0 ? (token === tokens[0] ? "" : `${plural(token - tokens[0], "token")} back`) : plural(tokens.length, "token");
    list.append(make("li", {}, make("div", { className: "weight" }, make("span", {}, fine(weight)), track, what, make("span", { className: "small" }, count)),
      memberList(tokens, { near: token, most: 3 })));
  }
  const rest = Math.max(0, 1 - reads.reduce((sum, read) => sum + read.weight, 0));
  if (rest > 0.0005) list.append(make("li", { className: "small" }, `${fine(rest)} on all others; bars are relative to the largest weight`));
  const sum = make("div", { className: "stack", role: "img", "aria-label": names.map((name, i) => `${percent(shares[i])} on ${name}`).join(", ") });
  sum.append(...stackOf(shares, ["l0", "l1", "l4"]));
  const key = make("ul", { className: "key" }, ...names.map((name, i) => make("li", {}, make("i", { className: `swatch ${["l0", "l1", "l4"][i]}` }), `${percent(shares[i])} ${name}`)));
  // Values kept are those at the end of the text, whatever the time.
  const then = make("button", { type: "button", className: "link", hidden: mode === "kept", onclick: () => setTime(chunk) }, "Show the memory as it was then");
  return [
    make("h3", {}, `What head ${head} of layer ${layer.layer} attends to here`),
    make("p", { className: "small" }, `${gone}; all others, up to itself, are exact. `, then),
    sum, key, list,
  ];
}

// Parts of a stacked bar.
function stackOf(shares, names) {
  return shares.map((share, i) => {
    const part = make("i", { className: names[i] });
    part.style.width = `${100 * share}%`;
    part.hidden = share === 0;
    return part;
  }).filter((part) => !part.hidden);
}
