// @ts-check
// Numbers and names as people read them.

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return '–';
  const value = share * 100;
  return `${value >= 99.95 || value === 0 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toPrecision(2)}%`;
}

/** For axes: no needless decimals. */
export const share = (value) => `${Number((value * 100).toPrecision(3))}%`;

/** @type {[number, string][]} */
const UNITS = [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']];

export function compact(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '–';
  for (const [size, unit] of UNITS) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${unit}`;
  }
  return String(Number(value.toPrecision(3)));
}

export const whole = (value) => value.toLocaleString('en-US');

/** Block of a layer: its name up to the first whole number ("transformer.h.0"), else its parent. */
export function blockOf(name) {
  const parts = name.split('.');
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  if (at >= 0 && at < parts.length - 1) return parts.slice(0, at + 1).join('.');
  return parts.slice(0, -1).join('.');
}

/** Layers by block, both in the order of the model. */
export function byBlock(layers, nameOf = (layer) => layer.name) {
  const groups = new Map();
  for (const layer of layers) {
    const block = blockOf(nameOf(layer));
    if (!groups.has(block)) groups.set(block, []);
    groups.get(block).push(layer);
  }
  return groups;
}

/** Two to five round numbers that cover [low, high]. */
export function ticks(low, high, most = 4) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999);
  const result = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) {
    result.push(Number(tick.toPrecision(12)));
  }
  return result;
}

/** "10–58", cyclic intervals as "90–3 ↻"; indices count from 0, both ends included. */
export function interval(start, width, length, offset = 0) {
  if (width === 0) return 'none';
  if (width === length) return `${offset}–${offset + length - 1} (all)`;
  const end = (start + width - 1) % length;
  return `${offset + start}–${offset + end}${end < start ? ' ↻' : ''}`;
}

export function safeFileName(text) {
  return text.replace(/[^A-Za-z0-9._-]+/g, '_').slice(0, 120) || 'gblr';
}
