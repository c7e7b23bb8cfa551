// @ts-check
// Talks to the plugin's routes. Structures never change once written, so they are kept.

const BASE = new URL('../', import.meta.url);
const MOST_KEPT = 3000;

async function get(route, params) {
  const url = new URL(route, BASE);
  for (const [key, value] of Object.entries(params ?? {})) {
    if (value !== null && value !== undefined) url.searchParams.set(key, value);
  }
  const response = await fetch(url, { credentials: 'same-origin' });
  let body;
  try {
    body = await response.json();
  } catch {
    throw new Error(`TensorBoard answered ${response.status} without data`);
  }
  if (!response.ok) throw new Error(body?.error ?? `TensorBoard answered ${response.status}`);
  return body;
}

class Cache {
  constructor() {
    this.kept = new Map();
  }

  get(key, load) {
    if (!this.kept.has(key)) {
      if (this.kept.size >= MOST_KEPT) this.kept.delete(this.kept.keys().next().value);
      const promise = load();
      promise.catch(() => this.kept.delete(key));
      this.kept.set(key, promise);
    }
    return this.kept.get(key);
  }
}

const layers = new Cache();
const overviews = new Cache();
const curves = new Cache();

export const fetchRuns = () => get('runs');

export function fetchOverview(run, step) {
  return overviews.get(JSON.stringify([run, step]), () => get('overview', { run, step }));
}

export function fetchLayer(run, layer, step) {
  return layers.get(JSON.stringify([run, layer, step]), () => get('layer', { run, layer, step }));
}

/** `version` changes when the run has new steps. */
export function fetchCurves(run, layer, version) {
  return curves.get(JSON.stringify([run, layer, version]), () => get('time', { run, layer }));
}
