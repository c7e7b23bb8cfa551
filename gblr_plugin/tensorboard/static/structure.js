// @ts-check
// One layer: its map, its intervals, and what it is compared with. Or all layers as small maps.

import { fetchLayer } from './api.js';
import { button, h, segmented, select } from './dom.js';
import { downloads } from './download.js';
import { byBlock, interval, percent, whole } from './format.js';
import { Gallery } from './gallery.js';
import { componentAt, drawIntervals } from './intervals.js';
import { countShade, drawMap, layout, scaleFor } from './map.js';
import { Structure as Model } from './model.js';
import { CanvasPen, SvgPen } from './pen.js';
import { Pane, Viewport } from './pane.js';
import { lookup, palette, rgb } from './theme.js';

const COMPARE = [['', 'nothing'], ['step', 'another step'], ['layer', 'another layer'], ['run', 'another run']];
const ORDERS = [['start', 'location'], ['width', 'width'], ['energy', 'energy']];
const MOST_LISTED = 5;
const INTERVALS_HEIGHT = 190;
const INTERVALS_TALLEST = 290;

export class StructureView {
  constructor(app) {
    this.app = app;
    this.viewport = new Viewport((what) => this.onViewport(this.viewport, what));
    this.sides = [];
    this.run = select('Run', (value) => app.set({ run: value }));
    this.layer = select('Layer', (value) => app.set({ layer: value }));
    this.compare = select('Compare with', (value) => app.set({ compare: value, compareWith: '' }));
    this.compareWith = select('Which', (value) => app.set({ compareWith: value }));
    this.colourBy = segmented('Colour by', [['count', 'Overlap'], ['energy', 'Energy']], (value) => app.set({ colourBy: value }));
    this.order = select('Sort intervals by', (value) => app.set({ intervalOrder: value }));
    this.zoom = h(
      'div',
      { class: 'downloads', role: 'group', 'aria-label': 'Zoom' },
      button('+', () => this.viewport.zoom(0.6), { 'aria-label': 'Zoom in', 'data-control': 'zoom-in' }),
      button('−', () => this.viewport.zoom(1 / 0.6), { 'aria-label': 'Zoom out' }),
      button('Fit', () => this.viewport.reset(), { 'aria-label': 'Show the whole matrix' }),
    );
    this.legend = h('div', { class: 'legend' });
    this.notes = h('p', { class: 'note', role: 'status', hidden: true });
    this.readout = h('div', { class: 'pointed', 'aria-live': 'polite' });
    this.help = h('p', { class: 'hint', id: 'map-help' },
      'Drag to zoom, double-click to fit. With the map focused: arrow keys move the cross, Shift and arrows pan, + and − zoom, 0 fits. ↻ marks an interval that wraps around.');
    this.maps = h('div', { class: 'maps' });
    this.gallery = new Gallery(app);
    this.single = h(
      'div',
      {},
      h('div', { class: 'toolbar quiet' }, this.colourBy.element, this.zoom, this.legend, h('span', { class: 'spring' }), this.order.element),
      this.maps,
      this.help,
    );
    this.toolbar = h(
      'div',
      { class: 'toolbar' },
      ...[this.run, this.layer, this.compare, this.compareWith].map((part) => part.element),
      h('span', { class: 'spring' }),
      downloads(this),
    );
    this.nothing = h('p', { class: 'empty' }, 'Choose a run above to see its structure.');
    this.element = h(
      'section',
      { class: 'view', 'aria-label': 'Structure' },
      h('div', { class: 'card' },
        this.toolbar,
        this.notes,
        this.nothing,
        this.single,
        this.gallery.element,
      ),
    );
    new ResizeObserver(() => this.redraw()).observe(this.maps);
  }

  // -- what is shown -----------------------------------------------------------------------------------------------

  fillSelects(run, layer) {
    const { app } = this;
    const { state } = app;
    this.run.set(app.selectedRuns().map((r) => [r.run, r.run || '.']), run.run);
    this.run.show(app.selectedRuns().length > 1);
    const grouped = [...byBlock(run.layers)].map(([label, layers]) => ({ label: label || 'other layers', options: layers.map((l) => [l.name, l.name]) }));
    this.layer.set([['', 'all layers'], ...grouped], layer);
    const kinds = COMPARE.filter(([kind]) => kind !== 'run' || app.runs.length > 1);
    this.compare.set(kinds, kinds.some(([kind]) => kind === state.compare) ? state.compare : '');
    this.compare.show(Boolean(layer));
    const choices = {
      step: run.steps.map((step) => [String(step), whole(step)]),
      layer: grouped,
      run: app.runs.filter((r) => r.run !== run.run && r.steps.length).map((r) => [r.run, r.run || '.']),
    }[state.compare];
    this.compareWith.show(Boolean(layer && choices), { step: 'Step', layer: 'Layer', run: 'Run' }[state.compare]);
    if (!layer || !choices) return null;
    const flat = choices.flatMap((choice) => (Array.isArray(choice) ? [choice[0]] : choice.options.map(([value]) => value)));
    const fallback = state.compare === 'layer' ? flat[(flat.indexOf(layer) + 1) % flat.length] : flat[0];
    const value = flat.includes(state.compareWith) ? state.compareWith : fallback;
    this.compareWith.set(choices, value);
    return value;
  }

  /** What to load: [run, layer, step] of each side. */
  wanted(run, layer, other) {
    const { app } = this;
    const { state } = app;
    const sides = [[run, layer, app.stepFor(run, state.step)]];
    if (other === null || other === undefined) return sides;
    if (state.compare === 'step') sides.push([run, layer, Number(other)]);
    else if (state.compare === 'layer') sides.push([run, other, app.stepFor(run, state.step)]);
    else {
      const second = app.runs.find((r) => r.run === other);
      sides.push([second, layer, app.stepFor(second, state.step)]);
    }
    return sides;
  }

  async update() {
    const { app } = this;
    const { state } = app;
    const run = app.structureRun();
    const token = (this.token = {});
    this.nothing.hidden = Boolean(run);
    this.toolbar.hidden = !run;
    if (!run) {
      this.sides = [];
      this.single.hidden = this.gallery.element.hidden = true;
      this.setNotes([]);
      return;
    }
    const layer = run.layers.some((l) => l.name === state.layer) ? state.layer : '';
    const other = this.fillSelects(run, layer);
    this.colourBy.set(state.colourBy);
    this.order.set(ORDERS, state.intervalOrder);
    this.single.hidden = !layer;
    this.gallery.element.hidden = Boolean(layer);
    if (!layer) {
      this.sides = [];
      this.setNotes([]);
      await this.gallery.update(run, state.step);
      if (this.galleryColour !== state.colourBy) this.gallery.redraw();
      this.galleryColour = state.colourBy;
      return;
    }
    const wanted = this.wanted(run, layer, other);
    const settled = await Promise.allSettled(wanted.map(([r, name, step]) => fetchLayer(r.run, name, step)));
    if (this.token !== token) return;
    const notes = settled.flatMap((s) => (s.status === 'fulfilled' ? s.value.notes : [s.reason.message]));
    const sides = settled.flatMap((s) => (s.status === 'fulfilled' && s.value.structure ? [s.value] : []));
    if (!sides.length) notes.push('There is no readable structure of this layer at or before this step.');
    this.setNotes(notes);
    this.sides = sides.map((side) => ({ ...side, model: new Model(side.structure), title: `${side.layer}, ${wanted.some(([r]) => r !== run) || app.selectedRuns().length > 1 ? `${side.run || '.'}, ` : ''}step ${whole(side.step)}` }));
    this.draw();
    if (app.playing) this.prefetch(wanted);
  }

  prefetch(wanted) {
    const steps = this.app.upcoming(6);
    const [[run, layer]] = wanted;
    for (const step of steps) fetchLayer(run.run, layer, this.app.stepFor(run, step)).catch(() => {});
  }

  setNotes(notes) {
    this.notes.hidden = !notes.length;
    this.notes.textContent = notes.join(' ');
  }

  // -- drawing -----------------------------------------------------------------------------------------------------

  options() {
    const models = this.sides.map((side) => side.model);
    return { colours: palette(), colourBy: this.app.state.colourBy, scale: scaleFor(models) };
  }

  comparable() {
    const [a, b] = this.sides;
    return b && a.model.rows === b.model.rows && a.model.cols === b.model.cols;
  }

  draw() {
    const { sides } = this;
    this.single.hidden = !sides.length;
    if (!sides.length) return;
    this.viewport.fit(sides[0].model);
    const count = sides.length + (this.comparable() ? 1 : 0);
    if (this.maps.dataset.panes !== String(count)) this.build(count);
    this.redraw();
    this.point();
  }

  build(count) {
    this.maps.dataset.panes = String(count);
    const second = count === 2 ? new Viewport((what) => this.onViewport(second, what)) : this.viewport;
    this.columns = Array.from({ length: count }, (_, i) => {
      const difference = i === 2;
      const pane = new Pane(i === 1 ? second : this.viewport, i, difference ? 'Map of the difference' : 'Map of blocks');
      if (difference) return { pane, intervals: [], element: h('div', { class: 'column' }, pane.element, this.readout) };
      const intervals = ['rows', 'cols'].map((axis) => this.intervals(axis, i));
      const pair = h('div', { class: 'interval-pair' }, ...intervals.map((part) => part.element));
      const beside = count === 1 ? h('div', {}, this.readout, pair) : pair;
      return { pane, intervals, element: h('div', { class: 'column' }, pane.element, beside) };
    });
    this.maps.replaceChildren(...this.columns.map((column) => column.element));
    if (count === 2) this.maps.after(this.readout);
  }

  intervals(axis, side) {
    const label = `${axis === 'rows' ? 'Row' : 'Column'} intervals, sorted. Up and down arrow keys go through the components.`;
    const canvas = h('canvas', { tabindex: 0, role: 'application', 'aria-label': label });
    const part = { axis, canvas, order: [], title: h('figcaption', {}) };
    canvas.addEventListener('pointermove', (event) => {
      const y = event.clientY - canvas.getBoundingClientRect().top;
      this.highlight(componentAt(part.order, part.height, y), side);
    });
    canvas.addEventListener('keydown', (event) => {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!by || !part.order.length) return;
      event.preventDefault();
      const at = part.order.indexOf(this.columns[side].pane.viewport.component) + by;
      this.highlight(part.order[Math.min(Math.max(at, 0), part.order.length - 1)], side);
    });
    canvas.addEventListener('pointerleave', () => this.highlight(-1, side));
    part.element = h('figure', { class: 'intervals' }, part.title, canvas);
    return part;
  }

  redraw() {
    if (!this.sides.length || !this.columns || this.single.hidden) return;
    const options = this.options();
    this.sides.forEach((side, i) => {
      const { pane } = this.columns[i];
      if (pane.viewport !== this.viewport) pane.viewport.fit(side.model);
      pane.show(side.title, side.model, options);
    });
    if (this.columns.length > 2 && this.comparable()) {
      const [a, b] = this.sides;
      this.columns[2].pane.show('difference: first minus second', a.model, { ...options, minus: b.model });
    }
    this.drawIntervals();
    this.drawLegend(options);
  }

  drawIntervals() {
    const colours = palette();
    this.sides.forEach(({ model }, i) => {
      for (const part of this.columns[i].intervals) {
        part.order = model.sorted(part.axis, this.app.state.intervalOrder);
        const width = Math.floor(part.element.clientWidth);
        part.height = this.intervalsHeight(i);
        part.title.textContent = `${part.axis === 'rows' ? 'Row' : 'Column'} intervals`;
        if (width > 60) drawIntervals(new CanvasPen(part.canvas, width, part.height), width, part.height, model, part.axis, part.order, colours, this.columns[i].pane.viewport.componentOf(i));
      }
    });
  }

  /** Beside a tall map, intervals use its height. */
  intervalsHeight(i) {
    const { element, pane } = this.columns[i];
    const beside = this.columns.length === 1 && pane.element.clientWidth < element.clientWidth * 0.8;
    const share = beside && pane.box ? (pane.box.height - 190) / 2 : 0;
    return Math.round(Math.min(Math.max(share, INTERVALS_HEIGHT), INTERVALS_TALLEST));
  }

  drawLegend({ colours, colourBy, scale }) {
    const table = lookup(colours.ramp);
    const stops = Array.from({ length: 9 }, (_, i) => rgb(table, Math.round((i / 8) * 255))).join(',');
    const counts = [scale, 1024, 256, 64, 16, 4, 1].filter((count, i) => i === 0 || count < scale);
    const apart = [];
    for (const count of counts) {
      const at = countShade(count, scale);
      if (!apart.length || apart.at(-1)[1] - at > 0.16) apart.push([String(count), at]);
    }
    const marks = colourBy === 'energy' ? [['weak', 0], ['strong', 1]] : apart.reverse();
    this.legend.replaceChildren(
      h('span', { class: 'hint' }, colourBy === 'energy' ? 'Energy per entry' : 'Blocks that overlap'),
      h('span', { class: 'ramp', style: { 'background-image': `linear-gradient(90deg,${stops})` } },
        ...marks.map(([text, at]) => h('small', { style: { left: `${at * 100}%`, transform: at === 0 ? 'none' : null } }, text))),
    );
  }

  // -- pointing ----------------------------------------------------------------------------------------------------

  onViewport(viewport, what) {
    if (what === 'view') this.redraw();
    this.point(viewport);
  }

  /** Component numbers last over the steps of a layer; in other layers and runs they mean something else. */
  ownerOf(pane) {
    return this.app.state.compare === 'step' ? null : pane;
  }

  highlight(k, side) {
    const { viewport } = this.columns[side].pane;
    Object.assign(viewport, { component: k, owner: this.ownerOf(side), cross: null });
    this.overlays();
    if (k >= 0) this.list([k], `Component ${k}`, this.sides[side].model);
    else this.list([], null);
  }

  overlays() {
    for (const { pane } of this.columns ?? []) pane.drawOverlay();
    this.drawIntervals();
  }

  point(viewport = this.viewport) {
    if (!this.sides.length) return;
    const { cross } = viewport;
    const at = viewport === this.viewport ? (this.sides[viewport.pane] ? viewport.pane : 0) : 1;
    const { model } = this.sides[at];
    const found = cross ? model.at(cross.row, cross.col) : [];
    viewport.component = found.length ? found[0] : -1;
    viewport.owner = this.ownerOf(at);
    this.overlays();
    if (!cross) this.list([], null);
    else {
      const counts = this.comparable() ? this.sides.map((side) => side.model.at(cross.row, cross.col).length) : [found.length];
      const blocks = counts.map((count) => (count === 1 ? '1 block' : `${count} blocks`)).join(' and ');
      this.list(found, `Row ${cross.row}, column ${cross.col}: ${blocks}`, model);
    }
  }

  list(components, title, model) {
    if (title === null) {
      this.readout.replaceChildren(h('p', { class: 'hint' }, 'Point at the map to see the blocks that cover a place.'));
      return;
    }
    const rows = components.slice(0, MOST_LISTED).map((k) =>
      h('tr', {},
        h('td', {}, `#${k}`),
        h('td', {}, interval(model.rowStart[k], model.rowWidth[k], model.splitRows, model.offset[k])),
        h('td', {}, interval(model.colStart[k], model.colWidth[k], model.cols)),
        h('td', {}, whole(model.rowWidth[k] + model.colWidth[k])),
        h('td', {}, percent(model.energy[k])),
      ),
    );
    const more = components.length > MOST_LISTED ? h('p', { class: 'hint' }, `and ${components.length - MOST_LISTED} weaker ones`) : null;
    this.readout.replaceChildren(
      h('p', { class: 'place' }, title),
      rows.length
        ? h('table', {}, h('thead', {}, h('tr', {}, ...['Component', 'Rows', 'Columns', 'Multiply-adds', 'Energy'].map((t) => h('th', { scope: 'col' }, t)))), h('tbody', {}, ...rows))
        : '',
      more ?? '',
    );
  }

  // -- downloads ---------------------------------------------------------------------------------------------------

  async prepare() {
    if (!this.sides.length && this.gallery.run) await this.gallery.loadAll();
  }

  fileName() {
    const [side] = this.sides;
    return side ? `gblr ${side.run} ${side.layer} step ${side.step}` : `gblr ${this.app.structureRun()?.run ?? ''} all layers`;
  }

  table() {
    const head = ['run', 'layer', 'step', 'component', 'row_start', 'row_width', 'column_start', 'column_width', 'energy_share'];
    const sides = this.sides.length ? this.sides : this.gallery.loaded().map((card) => ({ run: this.gallery.run.run, layer: card.shape.name, step: this.app.stepFor(this.gallery.run, this.app.state.step), model: card.structure }));
    return [head, ...sides.flatMap(({ run, layer, step, model }) =>
      model.rowWidth.map((_, k) => [run, layer, step, k, model.rowStart[k] + model.offset[k], model.rowWidth[k], model.colStart[k], model.colWidth[k], model.energy[k]]))];
  }

  figure() {
    if (!this.sides.length) return this.gallery.figure(`${this.gallery.run?.run ?? ''}, step ${this.app.currentStep()}`);
    const options = this.options();
    const { colours } = options;
    const width = 520;
    const boxes = this.sides.map(({ model }) => layout(model, width));
    const top = 56;
    const tallest = Math.max(...boxes.map((box) => box.height));
    const pen = new SvgPen(width * boxes.length + 24, top + tallest + 2 * (INTERVALS_HEIGHT + 28) + 8, colours.card);
    this.sides.forEach(({ model, title }, i) => {
      pen.shifted(12 + i * width, 0, () => {
        pen.text(4, 22, title, { fill: colours.ink, size: 13, weight: 600 });
        pen.text(4, 40, `${percent(model.relativeFlops)} of dense FLOPs, ${model.live.length} of ${model.components} components live`, { fill: colours.muted });
      });
      const view = this.comparable() || i === 0 ? this.viewport.view : model.whole();
      pen.shifted(12 + i * width, top, () => drawMap(pen, boxes[i], model, view, options));
      ['rows', 'cols'].forEach((axis, a) => {
        pen.shifted(12 + i * width, top + tallest + 12 + a * (INTERVALS_HEIGHT + 28), () => {
          pen.text(8, 6, axis === 'rows' ? 'Row intervals' : 'Column intervals', { fill: colours.ink, size: 12, weight: 600 });
          pen.shifted(0, 14, () => drawIntervals(pen, width - 24, INTERVALS_HEIGHT, model, axis, model.sorted(axis, this.app.state.intervalOrder), colours, -1));
        });
      });
    });
    return pen.root;
  }
}
