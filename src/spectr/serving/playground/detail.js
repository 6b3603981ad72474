// One token close up: its shares, and a picture of all layers that is a table too.

import { labelled, shareList } from "./badge.js";
import { find, make, short } from "./dom.js";
import { layerTable, readCell } from "./layers.js";
import { byLayer } from "./routing.js";
import { titleOf } from "./tip.js";

export class Detail {
  #tokens = null;
  #number = 0;
  #layer = null; // the one that is read, from token to token

  constructor() {
    this.panel = find("detail");
    this.title = make("h2", { tabIndex: -1, "aria-live": "polite" });
    this.back = this.#button("‹", "Token before", () => this.#step(-1));
    this.next = this.#button("›", "Next token", () => this.#step(1));
    const close = this.#button("×", "Close", () => this.close());
    this.content = make("div", { className: "content" });
    this.panel.append(make("header", {}, this.title, this.back, this.next, close), this.content);
  }

  /** Show a token; with the keyboard the focus goes along, and comes back on closing. */
  pick(tokens, number, byKeyboard = false) {
    this.#tokens?.select(null);
    this.#tokens = tokens;
    this.#number = number;
    this.panel.hidden = false;
    document.body.classList.add("detailed");
    tokens.select(number); // scrolls it to where the panel leaves it in sight
    this.#draw(tokens.pieces[number]);
    if (byKeyboard) this.title.focus();
  }

  /** Follow who walks through the tokens that are looked at. */
  walk(tokens, number) {
    if (this.#tokens === tokens) this.pick(tokens, number);
  }

  close() {
    if (!this.#tokens) return;
    const inside = this.panel.contains(document.activeElement);
    this.panel.hidden = true;
    document.body.classList.remove("detailed");
    this.#tokens.select(null);
    if (inside && this.#tokens.body.isConnected) this.#tokens.focus(this.#number);
    this.#tokens = null;
  }

  #step(step) {
    const number = this.#number + step;
    if (this.#tokens.pieces[number]) this.pick(this.#tokens, number);
  }

  #draw(piece) {
    this.title.replaceChildren(make("span", { className: "unseen" }, "Token "), make("bdi", {}, titleOf(piece)));
    this.back.disabled = this.#number === 0;
    this.next.disabled = this.#number === this.#tokens.pieces.length - 1;
    const shares = piece.shares.length
      ? shareList(piece.shares, 12)
      : make("p", { className: "hint" }, "No expert: only the base model.");
    this.content.replaceChildren(shares, ...this.#layerParts(byLayer(piece)));
  }

  #layerParts(layers) {
    if (!layers) return [make("p", { className: "hint" }, "The server sent no scores by layer with this token.")];
    const readout = make("div", { className: "readout" });
    const table = layerTable(layers, number => {
      this.#layer = layers[number].layer;
      readout.replaceChildren(...reading(layers[number]));
    });
    readCell(
      table,
      Math.max(
        0,
        layers.findIndex(({ layer }) => layer === this.#layer),
      ),
    );
    return [make("h3", {}, "Layers"), readout, make("div", { className: "scroll" }, table)];
  }

  #button(text, label, act) {
    const button = make("button", { type: "button", className: "quiet", title: label, "aria-label": label }, text);
    button.addEventListener("click", act);
    return button;
  }
}

/** What one layer chose, with weights and scores. */
function reading({ layer, experts }) {
  const lines = experts.map(({ name, weight, score }) =>
    make("tr", {}, make("td", {}, labelled(name)), make("td", {}, short(weight)), make("td", {}, short(score))),
  );
  const head = make("tr", {}, ...["expert", "weight", "score"].map(word => make("th", { scope: "col" }, word)));
  const body = lines.length ? make("table", {}, head, ...lines) : make("p", { className: "hint" }, "No expert here.");
  return [make("p", { className: "layer" }, make("bdi", {}, layer)), body];
}
