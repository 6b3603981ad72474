// The conversation: questions, and one or two answers to each, streamed at once.

import { Answer } from "./answer.js";
import { ServerError, streamChat } from "./api.js";
import { find, make } from "./dom.js";
import { Pieces } from "./routing.js";
import { Speaker, say } from "./speak.js";

const ENDS = { length: "stopped at the maximum number of tokens", content_filter: "filtered by the server" };

export class Talk {
  #turns = [];
  #abort = null;

  /** @param choices the settings. @param watcher see Tokens. */
  constructor(choices, watcher) {
    Object.assign(this, { choices, watcher });
  }

  get busy() {
    return this.#abort !== null;
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    find("talk").replaceChildren();
    find("spoken").replaceChildren();
  }

  /** Ask every chosen model. Resolves when all have ended, to whether one of them said something. */
  async ask(question) {
    this.#abort = new AbortController();
    const turn = { question, answers: this.choices.asked.map(model => new Answer(model, this.watcher)) };
    const requests = this.choices.asked.map((model, side) => this.#request(model, side, turn));
    this.#turns.push(turn);
    this.#show(turn);
    say("Answering");
    await Promise.all(requests.map((request, side) => this.#stream(request, turn.answers[side])));
    this.#abort = null;
    say("Done");
    return turn.answers.some(({ text }) => text);
  }

  /** A model remembers its own side of the talk; where it was not asked, the first model's answer stands in. */
  #request(model, side, { question }) {
    const messages = this.choices.system ? [{ role: "system", content: this.choices.system }] : [];
    for (const turn of this.#turns) {
      const content = (turn.answers[side] ?? turn.answers[0]).text;
      if (content) messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
    }
    return { ...this.choices.request(model), messages: [...messages, { role: "user", content: question }] };
  }

  #show({ question, answers }) {
    const said = make("p", { className: "said", dir: "auto" }, question);
    const sides = make("div", { className: "sides" }, ...answers.map(({ element }) => element));
    find("talk").append(make("section", { className: "turn" }, said, sides));
  }

  async #stream(request, answer) {
    const speaker = new Speaker(request.model);
    try {
      answer.finish(await this.#read(request, answer, speaker));
    } catch (error) {
      if (error.name === "AbortError") answer.finish("stopped");
      else answer.fail(error);
    }
    speaker.finish();
  }

  /** Fill the answer from the stream; how it ended, in words. */
  async #read(request, answer, speaker) {
    const pieces = new Pieces();
    let end = "";
    const take = piece => {
      if (!piece) return;
      answer.add(piece);
      if (!piece.thought) speaker.add(piece.text);
    };
    for await (const { choices } of this.#chunks(request)) {
      const [choice] = choices ?? [];
      if (!choice) continue;
      take(pieces.add(choice));
      end = ENDS[choice.finish_reason] ?? end;
    }
    take(pieces.end());
    return end;
  }

  /** A server that does not give routing still chats. */
  async *#chunks(request) {
    const with_ = { key: this.choices.key, signal: this.#abort.signal };
    try {
      yield* streamChat(request, with_);
    } catch (error) {
      if (!(error instanceof ServerError && error.param === "return_routing" && "return_routing" in request))
        throw error;
      const { return_routing, ...plain } = request;
      yield* streamChat(plain, with_);
    }
  }
}
