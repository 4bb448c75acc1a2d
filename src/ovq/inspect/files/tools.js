// Small tools: elements, numbers in words, and text that is safe to show.

const $ = (id) => document.getElementById(id);
const format = (x) => x.toLocaleString("en-US");
const percent = (x) => (x > 0 && x < 0.01 ? "<1 %" : x < 1 && x > 0.99 ? ">99 %" : `${Math.round(100 * x)} %`);
const fine = (x) => (x < 0.0005 ? "<0.1 %" : x < 0.0995 ? `${(100 * x).toFixed(1)} %` : percent(x));
const plural = (n, word) => `${format(n)} ${word}${n === 1 ? "" : "s"}`;

// Text goes in as text alone, so that nothing in it can become part of the page.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name === "id") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Draws a box anew. If a button in it had the focus, the same one or the one in its place gets it.
function redraw(box, ...children) {
  const shown = () => [...box.querySelectorAll("button:not([hidden])")];
  const had = document.activeElement, place = shown().indexOf(had);
  box.replaceChildren(...children);
  if (place < 0) return;
  const buttons = shown();
  const same = [buttons[place], ...buttons].find((each) => each?.textContent === had.textContent);
  (same ?? buttons[Math.min(place, buttons.length - 1)] ?? $("text")).focus();
}

const BREAK = "\u21b5", TAB = "\u21e5";
// Controls, invisible and direction-changing characters, private ones, halves of characters.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;

function named(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `<U+${code.toString(16).toUpperCase().padStart(4, "0")}>`;
}

// A piece on one line.
function flat(piece) {
  return piece.replace(/\r\n|\n/g, BREAK).replace(/\t/g, TAB).replace(HIDDEN, named);
}

// A piece in the text: line breaks are shown, and break the line.
function shown(piece) {
  if (piece === "") return "\u00b7";
  return piece.replace(/\r\n|\n|\t|[^\n\t]+/g, (part) => {
    if (part === "\t") return TAB;
    return part.includes("\n") ? `${BREAK}\n` : part.replace(HIDDEN, named);
  });
}

const space = DATA.hasIds ? " " : "";

// What stands around a token, on one line, the token itself marked.
function context(token, width = 22) {
  const piece = DATA.pieces[token];
  let before = "", after = "";
  for (let i = token - 1; i >= 0 && before.length < width; i--) before = flat(DATA.pieces[i]) + space + before;
  for (let i = token + 1; i < NUM_TOKENS && after.length < width; i++) after += space + flat(DATA.pieces[i]);
  return [[...before].slice(-width).join("").padStart(width), piece === "" ? "\u00b7" : flat(piece), [...after].slice(0, width).join("")];
}

const look = (slot) => (slot === DROPPED ? "dropped" : slot < 0 ? "pending" : `f${slot % 8} u${Math.floor(slot / 8) % 8}`);
// What is said of a token in no slot.
const OUTSIDE = { [UNREAD]: "not merged yet", [EXACT]: "exact, in no slot", [DROPPED]: "dropped, this head keeps only its first and last tokens" };
const nameOf = (slot, count) => (count === 1 ? `slot ${slot}, this token alone` : `slot ${slot}, shared by ${plural(count, "token")}`);

// The tokens of a slot as a list of buttons that choose them, the nearest to a place first.
function memberList(tokens, { near, most = 4, width = 18 } = {}) {
  const sorted = [...tokens].sort((a, b) => Math.abs(a - near) - Math.abs(b - near));
  const list = make("ul", { className: "members" });
  const add = (from, to) => {
    for (const token of sorted.slice(from, to)) {
      const [before, own, after] = context(token, width);
      const button = make("button", { type: "button", onclick: () => choose(token, { scroll: true }) });
      button.append(`${format(token).padStart(6)} `, before, make("b", {}, own), after);
      list.append(make("li", {}, button));
    }
    if (sorted.length <= to) return;
    const more = make("button", { type: "button", className: "link" }, `and ${plural(sorted.length - to, "more token")}`);
    more.onclick = () => {
      more.parentElement.remove();
      add(to, to + 200);
      list.children[to].firstChild.focus();
    };
    list.append(make("li", {}, more));
  };
  add(0, most);
  return list;
}

function showTip(event, ...children) {
  const tip = $("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const x = Math.min(event.clientX + gap, innerWidth - box.width - 4);
  const below = event.clientY + gap + box.height < innerHeight;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${below ? event.clientY + gap : Math.max(4, event.clientY - gap - box.height)}px`;
}

const hideTip = () => { $("tip").hidden = true; };

// What a tip says of a token.
function tipOf(token) {
  const { layer, kv, memory } = view(), slot = memory.slotOf[token], [, own] = context(token);
  const head = make("strong", {}, `${own}  `), lines = [];
  if (slot < 0) return [head, `token ${format(token)}: ${OUTSIDE[slot]}`];
  const tokens = memory.members.get(slot);
  const others = tokens.filter((other) => other !== token).sort((a, b) => Math.abs(a - token) - Math.abs(b - token));
  for (const other of others.slice(0, 6)) lines.push(make("div", {}, `${format(other).padStart(6)} ${context(other, 16).join("")}`));
  if (others.length > 6) lines.push(make("div", {}, `       and ${format(others.length - 6)} more`));
  const kept = memory.numRead === NUM_TOKENS ? `; ${percent(keptOf(layer, kv, token))} of its value kept` : "";
  return [head, `token ${format(token)}: ${nameOf(slot, tokens.length)}${kept}`, ...lines];
}
