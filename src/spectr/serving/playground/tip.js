// The one tooltip: a token's experts, next to the token.

import { shareList } from "./badge.js";
import { find, make } from "./dom.js";

/** What a piece is called where its text alone would not show. */
export function titleOf({ text, tokens }) {
  if (text === "") return "end of the answer";
  const visible = text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));
  return tokens.length > 1 ? `${visible} (mean of ${tokens.length} tokens)` : visible;
}

export function showTip(target, piece) {
  const tip = find("tip");
  const body = piece.shares.length ? shareList(piece.shares, 6) : "No expert: only the base model.";
  tip.replaceChildren(make("p", { className: "tiptitle" }, titleOf(piece)), body);
  tip.hidden = false;
  target.setAttribute("aria-describedby", "tip");
  place(tip, target.lastChild.getBoundingClientRect());
}

export function hideTip() {
  find("tip").hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

/** Above the token, or below it where there is no room. */
function place(tip, near) {
  const { width, height } = tip.getBoundingClientRect();
  const above = near.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(near.left, document.documentElement.clientWidth - width - 8))}px`;
  tip.style.top = `${above > 8 ? above : near.bottom + 18}px`;
}
