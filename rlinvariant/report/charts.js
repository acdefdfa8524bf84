// The charts of a page: Python has drawn each as SVG, which stays without scripts and in print, and put its numbers beside it.
// Here they can be read, zoomed, smoothed, put on another axis, and taken away. uPlot draws; numbers.js computes.
const charts = (() => {
  const share = document.getElementById("clocks");
  if (!share) return {refresh() {}, replace() {}};
  let common = JSON.parse(share.textContent), zoom = null;
  const view = {x: "step", window: common.window, hidden: new Set()}, all = new Map();
  const units = {step: "step", tokens: "tokens", seconds: "time"};

  const {isNumber, runningMean, between, nearest, number, ticks, large, duration} = numbers;
  const curve = (seeds) => numbers.curve(seeds, common.t);
  const clock = (label) => common.arms.find((arm) => arm.label === label) ?? common.arms[0];
  const place = (x) => view.x === "seconds" ? duration(x) : view.x === "tokens" ? large(x) : x.toLocaleString("en-US");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const make = (tag, parent, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  // one chart

  const prepare = (chart) => {  // the lines to draw, each with its own x, and one x of all
    const {data} = chart, window = data.smooth ? view.window : 1;
    let lines = data.lines.filter((line) => data.stack || !view.hidden.has(line.label)).map((line) => {
      const arm = clock(data.arm ?? line.label);
      const x = view.x === "step" ? line.steps : line.steps.map((step) => between(arm.step, arm[view.x], step));
      const seeds = window > 1 ? line.seeds.map((seed) => runningMean(seed, window)) : line.seeds;
      return {...line, x, ...curve(seeds), raw: window > 1 && !data.stack ? curve(line.seeds).mean : null};
    });
    if (data.stack) {
      for (const line of lines) if (line.x.length === 1) {  // an area needs two places: a bar around the one
        line.x = [line.x[0] - 0.5, line.x[0] + 0.5];
        for (const of of ["steps", "mean", "low", "high"]) line[of] = [line[of][0], line[of][0]];
      }
      lines.forEach((line, i) => { line.top = line.mean.map((x, k) => x + (i ? lines[i - 1].top[k] : 0)); });
      lines = lines.reverse();  // the highest is drawn first
    }
    chart.lines = lines;
    const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const at = new Map(xs.map((x, i) => [x, i]));
    const spread = (line, values) => {  // undefined: the line has no point there; null: a gap
      const out = new Array(xs.length).fill(undefined);
      line.x.forEach((x, i) => { out[at.get(x)] = values[i]; });
      return out;
    };
    return {xs, spread};
  };
  const ends = (values) => {
    const known = values.filter(isNumber);
    return known.length ? [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))] : [NaN, NaN];
  };
  const scaleOf = (chart) => {  // {put(value), ticks or null}: a log axis has a place for an exact 0
    const shown = chart.lines.flatMap((line) => line.raw ?? line.mean);
    const [least, most] = ends(shown.filter((x) => x > 0));
    if (!chart.log) return {put: (x) => x, ticks: null};
    const zero = shown.some((x) => x <= 0), bottom = Number.isNaN(least) ? -8 : Math.floor(Math.log10(least));
    const top = Number.isNaN(most) ? 0 : Math.max(bottom + 1, Math.ceil(Math.log10(most))), below = bottom - 0.14 * (top - bottom);
    const every = Math.ceil((top - bottom) / 5), ticks = [];
    for (let k = top; k >= bottom; k -= every) ticks.push(k);
    const put = (x) => !isNumber(x) ? x : x > 0 ? Math.max(bottom, Math.log10(x)) : x === 0 ? below : bottom;
    return {put, ticks: zero ? [...ticks, below] : ticks, below, top, bottom: zero ? below - 0.07 * (top - bottom) : bottom};
  };
  const range = (chart, scale) => () => {
    if (scale.ticks) return [scale.bottom, scale.top];
    const [min, max] = zoom ?? [-Infinity, Infinity];  // plot.scales.x is not yet set when this is asked
    const inside = (line, values) => values.filter((_, i) => line.x[i] >= min && line.x[i] <= max);
    const points = chart.lines.flatMap((line) => inside(line, line.top ?? line.raw ?? line.mean)).filter(isNumber);
    if (!points.length) return [0, 1];
    const [least, most] = ends(points), room = most - least || Infinity;
    chart.lines.forEach((line) => [[line.low, 0.1], [line.high, 0.9]].forEach(([values, q]) => {  // of a band, most: two seeds' is wide
      const known = inside(line, values).filter(isNumber).sort((a, b) => a - b);
      if (known.length && !line.top) points.push(Math.max(least - room, Math.min(most + room, known[Math.round(q * (known.length - 1))])));
    }));
    let [low, high] = ends(points);
    if (chart.data.scale === "from zero") { low = Math.min(0, least); high = Math.max(0, high) || 1; }
    const wide = high - low || Math.abs(high) * 0.2 || 1;
    const floor = chart.data.scale === "from zero" && low === 0 ? (chart.data.stack ? 0 : -0.03 * wide) : low - 0.06 * wide;
    return [floor, high + 0.06 * wide];
  };

  const draw = (chart) => {
    if (chart.plot) { chart.plot.destroy(); chart.box.replaceChildren(); }
    const {xs, spread} = prepare(chart), scale = scaleOf(chart), {data} = chart;
    const columns = [xs], series = [{}], bands = [];
    const dashes = (line) => (data.stack ? "" : common.dashes[line.style]).split(" ").filter(Boolean).map(Number);
    const put = (line, values, options) => {
      columns.push(spread(line, values.map(scale.put)));
      series.push({scale: "y", points: {show: false}, ...options});
      return series.length - 1;
    };
    for (const line of chart.lines) {
      const stroke = colour("--c" + line.style % 8);
      if (line.top) {
        put(line, line.top, {stroke, width: 0.8, fill: stroke + "b0"});
        continue;
      }
      if (line.high.some(isNumber)) {
        const high = put(line, line.high, {width: 0}), low = put(line, line.low, {width: 0});
        bands.push({series: [high, low], fill: stroke + "2b"});
      }
      if (line.raw) put(line, line.raw, {stroke: stroke + "66", width: 0.7});
      const few = line.mean.filter(isNumber).length <= 12, at = columns.length;
      const alone = () => columns[at].flatMap((y, i) => isNumber(y) && !isNumber(columns[at][i - 1]) && !isNumber(columns[at][i + 1]) ? [i] : []);
      const points = {show: few, size: 5, fill: stroke, filter: few ? undefined : alone};  // a step between gaps has no line
      put(line, line.mean, {stroke, width: 1.7, dash: dashes(line), points});
    }
    if (data.stack) chart.lines.slice(1).forEach((_, i) => bands.push({series: [i + 1, i + 2], fill: colour("--c" + chart.lines[i].style % 8) + "b0"}));
    const font = "12px ui-sans-serif, system-ui, Arial, sans-serif", soft = colour("--soft"), faint = colour("--faint");
    const axis = {font, stroke: soft, grid: {stroke: faint, width: 1}, ticks: {stroke: faint, width: 1, size: 4}};
    const words = (k) => k === scale.below ? "exactly 0" : "1e" + String(k).replace("-", "−");
    const options = {
      width: Math.max(220, chart.box.clientWidth), height: 232, legend: {show: false}, bands, series,
      padding: [8, 12, 0, 0],
      scales: {x: {time: false, range: (_, from, to) => from === to ? [from - 1, to + 1] : [from, to]}, y: {range: range(chart, scale)}},
      axes: [
        {...axis, size: 34, gap: 4, space: 70, label: units[view.x], labelSize: 14, labelGap: 0, labelFont: font,
          incrs: view.x === "seconds" ? undefined : [1, 2, 5, 10, 20, 50, 100, 200, 500, ...[3, 4, 5, 6, 7, 8, 9, 10, 11].flatMap((p) => [1, 2, 5].map((m) => m * 10 ** p))],
          values: (_, splits) => splits.map((x) => x === null || x < 0 ? "" : place(x))},
        {...axis, size: 68, gap: 5, ...(scale.ticks ? {splits: () => scale.ticks, values: (_, splits) => splits.map(words)}
          : {space: 36, values: (_, splits) => ticks(splits)})},
      ],
      cursor: {drag: {x: true, y: false, setScale: false}, points: {show: false}, y: false},
      hooks: {setCursor: [(plot) => said(chart, plot)], setSelect: [(plot) => {
        if (plot.select.width < 4) return;
        const from = plot.posToVal(plot.select.left, "x"), to = plot.posToVal(plot.select.left + plot.select.width, "x");
        plot.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
        zoomTo([from, to]);
      }]},
    };
    chart.plot = new uPlot(options, columns, chart.box);
    chart.plot.over.addEventListener("dblclick", () => zoomTo(null));
    if (zoom) chart.plot.setScale("x", {min: zoom[0], max: zoom[1]});
  };

  const said = (chart, plot) => {  // what the cursor is on, beside it
    const {left, idx} = plot.cursor, {tip} = chart;
    if (idx === null || idx === undefined || left < 0) { tip.hidden = true; return; }
    const wanted = plot.posToVal(left, "x");
    const found = chart.lines.filter((line) => line.x.length).map((line) => ({line, i: nearest(line.x, wanted)}));
    if (!found.length) return;
    const at = found.map(({line, i}) => line.x[i]).reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const first = found.find(({line, i}) => line.x[i] === at), step = first.line.steps[first.i], arm = clock(chart.data.arm ?? first.line.label);
    const head = ["step " + step.toLocaleString("en-US")];
    if (common.arms.length < 2 || view.x !== "step") head.push(large(between(arm.step, arm.tokens, step)) + " tokens", duration(between(arm.step, arm.seconds, step)));
    const rows = found.map(({line, i}) => {
      const interval = isNumber(line.low[i]) ? "[" + number(line.low[i]) + ", " + number(line.high[i]) + "]" : "";
      const mean = line.mean[i], raw = line.raw?.[i];
      const other = line.x[i] === at ? "" : " (step " + line.steps[i] + ")";
      const value = raw === undefined ? number(mean) : number(raw), running = raw === undefined ? "" : "running mean " + number(mean) + " ";
      return [line, chart.lines.length > 1 ? line.label : "", value + other, running + interval];
    });
    const table = document.createElement("table");
    table.createCaption().textContent = head.join(", ");
    for (const [line, ...cells] of rows) {
      const row = table.insertRow();
      cells.forEach((text) => { row.insertCell().textContent = text; });
      row.cells[0].style.color = "var(--c" + line.style % 8 + ")";
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    const box = chart.figure.getBoundingClientRect(), over = plot.over.getBoundingClientRect();
    const x = over.left - box.left + plot.valToPos(at, "x"), wide = tip.offsetWidth;
    tip.style.left = Math.max(0, Math.min(box.width - wide, x > box.width / 2 ? x - wide - 12 : x + 12)) + "px";
    tip.style.top = over.top - box.top + 6 + "px";
    chart.words = head.join(", ") + ": " + rows.map(([, ...cells]) => cells.filter(Boolean).join(" ")).join("; ");
  };

  // all charts

  const spoken = make("p", document.body, "", "spoken");
  spoken.setAttribute("aria-live", "polite");
  const drawn = () => [...all.values()].filter((chart) => chart.plot);
  const idle = globalThis.requestIdleCallback ?? ((then) => setTimeout(then, 50));
  const rest = () => {  // all others one by one, while there is nothing else to do: who scrolls fast, or saves the page, sees each
    const next = [...all.values()].find((chart) => !chart.plot && chart.box.clientWidth);
    if (next) { draw(next); idle(rest); }
  };
  const redraw = () => {  // what is seen now, the others later
    for (const chart of drawn()) {
      const {top, bottom} = chart.box.getBoundingClientRect();
      if (bottom > -400 && top < innerHeight + 400) draw(chart); else { chart.plot.destroy(); chart.box.replaceChildren(); chart.plot = null; }
    }
    idle(rest);
  };
  const zoomTo = (to) => {
    zoom = to;
    for (const {plot} of drawn()) {
      const xs = plot.data[0];
      plot.setScale("x", zoom ? {min: zoom[0], max: zoom[1]} : {min: xs[0], max: xs[xs.length - 1]});
    }
    document.querySelectorAll(".unzoom").forEach((button) => { button.hidden = !zoom; });
  };
  const keyed = (chart) => (event) => {
    const {plot} = chart, xs = plot?.data[0];
    if (!plot || event.ctrlKey || event.metaKey || event.altKey || event.target !== chart.box) return;
    const now = plot.cursor.idx ?? -1, {min, max} = plot.scales.x, jump = event.shiftKey ? 10 : 1;
    const to = {ArrowRight: now + jump, ArrowLeft: (now < 0 ? xs.length : now) - jump, Home: 0, End: xs.length - 1}[event.key];
    const by = {"+": 0.5, "=": 0.5, "-": 2}[event.key];
    if (to !== undefined) {
      const x = xs[Math.max(0, Math.min(xs.length - 1, to))];
      if (x < min || x > max) zoomTo(x < min ? [x, x + max - min] : [x - max + min, x]);
      plot.setCursor({left: plot.valToPos(x, "x"), top: 10});
      spoken.textContent = chart.words ?? "";
    } else if (by) {
      const middle = now < 0 ? (min + max) / 2 : xs[now], half = (max - min) * by / 2;
      const from = Math.max(xs[0], middle - half), until = Math.min(xs[xs.length - 1], middle + half);
      zoomTo(until - from >= xs[xs.length - 1] - xs[0] ? null : [from, until]);
    } else if (event.key === "Escape") { zoomTo(null); plot.setCursor({left: -10, top: -10}); } else return;
    event.preventDefault();
  };
  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1e4);
  };
  const csv = (chart) => {  // every number of the page's chart, unsmoothed: a row for each step of each line
    const quoted = (text) => /[",\n]|^[=+@-]/.test(text) ? '"' + (/^[=+@-]/.test(text) ? "'" : "") + text.replaceAll('"', '""') + '"' : text;
    const lines = [["line", "step", "tokens", "seconds", "mean", "low", "high", "seeds"].join(",")];
    for (const line of chart.data.lines) {
      const arm = clock(chart.data.arm ?? line.label), {mean, low, high} = curve(line.seeds);
      line.steps.forEach((step, i) => lines.push([
        quoted(line.label), step, Math.round(between(arm.step, arm.tokens, step)), between(arm.step, arm.seconds, step).toFixed(2),
        mean[i] ?? "", low[i] ?? "", high[i] ?? "", line.seeds.map((seed) => seed[i] ?? "").join(" ")].join(",")));
    }
    return lines.join("\n") + "\n";
  };
  const picture = (chart) => {  // as the page shows it: on its paper, with its title, and the lines' names
    if (!chart.plot) draw(chart);
    const from = chart.plot.ctx.canvas, scale = from.width / chart.plot.width, made = document.createElement("canvas"), to = made.getContext("2d");
    const style = (size, ink) => { to.font = size * scale + "px system-ui, Arial, sans-serif"; to.fillStyle = colour(ink); };
    const names = chart.lines.length > 1 ? chart.lines.map((line) => ["\u25a0 " + line.label, "--c" + line.style % 8]) : [];
    let x = 8 * scale, y = 42 * scale;
    style(12, "--ink");
    const placed = names.map(([text, ink]) => {
      const wide = to.measureText(text).width + 14 * scale;
      if (x + wide > from.width && x > 8 * scale) { x = 8 * scale; y += 17 * scale; }
      x += wide;
      return [text, ink, x - wide, y];
    });
    const head = names.length ? y + 8 * scale : 30 * scale;
    made.width = from.width;
    made.height = from.height + head;
    style(14, "--paper");
    to.fillRect(0, 0, made.width, made.height);
    style(14, "--ink");
    to.fillText(chart.title, 8 * scale, 20 * scale);
    placed.forEach(([text, ink, left, base]) => { style(12, ink); to.fillText(text, left, base); });
    to.drawImage(from, 0, head);
    return made;
  };
  const button = (parent, text, label, act) => {
    const made = make("button", parent, text);
    made.type = "button";
    made.title = label;
    made.addEventListener("click", act);
    return made;
  };
  const adopt = (figure) => {
    const source = figure.querySelector("script"), title = figure.querySelector("b").textContent;
    const data = JSON.parse(source.textContent), values = data.lines.flatMap((line) => line.seeds.flat()).filter(isNumber);
    const [least, most] = ends(values), log = data.scale === "log and zero" || data.scale === "log" && least > 0 && most / least >= 10;
    const chart = {figure, data, log, source};
    const unit = figure.querySelector(".unit").textContent;
    chart.title = title + ", " + unit;
    const last = data.lines.map((line) => line.label + " " + number(line.seeds[0].findLast(isNumber) ?? null));
    chart.box = make("div", figure, undefined, "live");
    chart.box.tabIndex = 0;
    chart.box.setAttribute("role", "group");
    chart.box.setAttribute("aria-label", title + ", " + unit + ", against the " + units[view.x] + "; last " + last.join(", ") + ". Arrow keys read it, + and − zoom, Escape resets.");
    chart.tip = make("div", figure, undefined, "tip");
    chart.tip.hidden = true;
    const tools = make("span", figure.querySelector("figcaption"), undefined, "tools"), name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
    if (!data.stack) {
      const toggle = button(tools, "log", "logarithmic axis", () => { chart.log = !chart.log; toggle.setAttribute("aria-pressed", chart.log); draw(chart); });
      toggle.setAttribute("aria-pressed", log);
    }
    button(tools, "csv", "download the numbers", () => save(new Blob([csv(chart)], {type: "text/csv"}), name + ".csv"));
    button(tools, "png", "download the picture", () => picture(chart).toBlob((blob) => save(blob, name + ".png")));
    chart.box.addEventListener("keydown", keyed(chart));
    chart.box.addEventListener("blur", () => chart.plot?.setCursor({left: -10, top: -10}));
    if (data.stack) {
      const names = make("ul", figure.querySelector("figcaption"), undefined, "layers");
      data.lines.forEach((line) => make("li", names, line.label).style.setProperty("--layer", "var(--c" + line.style % 8 + ")"));
    }
    figure.classList.add("alive");
    all.set(figure, chart);
    seen.observe(chart.box);
    sized.observe(chart.box);
  };
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    const chart = all.get(entry.target.parentNode);
    if (entry.isIntersecting && chart && !chart.plot) draw(chart);
  }), {rootMargin: "400px"});
  const sized = new ResizeObserver((entries) => entries.forEach((entry) => {
    const chart = all.get(entry.target.parentNode), width = Math.floor(entry.contentRect.width);
    if (chart?.plot && width > 100 && width !== chart.plot.width) chart.plot.setSize({width, height: 232});
  }));

  const controls = () => {
    const bar = document.getElementById("controls");
    bar.className = "bar charts";
    bar.replaceChildren();
    const labelled = (text, tag) => make(tag, make("label", bar, text + " "));
    const x = labelled("x", "select");
    for (const [value, text] of Object.entries(units)) make("option", x, text).value = value;
    x.value = view.x;
    x.addEventListener("input", () => { view.x = x.value; zoom = null; zoomTo(null); redraw(); });
    const smooth = labelled("smoothing", "input"), told = make("output", smooth.parentNode);
    const longest = Math.max(...common.arms.map((arm) => arm.step.length), 3), most = Math.max(1, Math.floor(longest / 4));
    smooth.type = "range"; smooth.min = 0; smooth.max = most; smooth.value = (view.window - 1) / 2;
    smooth.parentNode.title = "running mean over so many steps, centred";
    const tell = () => { told.textContent = view.window > 1 ? view.window + " steps" : "none"; };
    tell();
    smooth.addEventListener("input", () => { view.window = 2 * +smooth.value + 1; tell(); redraw(); });
    button(bar, "whole run", "reset the zoom (double click)", () => zoomTo(null)).className = "unzoom";
    bar.querySelector(".unzoom").hidden = !zoom;
    make("span", bar, "Drag across a chart to zoom all; double click resets." + (common.t.length > 2 ? " Lines: mean over seeds; shading: its 95 % interval." : ""), "small");
    document.querySelectorAll(".legend li").forEach((item, i) => {
      const label = common.arms[i]?.label, box = document.createElement("input");
      if (label === undefined || item.querySelector("input")) return;
      box.type = "checkbox";
      box.checked = !view.hidden.has(label);
      box.setAttribute("aria-label", "show " + label);
      box.addEventListener("input", () => { view.hidden[box.checked ? "delete" : "add"](label); item.classList.toggle("off", !box.checked); redraw(); });
      item.prepend(box);
    });
  };
  controls();
  document.querySelectorAll("figure:has(> script)").forEach(adopt);
  addEventListener("load", () => idle(rest));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return {
    runningMean, curve, ticks,
    replace(figure, next) {  // of a live page: the same chart, further on
      const chart = all.get(figure);
      figure.querySelector("svg").replaceWith(next.querySelector("svg"));
      figure.querySelector("script").textContent = next.querySelector("script").textContent;
      if (!chart) return;
      chart.data = JSON.parse(figure.querySelector("script").textContent);
      common = JSON.parse(document.getElementById("clocks").textContent);
      if (chart.plot) draw(chart);
    },
    refresh() {  // after figures of a live page were replaced
      common = JSON.parse(document.getElementById("clocks").textContent);
      for (const [figure, chart] of all) if (!figure.isConnected) { chart.plot?.destroy(); all.delete(figure); }
      document.querySelectorAll("figure:has(> script)").forEach((figure) => all.has(figure) || adopt(figure));
      idle(rest);
    },
  };
})();
