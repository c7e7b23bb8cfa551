// All layers of a run as small maps.

import { fetchLayer } from './api.js';
import { h } from './dom.js';
import { byBlock, percent } from './format.js';
import { picture, scaleFor } from './map.js';
import { Structure } from './model.js';
import { CanvasPen, SvgPen } from './pen.js';
import { palette } from './theme.js';

const THUMB = 132;

function size(shape) {
  const ratio = Math.min(Math.max(shape.rows / shape.cols, 0.3), 1.6);
  return ratio > 1 ? [Math.round(THUMB / ratio), THUMB] : [THUMB, Math.round(THUMB * ratio)];
}

export class Gallery {
  constructor(app) {
    this.app = app;
    this.cards = new Map();
    this.element = h('div', { class: 'gallery', 'data-view': 'gallery' });
    this.visible = new Set();
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.visible.add(target.dataset.layer);
        else this.visible.delete(target.dataset.layer);
        if (isIntersecting) this.load(target.dataset.layer).catch(() => {});
      }
    }, { rootMargin: '200px' });
  }

  async update(run, step) {
    this.step = step;
    const key = JSON.stringify([run.run, run.layers]);
    if (key !== this.key) {
      this.key = key;
      this.run = run;
      this.cards.clear();
      this.visible.clear();
      this.observer.disconnect();
      this.element.replaceChildren(
        ...[...byBlock(run.layers)].map(([block, layers]) =>
          h('section', { class: 'shelf' }, h('h3', {}, h('bdi', {}, block || 'other layers')), h('div', { class: 'thumbs' }, ...layers.map((l) => this.card(l, block)))),
        ),
      );
    }
    await Promise.all([...this.visible].map((name) => this.load(name)));
  }

  card(shape, block) {
    const canvas = h('canvas', {});
    const share = h('span', { class: 'share' });
    const short = block && shape.name.startsWith(`${block}.`) ? shape.name.slice(block.length + 1) : shape.name;
    const element = h(
      'button',
      { type: 'button', class: 'thumb', 'data-layer': shape.name, title: shape.name, on: { click: () => this.app.set({ layer: shape.name }) } },
      canvas,
      h('span', { class: 'name' }, h('bdi', {}, short)),
      share,
    );
    const [w, height] = size(shape);
    new CanvasPen(canvas, w, height);
    this.cards.set(shape.name, { canvas, share, shape, structure: null });
    this.observer.observe(element);
    return element;
  }

  async load(name) {
    const card = this.cards.get(name);
    const { step } = this;
    const answer = await fetchLayer(this.run.run, name, this.app.stepFor(this.run, step));
    if (this.step !== step || this.cards.get(name) !== card) return;
    card.structure = answer.structure ? new Structure(answer.structure) : null;
    this.paint(card);
  }

  paint(card) {
    const { structure, canvas } = card;
    card.share.textContent = structure ? percent(structure.relativeFlops) : 'unreadable';
    const [w, height] = size(card.shape);
    const pen = new CanvasPen(canvas, w, height);
    if (structure) pen.image(this.picture(card, w, height), 0, 0, w, height);
  }

  picture(card, w, height) {
    const { structure } = card;
    const options = { colours: palette(), colourBy: this.app.state.colourBy, scale: scaleFor([structure]) };
    return picture(structure, structure.whole(), w, height, options);
  }

  redraw() {
    for (const card of this.cards.values()) if (card.structure) this.paint(card);
  }

  /** Every layer, loaded or not, for downloads. */
  loaded() {
    return [...this.cards.values()].filter((card) => card.structure);
  }

  figure(title) {
    const colours = palette();
    const groups = [...byBlock(this.loaded(), (card) => card.shape.name)];
    const columns = Math.max(1, Math.min(6, Math.max(...groups.map(([, cards]) => cards.length), 1)));
    const cell = THUMB + 22;
    const width = Math.max(columns * cell + 24, 420);
    const heights = groups.map(([, cards]) => 30 + Math.ceil(cards.length / columns) * (cell + 18));
    const pen = new SvgPen(width, 50 + heights.reduce((a, b) => a + b, 0), colours.card);
    pen.text(16, 24, title, { fill: colours.ink, size: 14, weight: 600 });
    let y = 46;
    groups.forEach(([block, cards], g) => {
      pen.text(16, y + 8, block || 'other layers', { fill: colours.muted, size: 11.5, weight: 600 });
      cards.forEach((card, i) => {
        const [w, height] = size(card.shape);
        const x = 16 + (i % columns) * cell;
        const top = y + 24 + Math.floor(i / columns) * (cell + 18);
        pen.image(this.picture(card, w, height), x, top + THUMB - height, w, height);
        const short = block ? card.shape.name.slice(block.length + 1) : card.shape.name;
        pen.text(x, top + THUMB + 11, `${short.slice(-16)} ${percent(card.structure.relativeFlops)}`, { fill: colours.ink, size: 10.5 });
      });
      y += heights[g];
    });
    return pen.root;
  }
}
