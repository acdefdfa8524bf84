// Why temperature 0 is not deterministic: numbers to move. The arithmetic is that of IEEE 754 and of PyTorch, to the bit;
// tests/report/test_explain.py compares it with numpy and torch. What was recorded from real kernels is in recorded.json.
const explain = (() => {
  // arithmetic: a number of JavaScript holds every fp32 and bf16 value; each operation is rounded to its format
  const view = new DataView(new ArrayBuffer(4));
  const fp32 = Math.fround;
  const bits = (x) => (view.setFloat32(0, x), view.getUint32(0));
  const fromBits = (word) => (view.setUint32(0, word >>> 0), view.getFloat32(0));
  const bf16 = (x) => {  // as PyTorch: first to fp32, then to the nearest of 16 bits, ties to even
    const word = bits(fp32(x));
    if (Number.isNaN(x)) return NaN;
    return fromBits((word + 0x7fff + ((word >>> 16) & 1)) & 0xffff0000);
  };
  const formats = {fp32: {round: fp32, exponent: 8, fraction: 23}, bf16: {round: bf16, exponent: 8, fraction: 7}};
  const add = (format, x, y) => formats[format].round(x + y);
  const word = (format, x) => format === "fp32" ? (bits(x) >>> 0).toString(16).toUpperCase().padStart(8, "0")
    : (bits(x) >>> 16).toString(16).toUpperCase().padStart(4, "0");
  const place = (x) => { const b = bits(x) | 0; return b < 0 ? -(b & 0x7fffffff) : b; };  // floats in order, as integers
  const ulps = (format, x, y) => Math.abs(place(x) - place(y)) / (format === "fp32" ? 1 : 65536);
  const sum = (values) => values.slice(1).reduce((total, x) => fp32(total + x), values[0]);

  // a kernel with 16 workers: which parts of a row's 16 numbers are summed by themselves, for so many rows
  const workers = 16;
  const parts = (rows) => { let split = 1; while (split * 2 * rows <= workers) split *= 2; return split; };
  const kernel = (rows, values) => {  // the levels of the tree: partial sums, then pairs of them until one is left
    const split = parts(rows), size = values.length / split, levels = [];
    let now = Array.from({length: split}, (_, i) => sum(values.slice(i * size, (i + 1) * size)));
    levels.push(now);
    while (now.length > 1) {
      now = Array.from({length: now.length / 2}, (_, i) => fp32(now[2 * i] + now[2 * i + 1]));
      levels.push(now);
    }
    return {split, levels, result: now[0]};
  };
  const numbers = (seed) => {  // 16 numbers of mixed size, the same for a seed everywhere (mulberry32)
    let state = seed >>> 0;
    const next = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return Array.from({length: 16}, () => fp32((2 * next() - 1) * 4 ** Math.floor(4 * next())));
  };
  const drift = (delta, tokens) => ({ratio: Math.exp(delta), sequence: Math.exp(delta * tokens), k3: Math.expm1(delta) - delta});
  const exported = {fp32, bf16, add, word, ulps, kernel, parts, numbers, drift};
  const home = document.getElementById("explain");
  if (!home) return exported;

  // the page
  const recorded = JSON.parse(document.getElementById("explain-data").textContent);
  const make = (tag, parent, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const at = (id) => document.getElementById(id);
  const input = (parent, label, type, value, options = {}) => {
    const made = make(type === "select" ? "select" : "input", make("label", parent, label + " "));
    if (type === "select") options.choices.forEach((text) => make("option", made, text)); else made.type = type;
    Object.entries(options).forEach(([key, given]) => { if (key !== "choices") made[key] = given; });
    made.value = value;
    return made;
  };
  const table = (parent, head, rows) => {
    const made = make("table", make("div", parent, undefined, "wide"));
    const top = make("tr", make("thead", made));
    head.forEach((text) => { make("th", top, text).scope = "col"; });
    const body = make("tbody", made);
    for (const cells of rows) {
      const row = make("tr", body);
      cells.forEach((cell) => {
        const td = make("td", row, cell.text ?? (cell.node ? undefined : cell), cell.name);
        if (cell.node) td.append(cell.node);
      });
    }
    return made;
  };
  const svg = (tag, parent, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };
  const hue = (i) => "var(--c" + (i === 0 ? 3 : [1, 2, 4, 5, 6, 7, 0][(i - 1) % 7]) + ")";

  const bitsOf = (format, x) => {  // sign, exponent, fraction
    const {exponent, fraction} = formats[format], all = bits(x).toString(2).padStart(32, "0").slice(0, 1 + exponent + fraction);
    const made = document.createElement("code");
    made.className = "bits";
    [[0, 1, "sign"], [1, 1 + exponent, "exponent"], [1 + exponent, all.length, "fraction"]].forEach(([from, to, name]) => {
      make("span", made, all.slice(from, to), name).title = name;
    });
    return made;
  };

  const three = () => {
    const bar = at("e1-in"), fields = ["a", "b", "c"].map((name, i) => input(bar, name, "text", ["0.1", "0.3", "0.9"][i], {size: 9, inputMode: "decimal"}));
    const preset = input(bar, "or take", "select", "0.1, 0.3, 0.9", {choices: ["0.1, 0.3, 0.9", "0.1, 0.2, 0.3", "1e8, -1e8, 1", "16777216, 1, 1", "1, 2, 4"]});
    const draw = () => {
      const out = at("e1-out"), [a, b, c] = fields.map((field) => Number(field.value.trim().replace("−", "-").replace(",", ".") || NaN));
      out.replaceChildren();
      fields.forEach((field, i) => field.setCustomValidity(Number.isNaN([a, b, c][i]) ? "not a number" : ""));
      if ([a, b, c].some(Number.isNaN)) { make("p", out, "Each of a, b and c must be a number, as 0.1, −3 or 1e8."); return; }
      for (const format of Object.keys(formats)) {
        const [x, y, z] = [a, b, c].map(formats[format].round);
        const left = add(format, add(format, x, y), z), right = add(format, x, add(format, y, z)), same = Object.is(left, right);
        const line = (name, value) => [name, String(value), {text: "0x" + word(format, value), name: "word"}, {node: bitsOf(format, value), name: "word"}];
        const made = table(out, [format, "value", "word", "sign, exponent, fraction"],
          [line("a", x), line("b", y), line("c", z), line("(a + b) + c", left), line("a + (b + c)", right)]);
        made.className = same ? "" : "differs";
        const apart = ulps(format, left, right);
        make("p", out, format + ": " + (same ? "the same bits." : "they differ" + (Number.isFinite(left - right) && apart < 1e6 ? ", by " + apart + " of the last place." : ".")), same ? "same" : "differ");
      }
    };
    fields.forEach((field) => field.addEventListener("input", draw));
    preset.addEventListener("input", () => { preset.value.split(", ").forEach((value, i) => { fields[i].value = value; }); draw(); });
    draw();
  };

  const rows = () => {
    const bar = at("e2-in"), slider = input(bar, "rows in the batch", "range", 1, {min: 1, max: 32}), told = make("output", slider.parentNode);
    const other = make("button", bar, "other numbers");
    other.type = "button";
    let seed = 3;
    const tree = (out, found, values) => {
      const wide = 640, leaf = wide / 16, levels = found.levels, high = 22 + 40 * levels.length;
      const drawn = svg("svg", make("div", out, undefined, "wide"), {viewBox: `0 0 ${wide} ${high}`, class: "chart tree", role: "img", "aria-label": `16 numbers in ${found.split} parts, then ${levels.length - 1} levels of pairs`});
      values.forEach((x, i) => svg("text", drawn, {x: (i + 0.5) * leaf, y: 14, class: "step", "font-size": 9.5}, +x.toPrecision(3)));
      levels.forEach((level, k) => level.forEach((value, i) => {
        const width = wide / level.length, middle = (i + 0.5) * width, y = 44 + 40 * k;
        if (k === 0) svg("path", drawn, {class: "brace", d: `M${i * width + 4} 20V26H${(i + 1) * width - 4}V20M${middle} 26V${y - 9}`});
        else [2 * i, 2 * i + 1].forEach((child) => svg("path", drawn, {class: "brace", d: `M${(child + 0.5) * width / 2} ${y - 32}L${middle} ${y - 9}`}));
        svg("text", drawn, {x: middle, y: y + 2, class: "step", "font-size": level.length > 8 ? 8 : 10.5}, level.length > 8 ? +value.toPrecision(3) : word("fp32", value));
      }));
    };
    const draw = () => {
      const out = at("e2-out"), values = numbers(seed), count = +slider.value, found = kernel(count, values), first = kernel(1, values).result;
      told.textContent = count + (count > 1 ? " rows" : " row");
      slider.setAttribute("aria-valuetext", told.textContent);
      out.replaceChildren();
      tree(out, found, values);
      const ours = kernel(32, values).result;
      table(out, ["", "sum of your row", "word"], [
        [found.split > 1 ? `this kernel: ${found.split} workers share your row` : "this kernel: one worker for your row", String(found.result), {text: "0x" + word("fp32", found.result), name: "word"}],
        ["one order for any number of rows", String(ours), {text: "0x" + word("fp32", ours), name: "word"}]]);
      const strip = make("div", out, undefined, "cells"), seen = new Map();
      for (let n = 1; n <= 32; n++) {
        const result = word("fp32", kernel(n, values).result);
        if (!seen.has(result)) seen.set(result, seen.size);
        const cell = make("span", strip, n, n === count ? "cell here" : "cell");
        cell.style.setProperty("--of", hue(seen.get(result)));
        cell.title = `${n} rows: 0x${result}`;
      }
      make("p", out, `Rows 1 to 32, coloured by the word that comes out: ${seen.size} different ${seen.size > 1 ? "words" : "word"} for the same numbers.` + (Object.is(found.result, first) ? "" : " This one is not the one that you get alone."), "small");
    };
    slider.addEventListener("input", draw);
    other.addEventListener("click", () => { seed++; draw(); });
    draw();
  };

  const others = () => {
    const {crowd} = recorded, sizes = crowd.sizes, bar = at("e3-in");
    at("e3-about").textContent = `Recorded from real kernels: ${crowd.model} in ${crowd.dtype} (${crowd.machine}) completes "${crowd.prompt}" at temperature 0, alone, and while others are in the batch. Stock vLLM, and the same vLLM with the ops of rlinvariant. Each word is the fp32 log-prob of a token.`;
    const slider = input(bar, "requests in the batch", "range", sizes.length - 1, {min: 0, max: sizes.length - 1}), told = make("output", slider.parentNode);
    const draw = () => {
      const k = +slider.value, out = at("e3-out");
      told.textContent = sizes[k] === 1 ? "yours alone" : `yours and ${sizes[k] - 1} other${sizes[k] > 2 ? "s" : ""}`;
      slider.setAttribute("aria-valuetext", told.textContent);
      out.replaceChildren();
      const cells = (arm, i) => {  // the token, and the word of its log-prob
        const text = crowd[arm].tokens[k][i], value = crowd[arm].words[k][i], alone = crowd[arm];
        const name = value !== alone.words[0][i] || text !== alone.tokens[0][i] ? "word differ" : "word same";
        return [{text, name: "word"}, {text: "0x" + value, name}, String(fromBits(parseInt(value, 16)).toPrecision(5)).replace("-", "−")];
      };
      const lines = crowd.stock.tokens[0].map((_, i) => [...cells("stock", i), ...cells("ours", i)]);
      table(out, ["stock", "word", "nats", "ours", "word", "nats"], lines).className = "recorded";
      const count = (arm) => crowd[arm].words[k].filter((value, i) => value !== crowd[arm].words[0][i]).length;
      make("p", out, `Of ${lines.length} tokens, ${count("stock")} differ from when you were alone on stock kernels, ${count("ours")} on ours. The two kernels round differently and may write two texts; the question is whether each of them says again what it has said.`).setAttribute("role", "status");
    };
    slider.addEventListener("input", draw);
    draw();
  };
  const differences = () => recorded.crowd.sizes.flatMap((_, k) => recorded.crowd.stock.words[k].flatMap((value, i) => {
    const same = recorded.crowd.stock.tokens[k].slice(0, i + 1).join() === recorded.crowd.stock.tokens[0].slice(0, i + 1).join();
    return k && same ? [Math.abs(fromBits(parseInt(value, 16)) - fromBits(parseInt(recorded.crowd.stock.words[0][i], 16)))] : [];
  }));

  const cliff = () => {
    const bar = at("e4-in"), slider = input(bar, "gap between the two likeliest tokens", "range", 30, {min: 0, max: 60}), told = make("output", slider.parentNode);
    const all = differences(), most = Math.max(...all), lowest = -6, highest = Math.max(-1, Math.ceil(Math.log10(most)));
    const gap = () => 10 ** (lowest + (highest - lowest) * slider.value / 60), x = (value) => 20 + 600 * (Math.log10(Math.max(value, 10 ** lowest)) - lowest) / (highest - lowest);
    const draw = () => {
      const out = at("e4-out"), edge = gap(), over = all.filter((value) => value >= edge).length;
      told.textContent = edge.toPrecision(2) + " nats";
      slider.setAttribute("aria-valuetext", told.textContent);
      out.replaceChildren();
      const drawn = svg("svg", out, {viewBox: "0 0 640 130", class: "chart", role: "img", "aria-label": `${over} of ${all.length} differences reach the gap`});
      for (let k = lowest; k <= highest; k++) {
        svg("path", drawn, {class: "grid", d: `M${x(10 ** k)} 8V100`});
        svg("text", drawn, {class: "step", x: x(10 ** k), y: 116}, "1e" + k);
      }
      const heights = new Map();
      all.forEach((value) => {
        const column = Math.round(x(value) / 5), n = heights.get(column) ?? 0;
        heights.set(column, n + 1);
        if (n < 30) svg("circle", drawn, {cx: column * 5, cy: 97 - 3 * n, r: 1.6, fill: value >= edge ? "var(--bad)" : "var(--soft)"});
      });
      svg("path", drawn, {d: `M${x(edge)} 4V102`, stroke: "var(--ink)", "stroke-width": 2});
      svg("text", drawn, {x: Math.min(600, x(edge) + 5), y: 12, class: x(edge) > 480 ? "tick" : ""}, "the gap");
      make("p", out, `${over} of the ${all.length} recorded differences are at least as large as the gap: there, the other token could win. From that token on the two answers are two texts.`).setAttribute("role", "status");
    };
    slider.addEventListener("input", draw);
    draw();
  };

  const thousand = () => {
    const {demo} = recorded, bar = at("e5-in"), arm = input(bar, "kernels", "select", "stock", {choices: ["stock", "ours"]});
    const length = demo.tokens, slider = input(bar, "tokens so far", "range", length, {min: 1, max: length}), told = make("output", slider.parentNode);
    const which = input(bar, "completion", "range", 1, {min: 1, max: demo.arms.stock.of.length}), number = make("output", which.parentNode);
    const asked = demo.prompt ? `"${demo.prompt}"` : "a random prompt";
    at("e5-about").append(`${demo.completions.toLocaleString("en-US")} completions of ${asked} at temperature 0 while others join and leave, as `);
    make("code", at("e5-about"), "rlinvariant demo");
    at("e5-about").append(` draws them: ${demo.model} in ${demo.dtype} (${demo.machine}). Each chip is one completion; one colour is one text so far. Touch a chip to read it.`);
    const draw = () => {
      const out = at("e5-out"), {of, texts, unique_logprobs: words, logprobs_as_alone: alone} = demo.arms[arm.value], now = +slider.value, chosen = of[which.value - 1], names = new Map();
      told.textContent = now;
      number.textContent = which.value;
      slider.setAttribute("aria-valuetext", now + " tokens");
      out.replaceChildren();
      const group = texts.map((pieces) => pieces.slice(0, now).join("\u0000"));
      of.forEach((i) => { group[i] ??= "text " + i; texts[i] ??= []; if (!names.has(group[i])) names.set(group[i], {n: 0, text: i}); names.get(group[i]).n++; });
      const ranked = [...names].sort((a, b) => b[1].n - a[1].n), rank = new Map(ranked.map(([name], i) => [name, i]));
      make("p", out, `${ranked.length} different text${ranked.length > 1 ? "s" : ""} after ${now} token${now > 1 ? "s" : ""}.`).setAttribute("role", "status");
      make("p", out, `Log-probs of all ${length} tokens, to the last bit: ${words} different sequence${words > 1 ? "s" : ""}; ${alone.toLocaleString("en-US")} of ${of.length.toLocaleString("en-US")} as when the prompt is alone.`, "small");
      const chips = svg("svg", out, {viewBox: "0 0 640 " + (Math.ceil(of.length / 50) * 12.8 + 2), class: "chips", role: "img", "aria-label": ranked.map(([, {n}]) => n).join(", ") + " completions of each text"});
      of.forEach((i, k) => {
        const chip = svg("rect", chips, {x: 1 + (k % 50) * 12.8, y: 1 + Math.floor(k / 50) * 12.8, width: 10.8, height: 10.8, rx: 2, fill: hue(rank.get(group[i]))});
        if (k === which.value - 1) chip.setAttribute("class", "here");
        chip.addEventListener("click", () => { which.value = k + 1; draw(); });
      });
      const best = texts[ranked[0][1].text];
      const shown = ranked.filter(([name], i) => i < 8 || name === group[chosen]);
      for (const [name, {n, text}] of shown) {
        const line = make("p", out, undefined, "said-text");
        const mark = make("span", line, n.toLocaleString("en-US") + " × ", "count");
        mark.style.setProperty("--of", hue(rank.get(name)));
        const first = best.findIndex((piece, k) => piece !== texts[text][k]);
        texts[text].slice(0, now).forEach((piece, k) => make("span", line, piece, first >= 0 && k >= first ? (k === first ? "first-differ" : "later-differ") : ""));
        if (group[chosen] === name) line.classList.add("chosen");
      }
      if (ranked.length > shown.length) make("p", out, `and ${ranked.length - shown.length} more.`, "small");
    };
    [arm, slider, which].forEach((control) => control.addEventListener("input", draw));
    draw();
  };

  const gradient = () => {
    const bar = at("e6-in"), slider = input(bar, "difference of a token's log-prob", "range", 60, {min: 0, max: 120});
    const told = make("output", slider.parentNode), tokens = input(bar, "tokens in the completion", "range", 256, {min: 1, max: 4096}), count = make("output", tokens.parentNode);
    const most = Math.max(...differences());
    const draw = () => {
      const delta = slider.value === "0" ? 0 : 10 ** (-7 + 7 * (slider.value - 1) / 119), found = drift(delta, +tokens.value), out = at("e6-out");
      told.textContent = delta === 0 ? "0: exact" : delta.toPrecision(2) + " nats";
      count.textContent = tokens.value;
      out.replaceChildren();
      const outside = found.ratio > 1.2, big = (x) => x > 1e6 ? x.toExponential(1) : String(+x.toPrecision(5));
      const steps = [
        ["a rounding", delta === 0 ? "the same order, the same bits" : "another order of a sum, one last place", false],
        ["a hidden value, a logit", delta === 0 ? "equal" : "the layers carry it on", false],
        ["the log-prob of a token", delta === 0 ? "difference 0" : "difference " + delta.toPrecision(2), delta > 0],
        ["its importance ratio", "exp(Δ) = " + big(found.ratio) + (outside ? ": outside 0.8 … 1.2, where PPO clips" : ""), delta > 0],
        ["the ratio of the sequence", `exp(${tokens.value} Δ) = ${big(found.sequence)}, if all differ the same way`, found.sequence > 1.01],
        ["the gradient", delta === 0 ? "that of the policy that sampled" : found.sequence > 1.2 ? "of another policy than the one that sampled" : "nearly that of the policy that sampled, and nobody tells how nearly", found.sequence > 1.2],
      ];
      const list = make("ol", out, undefined, "chain");
      steps.forEach(([name, text, wrong]) => { const item = make("li", list, undefined, wrong ? "wrong" : ""); make("b", item, name); make("span", item, text); });
      make("p", out, `k3 of this token: ${found.k3 === 0 ? "0" : found.k3.toExponential(2)} nats. The largest difference that was recorded for part 3 is ${most.toPrecision(2)}.`, "small");
    };
    [slider, tokens].forEach((control) => control.addEventListener("input", draw));
    draw();
  };

  const guide = () => {
    const asks = [
      ["rl", "I train by RL on what a model samples", "yes"], ["two", "sampler and trainer are two programs (vLLM and Hugging Face, say)", "yes"],
      ["trouble", "runs have collapsed, or need importance corrections", "no"], ["same", "answers at temperature 0 must not change with the load", "no"],
      ["cost", "a lower speed of sampling is out of the question", "no"]];
    const bar = at("e7-in"), fields = Object.fromEntries(asks.map(([name, text, value]) => [name, input(bar, text, "checkbox", "", {checked: value === "yes"})]));
    const draw = () => {
      const is = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.checked])), said = [];
      if (is.rl && is.two) said.push(["Measure first", "On your model and machine, rlinvariant bisect MODEL --invariance off says where stock vLLM first leaves the stock trainer, and rlinvariant verify MODEL how many log-probs differ, with stock kernels and with exact ones."]);
      if (is.rl && is.two && is.trouble) said.push(["Try it", "Train a run with invariance=exact and one with invariance=off: rlinvariant ablate. If the trouble stays, drift was not its cause, and you can look elsewhere."]);
      if (is.rl && is.two && !is.trouble) said.push(["Perhaps", "Short completions and small steps often survive drift; importance corrections (TRL has four) bound it. Exactness removes the question, and a run can be replayed bit for bit."]);
      if (is.same) said.push(["Yes, to serve", "rlinvariant serve gives the same bytes whatever else is being served."]);
      if (is.cost) said.push(["Look at the price", "The pages on cost have the measured speed of sampler and trainer beside stock kernels; with drift you can keep the speed and correct, or measure."]);
      if (!is.rl && !is.same) said.push(["Probably not", "Fine-tuning on given texts has one program and no sampler; an answer that changes rarely may be good enough."]);
      if (is.rl && !is.two) said.push(["Check", "One program for both can still use other kernels for one token at a time than for a whole text: compare the log-probs of both."]);
      const out = at("e7-out");
      out.replaceChildren();
      said.forEach(([name, text]) => { const item = make("li", out); make("b", item, name + ": "); item.append(text); });
    };
    Object.values(fields).forEach((field) => field.addEventListener("input", draw));
    draw();
  };

  let drawn = false;
  const start = () => { if (!drawn) { drawn = true; [three, rows, others, cliff, thousand, gradient, guide].forEach((part) => part()); } };
  const folded = home.closest("details");
  if (!folded || folded.open) start(); else folded.addEventListener("toggle", start, {once: true});
  addEventListener("hashchange", () => { if (folded && (location.hash === "#why" || /^#e\d$/.test(location.hash))) { folded.open = true; start(); document.querySelector(location.hash)?.scrollIntoView(); } });
  return exported;
})();
