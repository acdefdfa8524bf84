// A live page, as `rlinvariant watch` serves it: asks every two seconds whether the run has gone on, and takes over what is new
// without losing what the reader has zoomed, searched or opened.
(() => {
  if (!document.body.dataset.version) return;
  const status = document.getElementById("live-status");
  let version = document.body.dataset.version, asking = false;
  const titled = (within) => new Map([...within.querySelectorAll("figure")].map((of) => [of.querySelector("b").textContent, of]));
  const layout = (section) => [...section.querySelectorAll("figure b")].map((of) => (of.closest("details") ? "folded " : "open ") + of.textContent).join();
  const legend = (of) => of.querySelector(".legend")?.textContent;
  const same = (a, b) => a && b && a.querySelector("script")?.textContent === b.querySelector("script")?.textContent;

  const take = (fresh) => {
    document.title = fresh.title;
    for (const name of ["header h1", "header nav", "#outcome", "#clocks"]) {
      const now = document.querySelector(name), then = fresh.querySelector(name);
      if (now && then && now.innerHTML !== then.innerHTML) now.replaceChildren(...then.childNodes);
    }
    const sections = [...fresh.querySelectorAll("section")];
    sections.forEach((next, i) => {
      const now = document.getElementById(next.id);
      if (!now) {
        const after = i ? document.getElementById(sections[i - 1].id) : document.getElementById("outcome");
        after.after(next);
        return;
      }
      if (now.querySelector("#said")) return;  // it asks for itself
      const figures = titled(now), others = titled(next);
      if (!others.size || layout(now) !== layout(next) || [...others.keys()].some((title) => !figures.has(title))) {
        const open = now.querySelector("details")?.open;
        now.replaceWith(next);
        if (open && next.querySelector("details")) next.querySelector("details").open = true;
        return;
      }
      for (const [title, figure] of others) if (!same(figures.get(title), figure)) charts.replace(figures.get(title), figure);
      next.querySelectorAll(".strip").forEach((strip) => now.querySelector(".strip")?.replaceWith(strip));
    });
    const said = fresh.getElementById("said-data");
    if (said && document.getElementById("said")?.firstChild) samples.refresh(JSON.parse(said.textContent));
    charts.refresh();
  };
  const got = async (where) => {
    const answer = await fetch(where);
    if (!answer.ok) throw new Error(await answer.text());  // another server has the port now, with another key
    return answer.text();
  };
  const ask = async () => {
    if (asking || document.hidden) return;
    asking = true;
    try {
      const now = await got("version");
      if (now !== version) {
        const fresh = new DOMParser().parseFromString(await got("./"), "text/html");
        const appeared = ["section", "#clocks", "#said"].some((of) => !document.querySelector(of) && fresh.querySelector(of));
        if (appeared || legend(document) !== legend(fresh)) location.reload(); else take(fresh);
        version = now;
      }
      status.textContent = "live";
    } catch {
      status.textContent = "the server has ended: this is what it said last";
    }
    asking = false;
  };
  setInterval(ask, 2000);
})();
