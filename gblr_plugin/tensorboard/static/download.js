// @ts-check
// Saves figures as SVG or PNG and tables as CSV, without leaving the page.

import { button, h } from './dom.js';
import { safeFileName } from './format.js';

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = h('a', { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function svgText(root) {
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(root)}`;
}

/** PNG of an SVG at twice its size. */
export async function rasterise(root) {
  const url = URL.createObjectURL(new Blob([svgText(root)], { type: 'image/svg+xml' }));
  try {
    const picture = new Image();
    picture.src = url;
    await picture.decode();
    const canvas = h('canvas', { width: 2 * root.getAttribute('width'), height: 2 * root.getAttribute('height') });
    canvas.getContext('2d').drawImage(picture, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  } finally {
    URL.revokeObjectURL(url);
  }
}

function cell(value) {
  if (value === null || value === undefined) return '';
  let text = String(value);
  // A name that starts like a formula must stay text in a spreadsheet.
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export const csvText = (rows) => rows.map((row) => row.map(cell).join(',')).join('\n') + '\n';

/** Buttons that save what a view shows; `view` has figure() -> SVG, table() -> rows and fileName(), may load more first in prepare(), and tells its app of failures. */
export function downloads(view) {
  const write = async (action) => {
    await view.prepare?.();
    const root = action === 'csv' ? null : view.figure();
    const name = safeFileName(view.fileName());
    if (action === 'csv') save(new Blob([csvText(view.table())], { type: 'text/csv' }), `${name}.csv`);
    else if (action === 'svg') save(new Blob([svgText(root)], { type: 'image/svg+xml' }), `${name}.svg`);
    else save(await rasterise(root), `${name}.png`);
  };
  const guarded = (action) => () => write(action).catch((error) => view.app.fail(`${action.toUpperCase()} was not saved: ${error.message}`));
  return h(
    'div',
    { class: 'downloads', role: 'group', 'aria-label': 'Download' },
    h('span', { class: 'hint', 'aria-hidden': true }, 'Save'),
    ...['png', 'svg', 'csv'].map((kind) =>
      button(kind.toUpperCase(), guarded(kind), { 'data-save': kind, title: `Download as ${kind.toUpperCase()}` }),
    ),
  );
}
