// @ts-check
// The step slider, which plays learning.

import { h } from './dom.js';
import { whole } from './format.js';

const FRAME_MS = 110;

export class Transport {
  constructor(app) {
    this.app = app;
    const step = (text, label, by) => h('button', { type: 'button', class: 'button', 'aria-label': label, on: { click: () => app.moveStep(by) } }, text);
    this.play = h('button', { type: 'button', class: 'button play', 'data-control': 'play', on: { click: () => this.toggle() } });
    this.range = h('input', { type: 'range', min: 0, step: 1, 'aria-label': 'Step', on: { input: () => app.setStep(app.steps()[this.range.valueAsNumber]) } });
    this.output = h('output', {});
    this.element = h('div', { class: 'transport', role: 'group', 'aria-label': 'Step' }, this.play, step('‹', 'Previous step', -1), this.range, step('›', 'Next step', 1), this.output);
    this.update();
  }

  update() {
    const steps = this.app.steps();
    this.element.hidden = steps.length < 2;
    const at = this.app.indexAt(steps, this.app.currentStep());
    this.range.max = Math.max(steps.length - 1, 0);
    this.range.value = at;
    this.range.style.setProperty('--at', `${steps.length > 1 ? (at / (steps.length - 1)) * 100 : 100}%`);
    const text = steps.length ? `step ${whole(steps[at])}` : '';
    this.range.setAttribute('aria-valuetext', text);
    this.output.replaceChildren(h('strong', {}, text), h('span', {}, `${at + 1} of ${steps.length}`));
    this.play.textContent = this.app.playing ? 'Pause' : 'Play';
  }

  toggle() {
    if (this.app.playing) this.app.playing = false;
    else this.run();
    this.update();
  }

  /** Shows step after step; waits for each to be drawn, so that a slow log plays slower instead of skipping. */
  async run() {
    const { app } = this;
    app.playing = true;
    const steps = app.steps();
    if (app.indexAt(steps, app.currentStep()) === steps.length - 1) await app.setStep(steps[0]);
    while (app.playing && app.indexAt(app.steps(), app.currentStep()) < app.steps().length - 1) {
      const began = performance.now();
      await app.moveStep(1);
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, FRAME_MS - (performance.now() - began))));
    }
    app.playing = false;
    this.update();
  }
}
