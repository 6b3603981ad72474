// One model's answer to one question: its head, its tokens, its legend, how it ended.

import { labelled } from "./badge.js";
import { counted, make, percent } from "./dom.js";
import { abstained, mean } from "./routing.js";
import { Tokens } from "./tokens.js";

const SHOWN = 12; // experts in the legend, by share

export class Answer {
  text = "";
  #count = 0;
  #began = performance.now();
  #drawn = 0;
  #only = null;

  /** @param title whose answer it is. @param watcher see Tokens. */
  constructor(title, watcher) {
    this.body = make("div", {
      className: "body",
      dir: "auto",
      role: "group",
      "aria-label": `Answer of ${title}`,
      "aria-busy": "true",
    });
    this.tokens = new Tokens(this.body, watcher);
    this.legend = make("div", { className: "legend" });
    this.end = make("p", { className: "end" });
    this.element = make(
      "article",
      { className: "answer" },
      make("h3", {}, make("bdi", {}, title)),
      this.body,
      this.legend,
      this.end,
    );
  }

  add(piece) {
    this.tokens.add(piece);
    this.#count += piece.tokens.length;
    if (!piece.thought) this.text += piece.text;
    this.#drawn ||= requestAnimationFrame(() => this.#draw());
  }

  /** All is drawn with it. @param words how it ended, if there is something to say. */
  finish(words = "") {
    cancelAnimationFrame(this.#drawn);
    if (this.#drawn) this.#draw();
    const seconds = (performance.now() - this.#began) / 1000;
    const tokens = this.#count ? [counted(this.#count, "token")] : [];
    this.end.textContent = [...tokens, `${seconds.toFixed(1)} s`, words].filter(Boolean).join(" · ");
    this.body.setAttribute("aria-busy", "false");
  }

  /** Say in place what went wrong; the text so far stays. */
  fail(error) {
    const code = [error.status, error.code, error.param && `in “${error.param}”`].filter(Boolean).join(" · ");
    const parts = [make("strong", {}, error.message), ...(code ? [make("small", {}, code)] : [])];
    this.end.before(make("p", { className: "trouble", role: "alert" }, ...parts));
    this.finish();
  }

  /** Each expert's share of the whole answer, as buttons that show one expert alone. */
  #draw() {
    this.#drawn = 0;
    const tokens = this.tokens.pieces.flatMap(piece => piece.tokens);
    const shares = mean(tokens.map(token => token.shares));
    const focused = this.legend.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const words = abstained(tokens);
    const buttons = shares.slice(0, SHOWN).map(share => this.#button(share));
    this.legend.replaceChildren(...(words ? [make("p", { className: "hint" }, words)] : buttons));
    [...this.legend.children].find(button => button.dataset.name === focused)?.focus();
  }

  #button({ name, share }) {
    const pressed = String(this.#only === name);
    const title = "Colour the tokens by this expert only";
    const button = make(
      "button",
      { type: "button", title, "aria-pressed": pressed },
      labelled(name),
      " ",
      percent(share),
    );
    button.dataset.name = name;
    button.addEventListener("click", () => this.#toggle(name));
    return button;
  }

  #toggle(name) {
    this.#only = this.#only === name ? null : name;
    this.tokens.only(this.#only);
    this.#draw();
  }
}
