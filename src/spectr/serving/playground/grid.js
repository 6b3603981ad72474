// The shape of the picture of all layers: rows are blocks, columns are kinds of modules, both in the model's order.

const BLOCK = /^(.*?)\.?\b(\d+)\.(.+)$/;

/**
 * @param layers their names, such as "model.layers.0.self_attn.q_proj".
 * @returns {{groups: {name, span}[], columns: string[], rows: {name, cells: (number|null)[]}[]}} cells hold places in layers.
 */
export function gridOf(layers) {
  const places = layers.map(place);
  const kinds = [...new Set(places.map(({ kind }) => kind))];
  const rows = new Map();
  places.forEach(({ block, kind }, number) => {
    if (!rows.has(block))
      rows.set(
        block,
        kinds.map(() => null),
      );
    rows.get(block)[kinds.indexOf(kind)] = number;
  });
  const names = blockNames([...rows.keys()]);
  return {
    groups: groupsOf(kinds),
    columns: kinds.map(kind => kind.split(".").at(-1)),
    rows: [...rows.values()].map((cells, r) => ({ name: names[r], cells })),
  };
}

function place(layer) {
  const [, before, number, kind] = BLOCK.exec(layer) ?? [null, "", "", layer];
  return { block: `${before}\n${number}`, kind };
}

/** The number alone, with the stack's name where there are several (an encoder and a decoder). */
function blockNames(blocks) {
  const split = blocks.map(block => block.split("\n"));
  const stacks = new Set(split.filter(([, number]) => number).map(([before]) => before));
  return split.map(([before, number]) =>
    stacks.size > 1 && number ? `${before.split(".")[0]} ${number}` : number || "–",
  );
}

/** Neighbouring columns of one parent, "self_attn" or "mlp". */
function groupsOf(kinds) {
  const groups = [];
  for (const kind of kinds) {
    const name = kind.split(".").slice(0, -1).join(".");
    if (groups.at(-1)?.name === name) groups.at(-1).span += 1;
    else groups.push({ name, span: 1 });
  }
  return groups;
}
