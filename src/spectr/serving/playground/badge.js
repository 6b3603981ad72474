// How an expert is shown: its mark in its colour, and its name.

import { make, percent } from "./dom.js";
import { ensign } from "./palette.js";

export function badge(name, strength = 1) {
  const { mark, hue } = ensign(name);
  const node = make("span", { className: "badge", "aria-hidden": "true" }, mark);
  node.style.setProperty("--hue", hue);
  node.style.setProperty("--strength", strength);
  return node;
}

/** Mark and name; <bdi> keeps a name of another direction from turning what is around it. */
export const labelled = name =>
  make("span", { className: "expert" }, badge(name), make("bdi", { className: "name" }, name));

/** One line for each of the first experts: mark, name, bar, share. */
export function shareList(shares, limit) {
  const more = shares.length - limit;
  const rest = more > 0 ? [make("li", { className: "more" }, `and ${more} more`)] : [];
  return make("ul", { className: "shares" }, ...shares.slice(0, limit).map(shareLine), ...rest);
}

function shareLine({ name, share }) {
  const bar = make("span", { className: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--hue", ensign(name).hue);
  bar.style.setProperty("--share", share);
  return make("li", {}, labelled(name), bar, make("span", { className: "number" }, percent(share)));
}
