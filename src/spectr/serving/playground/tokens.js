// An answer's pieces as text that can be pointed at and walked through.

import { make } from "./dom.js";
import { ensign } from "./palette.js";
import { hideTip, showTip, titleOf } from "./tip.js";

export class Tokens {
  pieces = [];
  #nodes = [];
  #numbers = new WeakMap();
  #leader = null; // whose mark was written last
  #room = Infinity; // letters since then
  #only = null;

  /**
   * @param body the element to fill.
   * @param watcher has pick(this, number, byKeyboard), for a token asked for, and walk(this, number), on the way.
   */
  constructor(body, watcher) {
    Object.assign(this, { body, watcher });
    body.addEventListener("click", event => this.#clicked(event));
    body.addEventListener("keydown", event => this.#pressed(event));
    body.addEventListener("pointerover", event => event.pointerType === "mouse" && this.#pointed(event.target));
    body.addEventListener("pointerout", hideTip);
    body.addEventListener("focusin", event => event.target.matches(":focus-visible") && this.#pointed(event.target));
    body.addEventListener("focusout", hideTip);
  }

  /** Append a piece. One without tokens is plain text: nothing is known about it. */
  add(piece) {
    if (!piece.tokens.length) return this.body.append(piece.thought ? make("i", {}, piece.text) : piece.text);
    const node = this.#node(piece);
    this.#numbers.set(node, this.pieces.push(piece) - 1);
    this.#nodes.push(node);
    paint(node, piece, this.#only);
    return this.body.append(node);
  }

  /** Colour by one expert's share alone, or with null by all. */
  only(name) {
    this.#only = name;
    this.body.classList.toggle("only", name !== null);
    this.pieces.forEach((piece, n) => paint(this.#nodes[n], piece, name));
  }

  /** Mark a token as the one that is looked at, or none. */
  select(number) {
    for (const node of this.body.querySelectorAll("[aria-current]")) node.removeAttribute("aria-current");
    if (number === null) return;
    this.#nodes[number].setAttribute("aria-current", "true");
    this.#nodes[number].scrollIntoView({ block: "nearest" });
    this.#rove(number);
  }

  focus(number) {
    this.#rove(number);
    this.#nodes[number].focus();
  }

  #node(piece) {
    const title = piece.text.trim() ? undefined : spoken(piece.text);
    const properties = {
      className: "token",
      role: "button",
      tabIndex: this.pieces.length ? -1 : 0,
      "aria-label": title,
    };
    const node = make("span", properties, ...this.#parts(piece));
    node.classList.toggle("break", /^\s*\n\s*$/.test(piece.text));
    node.classList.toggle("silent", piece.text === "");
    node.classList.toggle("thought", piece.thought);
    return node;
  }

  /**
   * The space before a word is not tinted: where a line breaks it would hang at the end of the line above. Where another
   * expert takes the lead its mark is written under the word, so that colour is not the only sign.
   */
  #parts({ text, shares }) {
    const word = text.trimStart() || text;
    if (text.slice(0, -word.length).includes("\n")) this.#room = Infinity;
    const node = make("span", { className: "word" }, word);
    const mark = text.trim() && this.#mark(shares[0]?.name);
    if (mark) node.dataset.mark = mark;
    this.#room = word.includes("\n") ? Infinity : this.#room + text.length;
    return [text.slice(0, text.length - word.length), node];
  }

  /** The leader's mark if another one's was written last; a dot where that one leaves no room for it. */
  #mark(leader = "") {
    if (leader === this.#leader) return null;
    const free = this.#room >= 0;
    const mark = leader && ensign(leader).mark;
    this.#leader = free ? leader : null;
    if (free) this.#room = -0.9 * mark.length - 0.4; // a mark's letters are smaller
    return free ? mark || "–" : "·";
  }

  #numberAt(target) {
    return this.#numbers.get(target.closest?.(".token"));
  }

  #pointed(target) {
    const number = this.#numberAt(target);
    if (number !== undefined) showTip(this.#nodes[number], this.pieces[number]);
  }

  #clicked(event) {
    const number = this.#numberAt(event.target);
    if (number === undefined || !document.getSelection().isCollapsed) return; // someone selects text to copy it
    hideTip();
    this.watcher.pick(this, number, event.detail === 0);
  }

  #pressed(event) {
    const number = this.#numberAt(event.target);
    if (number === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") hideTip();
    const moves = { Enter: number, " ": number, ...this.#moves(event.key, number) };
    if (!(event.key in moves)) return;
    event.preventDefault();
    if (event.key === "Enter" || event.key === " ") this.watcher.pick(this, number, true);
    else this.#move(moves[event.key]);
  }

  #moves(key, number) {
    const last = this.#nodes.length - 1;
    const line = key === "ArrowUp" || key === "ArrowDown" ? this.#onLine(number, key === "ArrowUp" ? -1 : 1) : number;
    const sides = { ArrowLeft: Math.max(0, number - 1), ArrowRight: Math.min(last, number + 1) };
    return { ...sides, ArrowUp: line, ArrowDown: line, Home: 0, End: last };
  }

  #move(number) {
    this.focus(number);
    this.watcher.walk(this, number);
  }

  /** The token of the line above (-1) or below (1) that is nearest to this one. */
  #onLine(number, step) {
    const boxes = this.#nodes.map(
      ({ lastChild }) => lastChild.getClientRects()[0] ?? lastChild.getBoundingClientRect(),
    );
    const here = boxes[number];
    let best = number;
    let line = null;
    for (let n = number + step; n >= 0 && n < boxes.length; n += step) {
      if (Math.abs(boxes[n].top - here.top) < here.height / 2) continue;
      line ??= boxes[n].top;
      if (Math.abs(boxes[n].top - line) > here.height / 2) break;
      if (best === number || distance(boxes[n], here) < distance(boxes[best], here)) best = n;
    }
    return best;
  }

  /** One token of the answer takes part in tabbing. */
  #rove(number) {
    for (const node of this.body.querySelectorAll("[tabindex='0']")) node.tabIndex = -1;
    this.#nodes[number].tabIndex = 0;
  }
}

const distance = (a, b) => Math.abs(a.left + a.width / 2 - b.left - b.width / 2);

const spoken = text => (text === "" ? titleOf({ text }) : text.includes("\n") ? "line break" : "space");

/** The tint is the leader's, the bar below has every expert's share. */
function paint(node, { shares }, only) {
  const shown = only === null ? shares : shares.filter(({ name }) => name === only);
  const leader = shown[0];
  node.style.setProperty("--hue", leader ? ensign(leader.name).hue : "transparent");
  node.style.setProperty("--strength", leader ? Math.sqrt(leader.share).toFixed(3) : 0);
  node.style.setProperty("--bar", barOf(shown));
}

function barOf(shares) {
  let from = 0;
  const stops = shares.map(({ name, share }) => {
    const stop = `${ensign(name).hue} ${percentage(from)} ${percentage(from + share)}`;
    from += share;
    return stop;
  });
  return `linear-gradient(90deg, ${[...stops, `var(--none) ${percentage(from)}`, "var(--none)"].join(", ")})`;
}

const percentage = share => `${(100 * Math.min(share, 1)).toFixed(1)}%`;
