// @ts-check
// The GBLR tab. TensorBoard imports this module into an empty page and calls render().

import { fetchRuns } from './api.js';
import { h, segmented } from './dom.js';
import { onReload } from './host.js';
import { Overview } from './overview.js';
import { StructureView } from './structure.js';
import { followTheme, palette, runColour } from './theme.js';
import { Time } from './time.js';
import { Transport } from './transport.js';

const POLL_MS = 15_000;
const FIRST_RUNS = 4;
const KEPT = 'gblr-tab';

const HOW = `from gblr_plugin.tensorboard import write_structure

write_structure(writer, layers, step, budget=0.5)`;

class App {
  constructor() {
    this.runs = [];
    this.playing = false;
    this.error = null;
    this.state = {
      view: 'overview',
      runs: null, // names of the chosen runs; null: the first few
      run: '', // run of the structure view
      layer: '',
      step: null, // null: the latest, also when more arrive
      order: 'model',
      descending: true,
      grouping: 'block',
      compare: '',
      compareWith: '',
      colourBy: 'count',
      intervalOrder: 'start',
      scope: '',
      ...this.restored(),
    };
    this.tabs = segmented('View', [['overview', 'Overview'], ['structure', 'Structure'], ['time', 'Time']], (view) => this.set({ view }));
    this.chips = h('fieldset', { class: 'runs' }, h('legend', {}, 'Runs'));
    this.banner = h('div', { class: 'banner', role: 'status' });
    this.transport = new Transport(this);
    this.views = { overview: new Overview(this), structure: new StructureView(this), time: new Time(this) };
    this.body = h('main', {});
    this.root = h('div', { class: 'app' }, h('header', {}, this.tabs.element, this.chips), this.banner, this.transport.element, this.body);
  }

  // -- state -------------------------------------------------------------------------------------------------------

  restored() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? '{}');
      return kept && typeof kept === 'object' ? kept : {};
    } catch {
      return {};
    }
  }

  set(change) {
    Object.assign(this.state, change);
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(this.state));
    } catch {
      // Storage may be off; the tab then starts afresh after a reload.
    }
    return this.update();
  }

  /** Shows a layer; what was pressed is gone then, so the keyboard goes on at the choice of layers. */
  async openLayer(change) {
    await this.set({ view: 'structure', ...change });
    this.views.structure.layer.input.focus();
  }

  selectedRuns() {
    const readable = this.runs.filter((run) => run.steps.length);
    const { runs } = this.state;
    return runs ? readable.filter((run) => runs.includes(run.run)) : readable.slice(0, FIRST_RUNS);
  }

  structureRun() {
    const chosen = this.selectedRuns();
    return chosen.find((run) => run.run === this.state.run) ?? chosen[0] ?? null;
  }

  runIndex(name) {
    return this.runs.findIndex((run) => run.run === name);
  }

  layerNames() {
    return [...new Set(this.selectedRuns().flatMap((run) => run.layers.map((layer) => layer.name)))];
  }

  // -- steps -------------------------------------------------------------------------------------------------------

  /** All steps of the chosen runs, ascending. */
  steps() {
    return [...new Set(this.selectedRuns().flatMap((run) => run.steps))].sort((a, b) => a - b);
  }

  currentStep() {
    return this.state.step ?? this.steps().at(-1) ?? null;
  }

  /** Position of the latest step not after `step` (0 if all are). */
  indexAt(steps, step) {
    let at = steps.length - 1;
    while (step !== null && at > 0 && steps[at] > step) at--;
    return Math.max(at, 0);
  }

  /** The step of a run that is shown when the slider is at `step`. */
  stepFor(run, step) {
    return run.steps[this.indexAt(run.steps, step)];
  }

  nearestStep(place) {
    return this.steps().reduce((best, step) => (Math.abs(step - place) < Math.abs(best - place) ? step : best));
  }

  setStep(step) {
    return this.set({ step: step === this.steps().at(-1) ? null : step });
  }

  moveStep(by) {
    const steps = this.steps();
    if (!steps.length) return Promise.resolve();
    const at = this.indexAt(steps, this.currentStep());
    return this.setStep(steps[Math.min(Math.max(at + by, 0), steps.length - 1)]);
  }

  upcoming(count) {
    const steps = this.steps();
    const at = this.indexAt(steps, this.currentStep());
    return steps.slice(at + 1, at + 1 + count);
  }

  // -- showing -----------------------------------------------------------------------------------------------------

  async update() {
    const { view } = this.state;
    const shown = this.views[view] ?? this.views.overview;
    this.tabs.set(view);
    this.drawRuns();
    this.transport.update();
    if (!this.runs.some((run) => run.steps.length)) {
      this.drawBanner();
      this.body.replaceChildren(this.nothing());
      return;
    }
    if (this.body.firstChild !== shown.element) this.body.replaceChildren(shown.element);
    try {
      await shown.update();
      this.failure = null;
    } catch (error) {
      this.failure = error.message;
    }
    this.drawBanner();
  }

  /** Says what went wrong until something else is shown. */
  fail(text) {
    this.failure = text;
    this.drawBanner();
  }

  nothing() {
    return h('div', { class: 'card nothing' },
      h('h2', {}, this.runs.length ? 'No readable GBLR records' : 'No GBLR records yet'),
      h('p', {}, 'This tab shows the structure of layers as training logs it. The Lightning callback and gblr run write it by themselves; any other loop does so with'),
      h('pre', {}, h('code', {}, HOW)));
  }

  drawRuns() {
    const colours = palette();
    const chosen = new Set(this.selectedRuns().map((run) => run.run));
    const key = JSON.stringify([this.runs.map((run) => [run.run, run.steps.length > 0]), [...chosen], colours.runs]);
    if (key === this.runsKey) return;
    this.runsKey = key;
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.run;
    const chips = this.runs.map((run, index) =>
      h('label', { class: 'chip', style: { '--run': runColour(colours, index) } },
        h('input', {
          type: 'checkbox',
          checked: chosen.has(run.run),
          disabled: !run.steps.length,
          'data-run': run.run,
          on: { change: (event) => this.toggleRun(run.run, event.target.checked) },
        }),
        h('span', { class: 'swatch' }),
        h('bdi', {}, run.run || '.')),
    );
    this.chips.replaceChildren(h('legend', {}, 'Runs'), ...chips);
    if (focused !== undefined) [...this.chips.querySelectorAll('input')].find((input) => input.dataset.run === focused)?.focus();
  }

  toggleRun(name, on) {
    const names = this.selectedRuns().map((run) => run.run);
    this.set({ runs: on ? [...names, name] : names.filter((other) => other !== name) });
  }

  drawBanner() {
    const notes = this.runs.flatMap((run) => run.notes.map((note) => `${run.run || '.'}: ${note}`));
    const failures = [this.error, this.failure].filter(Boolean);
    const key = JSON.stringify([notes, failures]);
    if (key === this.bannerKey) return;
    this.bannerKey = key;
    this.banner.replaceChildren(
      ...failures.map((text) => h('p', { class: 'note' }, text)),
      ...(notes.length
        ? [h('details', { class: 'note' }, h('summary', {}, notes.length === 1 ? '1 record was skipped' : `${notes.length} records were skipped`), h('ul', {}, ...notes.map((note) => h('li', {}, note))))]
        : []),
    );
  }

  async poll() {
    try {
      const { runs } = await fetchRuns();
      const changed = JSON.stringify(runs) !== JSON.stringify(this.runs);
      this.error = null;
      if (changed || !this.body.firstChild) {
        this.runs = runs;
        await this.update();
      } else this.drawBanner();
    } catch (error) {
      this.error = `Could not read the runs (${error.message}); trying again.`;
      if (this.body.firstChild) this.drawBanner();
      else await this.update();
    }
  }

  redraw() {
    this.runsKey = null;
    this.views.structure.gallery.redraw();
    return this.runs.length ? this.update() : undefined;
  }
}

export async function render() {
  document.documentElement.lang = 'en';
  document.title = 'GBLR';
  const sheet = h('link', { rel: 'stylesheet', href: new URL('style.css', import.meta.url).href });
  const styled = new Promise((resolve) => {
    sheet.addEventListener('load', resolve);
    sheet.addEventListener('error', resolve);
  });
  document.head.append(h('meta', { name: 'viewport', content: 'width=device-width, initial-scale=1' }), sheet);
  await styled; // canvas colours come from the style sheet
  const app = new App();
  followTheme(() => app.redraw());
  document.body.append(app.root);
  await app.poll();
  onReload(() => app.poll());
  setInterval(() => document.hidden || app.poll(), POLL_MS);
}
