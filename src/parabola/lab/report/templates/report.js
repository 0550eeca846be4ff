"use strict";
// Draws the figures of the page's JSON block in the colors of its style sheet, light or dark.
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const slotColor = (slot) => color(slot < 0 ? "--neutral" : `--slot-${slot % 8}`);
  const coarse = matchMedia("(pointer: coarse)").matches;

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const faded = (hex, opacity) => `rgba(${channels(hex).join(",")},${opacity})`;

  // Like faded, but opaque: the grid does not show through.
  function tinted(hex, share) {
    const paper = channels(color("--paper"));
    return `rgb(${channels(hex).map((c, i) => Math.round(share * c + (1 - share) * paper[i])).join(",")})`;
  }

  function painted(trace) {
    const { slot, slots, role } = trace.meta;
    const own = slot === undefined ? null : slotColor(slot);
    const copy = { ...trace, showlegend: false, visible: hidden.has(slot) ? false : true };
    if (role === "band") copy.fillcolor = faded(own, 0.16);
    if (role === "line") copy.line = { ...trace.line, color: own, dash: slot < 8 ? "solid" : "dash" };
    if (role === "line") copy.marker = { color: own, size: 8 };
    if (role === "hit") copy.marker = { ...trace.marker, color: own, line: { ...trace.marker.line, color: color("--paper") } };
    if (role === "end") copy.marker = { ...trace.marker, color: own, line: { ...trace.marker.line, color: own } };
    if (role === "target") copy.line = { ...trace.line, color: color("--soft") };
    if (role === "model") copy.marker = { color: slots.map((s) => tinted(slotColor(s), 0.35)) };
    if (role === "optimizer") copy.marker = { color: slots.map(slotColor) };
    if (role === "rest") copy.marker = { color: tinted(color("--neutral"), 0.45) };
    if (trace.type === "bar") copy.textfont = { color: color("--ink") };
    return copy;
  }

  function laidOut(layout) {
    const bars = layout.meta !== undefined;
    const axis = {
      color: color("--soft"),
      gridcolor: color("--grid"),
      linecolor: color("--line"),
      zeroline: false,
      automargin: true,
      exponentformat: "power",
      fixedrange: coarse,
    };
    const title = { ...layout.xaxis.title, font: { size: 12.5, color: color("--soft") }, standoff: 6 };
    return {
      ...layout,
      font: { family: color("--sans"), size: 12.5, color: color("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      annotations: (layout.annotations ?? []).map((note) => ({ ...note, font: { size: 12, color: color("--soft") } })),
      margin: { l: 8, r: 12, t: 8, b: 8 },
      dragmode: coarse ? false : "zoom",
      hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--ink") } },
      xaxis: { rangemode: "tozero", ...axis, ...layout.xaxis, title, showgrid: bars, showline: !bars },
      yaxis: { ...axis, ...layout.yaxis, showgrid: !bars, ...(bars ? { color: color("--ink") } : {}) },
    };
  }

  const hidden = new Set();
  function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      if (!figure) continue;
      const place = document.getElementById(id);
      if (figure.layout.meta) place.style.height = `${64 + 40 * figure.layout.meta.bars}px`;
      const options = { displayModeBar: false, responsive: true, doubleClick: "reset+autosize" };
      Plotly.react(place, figure.data.map(painted), laidOut(figure.layout), options);
    }
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const slot = Number(button.dataset.slot);
      if (!hidden.delete(slot)) hidden.add(slot);
      button.setAttribute("aria-pressed", String(!hidden.has(slot)));
      draw();
    });
  }
  // A headless window is less tall than its screenshot, so the picture's height comes in the address.
  const picture = location.hash.match(/^#picture=(\d+)$/);
  if (picture) {
    document.body.classList.add("picture");
    document.querySelector("main").style.height = `${picture[1]}px`;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
