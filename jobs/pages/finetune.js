"use strict";
// The curves of one finetuning run.

const run = JSON.parse($("document").textContent);

function drawRun() {
  const losses = [
    { name: "each step", points: run.losses, class: "plain" },
    { name: `mean over ${run.smoothed_over} steps`, points: run.smoothed, class: "thick" },
    {
      name: "evaluated",
      points: run.evaluations.map((one) => [one.step, one.loss]),
      class: "evaluated",
      dots: true,
    },
  ].filter((one) => one.points.length);
  const values = losses.flatMap((one) => one.points.map((point) => point[1])).filter(finite);
  const box = $("loss-log"),
    possible = values.length > 0 && values.every((value) => value > 0);
  if (!box.dataset.chosen) box.checked = wantsLog(values);
  box.closest("label").hidden = !possible;
  drawCurves($("loss"), {
    series: losses,
    x: "step",
    y: { label: "loss", log: possible && box.checked },
    focus: "loss",
  });
  replace(
    $("loss-key"),
    ...losses.map((one) =>
      html(
        "span",
        {},
        svg(
          "svg",
          { width: 22, height: 8, "aria-hidden": "true" },
          svg("path", { d: "M0 4H22", class: `curve ${one.class}` }),
        ),
        ` ${one.name}`,
      ),
    ),
  );

  const judged = run.evaluations.filter((one) => finite(one.accuracy));
  $("accuracy-part").hidden = !judged.length;
  if (judged.length) {
    drawCurves($("accuracy"), {
      series: [
        {
          name: "evaluated",
          points: judged.map((one) => [one.step, one.accuracy]),
          class: "evaluated",
          dots: true,
        },
      ],
      x: "step",
      y: { label: "accuracy" },
      focus: "accuracy",
    });
  }
}

function begin() {
  document.title = `${run.title}: axicon finetune`;
  $("title").textContent = run.title;
  replace(
    $("facts"),
    ...Object.entries(run.facts).map(([name, value]) =>
      html("span", {}, html("i", {}, name), " ", shown(value)),
    ),
  );
  $("recipe").textContent = run.recipe;
  $("rows").append(
    ...run.evaluations.map((one) =>
      html(
        "tr",
        { class: one.step === run.result_step ? "best" : null },
        html("td", { class: "number" }, String(one.step), one.step === run.result_step ? " ★" : ""),
        html("td", { class: "number" }, missing(one.loss) ? "not finite" : one.loss.toFixed(4)),
        html("td", { class: "number" }, missing(one.accuracy) ? "–" : one.accuracy.toFixed(4)),
        html("td", { class: "number" }, String(one.examples)),
      ),
    ),
  );
  $("none").hidden = run.evaluations.length > 0;
  $("loss-log").addEventListener("change", () => {
    $("loss-log").dataset.chosen = "yes";
    drawRun();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      drawRun();
    }
  });
  drawRun();
}

begin();
