// One token close up: its shares, and a picture of all layers that is a table too.

import { badge, labelled, shareList } from "./badge.js";
import { find, make, short } from "./dom.js";
import { gridOf } from "./grid.js";
import { ensign } from "./palette.js";
import { byLayer } from "./routing.js";
import { titleOf } from "./tip.js";

export class Detail {
  #tokens = null;
  #number = 0;

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
    tokens.select(number);
    this.panel.hidden = false;
    document.body.classList.add("detailed");
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
    const shares = piece.shares.length ? shareList(piece.shares) : make("p", { className: "hint" }, "No expert: the base model alone.");
    this.content.replaceChildren(shares, ...layerParts(byLayer(piece)));
  }

  #button(text, label, act) {
    const button = make("button", { type: "button", className: "quiet", title: label, "aria-label": label }, text);
    button.addEventListener("click", act);
    return button;
  }
}

function layerParts(layers) {
  if (!layers) return [make("p", { className: "hint" }, "The server sent no scores by layer with this token.")];
  const readout = make("div", { className: "readout" });
  const table = tableOf(layers, cell => readout.replaceChildren(...reading(cell)));
  readout.append(make("p", { className: "hint" }, "Point at a cell, or walk with the arrow keys."));
  return [make("h3", {}, "Layers"), readout, make("div", { className: "scroll" }, table)];
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

function tableOf(layers, read) {
  const { groups, columns, rows } = gridOf(layers.map(({ layer }) => layer));
  const strongest = Math.max(...layers.map(({ experts }) => experts[0]?.weight ?? 0), 1e-9);
  const caption = make("caption", { className: "unseen" }, "Experts by layer: the one with most weight, then the others");
  const over = groups.map(({ name, span }) => make("th", { scope: "colgroup", colSpan: span }, name));
  const kinds = columns.map(name => make("th", { scope: "col", title: name }, name.replace(/_proj$/, "")));
  const head = make("thead", {}, make("tr", {}, make("td"), ...over), make("tr", {}, make("td"), ...kinds));
  const body = make("tbody", {}, ...rows.map(row => rowOf(row, layers, strongest)));
  const table = make("table", { className: "layers", role: "grid" }, caption, head, body);
  walkable(table, cell => read(layers[cell.dataset.number]));
  return table;
}

function rowOf({ name, cells }, layers, strongest) {
  const shown = cells.map(number => (number === null ? make("td", { className: "absent" }) : cellOf(number, layers[number], strongest)));
  return make("tr", {}, make("th", { scope: "row" }, name), ...shown);
}

function cellOf(number, { experts }, strongest) {
  const [top] = experts;
  const words = experts.map(({ name, weight, score }) => `${name} ${short(weight)}, score ${short(score)}`).join("; ");
  const cell = make("td", { tabIndex: -1 }, make("span", { className: "unseen" }, words || "no expert"));
  cell.dataset.number = number;
  if (!top) return cell;
  cell.style.setProperty("--hue", ensign(top.name).hue);
  cell.style.setProperty("--strength", (top.weight / strongest).toFixed(3));
  cell.append(make("span", { "aria-hidden": "true" }, badge(top.name).textContent));
  return cell;
}

/** Arrow keys, Home and End walk the cells; focus and pointer read them. */
function walkable(table, read) {
  const cells = [...table.querySelectorAll("td[data-number]")];
  if (cells.length) cells[0].tabIndex = 0;
  const at = event => event.target.closest("td[data-number]");
  table.addEventListener("pointerover", event => at(event) && read(at(event)));
  table.addEventListener("click", event => at(event)?.focus());
  table.addEventListener("focusin", event => {
    for (const cell of table.querySelectorAll("[tabindex='0']")) cell.tabIndex = -1;
    event.target.tabIndex = 0;
    read(event.target);
  });
  table.addEventListener("keydown", event => {
    const next = neighbour(at(event), event.key);
    if (next) event.preventDefault();
    next?.focus();
  });
}

function neighbour(cell, key) {
  const row = cell.parentElement;
  const inRow = [...row.querySelectorAll("td[data-number]")];
  const here = inRow.indexOf(cell);
  const sideways = { ArrowLeft: inRow[here - 1], ArrowRight: inRow[here + 1], Home: inRow[0], End: inRow.at(-1) };
  if (key in sideways) return sideways[key];
  const other = { ArrowUp: row.previousElementSibling, ArrowDown: row.nextElementSibling }[key];
  return other?.querySelector(`td:nth-child(${cell.cellIndex + 1})[data-number]`);
}
