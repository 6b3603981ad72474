// All layers of one token as a compact picture, which is a table too: for eyes, keys and screen readers.

import { make, short } from "./dom.js";
import { gridOf } from "./grid.js";
import { ensign } from "./palette.js";

const SPOKEN = 8; // experts in a cell's words

/**
 * @param layers of routing.js' byLayer.
 * @param read called with a layer's number when it is pointed at or walked to.
 */
export function layerTable(layers, read) {
  const { groups, columns, rows } = gridOf(layers.map(({ layer }) => layer));
  const strongest = Math.max(...layers.map(({ experts }) => experts[0]?.weight ?? 0), 1e-9);
  const caption = make("caption", { className: "unseen" }, "Experts by layer, most weight first");
  const over = groups.map(({ name, span }) => make("th", { scope: "colgroup", colSpan: span }, name));
  const kinds = columns.map(name => make("th", { scope: "col", title: name }, name.replace(/_proj$/, "")));
  const head = make("thead", {}, make("tr", {}, make("td"), ...over), make("tr", {}, make("td"), ...kinds));
  const body = make("tbody", {}, ...rows.map(row => rowOf(row, layers, strongest)));
  const table = make("table", { className: "layers", role: "grid" }, caption, head, body);
  listen(table);
  table.addEventListener("read", event => read(Number(event.target.dataset.number)));
  return table;
}

/** Read the cell of a layer, as if it were pointed at. */
export const readCell = (table, number) => choose(table, table.querySelector(`[data-number="${number}"]`));

function rowOf({ name, cells }, layers, strongest) {
  const shown = cells.map(number =>
    number === null ? make("td", { className: "absent" }) : cellOf(number, layers[number], strongest),
  );
  return make("tr", {}, make("th", { scope: "row" }, name), ...shown);
}

function cellOf(number, { experts }, strongest) {
  const [top] = experts;
  const words = experts
    .slice(0, SPOKEN)
    .map(({ name, weight, score }) => `${name} ${short(weight)}, score ${short(score)}`)
    .join("; ");
  const cell = make(
    "td",
    { tabIndex: -1, "data-number": number },
    make("span", { className: "unseen" }, words || "no expert"),
  );
  if (!top) return cell;
  const { mark, hue } = ensign(top.name);
  cell.style.setProperty("--hue", hue);
  cell.style.setProperty("--strength", (top.weight / strongest).toFixed(3));
  cell.append(make("span", { "aria-hidden": "true" }, mark));
  return cell;
}

/** The pointer reads; arrow keys, Home and End walk and read. */
function listen(table) {
  const at = event => event.target.closest("[data-number]");
  table.addEventListener("pointerover", event => at(event) && choose(table, at(event)));
  table.addEventListener("click", event => at(event)?.focus());
  table.addEventListener("focusin", event => choose(table, at(event)));
  table.addEventListener("keydown", event => {
    const next = neighbour(at(event), event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

/** One cell takes part in tabbing: the one that is read. */
function choose(table, cell) {
  const before = table.querySelector("[aria-selected]");
  before?.removeAttribute("aria-selected");
  if (before) before.tabIndex = -1;
  cell.setAttribute("aria-selected", "true");
  cell.tabIndex = 0;
  cell.dispatchEvent(new Event("read", { bubbles: true }));
}

function neighbour(cell, key) {
  const row = cell.parentElement;
  const inRow = [...row.querySelectorAll("[data-number]")];
  const here = inRow.indexOf(cell);
  const sideways = { ArrowLeft: inRow[here - 1], ArrowRight: inRow[here + 1], Home: inRow[0], End: inRow.at(-1) };
  if (key in sideways) return sideways[key];
  const other = { ArrowUp: row.previousElementSibling, ArrowDown: row.nextElementSibling }[key];
  return other?.querySelector(`td:nth-child(${cell.cellIndex + 1})[data-number]`);
}
