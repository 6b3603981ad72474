// Answers for those who listen: whole sentences, not one token after the other.

import { find, make } from "./dom.js";

const SENTENCE = /^[^]*?(?:[.!?:;](?=\s)|[\n。！？])\s*/;

export class Speaker {
  #rest = "";
  #line;

  /** @param title whose answer it is, said first. */
  constructor(title) {
    this.#line = make("p", {}, `${title}: `);
    find("spoken").append(this.#line);
  }

  add(text) {
    this.#rest += text;
    for (let match; (match = SENTENCE.exec(this.#rest)); this.#rest = this.#rest.slice(match[0].length)) {
      this.#line.append(match[0]);
    }
  }

  finish() {
    this.#line.append(this.#rest);
    this.#rest = "";
  }
}

/** What the page is doing, in a word or two. */
export const say = words => (find("status").textContent = words);
