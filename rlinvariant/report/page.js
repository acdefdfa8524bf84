// Hovering over a chart shows the numbers of the nearest step. The page is complete without this.
for (const chart of document.querySelectorAll("svg.chart[data-x]")) {
  const figure = chart.closest("figure"), cursor = chart.querySelector(".cursor");
  const [left, right, first, last] = chart.dataset.x.split(" ").map(Number);
  let lines = null, tip = null;
  const number = (x) =>
    x === null ? "no number" : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential() : String(x);
  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
  };
  const cell = (row, text) => { row.insertCell().textContent = text; };
  const hide = () => { cursor.style.visibility = "hidden"; if (tip) tip.hidden = true; };
  chart.addEventListener("pointermove", (event) => {
    lines ??= JSON.parse(chart.nextElementSibling.textContent);
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const x = Math.min(right, Math.max(left, (event.clientX - box.left) / scale));
    const wanted = first + (x - left) / (right - left) * (last - first);
    const found = lines.filter((line) => line.points.length).map((line) => [line, nearest(line.points, wanted)]);
    if (!found.length) return;
    const step = found.map(([, point]) => point[0]).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    if (!tip) { tip = document.createElement("div"); tip.className = "tip"; figure.append(tip); }
    const table = document.createElement("table");
    cell(table.insertRow(), "step " + step);
    for (const [line, [at, value, low, high, running]] of found) {
      const row = table.insertRow(), interval = low == null ? "" : "[" + number(low) + ", " + number(high) + "]";
      cell(row, lines.length > 1 ? line.label : "");
      cell(row, number(value) + (at === step ? "" : " (step " + at + ")"));
      cell(row, running == null ? interval : "running mean " + number(running) + " " + interval);
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    const place = left + (step - first) / Math.max(last - first, 1) * (right - left);
    cursor.setAttribute("transform", "translate(" + place + " 0)");
    cursor.style.visibility = "visible";
    const middle = place * scale;
    tip.style.top = chart.offsetTop + 8 + "px";
    tip.style.left = (middle > box.width / 2 ? middle - tip.offsetWidth - 12 : middle + 12) + "px";
  });
  chart.addEventListener("pointerleave", hide);
}
