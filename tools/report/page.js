"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const themes = read("themes");
const dark = matchMedia("(prefers-color-scheme: dark)");
const template = () => themes[dark.matches ? "dark" : "light"];
const options = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

for (const [key, figure] of Object.entries(figures)) {
  const layout = { ...figure.layout, template: template() };
  Plotly.newPlot(key, { data: figure.data, layout, frames: figure.frames || [], config: options });
}

dark.addEventListener("change", () => {
  for (const key of Object.keys(figures)) Plotly.relayout(key, { template: template() });
});

for (const slider of document.querySelectorAll("[data-round]")) {
  const key = slider.dataset.round;
  const choice = document.querySelector(`[data-choice="${key}"]`);
  const told = document.querySelector(`[data-told="${key}"]`);
  const show = () => {
    const round = figures[key].rounds[slider.valueAsNumber];
    slider.setAttribute("aria-valuetext", `round ${round}`);
    told.textContent = round;
    Plotly.animate(key, [`${round}/${choice ? choice.value : 0}`], {
      mode: "immediate",
      frame: { duration: 0, redraw: true },
      transition: { duration: 0 },
    });
  };
  slider.addEventListener("input", show);
  if (choice) choice.addEventListener("change", show);
}
