// @ts-check
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

/** The end of a name, which tells layers apart. */
const fitted = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);

export class Gallery {
  constructor(app) {
    this.app = app;
    this.cards = new Map();
    this.element = h('div', { class: 'gallery', 'data-view': 'gallery' });
    this.visible = new Set();
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const { layer } = /** @type {HTMLElement} */ (target).dataset;
        if (isIntersecting) this.visible.add(layer);
        else this.visible.delete(layer);
        if (isIntersecting) this.load(layer).catch(() => {});
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
      { type: 'button', class: 'thumb', 'data-layer': shape.name, title: shape.name, on: { click: () => this.app.openLayer({ layer: shape.name }) } },
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

  loaded() {
    return [...this.cards.values()].filter((card) => card.structure);
  }

  /** Downloads show every layer, also those that were never scrolled to. */
  loadAll() {
    return Promise.allSettled([...this.cards.keys()].map((name) => this.load(name)));
  }

  figure(title) {
    const colours = palette();
    const cell = THUMB + 16;
    const across = 6; // thumbs in a row of shelves
    const shelves = [];
    for (const [block, cards] of byBlock(this.loaded(), (card) => card.shape.name)) {
      for (let from = 0; from < cards.length; from += across) shelves.push({ block, cards: cards.slice(from, from + across) });
    }
    const rowHeight = THUMB + 58;
    let x = 0;
    let row = 0;
    let widest = 2;
    for (const shelf of shelves) {
      if (x + shelf.cards.length > across) [x, row] = [0, row + 1];
      Object.assign(shelf, { x, row });
      x += shelf.cards.length;
      widest = Math.max(widest, x);
    }
    const pen = new SvgPen(widest * cell + 32, 52 + (row + 1) * rowHeight, colours.card);
    pen.text(16, 24, title, { fill: colours.ink, size: 14, weight: 600 });
    for (const { block, cards, x: column, row: line } of shelves) {
      const left = 16 + column * cell;
      const top = 46 + line * rowHeight;
      pen.text(left, top + 8, fitted(block || 'other layers', 22 * cards.length), { fill: colours.muted, size: 11.5, weight: 600 });
      cards.forEach((card, i) => {
        const [w, height] = size(card.shape);
        const at = left + i * cell;
        pen.image(this.picture(card, w, height), at, top + 22 + THUMB - height, w, height);
        const short = block ? card.shape.name.slice(block.length + 1) : card.shape.name;
        pen.text(at, top + THUMB + 33, `${fitted(short, 15)} ${percent(card.structure.relativeFlops)}`, { fill: colours.ink, size: 10.5 });
      });
    }
    return pen.root;
  }
}
