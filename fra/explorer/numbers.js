"use strict";
// The mathematics of the page: entries of a head, scores, channels, attention. Nothing here touches its elements.
const fra = (() => {
  const { about, block } = packed;
  const n = about.tokens.length;
  const shared = block("shared", about.index);
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
    // Four sums at a time: one alone waits for each addition.
    let [x, y, z, w] = [0, 0, 0, 0];
    const four = width - (width % 4);
    for (let k = 0; k < four; k += 4) {
      x += a[i + k] * b[j + k];
      y += a[i + k + 1] * b[j + k + 1];
      z += a[i + k + 2] * b[j + k + 2];
      w += a[i + k + 3] * b[j + k + 3];
    }
    for (let k = four; k < width; k++) x += a[i + k] * b[j + k];
    return x + y + z + w;
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
  // Maps of keys and values: heads that share their keys share these.
  const shares = new Map();
  const keysOf = (name) => {
    if (!shares.has(name)) shares.set(name, block(`keys-${name}`, about.keys_index[name]));
    return shares.get(name);
  };
  class Pairs {
    constructor(queries, keys, here, values) {
      Object.assign(this, { queries, keys, here, values });
    }
    one(at) {
      const column = at % this.keys.length;
      return { i: about.features[this.queries[(at / this.keys.length) | 0]], j: about.features[this.keys[column]], value: this.values[at], here: column < this.here };
    }
    // The most positive of them, or (sign -1) the most negative, the strongest first.
    strongest(most, sign) {
      const kept = [];
      let floor = 0;
      for (let at = 0; at < this.values.length; at++) {
        const size = sign * this.values[at];
        if (size <= floor) continue;
        let place = kept.length;
        while (place && sign * this.values[kept[place - 1]] < size) place--;
        kept.splice(place, 0, at);
        if (kept.length > most) kept.pop();
        if (kept.length === most) floor = sign * this.values[kept[most - 1]];
      }
      return kept.map((at) => this.one(at));
    }
  }
  class Head {
    constructor(place) {
      this.place = place;
      this.number = about.heads[place];
      this.name = `L${about.layer}H${this.number}`;
      this.at = place * n * width;
    }
    get maps() {
      return (this._maps ??= { ...block(`head-${this.number}`, about.head_index[this.number]), ...keysOf(about.keys_of[this.place]) });
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
    // What each pair of features brings to a cell. typical: as if both were as active as on average while live.
    _raw(t, s, typical) {
      const [q, k] = [this.entries("q"), this.entries("k")];
      const keys = slot.subarray(first[s], first[s + 1]);
      const values = new Float64Array((first[t + 1] - first[t]) * keys.length);
      for (let e = first[t], at = 0; e < first[t + 1]; e++)
        for (let g = first[s]; g < first[s + 1]; g++)
          values[at++] = dot(q, e * width, k, g * width) * (typical ? (means[slot[e]] / value[e]) * (means[slot[g]] / value[g]) : 1);
      return { keys, values, places: new Map(Array.from(keys, (key, column) => [key, column])) };
    }
    // Its mean over the row's keys: the query's vector times the key feature's mean vector.
    _average(t, typical) {
      const key = `${t} ${typical}`;
      if (this._row?.key === key) return this._row;
      const [q, k] = [this.entries("q"), this.entries("k")];
      const low = Math.max(0, t - about.window + 1);
      const places = new Map();
      for (let g = first[low]; g < first[t + 1]; g++) if (!places.has(slot[g])) places.set(slot[g], places.size);
      const vectors = new Float64Array(places.size * width);
      for (let g = first[low]; g < first[t + 1]; g++) {
        const into = places.get(slot[g]) * width;
        const scale = (typical ? means[slot[g]] / value[g] : 1) / (t - low + 1);
        for (let x = 0; x < width; x++) vectors[into + x] += k[g * width + x] * scale;
      }
      const values = new Float64Array((first[t + 1] - first[t]) * places.size);
      for (let e = first[t], at = 0; e < first[t + 1]; e++) {
        const up = typical ? means[slot[e]] / value[e] : 1;
        for (let column = 0; column < places.size; column++) values[at++] = dot(q, e * width, vectors, column * width) * up;
      }
      return (this._row = { key, keys: [...places.keys()], values, places });
    }
    // Every pair of the cell. less: "nothing", "row" (the pair's mean over the row's keys is taken away), or another key
    // (what the pair brings there is). only: pairs that are live at the cell, without those that are not.
    pairs(t, s, less, typical, only = false) {
      const queries = slot.subarray(first[t], first[t + 1]);
      const own = this._raw(t, s, typical);
      if (less === "nothing") return new Pairs(queries, own.keys, own.keys.length, own.values);
      const other = less === "row" ? this._average(t, typical) : this._raw(t, less, typical);
      const keys = [...own.keys, ...(only ? [] : Array.from(other.keys).filter((key) => !own.places.has(key)))];
      const here = own.keys.length;
      const columns = Int32Array.from(keys, (key) => other.places.get(key) ?? -1);
      const values = new Float64Array(queries.length * keys.length);
      for (let e = 0, at = 0; e < queries.length; e++)
        for (let column = 0; column < keys.length; column++, at++) {
          if (column < here) values[at] = own.values[e * here + column];
          if (columns[column] >= 0) values[at] -= other.values[e * other.keys.length + columns[column]];
        }
      return new Pairs(queries, keys, here, values);
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
  return { about, n, shared, width, posOf, dot, head, masked, activity, upstream, slotOf, means, TERMS };
})();
