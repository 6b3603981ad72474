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

/** The first letter and the first later one that nobody has with it yet; numbers where there is none. */
function newMark(name) {
  const [first, ...later] = [...name].filter(letter => /[\p{L}\p{N}]/u.test(letter));
  const tries = later.map(letter => (first + letter).toLowerCase());
  for (let number = 2; number <= known.size + 2; number++) tries.push(`${(first ?? "?").toLowerCase()}${number}`);
  const mark = tries.find(candidate => !marks.has(candidate));
  marks.add(mark);
  return mark;
}
