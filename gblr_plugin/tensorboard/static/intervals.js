// @ts-check
// Widths and locations as sorted intervals: one line a component.

import { ticks } from './format.js';
import { energyShade } from './map.js';
import { lookup, rgb } from './theme.js';

const LEFT = 8;
const RIGHT = 8;
const TOP = 6;
const BOTTOM = 22;

/** Index into `order` at a height inside the figure, or -1. */
export function componentAt(order, height, y) {
  const index = Math.floor(((y - TOP) / (height - TOP - BOTTOM)) * order.length);
  return index >= 0 && index < order.length ? order[index] : -1;
}

export function drawIntervals(pen, width, height, structure, axis, order, colours, highlight) {
  const length = structure.length(axis);
  const w = width - LEFT - RIGHT;
  const plot = height - TOP - BOTTOM;
  const toX = (at) => LEFT + (at / length) * w;
  const table = lookup(colours.ramp);
  pen.rect(LEFT, TOP, w, plot, colours.empty);
  const row = plot / Math.max(order.length, 1);
  const thick = Math.max(row >= 4 ? row - 1 : row, 0.6);
  order.forEach((k, i) => {
    const colour = rgb(table, Math.round(energyShade(structure.energy[k], structure.topEnergy) * 255));
    for (const [a, b] of structure.pieces(k, axis)) pen.rect(toX(a), TOP + i * row, Math.max(toX(b) - toX(a), 1), thick, colour);
  });
  for (let split = 1; axis === 'rows' && split < structure.splitSizes.length; split++) {
    const x = toX(split * structure.splitRows);
    pen.path([[x, TOP], [x, TOP + plot]], { stroke: colours.muted, dash: [4, 3] });
  }
  const at = order.indexOf(highlight);
  if (at >= 0) {
    const y = TOP + at * row;
    pen.frame(LEFT - 2, y - 1.5, w + 4, Math.max(row, 2) + 2, colours.highlight, 1.5);
  }
  for (const tick of ticks(0, length, Math.max(2, Math.floor(w / 70)))) {
    if (tick > length || !Number.isInteger(tick)) continue;
    const align = tick === 0 ? 'start' : tick > length * 0.97 ? 'end' : 'middle';
    pen.text(toX(tick), TOP + plot + 11, String(tick), { fill: colours.muted, size: 10.5, align });
  }
}
