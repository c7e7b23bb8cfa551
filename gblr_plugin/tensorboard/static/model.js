// @ts-check
// The structure of one layer at one step, ready to be drawn: which blocks lie where, and how many cover each place.

export class Structure {
  /** `json` as the `layer` route answers it: cyclic intervals of K components, ordered by row split. */
  constructor(json) {
    this.rows = json.rows;
    this.cols = json.cols;
    this.splitSizes = json.split_sizes;
    this.splitRows = json.rows / json.split_sizes.length;
    this.rowWidth = json.row_width;
    this.rowStart = json.row_start;
    this.colWidth = json.col_width;
    this.colStart = json.col_start;
    this.energy = json.energy;
    this.offset = json.split_sizes.flatMap((size, split) => new Array(size).fill(split * this.splitRows));
    this.components = this.rowWidth.length;
    /** Components that cost anything. */
    this.live = [];
    for (let k = 0; k < this.components; k++) if (this.rowWidth[k] && this.colWidth[k]) this.live.push(k);
    this.stored = this.live.reduce((sum, k) => sum + this.rowWidth[k] + this.colWidth[k], 0);
    this.relativeFlops = this.stored / (this.rows * this.cols);
    this.topEnergy = this.live.reduce((top, k) => Math.max(top, this.energy[k]), 0);
    this.rects = this.live.flatMap((k) =>
      this.pieces(k, 'rows').flatMap(([r0, r1]) => this.pieces(k, 'cols').map(([c0, c1]) => ({ k, r0, r1, c0, c1 }))),
    );
  }

  length(axis) {
    return axis === 'rows' ? this.rows : this.cols;
  }

  width(k, axis) {
    return (axis === 'rows' ? this.rowWidth : this.colWidth)[k];
  }

  /** First index covered, counted over all splits. */
  start(k, axis) {
    return axis === 'rows' ? this.rowStart[k] + this.offset[k] : this.colStart[k];
  }

  /** The one or two plain half-open intervals of a cyclic one. */
  pieces(k, axis) {
    const rows = axis === 'rows';
    const length = rows ? this.splitRows : this.cols;
    const start = rows ? this.rowStart[k] : this.colStart[k];
    const offset = rows ? this.offset[k] : 0;
    const end = start + this.width(k, axis);
    const parts = end <= length ? [[start, end]] : [[start, length], [0, end - length]];
    return parts.map(([a, b]) => [a + offset, b + offset]);
  }

  /** Components that cover each index of an axis: the rank available there. */
  profile(axis) {
    const count = new Int32Array(this.length(axis) + 1);
    for (const k of this.live) {
      for (const [a, b] of this.pieces(k, axis)) {
        count[a]++;
        count[b]--;
      }
    }
    for (let i = 1; i < count.length; i++) count[i] += count[i - 1];
    return count.subarray(0, -1);
  }

  /** Components that cover a place, by falling energy. */
  at(row, col) {
    const found = this.rects.filter((t) => t.r0 <= row && row < t.r1 && t.c0 <= col && col < t.c1).map((t) => t.k);
    return [...new Set(found)].sort((a, b) => this.energy[b] - this.energy[a]);
  }

  /** Live components sorted by 'start', 'width' (widest first) or 'energy' (strongest first) along an axis. */
  sorted(axis, order) {
    const keys = {
      start: (k) => this.start(k, axis),
      width: (k) => -this.width(k, axis),
      energy: (k) => -this.energy[k],
    };
    const key = keys[order];
    return [...this.live].sort((a, b) => key(a) - key(b) || this.width(b, axis) - this.width(a, axis) || a - b);
  }

  /**
   * Counts and energy per entry on a grid of w x h cells over `view` (whole rows r0..r1, columns c0..c1). Two-dimensional
   * running sums: the time does not depend on how large the blocks are.
   */
  raster(view, w, h) {
    const stride = w + 1;
    const count = new Float64Array(stride * (h + 1));
    const energy = new Float64Array(stride * (h + 1));
    const sx = w / (view.c1 - view.c0);
    const sy = h / (view.r1 - view.r0);
    for (const { k, r0, r1, c0, c1 } of this.rects) {
      if (r1 <= view.r0 || r0 >= view.r1 || c1 <= view.c0 || c0 >= view.c1) continue;
      const x0 = Math.min(Math.max(Math.round((c0 - view.c0) * sx), 0), w - 1);
      const y0 = Math.min(Math.max(Math.round((r0 - view.r0) * sy), 0), h - 1);
      // A block thinner than a cell still shows.
      const x1 = Math.min(Math.max(Math.round((c1 - view.c0) * sx), x0 + 1), w);
      const y1 = Math.min(Math.max(Math.round((r1 - view.r0) * sy), y0 + 1), h);
      const density = this.energy[k] / (this.rowWidth[k] * this.colWidth[k]);
      for (const [y, x, sign] of [[y0, x0, 1], [y0, x1, -1], [y1, x0, -1], [y1, x1, 1]]) {
        count[y * stride + x] += sign;
        energy[y * stride + x] += sign * density;
      }
    }
    let most = 0;
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        const i = y * stride + x;
        for (const sums of [count, energy]) {
          sums[i] += (x ? sums[i - 1] : 0) + (y ? sums[i - stride] : 0) - (x && y ? sums[i - stride - 1] : 0);
        }
        if (count[i] > most) most = count[i];
      }
    }
    return { w, h, stride, count, energy, most };
  }

  /** The whole matrix as a view. */
  whole() {
    return { r0: 0, r1: this.rows, c0: 0, c1: this.cols };
  }

  mostOverlap() {
    if (this._most === undefined) {
      const w = Math.min(this.cols, 512);
      const h = Math.min(this.rows, 512);
      this._most = this.raster(this.whole(), w, h).most;
    }
    return this._most;
  }
}
