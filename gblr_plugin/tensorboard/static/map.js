// @ts-check
// The map of a layer: how many blocks cover each place, with the rank by position along its edges.

import { h } from './dom.js';
import { compact, ticks } from './format.js';
import { lookup, parseHex } from './theme.js';

const MARGIN = { left: 44, right: 58, top: 46, bottom: 34 };
const DECADES = 3;

/** The smallest power of two that holds the overlap: the scale rarely changes while learning is played. */
export function scaleFor(structures) {
  const most = Math.max(1, ...structures.map((structure) => structure.mostOverlap()));
  return Math.max(4, 2 ** Math.ceil(Math.log2(most)));
}

/** Share of the colour ramp for a count. The root tells one block from none, and fifty from sixty. */
export const countShade = (count, scale) => Math.min(Math.sqrt(count / scale), 1);

/** Share of the ramp for an energy relative to the strongest; three decades. */
export function energyShade(energy, top) {
  if (!(energy > 0) || !(top > 0)) return 0.06;
  return Math.min(Math.max(1 + Math.log10(energy / top) / DECADES, 0.06), 1);
}

/** Where the parts of a map lie inside a figure w pixels wide. */
export function layout(structure, width) {
  const plotWidth = Math.max(width - MARGIN.left - MARGIN.right, 60);
  const ratio = structure.rows / structure.cols;
  const height = Math.round(Math.min(Math.max(plotWidth * ratio, 120), Math.max(plotWidth, 420), 560));
  return {
    width,
    height: height + MARGIN.top + MARGIN.bottom,
    x: MARGIN.left,
    y: MARGIN.top,
    w: plotWidth,
    h: height,
  };
}

/** Picture of the blocks inside `view`, one pixel per matrix entry or finer than the screen. */
export function picture(structure, view, w, height, { colours, colourBy, scale, minus = null }) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const gw = Math.max(1, Math.min(view.c1 - view.c0, Math.round(w * ratio)));
  const gh = Math.max(1, Math.min(view.r1 - view.r0, Math.round(height * ratio)));
  const cells = structure.raster(view, gw, gh);
  const other = minus ? minus.raster(view, gw, gh) : null;
  const canvas = h('canvas', { width: gw, height: gh });
  const ctx = canvas.getContext('2d');
  const image = ctx.createImageData(gw, gh);
  const table = lookup(minus ? colours.diverging : colours.ramp);
  const empty = parseHex(colours.empty);
  let top = 0;
  if (colourBy === 'energy') for (let i = 0; i < cells.energy.length; i++) top = Math.max(top, cells.count[i] > 0 ? cells.energy[i] : 0);
  for (let y = 0; y < gh; y++) {
    for (let x = 0; x < gw; x++) {
      const from = y * cells.stride + x;
      const to = (y * gw + x) * 4;
      const count = cells.count[from];
      let shade = -1;
      if (other) {
        const change = count - other.count[from];
        if (change || count) shade = 0.5 + (Math.sign(change) * countShade(Math.abs(change), scale)) / 2;
      } else if (count > 0) {
        shade = colourBy === 'energy' ? energyShade(cells.energy[from], top) : countShade(count, scale);
      }
      const at = Math.round(shade * 255) * 3;
      for (let c = 0; c < 3; c++) image.data[to + c] = shade < 0 ? empty[c] : table[at + c];
      image.data[to + 3] = 255;
    }
  }
  ctx.putImageData(image, 0, 0);
  return canvas;
}

/** Draws a map with axes and the rank by position; `options` as for picture(). */
export function drawMap(pen, box, structure, view, options) {
  const { colours } = options;
  const { x, y, w, h: height } = box;
  pen.image(picture(structure, view, w, height, options), x, y, w, height);
  const toX = (col) => x + ((col - view.c0) / (view.c1 - view.c0)) * w;
  const toY = (row) => y + ((row - view.r0) / (view.r1 - view.r0)) * height;
  for (let split = 1; split < structure.splitSizes.length; split++) {
    const row = split * structure.splitRows;
    if (row > view.r0 && row < view.r1) pen.path([[x, toY(row)], [x + w, toY(row)]], { stroke: colours.muted, dash: [4, 3] });
  }
  pen.frame(x - 0.5, y - 0.5, w + 1, height + 1, colours.line);

  const label = { fill: colours.muted, size: 10.5 };
  const inside = (tick, low, high) => tick >= low && tick <= high && Number.isInteger(tick);
  for (const tick of ticks(view.c0, view.c1, Math.max(2, Math.floor(w / 70)))) {
    if (!inside(tick, view.c0, view.c1)) continue;
    pen.path([[toX(tick), y + height], [toX(tick), y + height + 4]], { stroke: colours.line });
    pen.text(toX(tick), y + height + 11, String(tick), { ...label, align: 'middle' });
  }
  for (const tick of ticks(view.r0, view.r1, Math.max(2, Math.floor(height / 50)))) {
    if (!inside(tick, view.r0, view.r1)) continue;
    pen.path([[x - 4, toY(tick)], [x, toY(tick)]], { stroke: colours.line });
    pen.text(x - 7, toY(tick), String(tick), { ...label, align: 'end' });
  }
  pen.text(x + w / 2, y + height + 26, 'column', { ...label, align: 'middle' });
  pen.text(x - 7, y + height + 11, 'row', { ...label, align: 'end' });
  if (!options.minus) drawProfiles(pen, box, structure, view, colours);
}

/** Most components in each of `bins` equal parts of [low, high). */
function binned(profile, low, high, bins) {
  const result = new Float64Array(bins);
  for (let i = 0; i < bins; i++) {
    const from = low + Math.floor((i / bins) * (high - low));
    const to = Math.max(from + 1, low + Math.floor(((i + 1) / bins) * (high - low)));
    for (let at = from; at < to && at < high; at++) result[i] = Math.max(result[i], profile[at]);
  }
  return result;
}

function drawProfiles(pen, box, structure, view, colours) {
  const { x, y, w, h: height } = box;
  const fill = colours.ramp[2];
  const label = { fill: colours.muted, size: 10.5 };
  const cols = binned(structure.profile('cols'), view.c0, view.c1, Math.min(view.c1 - view.c0, Math.round(w)));
  const rows = binned(structure.profile('rows'), view.r0, view.r1, Math.min(view.r1 - view.r0, Math.round(height)));
  const mostCols = Math.max(1, ...cols);
  const mostRows = Math.max(1, ...rows);
  const up = (value) => y - 5 - (value / mostCols) * 22;
  const right = (value) => x + w + 5 + (value / mostRows) * 28;
  const above = [[x, up(0)]];
  cols.forEach((value, i) => above.push([x + (i / cols.length) * w, up(value)], [x + ((i + 1) / cols.length) * w, up(value)]));
  pen.path([...above, [x + w, up(0)]], { fill });
  const beside = [[right(0), y]];
  rows.forEach((value, i) =>
    beside.push([right(value), y + (i / rows.length) * height], [right(value), y + ((i + 1) / rows.length) * height]),
  );
  pen.path([...beside, [right(0), y + height]], { fill });
  // The ends of the two scales, and what they count.
  pen.text(x - 7, up(mostCols) + 4, compact(mostCols), { ...label, align: 'end' });
  pen.text(right(mostRows), y + height + 11, compact(mostRows), { ...label, align: 'middle' });
  pen.text(x + w + 6, y - 15, 'rank', label);
}
