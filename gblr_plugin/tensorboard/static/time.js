// @ts-check
// Curves over the steps of training, on one axis of steps. A click moves the slider.

import { fetchCurves } from './api.js';
import { h, select, svg } from './dom.js';
import { downloads } from './download.js';
import { byBlock, compact, percent, share, ticks, whole } from './format.js';
import { SvgPen } from './pen.js';
import { palette, runColour } from './theme.js';

const PANELS = [
  { key: 'relative_flops', title: 'Relative FLOPs', format: percent, axis: share, fromZero: true, height: 150 },
  { key: 'live', title: 'Live components', format: (v) => whole(v), axis: compact, fromZero: true, height: 110 },
  { key: 'sigma', title: 'Smoothness σ', format: compact, fromZero: true, height: 90 },
  { key: 'lambda', title: 'Shrinkage λ', format: compact, fromZero: true, height: 90 },
  { key: 'loss', title: 'Loss', format: compact, fromZero: false, height: 110 },
];
const LEFT = 56;
const RIGHT = 14;
const TITLE = 26;

export class Time {
  constructor(app) {
    this.app = app;
    this.shown = [];
    this.hover = null;
    this.scope = select('Curves of', (value) => app.set({ scope: value }));
    this.plot = h('div', {
      class: 'curves',
      tabindex: 0,
      role: 'group',
      'aria-label': 'Curves over steps. Left and right arrow keys move the slider.',
      on: {
        keydown: (event) => this.onKey(event),
        pointermove: (event) => this.onMove(event),
        pointerleave: () => this.setHover(null),
        click: (event) => this.onClick(event),
      },
    });
    this.readout = h('div', { class: 'readout', 'aria-live': 'polite' });
    this.element = h(
      'section',
      { class: 'view', 'aria-label': 'Time' },
      h('div', { class: 'card' },
        h('div', { class: 'toolbar' }, this.scope.element, h('span', { class: 'spring' }), downloads(this)),
        this.readout,
        this.plot,
        h('p', { class: 'hint' }, 'Click a curve, or use the arrow keys, to move the step slider.'),
      ),
    );
    new ResizeObserver(() => this.shown.length && this.draw()).observe(this.plot);
  }

  async update() {
    const { app } = this;
    const layers = app.layerNames();
    const groups = [...byBlock(layers, (name) => name)].map(([label, names]) => ({ label: label || 'other layers', options: names.map((n) => [n, n]) }));
    const scope = layers.includes(app.state.scope) ? app.state.scope : '';
    this.scope.set([['', 'all layers together'], ...groups], scope);
    const runs = app.selectedRuns().filter((run) => !scope || run.layers.some((layer) => layer.name === scope));
    const token = (this.token = {});
    const answers = await Promise.all(runs.map((run) => fetchCurves(run.run, scope || null, run.steps.length + ':' + run.steps.at(-1))));
    if (this.token !== token) return;
    this.shown = answers.map((answer) => ({ ...answer, index: app.runIndex(answer.run) }));
    this.draw();
  }

  panels() {
    return PANELS.filter((panel) => this.shown.some((run) => run[panel.key].some((value) => value !== null)));
  }

  extent() {
    const steps = this.shown.flatMap((run) => [run.steps[0], run.steps.at(-1)]);
    const low = Math.min(...steps);
    const high = Math.max(...steps);
    return [low, high > low ? high : low + 1];
  }

  drawInto(pen, width, top, colours) {
    const [low, high] = this.extent();
    const toX = (step) => LEFT + ((step - low) / (high - low)) * (width - LEFT - RIGHT);
    let y = top;
    for (const panel of this.panels()) {
      const values = this.shown.flatMap((run) => run[panel.key].filter((value) => value !== null));
      if (panel.key === 'relative_flops') values.push(...this.shown.flatMap((run) => run.budget.filter((b) => b !== null)));
      let bottom = Math.min(panel.fromZero ? 0 : Infinity, ...values);
      let peak = Math.max(...values);
      if (!(peak > bottom)) [bottom, peak] = [bottom - (bottom ? Math.abs(bottom) * 0.1 : 0), peak + (Math.abs(peak) * 0.1 || 1)];
      const marks = ticks(bottom, peak, panel.height > 100 ? 4 : 2);
      peak = Math.max(peak, marks.at(-1));
      if (!panel.fromZero) bottom = Math.min(bottom, marks[0]);
      const base = y + TITLE + panel.height;
      const toY = (value) => base - ((value - bottom) / (peak - bottom)) * panel.height;
      pen.text(LEFT, y + 12, panel.title, { fill: colours.ink, size: 12, weight: 600 });
      for (const mark of marks) {
        pen.path([[LEFT, toY(mark)], [width - RIGHT, toY(mark)]], { stroke: colours.line });
        pen.text(LEFT - 8, toY(mark), (panel.axis ?? panel.format)(mark), { fill: colours.muted, align: 'end' });
      }
      for (const run of this.shown) {
        const colour = runColour(colours, run.index);
        if (panel.key === 'relative_flops' && run.budget.some((b) => b !== null)) {
          const points = run.steps.map((step, i) => [step, run.budget[i]]).filter(([, b]) => b !== null);
          const [[first, budget]] = points;
          const line = [[toX(first), toY(budget)], ...points.map(([step, b]) => [toX(step), toY(b)])];
          pen.path(line, { stroke: colour, dash: [5, 4], width: 1.25 });
        }
        let stretch = [];
        const flush = () => {
          if (stretch.length === 1) pen.rect(stretch[0][0] - 2, stretch[0][1] - 2, 4, 4, colour);
          else if (stretch.length) pen.path(stretch, { stroke: colour, width: 1.75 });
          stretch = [];
        };
        run.steps.forEach((step, i) => {
          const value = run[panel.key][i];
          if (value === null) flush();
          else stretch.push([toX(step), toY(value)]);
        });
        flush();
        if (panel.key === 'sigma') this.markBoxcar(pen, run, toX, base, panel.height, colours, colour);
      }
      y = base + 8;
    }
    for (const tick of ticks(low, high, Math.max(2, Math.floor(width / 110)))) {
      if (tick > high) continue;
      pen.text(toX(tick), y + 8, compact(tick), { fill: colours.muted, align: tick === low ? 'start' : tick === high ? 'end' : 'middle' });
    }
    pen.text(width - RIGHT, y + 24, 'step', { fill: colours.muted, align: 'end' });
    return { bottom: y + 32, axis: y, toX, low, high };
  }

  /** Where the masks are exact boxcars there is no finite sigma: say so instead of leaving a hole. */
  markBoxcar(pen, run, toX, base, height, colours, colour) {
    const from = run.boxcar.indexOf(true);
    if (from < 0) return;
    const [a, b] = [toX(run.steps[from]), toX(run.steps.at(-1))];
    pen.path([[a, base - height], [b, base - height]], { stroke: colour, width: 1.75, dash: [2, 4] });
    if (b - a > 90) pen.text((a + b) / 2, base - height + 12, 'exact boxcar', { fill: colours.muted, align: 'middle' });
  }

  height() {
    return this.panels().reduce((sum, panel) => sum + panel.height + TITLE + 8, 0) + 40;
  }

  draw() {
    if (!this.shown.length) {
      this.plot.replaceChildren(h('p', { class: 'empty' }, 'Choose a run above to see its curves.'));
      return;
    }
    const width = Math.max(this.plot.clientWidth, 260);
    const colours = palette();
    const pen = new SvgPen(width, this.height());
    this.geometry = this.drawInto(pen, width, 0, colours);
    pen.root.setAttribute('aria-hidden', 'true');
    this.cursor = svg('path', { class: 'cursor', 'stroke-width': 1.5, fill: 'none' });
    this.hoverLine = svg('path', { class: 'hover', 'stroke-width': 1, fill: 'none' });
    pen.root.append(this.cursor, this.hoverLine);
    this.plot.replaceChildren(pen.root);
    this.mark();
  }

  mark() {
    const { toX, axis, low, high } = this.geometry;
    const line = (step) => (step === null || step < low || step > high ? '' : `M${toX(step)} 4V${axis}`);
    const step = this.app.currentStep();
    this.cursor.setAttribute('d', line(step));
    this.hoverLine.setAttribute('d', line(this.hover));
    const at = this.hover ?? step;
    const colours = palette();
    this.readout.replaceChildren(
      ...this.shown.map((run) => {
        const near = this.app.indexAt(run.steps, at);
        const parts = this.panels().map((panel) => {
          const value = run[panel.key][near];
          const text = panel.key === 'sigma' && run.boxcar[near] ? 'boxcar' : value === null ? '–' : panel.format(value);
          return h('span', {}, h('small', {}, panel.title), ' ', text);
        });
        return h('div', { style: { '--run': runColour(colours, run.index) } },
          h('span', { class: 'run-name' }, h('span', { class: 'swatch' }), h('bdi', {}, run.run || '.')),
          h('span', {}, h('small', {}, 'Step'), ' ', whole(run.steps[near])), ...parts);
      }),
    );
  }

  stepAt(event) {
    const { low, high } = this.geometry;
    const box = this.plot.firstElementChild.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    return this.app.nearestStep(low + Math.min(Math.max(share, 0), 1) * (high - low));
  }

  setHover(step) {
    if (!this.shown.length || this.hover === step) return;
    this.hover = step;
    this.mark();
  }

  onMove(event) {
    if (this.shown.length) this.setHover(this.stepAt(event));
  }

  onClick(event) {
    if (this.shown.length) this.app.setStep(this.stepAt(event));
  }

  onKey(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.app.moveStep(by);
  }

  // -- downloads ---------------------------------------------------------------------------------------------------

  fileName() {
    return `gblr time ${this.shown.map((run) => run.run).join(' ')} ${this.app.state.scope}`;
  }

  table() {
    const keys = ['relative_flops', 'budget', 'live', 'sigma', 'lambda', 'loss'];
    return [
      ['run', 'layer', 'step', ...keys, 'exact_boxcar'],
      ...this.shown.flatMap((run) => run.steps.map((step, i) => [run.run, run.layer, step, ...keys.map((key) => run[key][i]), run.boxcar[i]])),
    ];
  }

  figure() {
    const width = 880;
    const colours = palette();
    const top = 20 + 20 * this.shown.length;
    const pen = new SvgPen(width, this.height() + top, colours.card);
    this.shown.forEach((run, at) => {
      pen.rect(16, 15 + at * 20, 10, 10, runColour(colours, run.index));
      pen.text(34, 20 + at * 20, `${run.run}${run.layer ? `, ${run.layer}` : ''}`, { fill: colours.ink, size: 12 });
    });
    this.drawInto(pen, width, top, colours);
    return pen.root;
  }
}
