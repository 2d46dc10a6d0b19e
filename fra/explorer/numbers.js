"use strict";
// The mathematics of the page: entries of a head, scores, channels, attention. Nothing here touches the page's elements
// but the blocks that carry the numbers.
const fra = (() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const n = about.tokens.length;
  const bytes = (id) => {
    const text = atob(document.getElementById(id).textContent);
    const out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out.buffer;
  };
  let halves = null; // every float16 as a number
  const half = () => {
    if (halves) return halves;
    halves = new Float32Array(65536);
    for (let i = 0; i < 65536; i++) {
      const exponent = (i >> 10) & 31;
      const fraction = i & 1023;
      const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
      halves[i] = i & 32768 ? -size : size;
    }
    return halves;
  };
  const read = (buffer, index) => {
    const found = {};
    for (const [name, { kind, shape, at, scale }] of Object.entries(index)) {
      const size = shape.reduce((a, b) => a * b, 1);
      if (kind === "i32") found[name] = new Int32Array(buffer, at, size);
      else if (kind === "f32") found[name] = new Float32Array(buffer, at, size);
      else {
        const raw = new Uint16Array(buffer, at, size);
        const scales = new Float32Array(buffer, scale, shape[0]);
        const table = half();
        const width = shape[1];
        const out = new Float32Array(size);
        for (let i = 0; i < size; i++) out[i] = table[raw[i]] * scales[(i / width) | 0];
        found[name] = out;
      }
    }
    return found;
  };
  const shared = read(bytes("shared"), about.index);
  const { first, slot, value, sigma } = shared;
  const width = about.index.q_bias.shape[2];
  const nEntries = slot.length;
  const posOf = new Int32Array(nEntries);
  for (let t = 0; t < n; t++) for (let e = first[t]; e < first[t + 1]; e++) posOf[e] = t;
  const slotOf = new Map(about.features.map((id, i) => [id, i]));
  // Mean activation while live: in the target's documents where the feature fires there, else in this text.
  const means = new Float64Array(about.features.length);
  const counts = new Float64Array(means.length);
  for (let e = 0; e < nEntries; e++) (means[slot[e]] += value[e]), counts[slot[e]]++;
  for (let i = 0; i < means.length; i++) means[i] = about.means[i] ?? means[i] / counts[i];
  const masked = (t, s) => s > t || t - s >= about.window;
  const dot = (a, i, b, j) => {
    let sum = 0;
    for (let k = 0; k < width; k++) sum += a[i + k] * b[j + k];
    return sum;
  };
  const turn = (vector, at, pos, out, to) => {
    // Rotated to its position, as Rotary.rotate.
    const rot = about.rotary ? about.rotary.rot : 0;
    const halfway = rot / 2;
    for (let k = rot; k < width; k++) out[to + k] = vector[at + k];
    for (let k = 0; k < rot; k++) {
      const quarter = about.rotary.adjacent
        ? k % 2 ? vector[at + k - 1] : -vector[at + k + 1]
        : k < halfway ? -vector[at + k + halfway] : vector[at + k - halfway];
      out[to + k] = vector[at + k] * shared.cos[pos * rot + k] + quarter * shared.sin[pos * rot + k];
    }
  };
  const TERMS = ["feature", "bias", "error"];
  const heads = new Map();
  class Head {
    constructor(place) {
      this.place = place;
      this.number = about.heads[place];
      this.name = `L${about.layer}H${this.number}`;
      this.at = place * n * width;
    }
    get maps() {
      this._maps ??= read(bytes(`head-${this.number}`), about.head_index[this.number]);
      return this._maps;
    }
    // Every live entry's vector, as it enters the score at its position.
    entries(side) {
      const key = `_${side}`;
      if (!this[key]) {
        const from = this.maps[side === "q" ? "U" : "V"];
        const gain = shared[`gain_${side}`];
        const out = new Float32Array(nEntries * width);
        const turned = new Float64Array(width);
        for (let e = 0; e < nEntries; e++) {
          const t = posOf[e];
          const coefficient = (value[e] * gain[this.place * n + t]) / sigma[t];
          turn(from, slot[e] * width, t, turned, 0);
          for (let k = 0; k < width; k++) out[e * width + k] = coefficient * turned[k];
        }
        this[key] = out;
      }
      return this[key];
    }
    blocks(t, s) {
      return TERMS.map((a) =>
        TERMS.map((b) => dot(shared[`q_${a}`], this.at + t * width, shared[`k_${b}`], this.at + s * width)),
      );
    }
    get scores() {
      if (!this._scores) {
        const sums = ["q", "k"].map((side) => {
          const out = new Float64Array(n * width);
          for (const term of TERMS) for (let i = 0; i < out.length; i++) out[i] += shared[`${side}_${term}`][this.at + i];
          return out;
        });
        this._scores = new Float64Array(n * n).fill(-Infinity);
        for (let t = 0; t < n; t++)
          for (let s = 0; s <= t; s++) if (!masked(t, s)) this._scores[t * n + s] = dot(sums[0], t * width, sums[1], s * width);
      }
      return this._scores;
    }
    // F_ij: what one channel brings to each score.
    channel(i, j) {
      const out = new Float64Array(n * n);
      const [a, b] = [slotOf.get(i), slotOf.get(j)];
      const [q, k] = [this.entries("q"), this.entries("k")];
      for (let e = 0; e < nEntries; e++) if (slot[e] === a)
        for (let g = 0; g < nEntries && posOf[g] <= posOf[e]; g++)
          if (slot[g] === b && !masked(posOf[e], posOf[g])) out[posOf[e] * n + posOf[g]] = dot(q, e * width, k, g * width);
      return out;
    }
    // Every pair of the cell, strongest pull first. centred: less the pair's mean over the row's keys. typical: as if
    // both features were as active as on average while live.
    pairs(t, s, centred, typical) {
      const [q, k] = [this.entries("q"), this.entries("k")];
      const found = [];
      const low = Math.max(0, t - about.window + 1);
      const keys = t - low + 1;
      const mean = new Float64Array(width);
      const at = new Map();
      for (let g = first[s]; g < first[s + 1]; g++) at.set(slot[g], g);
      // The mean over keys of a pair is the query's vector times the key feature's mean vector.
      const wanted = new Map(at);
      if (centred) for (let g = first[low]; g < first[t + 1]; g++) if (!at.has(slot[g])) wanted.set(slot[g], -1);
      const vectors = new Map();
      if (centred) {
        for (const feature of wanted.keys()) vectors.set(feature, new Float64Array(width));
        for (let g = first[low]; g < first[t + 1]; g++) {
          const into = vectors.get(slot[g]);
          const scale = typical ? means[slot[g]] / value[g] / keys : 1 / keys;
          for (let x = 0; x < width; x++) into[x] += k[g * width + x] * scale;
        }
      }
      for (let e = first[t]; e < first[t + 1]; e++) {
        const up = typical ? means[slot[e]] / value[e] : 1;
        for (const [feature, g] of wanted) {
          const across = typical && g >= 0 ? means[feature] / value[g] : 1;
          const own = g < 0 ? 0 : dot(q, e * width, k, g * width) * across;
          const less = centred ? dot(q, e * width, vectors.get(feature), 0) : 0;
          found.push({ i: about.features[slot[e]], j: about.features[feature], value: (own - less) * up, here: g >= 0 });
        }
      }
      return found.sort((a, b) => b.value - a.value);
    }
    cap(score) {
      return about.softcap === null || score === -Infinity ? score : about.softcap * Math.tanh(score / about.softcap);
    }
    // Scores with channels scaled: [{i, j, factor}].
    changed(channels) {
      if (!channels.length) return this.scores;
      const out = Float64Array.from(this.scores);
      for (const { i, j, factor } of channels) {
        const map = this.channel(i, j);
        for (let c = 0; c < out.length; c++) if (out[c] !== -Infinity) out[c] += (factor - 1) * map[c];
      }
      return out;
    }
    attention(scores) {
      const out = new Float64Array(n * n);
      for (let t = 0; t < n; t++) {
        let most = -Infinity;
        for (let s = 0; s <= t; s++) most = Math.max(most, this.cap(scores[t * n + s]));
        let sum = 0;
        for (let s = 0; s <= t; s++) sum += out[t * n + s] = Math.exp(this.cap(scores[t * n + s]) - most);
        for (let s = 0; s <= t; s++) out[t * n + s] /= sum;
      }
      return out;
    }
    get pattern() {
      return (this._pattern ??= this.attention(this.scores));
    }
    // G_ij at offsets t - s of 0 to n - 1; one number where positions do not rotate.
    coupling(i, j) {
      const [u, v] = [this.maps.U, this.maps.V];
      const [a, b] = [slotOf.get(i) * width, slotOf.get(j) * width];
      const out = [];
      const [x, y] = [new Float64Array(width), new Float64Array(width)];
      turn(v, b, 0, y, 0);
      for (let offset = 0; offset < (about.rotary ? n : 1); offset++) {
        turn(u, a, offset, x, 0);
        out.push(dot(x, 0, y, 0));
      }
      return out;
    }
    // All channels of the text, in stretches: a click never waits. by: sum, mean, peak.
    async search({ by, least, punctuation, bos, own, typical }, alive) {
      const [q, k] = [this.entries("q"), this.entries("k")];
      const live = about.features.length;
      const [sum, count] = [new Float32Array(live * live), new Uint16Array(live * live)];
      const left = (t) => (punctuation && about.punctuation[t] && !about.bos[t]) || (bos && about.bos[t]);
      let since = performance.now();
      for (let t = 0; t < n; t++) {
        if (left(t)) continue;
        const low = Math.max(0, t - about.window + 1);
        for (let e = first[t]; e < first[t + 1]; e++) {
          const row = slot[e] * live;
          const up = typical ? means[slot[e]] / value[e] : 1;
          for (let s = low; s <= t; s++) {
            if (left(s)) continue;
            for (let g = first[s]; g < first[s + 1]; g++) {
              let term = dot(q, e * width, k, g * width) * up;
              if (typical) term *= means[slot[g]] / value[g];
              const c = row + slot[g];
              count[c]++;
              if (by !== "peak") sum[c] += term;
              else if (Math.abs(term) > Math.abs(sum[c])) sum[c] = term;
            }
          }
          if (performance.now() - since > 25) {
            await new Promise((done) => setTimeout(done));
            if (!alive()) return null;
            since = performance.now();
          }
        }
      }
      const size = (c) => (by === "mean" ? sum[c] / count[c] : sum[c]);
      const kept = [];
      let floor = 0;
      for (let c = 0; c < sum.length; c++) {
        if (count[c] < least || !count[c]) continue;
        const strength = Math.abs(size(c));
        if (strength <= floor || (own && (c / live | 0) === c % live)) continue;
        kept.push(c);
        if (kept.length === 400) {
          kept.sort((a, b) => Math.abs(size(b)) - Math.abs(size(a))).length = 100;
          floor = Math.abs(size(kept[99]));
        }
      }
      kept.sort((a, b) => Math.abs(size(b)) - Math.abs(size(a)));
      return kept.slice(0, 100).map((c) => ({
        i: about.features[(c / live) | 0], j: about.features[c % live], value: size(c), count: count[c],
      }));
    }
    // DFA of a firing of head outputs by source position, through this head, under an attention.
    sources(f, t, attention) {
      const E = this.maps.E;
      const out = new Float64Array(t + 1);
      for (let s = 0; s <= t; s++) {
        let read = 0;
        for (const term of TERMS) read += dot(shared[`v_${term}`], this.at + s * width, E, f * width);
        out[s] = attention[t * n + s] * read * shared.z_gain[t];
      }
      return out;
    }
    // That of one source, by the features of the attention input there; then biases and error.
    through(f, t, s, attention) {
      const { E, O } = this.maps;
      const scale = attention[t * n + s] * shared.z_gain[t];
      const found = [];
      for (let e = first[s]; e < first[s + 1]; e++)
        found.push({ entry: e, feature: about.features[slot[e]], value: (scale * value[e] * dot(O, slot[e] * width, E, f * width)) / sigma[s] });
      const rest = (term) => scale * dot(shared[`v_${term}`], this.at + s * width, E, f * width);
      return { features: found.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)), bias: rest("bias"), error: rest("error") };
    }
  }
  const upstream = (entry) => {
    if (!about.upstream.components) return { why: about.upstream.why };
    const shown = about.index.up_value.shape[1];
    const parts = [];
    for (let c = 0; c < shown; c++) {
      const name = about.upstream.components[shared.up_component[entry * shown + c]];
      if (name) parts.push({ name, value: shared.up_value[entry * shown + c] });
    }
    return { parts, rest: shared.up_rest[entry], constant: shared.up_constant[entry] };
  };
  // Activations of a feature by position, zero where it is silent.
  const activity = (feature) => {
    const out = new Float64Array(n);
    for (let e = 0; e < nEntries; e++) if (about.features[slot[e]] === feature) out[posOf[e]] = value[e];
    return out;
  };
  const head = (place) => {
    if (!heads.has(place)) heads.set(place, new Head(place));
    return heads.get(place);
  };
  return { about, n, shared, head, masked, activity, upstream, slotOf, means, TERMS };
})();
