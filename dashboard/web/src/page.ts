import uPlot from "uplot";

const charts = document.querySelector("#charts");
if (charts instanceof HTMLElement) {
  new uPlot({ width: 600, height: 300, title: "loss", series: [{}, { label: "loss", stroke: "teal" }] }, [[], []], charts);
}
