// @ts-check
// One map with its caption, cross and zoom. Panes share a viewport, so that what is compared is seen at the same place.

import { h } from './dom.js';
import { percent, whole } from './format.js';
import { drawMap, layout } from './map.js';
import { CanvasPen } from './pen.js';

const SMALLEST = 4;

/** The part of the matrix that is shown, and the place and component pointed at. */
export class Viewport {
  constructor(onChange) {
    this.onChange = onChange;
    this.view = null;
    this.cross = null;
    this.component = -1;
    /** Index of the pane whose component is meant; null: component numbers mean the same in all panes. */
    this.owner = null;
  }

  componentOf(pane) {
    return this.owner === null || this.owner === pane ? this.component : -1;
  }

  fit(structure) {
    const { view } = this;
    if (view && view.r1 <= structure.rows && view.c1 <= structure.cols && this.shape === `${structure.rows}x${structure.cols}`) return;
    this.shape = `${structure.rows}x${structure.cols}`;
    this.size = structure.whole();
    this.view = structure.whole();
    this.cross = null;
  }

  get zoomed() {
    const { view, size } = this;
    return Boolean(view) && (view.r1 - view.r0 < size.r1 || view.c1 - view.c0 < size.c1);
  }

  show(r0, r1, c0, c1) {
    const clamp = (low, high, length) => {
      const span = Math.min(Math.max(Math.round(high - low), Math.min(SMALLEST, length)), length);
      const from = Math.min(Math.max(Math.round(low), 0), length - span);
      return [from, from + span];
    };
    const [a, b] = clamp(r0, r1, this.size.r1);
    const [c, d] = clamp(c0, c1, this.size.c1);
    this.view = { r0: a, r1: b, c0: c, c1: d };
    this.onChange('view');
  }

  /** Zooms by a factor about a place (default: the cross, or the middle). */
  zoom(factor, row, col) {
    const { view, cross } = this;
    if (!view) return;
    const r = row ?? cross?.row ?? (view.r0 + view.r1) / 2;
    const c = col ?? cross?.col ?? (view.c0 + view.c1) / 2;
    this.show(r - (r - view.r0) * factor, r + (view.r1 - r) * factor, c - (c - view.c0) * factor, c + (view.c1 - c) * factor);
  }

  pan(rows, cols) {
    const { view } = this;
    this.show(view.r0 + rows, view.r1 + rows, view.c0 + cols, view.c1 + cols);
  }

  reset() {
    if (!this.size) return;
    this.view = { ...this.size };
    this.onChange('view');
  }

  point(row, col, pane = 0) {
    this.pane = pane;
    this.cross = row === null ? null : { row, col };
    this.onChange('cross');
  }
}

export class Pane {
  constructor(viewport, index, label) {
    this.viewport = viewport;
    this.index = index;
    this.base = h('canvas', { class: 'base', 'aria-hidden': true });
    this.overlay = h('canvas', {
      class: 'overlay',
      tabindex: 0,
      role: 'application',
      'aria-label': label,
      'aria-describedby': 'map-help',
      on: {
        pointermove: (event) => this.onMove(event),
        pointerleave: () => !this.drag && this.viewport.point(null, null, this.index),
        pointerdown: (event) => this.onDown(event),
        pointerup: () => this.onUp(),
        pointercancel: () => (this.drag = null),
        dblclick: () => this.viewport.reset(),
        keydown: (event) => this.onKey(event),
      },
    });
    this.overlay.addEventListener('wheel', (event) => this.onWheel(event), { passive: false });
    this.caption = h('figcaption', {});
    this.stage = h('div', { class: 'stage' }, this.base, this.overlay);
    this.element = h('figure', { class: 'pane' }, this.caption, this.stage);
    this.drag = null;
  }

  show(title, structure, options) {
    this.title = title;
    this.structure = structure;
    this.options = options;
    const facts = options.minus
      ? 'more blocks in warm, fewer in cool'
      : `${percent(structure.relativeFlops)} of dense FLOPs · ${whole(structure.live.length)} of ${whole(structure.components)} components live · ${whole(structure.rows)}\u00a0×\u00a0${whole(structure.cols)}`;
    this.caption.replaceChildren(h('strong', {}, h('bdi', {}, title)), h('span', { class: 'facts-line' }, facts));
    this.draw();
  }

  draw() {
    if (!this.structure) return;
    const width = Math.floor(this.stage.clientWidth);
    if (width < 80) return;
    this.box = layout(this.structure, width);
    drawMap(new CanvasPen(this.base, this.box.width, this.box.height), this.box, this.structure, this.viewport.view, this.options);
    this.drawOverlay();
  }

  drawOverlay() {
    if (!this.box) return;
    const { box, viewport, structure } = this;
    const { view, cross } = viewport;
    const { colours } = this.options;
    const pen = new CanvasPen(this.overlay, box.width, box.height);
    const toX = (col) => box.x + ((col - view.c0) / (view.c1 - view.c0)) * box.w;
    const toY = (row) => box.y + ((row - view.r0) / (view.r1 - view.r0)) * box.h;
    pen.clip(box.x, box.y, box.w, box.h, () => {
      const k = viewport.componentOf(this.index);
      for (const t of structure.rects) {
        if (t.k !== k || this.options.minus) continue;
        pen.frame(toX(t.c0), toY(t.r0), toX(t.c1) - toX(t.c0), toY(t.r1) - toY(t.r0), colours.card, 3.5);
        pen.frame(toX(t.c0), toY(t.r0), toX(t.c1) - toX(t.c0), toY(t.r1) - toY(t.r0), colours.highlight, 2);
      }
      if (cross) {
        const x = toX(cross.col + 0.5);
        const y = toY(cross.row + 0.5);
        for (const [stroke, width] of [[colours.card, 3], [colours.ink, 1]]) {
          pen.path([[x, box.y], [x, box.y + box.h]], { stroke, width });
          pen.path([[box.x, y], [box.x + box.w, y]], { stroke, width });
        }
      }
      if (this.drag?.moved) {
        const { x0, y0, x1, y1 } = this.drag;
        pen.frame(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0), colours.highlight, 1.5);
      }
    });
  }

  place(event) {
    const bounds = this.overlay.getBoundingClientRect();
    const x = event.clientX - bounds.left;
    const y = event.clientY - bounds.top;
    const { box } = this;
    const { view } = this.viewport;
    const row = view.r0 + ((y - box.y) / box.h) * (view.r1 - view.r0);
    const col = view.c0 + ((x - box.x) / box.w) * (view.c1 - view.c0);
    return { x, y, row, col, inside: row >= view.r0 && row < view.r1 && col >= view.c0 && col < view.c1 };
  }

  onMove(event) {
    if (!this.box) return;
    const at = this.place(event);
    if (this.drag) {
      Object.assign(this.drag, { x1: at.x, y1: at.y, row1: at.row, col1: at.col });
      this.drag.moved = Math.hypot(at.x - this.drag.x0, at.y - this.drag.y0) > 5;
    }
    if (at.inside) this.viewport.point(Math.floor(at.row), Math.floor(at.col), this.index);
    else if (this.drag) this.drawOverlay();
    else this.viewport.point(null, null, this.index);
  }

  onDown(event) {
    if (!this.box || event.button !== 0) return;
    const at = this.place(event);
    if (!at.inside) return;
    if (event.pointerType === 'touch') {
      this.viewport.point(Math.floor(at.row), Math.floor(at.col), this.index);
      return;
    }
    this.overlay.setPointerCapture(event.pointerId);
    this.drag = { x0: at.x, y0: at.y, row0: at.row, col0: at.col, moved: false };
  }

  onUp() {
    const { drag } = this;
    this.drag = null;
    if (!drag?.moved) return;
    const order = (a, b) => [Math.floor(Math.min(a, b)), Math.ceil(Math.max(a, b))];
    this.viewport.show(...order(drag.row0, drag.row1), ...order(drag.col0, drag.col1));
  }

  onWheel(event) {
    // A plain wheel scrolls the page; it zooms with Ctrl (and a pinch), or once the map has the focus.
    if (!this.box || !(event.ctrlKey || event.metaKey || document.activeElement === this.overlay)) return;
    const at = this.place(event);
    if (!at.inside) return;
    event.preventDefault();
    this.viewport.zoom(event.deltaY > 0 ? 1.25 : 0.8, at.row, at.col);
  }

  onKey(event) {
    const { viewport } = this;
    const { view } = viewport;
    if (!view) return;
    const rows = Math.max(1, Math.round((view.r1 - view.r0) / 40));
    const cols = Math.max(1, Math.round((view.c1 - view.c0) / 40));
    const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (way && event.shiftKey) viewport.pan(way[0] * rows * 4, way[1] * cols * 4);
    else if (way) {
      const from = viewport.cross ?? { row: Math.floor((view.r0 + view.r1) / 2), col: Math.floor((view.c0 + view.c1) / 2) };
      const clamp = (value, low, high) => Math.min(Math.max(value, low), high - 1);
      viewport.point(clamp(from.row + way[0] * rows, view.r0, view.r1), clamp(from.col + way[1] * cols, view.c0, view.c1), this.index);
    } else if (event.key === '+' || event.key === '=') viewport.zoom(0.6);
    else if (event.key === '-') viewport.zoom(1 / 0.6);
    else if (event.key === '0') viewport.reset();
    else if (event.key === 'Escape') viewport.point(null, null, this.index);
    else return;
    event.preventDefault();
  }
}
