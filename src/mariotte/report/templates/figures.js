// Draws the figures of the page: one chart for each model, in the colours of the theme, redrawn when the theme changes.
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function theme() {
    const soft = variable("--soft");
    const line = variable("--line");
    return {
      background: null,
      font: getComputedStyle(document.body).fontFamily,
      padding: { left: 0, right: 6, top: 6, bottom: 0 },
      view: { stroke: null },
      axis: {
        labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: "normal", labelPadding: 5, tickSize: 4,
      },
      axisY: { titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleY: -9, titleX: -34, domain: false, ticks: false },
      axisX: { titleAnchor: "middle", titlePadding: 7, grid: false },
      style: { reference: { color: variable("--soft") }, "reference-label": { color: soft } },
    };
  }

  // A specification names a colour by its place in the palette.
  function coloured(spec) {
    const palette = Array.from({ length: 8 }, (_, i) => variable(`--c${i}`));
    return JSON.parse(JSON.stringify(spec), (key, value) =>
      key === "range" && Array.isArray(value)
        ? value.map((v) => (typeof v === "string" && /^\{colour:\d+\}$/.test(v) ? palette[v.slice(8, -1) % 8] : v))
        : value,
    );
  }

  // A panel names its columns, and what all its marks share, once.
  function filled(spec, { title, columns, rows, common, references }) {
    const cuts = rows.map((row) => {
      const own = columns.map((name, i) => [name, row[i]]).filter(([, value]) => value !== null);
      return { ...common, ...Object.fromEntries(own) };
    });
    const datasets = { dense: [], chance: [], ...references, cuts };
    return { ...spec, description: `${title}: ${spec.description}`, datasets };
  }

  function figure(element) {
    const data = JSON.parse(document.getElementById(`data-${element.dataset.figure}`).textContent);
    const panels = element.querySelector(".panels");
    const note = element.querySelector(".note");
    const keys = [...element.querySelectorAll(".key")];
    const buttons = [...element.querySelectorAll("[data-answer]")];
    const hidden = new Set();
    let current = 0;
    let drawn = [];
    let turn = 0;

    const shown = () => keys.map((key) => key.dataset.key).filter((name) => !hidden.has(name));

    function showSomething() {
      if (keys.every((key) => key.hidden || hidden.has(key.dataset.key))) hidden.clear();
      keys.forEach((key) => key.setAttribute("aria-pressed", String(!hidden.has(key.dataset.key))));
    }

    async function draw() {
      const mine = ++turn; // a button may be pressed while an earlier view is still being drawn
      drawn.forEach((result) => result.finalize());
      drawn = [];
      const view = data.views[current];
      const present = new Set(view.spec.params.find((p) => p.name === "shown").value);
      keys.forEach((key) => (key.hidden = !present.has(key.dataset.key)));
      showSomething();
      note.textContent = view.note;
      note.hidden = !view.note;
      panels.replaceChildren();
      const places = view.panels.map((panel) => {
        const box = panels.appendChild(document.createElement("div"));
        box.className = "panel";
        const heading = box.appendChild(document.createElement("h3"));
        heading.textContent = panel.title;
        const plot = box.appendChild(document.createElement("div"));
        plot.className = "plot";
        return plot;
      });
      for (const [i, panel] of view.panels.entries()) {
        const result = await vegaEmbed(places[i], filled(coloured(view.spec), panel), {
          renderer: "svg",
          ast: true, // expressions are interpreted: the page forbids eval
          config: theme(),
          tooltip: { theme: "custom" },
          actions: { export: true, source: false, compiled: false, editor: false },
          downloadFileName: `${element.dataset.figure}-${panel.title.replace(/[^\w.-]+/g, "-")}`,
        });
        if (mine !== turn) return result.finalize();
        drawn.push(result);
        if (hidden.size) await result.view.signal("shown", shown()).runAsync();
      }
      element.dataset.drawn = view.choices.join(" | ");
    }

    // Of the views that give this answer, the one that shares most answers with the view on the screen.
    function choose(row, answer) {
      const before = data.views[current].choices;
      const shared = (choices) => choices.filter((choice, i) => choice === before[i]).length;
      let most = -1;
      data.views.forEach(({ choices }, i) => {
        if (choices[row] === answer && shared(choices) > most) [current, most] = [i, shared(choices)];
      });
      const now = data.views[current].choices;
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(now[Number(b.dataset.row)] === b.dataset.answer)));
    }

    keys.forEach((key) =>
      key.addEventListener("click", () => {
        const name = key.dataset.key;
        if (!hidden.delete(name)) hidden.add(name);
        showSomething();
        drawn.forEach((result) => result.view.signal("shown", shown()).runAsync());
      }),
    );
    buttons.forEach((button) =>
      button.addEventListener("click", () => {
        choose(Number(button.dataset.row), button.dataset.answer);
        draw();
      }),
    );
    return draw;
  }

  const figures = [...document.querySelectorAll(".figure")].map(figure);
  async function drawAll() {
    for (const draw of figures) await draw();
  }
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    drawAll();
  });
  dark.addEventListener("change", drawAll);
  drawAll().then(
    () => (root.dataset.drawn = String(figures.length)),
    (error) => {
      root.dataset.drawn = "failed";
      throw error;
    },
  );
})();
