// @ts-check
// One set of drawing words for the screen (canvas) and for downloads (SVG), so that each figure is described once.

import { svg } from './dom.js';

/** @typedef {{ stroke?: string, width?: number, dash?: number[], fill?: string }} Line */
/** @typedef {{ fill?: string, size?: number, align?: 'start' | 'middle' | 'end', weight?: number }} Lettering */

export const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

export class CanvasPen {
  /** Sizes the canvas to w x h CSS pixels and clears it. */
  constructor(canvas, w, h) {
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    canvas.width = Math.max(1, Math.round(w * ratio));
    canvas.height = Math.max(1, Math.round(h * ratio));
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
    this.ctx = canvas.getContext('2d');
    this.ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  rect(x, y, w, h, fill) {
    this.ctx.fillStyle = fill;
    this.ctx.fillRect(x, y, w, h);
  }

  frame(x, y, w, h, stroke, width = 1) {
    this.ctx.strokeStyle = stroke;
    this.ctx.lineWidth = width;
    this.ctx.setLineDash([]);
    this.ctx.strokeRect(x, y, w, h);
  }

  /** @param {number[][]} points @param {Line} line */
  path(points, { stroke, width = 1, dash = [], fill } = {}) {
    const { ctx } = this;
    ctx.beginPath();
    points.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
    if (fill) {
      ctx.fillStyle = fill;
      ctx.fill();
    }
    if (stroke) {
      ctx.strokeStyle = stroke;
      ctx.lineWidth = width;
      ctx.lineJoin = 'round';
      ctx.setLineDash(dash);
      ctx.stroke();
    }
  }

  /** @param {number} x @param {number} y @param {string} text @param {Lettering} lettering */
  text(x, y, text, { fill, size = 11, align = 'start', weight = 400 } = {}) {
    const { ctx } = this;
    ctx.font = `${weight} ${size}px ${FONT}`;
    ctx.textAlign = align === 'middle' ? 'center' : align;
    ctx.textBaseline = 'middle';
    ctx.fillStyle = fill;
    ctx.fillText(text, x, y);
  }

  image(picture, x, y, w, h) {
    this.ctx.imageSmoothingEnabled = false;
    this.ctx.drawImage(picture, x, y, w, h);
  }

  clip(x, y, w, h, draw) {
    this.ctx.save();
    this.ctx.beginPath();
    this.ctx.rect(x, y, w, h);
    this.ctx.clip();
    draw();
    this.ctx.restore();
  }
}

// XML has no way to write most control characters: one in a name would make the whole file unreadable.
// eslint-disable-next-line no-control-regex -- they are what it is there to find
const UNWRITABLE = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ud800-\udfff\ufffe\uffff]/gu;

let clips = 0;

export class SvgPen {
  constructor(w, h, background) {
    this.root = svg('svg', {
      xmlns: 'http://www.w3.org/2000/svg',
      width: w,
      height: h,
      viewBox: `0 0 ${w} ${h}`,
      'font-family': FONT,
    });
    this.into = this.root;
    if (background) this.rect(0, 0, w, h, background);
  }

  add(node) {
    this.into.append(node);
    return node;
  }

  rect(x, y, w, h, fill) {
    return this.add(svg('rect', { x, y, width: Math.max(w, 0), height: Math.max(h, 0), fill }));
  }

  frame(x, y, w, h, stroke, width = 1) {
    return this.add(svg('rect', { x, y, width: w, height: h, fill: 'none', stroke, 'stroke-width': width }));
  }

  /** @param {number[][]} points @param {Line} line */
  path(points, { stroke, width = 1, dash = [], fill } = {}) {
    const d = points.map(([x, y], i) => `${i ? 'L' : 'M'}${Number(x.toFixed(2))} ${Number(y.toFixed(2))}`).join('');
    return this.add(
      svg('path', {
        d,
        fill: fill ?? 'none',
        stroke: stroke ?? 'none',
        'stroke-width': width,
        'stroke-linejoin': 'round',
        'stroke-dasharray': dash.length ? dash.join(' ') : null,
      }),
    );
  }

  /** @param {number} x @param {number} y @param {string} text @param {Lettering} lettering */
  text(x, y, text, { fill, size = 11, align = 'start', weight = 400 } = {}) {
    const props = { x, y, fill, 'font-size': size, 'text-anchor': align, 'dominant-baseline': 'central', 'font-weight': weight };
    return this.add(svg('text', props, text.replace(UNWRITABLE, '\ufffd')));
  }

  image(picture, x, y, width, height) {
    const props = { x, y, width, height, href: picture.toDataURL('image/png'), preserveAspectRatio: 'none' };
    return this.add(svg('image', { ...props, style: { 'image-rendering': 'pixelated' } }));
  }

  clip(x, y, width, height, draw) {
    const id = `clip${++clips}`;
    this.add(svg('clipPath', { id }, svg('rect', { x, y, width, height })));
    const outer = this.into;
    this.into = svg('g', { 'clip-path': `url(#${id})` });
    outer.append(this.into);
    draw();
    this.into = outer;
  }

  /** Draws what follows shifted by (x, y). */
  shifted(x, y, draw) {
    const outer = this.into;
    this.into = svg('g', { transform: `translate(${x} ${y})` });
    outer.append(this.into);
    draw();
    this.into = outer;
  }
}
