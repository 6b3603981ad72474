// One colour and one short mark for each expert, the same everywhere on the page.
// The first ten colours are in style.css, for each scheme; later ones are hues spread by the golden ratio.

const FIRST = 10;
const known = new Map();
const marks = new Set();

/** {name, mark, hue}; hue is a CSS colour that follows the colour scheme. Colours go by who is asked for first. */
export function ensign(name) {
  if (!known.has(name)) known.set(name, { name, mark: newMark(name), hue: newHue(known.size) });
  return known.get(name);
}

function newHue(number) {
  const variable = `--e${number}`;
  if (number >= FIRST) {
    const turn = Math.round(360 * ((number * 0.618034) % 1));
    document.documentElement.style.setProperty(variable, `oklch(var(--far) 0.13 ${turn})`);
  }
  return `var(${variable})`;
}

/**
 * Two letters, "ss" for sst2; the number where that is the difference, "e30" for expert-30. Who comes when those are taken
 * gets another of its letters, and at last a number behind a dot, which no name's own number looks like.
 */
function newMark(name) {
  const [first = "?", ...later] = [...name.toLowerCase()].filter(letter => /[\p{L}\p{N}]/u.test(letter));
  const [, number] = /[^\p{L}\p{N}](\d{1,3})$/u.exec(name) ?? [];
  const tries = [...(number ? [first + number] : []), ...later.map(letter => first + letter)];
  for (let n = 2; n <= known.size + 2; n++) tries.push(`${first}.${n}`);
  const mark = tries.find(candidate => !marks.has(candidate));
  marks.add(mark);
  return mark;
}
