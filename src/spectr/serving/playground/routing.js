// From a stream's chunks to pieces of text, each with the routing of just the tokens that made it.

/**
 * A chunk brings text and the routing of the tokens generated since the last one. Usually that is one token. It can be
 * - routing without text: the tokenizer holds bytes back until they are whole. The tokens wait for the next text;
 * - several tokens: the piece has the mean of them;
 * - text without routing, and no token waits: a piece of no token. It gets no colour rather than a guessed one.
 */
export class Pieces {
  #waiting = [];
  #layers = [];

  /** The piece that a choice of a chunk completes, or null. */
  add({ delta = {}, routing }) {
    this.#waiting.push(...this.#tokens(routing));
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    const text = delta.content ?? "";
    return text || thought ? this.#piece(text || thought, !text) : null;
  }

  /** Tokens that never got a text (the end of the turn), as a last piece, or null. */
  end() {
    return this.#waiting.length ? this.#piece("", false) : null;
  }

  #piece(text, thought) {
    const tokens = this.#waiting;
    this.#waiting = [];
    return { text, thought, tokens, shares: mean(tokens.map(token => token.shares)) };
  }

  #tokens(routing) {
    if (!Array.isArray(routing?.tokens)) return [];
    const experts = (routing.experts ?? []).map(String);
    const layers = this.#same(routing.layers);
    const p = typeof routing.p === "number" ? routing.p : null;
    return routing.tokens.map((shares, t) => ({
      p,
      shares: shares.map(([expert, share]) => ({ name: named(experts, expert), share })),
      layers,
      cells: layers && packed(routing.by_layer?.[t], experts),
    }));
  }

  /** One list of layer names for all chunks that say the same. */
  #same(layers) {
    if (!Array.isArray(layers)) return null;
    const equal = layers.length === this.#layers.length && layers.every((name, l) => name === this.#layers[l]);
    if (!equal) this.#layers = layers.map(String);
    return this.#layers;
  }
}

/** That the base model answered since no expert stands out, in words; empty where an expert took part. */
export function abstained(tokens) {
  const p = tokens.find(token => token.p !== null)?.p ?? null;
  if (p === null || tokens.some(token => token.shares.length)) return "";
  return `No expert stands out (p = ${p.toFixed(2)}): the base model answered.`;
}

/** Mean shares over tokens, the largest first. */
export function mean(lists) {
  const sums = new Map();
  for (const { name, share } of lists.flat()) sums.set(name, (sums.get(name) ?? 0) + share);
  const shares = [...sums].map(([name, sum]) => ({ name, share: sum / lists.length }));
  return shares.sort((a, b) => b.share - a.share);
}

/** For each layer of a piece its experts {name, weight, score}, the largest first; null where the server sent none. */
export function byLayer({ tokens }) {
  const [first] = tokens;
  if (!first?.layers || tokens.some(token => !token.cells || token.layers !== first.layers)) return null;
  const found = first.layers.map(() => new Map());
  for (const { cells } of tokens) {
    for (let i = 0; i < cells.numbers.length; i += 4) gather(found, cells, i, tokens.length);
  }
  return first.layers.map((layer, l) => ({ layer, experts: ranked(found[l]) }));
}

function gather(found, { numbers, experts }, i, count) {
  const [layer, expert, weight, score] = numbers.subarray(i, i + 4);
  const name = named(experts, expert);
  const sum = found[layer]?.get(name) ?? { name, weight: 0, score: 0, times: 0 };
  found[layer]?.set(name, {
    name,
    weight: sum.weight + weight / count,
    score: sum.score + score,
    times: sum.times + 1,
  });
}

const ranked = experts =>
  [...experts.values()]
    .map(({ name, weight, score, times }) => ({ name, weight, score: score / times }))
    .sort((a, b) => b.weight - a.weight || b.score - a.score);

const named = (experts, index) => experts[index] ?? `expert ${index}`;

/** [layer, expert, weight, score] one after the other: a long answer has hundreds of thousands of them. */
function packed(byLayer, experts) {
  if (!Array.isArray(byLayer)) return null;
  const rows = byLayer.flatMap((row, layer) => row.map(([expert, weight, score]) => [layer, expert, weight, score]));
  return { numbers: Float32Array.from(rows.flat()), experts };
}
