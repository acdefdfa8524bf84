// The completions of a run: searched, sorted, step by step, in a table or a group side by side, tokens coloured by log-prob or by
// how much the trainer's differs. All texts are set as text: nothing that a model has written becomes part of the page. Of a live
// page the server finds what is asked for, among all that there are; else it is looked for in what the page has.
const samples = (() => {
  const said = document.getElementById("said");
  if (!said) return {refresh() {}};
  let runs = JSON.parse(document.getElementById("said-data").textContent), limit, turn = 0, wait;
  const shownAtOnce = 60;
  const make = (tag, parent, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const bar = make("div", said, undefined, "bar");
  const labelled = (text, tag) => make(tag, make("label", bar, text + " "));
  const which = labelled("run", "select"), slider = labelled("step", "input"), at = make("output", bar);
  const every = labelled("all steps", "input"), search = labelled("search", "input"), view = labelled("as", "select");
  const sort = labelled("sort by", "select"), order = labelled("order", "select"), colour = labelled("colour tokens by", "select");
  const add = (select, texts) => texts.forEach((text) => make("option", select, text));
  slider.type = "range"; slider.min = 0; every.type = "checkbox"; search.type = "search"; search.placeholder = "text or /regex/";
  const keys = {prompt: "i", reward: "r", length: "l", advantage: "a", "log-prob": "m"};
  add(sort, Object.keys(keys));
  add(order, ["highest first", "lowest first"]);
  add(view, ["groups", "table"]);
  add(colour, ["nothing", "log-prob", "difference"]);
  const count = make("p", said, undefined, "small"), list = make("div", said), more = make("button", said, "more");
  count.setAttribute("role", "status");
  more.type = "button";
  const number = (x) => (x === undefined ? "–" : x.toFixed(3).replace("-", "−"));

  // what is found

  const matcher = () => {
    const wanted = search.value, regex = wanted.length > 2 && wanted.startsWith("/") && wanted.endsWith("/");
    const found = regex ? new RegExp(wanted.slice(1, -1)) : null, lower = wanted.toLowerCase();
    return (of) => (found ? found.test(of) : of.toLowerCase().includes(lower));
  };
  const fromPage = (run, key, sign) => {
    const holds = matcher(), steps = every.checked ? run.steps : [run.steps[slider.value]];
    const rows = steps.flatMap((of) => of.rows.map((row) => ({...row, step: of.step, prompt: of.prompts[row.p]})))
      .filter((row) => holds(row.prompt) || holds(row.c));
    const none = (row) => row[key] === undefined;
    if (key !== "i") rows.sort((a, b) => none(a) - none(b) || sign * (a[key] - b[key]) || a.step - b.step || a.i - b.i);
    return {rows: rows.slice(0, limit), count: rows.length, notes: []};
  };
  const fromServer = async (run, key) => {
    const asked = {run: run.index, search: search.value, most: limit, lowest: order.selectedIndex};
    if (!every.checked) asked.step = run.steps[slider.value].step;
    if (key !== "i") asked.sort = sort.value.replace("-", "");
    const answer = await fetch("completions?" + new URLSearchParams(asked));
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };

  // how it is shown

  const text = (row, parent) => {
    const pre = make("pre", parent), by = colour.value;
    pre.dir = "auto";
    if (by === "nothing" || !row.n) { pre.textContent = row.c; return; }
    let start = 0;
    row.n.forEach((end, i) => {
      const span = make("span", pre, row.c.slice(start, end)), nats = row.q[i] === null ? null : row.q[i] / 10, differs = row.x?.[i] ?? 0;
      start = end;
      if (nats === null) {
        span.style.opacity = 0.6;
        span.title = "not sampled: a tool's";
        return;
      }
      const share = by === "log-prob" ? -12 * nats : differs ? 20 + 12 * Math.max(0, 5 + Math.log10(Math.abs(differs))) : 0;
      if (share > 0) span.style.backgroundColor = "color-mix(in srgb, var(--c1) " + Math.min(75, share) + "%, transparent)";
      span.title = "log-prob " + nats.toFixed(1) + (differs ? ", the trainer's differs by " + differs : "");
    });
  };
  const tokens = (row) => (row.l === undefined ? "–" : row.l + (row.t ? ", cut" : ""));
  const card = (row, parent) => {
    const box = make("div", parent, undefined, "said");
    const facts = ["reward " + number(row.r), "advantage " + number(row.a), "tokens " + tokens(row), "log-prob " + number(row.m)];
    if (row.d) facts.push(row.d + " tokens differ");
    const line = make("div", box, "", "facts");
    ["step " + row.step + " #" + row.i, ...facts].forEach((fact) => { make("span", line, fact); line.append(" "); });
    if (row.e) make("div", box, row.e, "facts");
    text(row, box);
  };
  const groups = (rows, key) => {
    let beside = null, before = null;
    for (const row of rows) {
      const group = row.step + " " + row.prompt;
      if (key !== "i" || group !== before) {
        make("pre", list, row.prompt, "prompt").dir = "auto";
        beside = make("div", list, undefined, "beside");
        before = group;
      }
      card(row, beside);
    }
  };
  const table = (rows) => {
    const made = make("table", make("div", list, undefined, "wide"), undefined, "said-table"), head = make("tr", make("thead", made));
    const differ = rows.some((row) => row.d), body = make("tbody", made);
    const numbers = ["step", "#", "reward", "advantage", "length", "log-prob", ...(differ ? ["differ"] : [])];
    for (const name of [...numbers, "prompt", "completion"]) {
      const cell = make("th", head, name in keys && name !== "prompt" ? undefined : name, name === "prompt" || name === "completion" ? "text" : "");
      cell.scope = "col";
      if (cell.textContent) continue;
      const chosen = sort.value === name, button = make("button", cell, name + (chosen ? (order.selectedIndex ? " ▲" : " ▼") : ""));
      button.type = "button";
      if (chosen) cell.setAttribute("aria-sort", order.selectedIndex ? "ascending" : "descending");
      button.addEventListener("click", () => {
        order.selectedIndex = chosen ? 1 - order.selectedIndex : 0;
        sort.value = name;
        fresh().then(() => list.querySelector("[aria-sort] button")?.focus());
      });
    }
    for (const row of rows) {
      const line = make("tr", body);
      const cells = [row.step, row.i, number(row.r), number(row.a), tokens(row), number(row.m), ...(differ ? [row.d ?? 0] : [])];
      cells.forEach((value, i) => { make("td", line, value).dataset.name = numbers[i]; });
      make("pre", make("td", line, undefined, "text"), row.prompt).dir = "auto";
      text(row, make("td", line, undefined, "text"));
    }
  };
  const draw = async () => {
    const run = runs[which.selectedIndex], key = keys[sort.value], mine = ++turn;
    slider.max = run.steps.length - 1;
    slider.disabled = every.checked;
    at.textContent = every.checked ? "all" : run.steps[slider.value].step;
    slider.setAttribute("aria-valuetext", "step " + run.steps[slider.value].step);
    order.parentNode.hidden = key === "i";
    search.setCustomValidity("");
    let found;
    try {
      matcher();
    } catch {
      search.setCustomValidity("not a regular expression");
      search.reportValidity();
      return;
    }
    try {
      found = run.steps[0].rows ? fromPage(run, key, order.selectedIndex ? 1 : -1) : await fromServer(run, key);
    } catch (error) {
      found = {rows: [], count: 0, notes: [String(error.message)]};
    }
    if (mine !== turn) return;  // something newer was asked for meanwhile
    list.replaceChildren();
    if (view.value === "table") table(found.rows); else groups(found.rows, key);
    more.hidden = found.count <= found.rows.length;
    count.textContent = [found.rows.length + " of " + found.count + " completions.", run.said, ...found.notes].join(" ");
  };
  const fresh = () => { limit = shownAtOnce; return draw(); };
  const newest = () => { slider.max = slider.value = runs[which.selectedIndex].steps.length - 1; };
  const named = () => {
    const chosen = Math.max(0, runs.findIndex((run) => run.name === which.value));  // of a live page: others may have come before
    which.replaceChildren();
    runs.forEach((run) => make("option", which, run.name));
    which.selectedIndex = chosen;
    which.parentNode.hidden = runs.length < 2;
    const differs = runs.some((run) => !run.steps[0].rows || run.steps.some((of) => of.rows.some((row) => row.x)));
    colour.lastChild.disabled = !differs;
  };
  which.addEventListener("input", () => { newest(); fresh(); });
  [slider, every, view, sort, order, colour].forEach((control) => control.addEventListener("input", fresh));
  search.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(fresh, runs[0].steps[0].rows ? 0 : 250); });
  more.addEventListener("click", () => { limit += shownAtOnce; draw(); });
  named();
  newest();
  fresh();
  return {
    refresh(now) {  // of a live page: more steps; who looks at the newest goes on to the newest
      const last = +slider.value === +slider.max, before = runs[which.selectedIndex]?.steps.length;
      runs = now;
      named();
      slider.max = runs[which.selectedIndex].steps.length - 1;
      if (last) newest();
      if (last && before !== runs[which.selectedIndex].steps.length && !every.checked) draw();
    },
  };
})();
