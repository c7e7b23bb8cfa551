// @ts-check
// Light or dark, as TensorBoard is. It tells plugins by a class on its own page, which has our origin.

function hostBody() {
  try {
    return window.parent !== window ? window.parent.document.body : null;
  } catch {
    return null;
  }
}

const media = window.matchMedia('(prefers-color-scheme: dark)');

function isDark() {
  const body = hostBody();
  return body ? body.classList.contains('dark-mode') : media.matches;
}

export function followTheme(onChange) {
  const apply = () => {
    const theme = isDark() ? 'dark' : 'light';
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    onChange();
  };
  const body = hostBody();
  if (body) new MutationObserver(apply).observe(body, { attributes: true, attributeFilter: ['class'] });
  media.addEventListener('change', apply);
  apply();
}

/** Colours of the present theme, for canvas and SVG. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    card: value('card'),
    ink: value('ink'),
    muted: value('muted'),
    line: value('line'),
    track: value('track'),
    budget: value('budget'),
    empty: value('empty'),
    highlight: value('highlight'),
    ramp: value('ramp').split(/\s+/),
    diverging: value('diverging').split(/\s+/),
    runs: value('runs').split(/\s+/),
  };
}

export const runColour = (colours, index) => colours.runs[index % colours.runs.length];

function parse(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** 256 colours between the stops, as a flat RGB array. */
export function lookup(stops) {
  const parsed = stops.map(parse);
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (parsed.length - 1);
    const low = Math.min(Math.floor(at), parsed.length - 2);
    for (let c = 0; c < 3; c++) table[i * 3 + c] = parsed[low][c] + (parsed[low + 1][c] - parsed[low][c]) * (at - low);
  }
  return table;
}

export const rgb = (table, i) => `rgb(${table[i * 3]},${table[i * 3 + 1]},${table[i * 3 + 2]})`;
export { parse as parseHex };
