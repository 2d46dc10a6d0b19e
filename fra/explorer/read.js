"use strict";
// The blocks of the page that carry the numbers, as typed arrays.
const packed = (() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const bytes = (id) => {
    const text = document.getElementById(id).textContent;
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
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
  return { about, block: (id, index) => read(bytes(id), index) };
})();
