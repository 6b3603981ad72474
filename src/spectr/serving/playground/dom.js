// Elements made of text, never of markup: what models and servers say stays text.

/** An element with properties (aria-* and data-* as attributes) and children (elements or strings). */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name.includes("-") || name === "role" || name === "scope") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

export const find = id => document.getElementById(id);

/** A number as people read it: three digits at most. */
export const short = value => (Number.isFinite(value) ? String(Number(value.toPrecision(3))) : "–");

/** A share from 0 to 1 as percent. */
export const percent = share => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

/** "1 token", "2 tokens". */
export const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
