// The strongest channels of the whole text, in stretches: a click never waits for it. Exact: a channel is passed over
// only where the lengths of its vectors say that it cannot be among the strongest. by: sum, mean, peak.
const KEPT = 100;
const STRETCH = 12; // ms
// Entries of one side by feature, the features with the longest vectors first, in one row of numbers that the loops read
// from end to end: feature f has the entries from start[f] on, at the positions pos, and no term with it exceeds
// bound[f] times that of the other side.
const byFeature = (vectors, scale, left, summed) => {
  const { width, posOf, about } = fra;
  const { slot } = fra.shared;
  const own = about.features.map(() => []);
  for (let e = 0; e < slot.length; e++) if (!left[posOf[e]]) own[slot[e]].push(e);
  const length = (e) => Math.sqrt(fra.dot(vectors, e * width, vectors, e * width)) * Math.abs(scale[e]);
  const bounds = own.map((list) => list.reduce((all, e) => (summed ? all + length(e) : Math.max(all, length(e))), 0));
  const features = [...own.keys()].filter((f) => own[f].length).sort((a, b) => bounds[b] - bounds[a]);
  const size = features.reduce((all, f) => all + own[f].length, 0);
  const [out, pos, start] = [new Float64Array(size * width), new Int32Array(size), new Int32Array(features.length + 1)];
  let at = 0;
  features.forEach((f, place_) => {
    for (const e of own[f]) {
      for (let x = 0; x < width; x++) out[at * width + x] = vectors[e * width + x] * scale[e];
      pos[at++] = posOf[e];
    }
    start[place_ + 1] = at;
  });
  return { features, out, pos, start, bound: features.map((f) => bounds[f]) };
};
const search = async (head, { by, least, punctuation, bos, own, typical }, alive) => {
  const { about, width, dot, means } = fra;
  const { slot, value } = fra.shared;
  const left = about.tokens.map((_, t) => (punctuation && about.punctuation[t] && !about.bos[t]) || (bos && about.bos[t]));
  const scale = Float64Array.from(slot, (f, e) => (typical ? means[f] / value[e] : 1));
  const [q, k] = ["q", "k"].map((side) => byFeature(head.entries(side), scale, left, by === "sum"));
  let kept = [];
  let floor = 0;
  const shorten = () => {
    kept.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    kept = kept.slice(0, KEPT);
    if (kept.length === KEPT) floor = Math.abs(kept[KEPT - 1].value);
  };
  const rounding = 1 + 1e-9; // of the bounds themselves
  let since = performance.now();
  for (let a = 0; a < q.features.length; a++) {
    if (q.bound[a] * (k.bound[0] ?? 0) * rounding < floor) break;
    for (let b = 0; b < k.features.length && q.bound[a] * k.bound[b] * rounding >= floor; b++) {
      if (own && q.features[a] === k.features[b]) continue;
      let [sum, count] = [0, 0];
      for (let e = q.start[a]; e < q.start[a + 1]; e++) {
        const t = q.pos[e];
        for (let g = k.start[b]; g < k.start[b + 1] && k.pos[g] <= t; g++) {
          if (t - k.pos[g] >= about.window) continue;
          const term = dot(q.out, e * width, k.out, g * width);
          count++;
          if (by !== "peak") sum += term;
          else if (Math.abs(term) > Math.abs(sum)) sum = term;
        }
      }
      if (!count || count < least) continue;
      const size = by === "mean" ? sum / count : sum;
      if (Math.abs(size) > floor) kept.push({ i: about.features[q.features[a]], j: about.features[k.features[b]], value: size, count });
      if (kept.length >= 2 * KEPT) shorten();
    }
    if (performance.now() - since > STRETCH) {
      await new Promise((done) => setTimeout(done));
      if (!alive()) return null;
      since = performance.now();
    }
  }
  shorten();
  return kept;
};
