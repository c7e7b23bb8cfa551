// @ts-check
// All layers as bars of relative FLOPs.

import { fetchOverview } from './api.js';
import { button, h, segmented, select } from './dom.js';
import { downloads } from './download.js';
import { blockOf, byBlock, compact, percent, share as plainShare, whole } from './format.js';
import { SvgPen } from './pen.js';
import { palette, runColour } from './theme.js';

const ORDERS = [
  ['model', 'model order'],
  ['flops', 'relative FLOPs'],
  ['stored', 'multiply-adds'],
  ['live', 'live components'],
  ['name', 'name'],
];

const dense = (layer) => layer.rows * layer.cols;
const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);

function totals(layers) {
  const all = sum(layers, dense);
  const stored = sum(layers, (layer) => layer.stored);
  const budgeted = layers.filter((layer) => layer.budget !== null);
  return {
    stored,
    dense: all,
    flops: all ? stored / all : null,
    live: sum(layers, (layer) => layer.live),
    components: sum(layers, (layer) => layer.components),
    budget: budgeted.length === layers.length && all ? sum(layers, (layer) => layer.budget * dense(layer)) / all : null,
  };
}

export class Overview {
  constructor(app) {
    this.app = app;
    this.shown = [];
    this.order = select('Sort by', (value) => app.set({ order: value }));
    this.direction = button('', () => app.set({ descending: !app.state.descending }), { 'data-control': 'direction' });
    this.grouping = segmented('Grouping', [['block', 'By block'], ['none', 'Flat']], (value) => app.set({ grouping: value }));
    this.totals = h('div', { class: 'totals' });
    this.bars = h('div', { class: 'bars', 'data-view': 'bars' });
    this.element = h(
      'section',
      { class: 'view', 'aria-label': 'Overview' },
      this.totals,
      h(
        'div',
        { class: 'card' },
        h('div', { class: 'toolbar' }, this.order.element, this.direction, this.grouping.element, h('span', { class: 'spring' }), downloads(this)),
        this.bars,
      ),
    );
  }

  async update() {
    const { app } = this;
    const { state } = app;
    this.order.set(ORDERS, state.order);
    this.direction.textContent = state.descending ? 'High to low' : 'Low to high';
    this.direction.hidden = state.order === 'model';
    this.grouping.set(state.grouping);
    const token = (this.token = {});
    const runs = app.selectedRuns();
    const answers = await Promise.all(runs.map((run) => fetchOverview(run.run, app.stepFor(run, state.step))));
    if (this.token !== token) return;
    this.shown = answers.map((answer, i) => ({ ...answer, index: app.runIndex(runs[i].run), totals: totals(answer.layers) }));
    this.draw();
  }

  /** Rows in the chosen order: a layer's name and its entry in each run. */
  rows() {
    const { order, descending } = this.app.state;
    const rows = new Map();
    this.shown.forEach((run, at) => {
      for (const layer of run.layers) {
        if (!rows.has(layer.name)) rows.set(layer.name, { name: layer.name, entries: new Array(this.shown.length).fill(null) });
        rows.get(layer.name).entries[at] = layer;
      }
    });
    const list = [...rows.values()];
    const first = (row) => row.entries.find((entry) => entry);
    const keys = {
      flops: (row) => first(row).stored / dense(first(row)),
      stored: (row) => first(row).stored,
      live: (row) => first(row).live,
    };
    if (order === 'name') list.sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }));
    else if (order !== 'model') list.sort((a, b) => keys[order](a) - keys[order](b));
    if (order !== 'model' && descending) list.reverse();
    return list;
  }

  groups() {
    const rows = this.rows();
    return this.app.state.grouping === 'block' ? [...byBlock(rows)] : [['', rows]];
  }

  /** Largest share any bar reaches; at least the dense layer. */
  reach() {
    return Math.max(1, ...this.shown.flatMap((run) => run.layers.map((layer) => layer.stored / dense(layer))));
  }

  draw() {
    const colours = palette();
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.layer;
    this.totals.replaceChildren(...this.shown.map((run) => this.total(run, colours)));
    const reach = this.reach();
    const groups = this.groups();
    this.totals.hidden = !this.shown.length;
    this.bars.replaceChildren(
      this.shown.length ? this.scale(reach) : '',
      ...groups.flatMap(([block, rows]) => [
        block || groups.length > 1 ? this.blockHead(block, rows) : null,
        ...rows.map((row) => this.row(row, block, reach, colours)),
      ]),
    );
    if (focused !== undefined) [...this.bars.querySelectorAll('button')].find((row) => row.dataset.layer === focused)?.focus();
    if (!groups.some(([, rows]) => rows.length)) this.bars.append(h('p', { class: 'empty' }, 'Choose a run above to see its layers.'));
  }

  total(run, colours) {
    const { totals: t } = run;
    const facts = [
      ['Multiply-adds', `${compact(t.stored)} of ${compact(t.dense)}`],
      ['Live components', `${whole(t.live)} of ${whole(t.components)}`],
      ['Layers', whole(run.layers.length)],
      ['Step', whole(run.step)],
    ];
    return h(
      'article',
      { class: 'card total', style: { '--run': runColour(colours, run.index) }, 'data-run': run.run },
      h('h2', { class: 'run-name' }, h('span', { class: 'swatch' }), h('bdi', {}, run.run || '.')),
      h('div', { class: 'headline' },
        h('strong', { 'data-total': 'flops' }, percent(t.flops)),
        h('span', {}, 'of dense FLOPs', t.budget === null ? null : h('em', {}, ` · budget ${plainShare(t.budget)}`)),
      ),
      h('dl', { class: 'facts' }, ...facts.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))),
    );
  }

  scale(reach) {
    const marks = reach > 1.3 ? [0, 0.5, 1, ...(reach > 1.6 ? [1.5] : [])] : [0, 0.25, 0.5, 0.75, 1];
    return h(
      'div',
      { class: 'scale', 'aria-hidden': true },
      h('span', {}),
      h('div', { class: 'axis' }, ...marks.map((mark) => h('span', { style: { left: `${(mark / reach) * 100}%` } }, plainShare(mark)))),
      h('span', {}),
    );
  }

  blockHead(block, rows) {
    const shares = this.shown.map((_, at) => {
      const entries = rows.map((row) => row.entries[at]).filter((entry) => entry);
      return entries.length ? percent(sum(entries, (entry) => entry.stored) / sum(entries, dense)) : '–';
    });
    return h('h3', { class: 'block' }, h('bdi', {}, block || 'other layers'), h('span', {}, shares.join(' · ')));
  }

  row(row, block, reach, colours) {
    const short = block && row.name.startsWith(`${block}.`) ? row.name.slice(block.length + 1) : row.name;
    const bars = row.entries.map((entry, at) => {
      if (!entry) return h('div', { class: 'bar missing' }, 'not in this run');
      const share = entry.stored / dense(entry);
      return h(
        'div',
        { class: 'bar', style: { '--run': runColour(colours, this.shown[at].index) } },
        h('i', { class: 'dense', style: { width: `${100 / reach}%` } }),
        h('i', { class: 'fill', style: { width: `${(share / reach) * 100}%` } }),
        entry.budget === null ? null : h('i', { class: 'budget', style: { left: `${(entry.budget / reach) * 100}%` } }),
      );
    });
    const values = row.entries.map((entry) => h('span', {}, entry ? percent(entry.stored / dense(entry)) : '–'));
    const first = row.entries.find((entry) => entry);
    const spoken = row.entries
      .map((entry, at) => entry && `${this.shown[at].run}: ${percent(entry.stored / dense(entry))}, ${entry.live} live components`)
      .filter(Boolean)
      .join('; ');
    return h(
      'button',
      {
        type: 'button',
        class: 'layer',
        'data-layer': row.name,
        'aria-label': `${row.name}. ${spoken}. Open its structure`,
        title: `${row.name}, ${first.rows} × ${first.cols}`,
        on: { click: () => this.openLayer(row) },
      },
      h('span', { class: 'name' }, h('bdi', {}, short)),
      h('span', { class: 'stack' }, ...bars),
      h('span', { class: 'value' }, ...values),
    );
  }

  openLayer(row) {
    const at = row.entries.findIndex((entry) => entry);
    const run = row.entries.some((entry, i) => entry && this.shown[i].run === this.app.state.run) ? this.app.state.run : this.shown[at].run;
    this.app.openLayer({ layer: row.name, run });
  }

  // -- downloads ---------------------------------------------------------------------------------------------------

  fileName() {
    return `gblr overview ${this.shown.map((run) => run.run).join(' ')} step ${this.shown[0]?.step ?? ''}`;
  }

  table() {
    const head = ['run', 'step', 'block', 'layer', 'rows', 'columns', 'multiply_adds', 'relative_flops', 'budget', 'live_components', 'components', 'lambda'];
    return [
      head,
      ...this.shown.flatMap((run) =>
        run.layers.map((l) => [run.run, run.step, blockOf(l.name), l.name, l.rows, l.cols, l.stored, l.stored / dense(l), l.budget, l.live, l.components, l.lambda]),
      ),
    ];
  }

  figure() {
    const colours = palette();
    const groups = this.groups();
    const width = 880;
    const label = 250;
    const bar = Math.max(6, 15 - 2 * this.shown.length);
    const rowHeight = Math.max(20, bar * this.shown.length + 8);
    const rows = groups.reduce((total, [block, list]) => total + list.length * rowHeight + (block ? 24 : 0), 0);
    const top = 34 + 20 * this.shown.length;
    const pen = new SvgPen(width, top + rows + 24, colours.card);
    const reach = this.reach();
    const plot = width - label - 80;
    const toX = (share) => label + (share / reach) * plot;
    const ink = { fill: colours.ink, size: 12 };
    const quiet = { fill: colours.muted, size: 11 };
    this.shown.forEach((run, at) => {
      const y = 20 + at * 20;
      pen.rect(16, y - 5, 10, 10, runColour(colours, run.index));
      const t = run.totals;
      const budget = t.budget === null ? '' : `, budget ${plainShare(t.budget)}`;
      pen.text(34, y, `${run.run}, step ${run.step}: ${percent(t.flops)} of dense FLOPs${budget}, ${whole(t.live)} live components`, ink);
    });
    pen.path([[toX(1), top - 8], [toX(1), top + rows]], { stroke: colours.line });
    pen.text(toX(1), top - 14, 'dense', { ...quiet, align: 'middle' });
    let y = top;
    for (const [block, list] of groups) {
      if (block) {
        pen.text(16, y + 14, block, { ...quiet, weight: 600 });
        y += 24;
      }
      for (const row of list) {
        const short = block ? row.name.slice(block.length + 1) : row.name;
        pen.text(label - 10, y + rowHeight / 2, short.length > 36 ? `…${short.slice(-35)}` : short, { ...ink, align: 'end' });
        row.entries.forEach((entry, at) => {
          if (!entry) return;
          const from = y + (rowHeight - bar * this.shown.length) / 2 + at * bar;
          pen.rect(label, from, toX(1) - label, bar - 1, colours.track);
          pen.rect(label, from, toX(entry.stored / dense(entry)) - label, bar - 1, runColour(colours, this.shown[at].index));
          if (entry.budget !== null) pen.rect(toX(entry.budget) - 1, from - 2, 2, bar + 3, colours.budget);
          const text = percent(entry.stored / dense(entry));
          pen.text(width - 16, from + bar / 2, text, { ...quiet, size: Math.min(11, bar + 1), align: 'end' });
        });
        y += rowHeight;
      }
    }
    return pen.root;
  }
}
