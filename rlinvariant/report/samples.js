// The completions of a run: searched, sorted, step by step, a group side by side, tokens coloured by log-prob. All texts are
// set as text: nothing that a model has written becomes part of the page. Without scripts, a few completions are there.
const said = document.getElementById("said");
if (said) {
  const runs = JSON.parse(document.getElementById("said-data").textContent), shownAtOnce = 60;
  const make = (tag, parent, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const labelled = (text, tag) => make(tag, make("label", bar, text + " "));
  const bar = make("div", said, undefined, "bar");
  const which = labelled("run", "select"), slider = labelled("step", "input"), at = make("output", bar);
  const every = labelled("all steps", "input"), search = labelled("search", "input"), sort = labelled("sort by", "select");
  const order = labelled("order", "select"), colour = labelled("colour tokens by log-prob", "input");
  runs.forEach((run) => make("option", which, run.name));
  which.parentNode.hidden = runs.length < 2;
  slider.type = "range"; every.type = colour.type = "checkbox"; search.type = "search"; search.placeholder = "text or /regex/";
  const keys = {prompt: "i", reward: "r", length: "l", advantage: "a", "log-prob": "m"};
  Object.keys(keys).forEach((key) => make("option", sort, key));
  ["highest first", "lowest first"].forEach((text) => make("option", order, text));
  const count = make("p", said, undefined, "small"), list = make("div", said), more = make("button", said, "more");
  more.type = "button";
  let limit = shownAtOnce;
  const number = (x) => (x === undefined ? "–" : x.toFixed(3));

  const text = (row, parent) => {
    const pre = make("pre", parent);
    if (!colour.checked || !row.n) { pre.textContent = row.c; return; }
    let start = 0;
    row.n.forEach((end, i) => {
      const span = make("span", pre, row.c.slice(start, end)), nats = row.q[i] / 10;
      start = end;
      if (row.q[i] === null) {
        span.style.opacity = 0.6;
        span.title = "not sampled: a tool's";
        return;
      }
      span.style.backgroundColor = "color-mix(in srgb, var(--c1) " + Math.min(75, -12 * nats) + "%, transparent)";
      span.title = "log-prob " + nats.toFixed(1);
    });
  };
  const card = (row, parent) => {
    const box = make("div", parent, undefined, "said");
    const length = row.l === undefined ? "–" : row.l + (row.t ? ", cut" : "");
    const facts = ["reward " + number(row.r), "advantage " + number(row.a), "tokens " + length, "log-prob " + number(row.m)];
    if (row.d) facts.push(row.d + " tokens differ");
    make("div", box, "step " + row.step + " #" + row.i + "  " + facts.join("  "), "facts");
    if (row.e) make("div", box, row.e, "facts");
    text(row, box);
  };
  const matcher = () => {
    const wanted = search.value, regex = wanted.length > 2 && wanted.startsWith("/") && wanted.endsWith("/");
    search.setCustomValidity("");
    try {
      const found = regex ? new RegExp(wanted.slice(1, -1)) : null, lower = wanted.toLowerCase();
      return (of) => (found ? found.test(of) : of.toLowerCase().includes(lower));
    } catch {
      search.setCustomValidity("not a regular expression");
      search.reportValidity();
      return () => true;
    }
  };
  const draw = () => {
    const run = runs[which.selectedIndex], key = keys[sort.value], sign = order.selectedIndex ? 1 : -1;
    slider.max = run.steps.length - 1;
    slider.disabled = every.checked;
    at.textContent = every.checked ? "all" : run.steps[slider.value].step;
    const holds = matcher(), steps = every.checked ? run.steps : [run.steps[slider.value]];
    const rows = steps.flatMap((of) => of.rows.map((row) => ({...row, step: of.step, prompt: of.prompts[row.p]})))
      .filter((row) => holds(row.prompt) || holds(row.c));
    const none = (row) => row[key] === undefined;
    if (key !== "i") rows.sort((a, b) => none(a) - none(b) || sign * (a[key] - b[key]) || a.step - b.step || a.i - b.i);
    list.replaceChildren();
    let beside = null, before = null;
    for (const row of rows.slice(0, limit)) {
      const group = row.step + " " + row.p;
      if (key !== "i" || group !== before) {
        make("pre", list, row.prompt, "prompt");
        beside = make("div", list, undefined, "beside");
        before = group;
      }
      card(row, beside);
    }
    more.hidden = rows.length <= limit;
    order.parentNode.hidden = key === "i";
    count.textContent = Math.min(limit, rows.length) + " of " + rows.length + " completions. " + run.said;
  };
  const fresh = () => { limit = shownAtOnce; draw(); };
  which.addEventListener("change", () => { slider.max = slider.value = runs[which.selectedIndex].steps.length - 1; fresh(); });
  [slider, every, search, sort, order, colour].forEach((control) => control.addEventListener("input", fresh));
  more.addEventListener("click", () => { limit += shownAtOnce; draw(); });
  slider.max = slider.value = runs[0].steps.length - 1;
  draw();
}
