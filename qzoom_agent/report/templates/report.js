"use strict";
(() => {
  const turns = [...document.querySelectorAll(".turn")];
  const stages = [...document.querySelectorAll(".stage")];
  const boxes = [...document.querySelectorAll(".stage [data-turn]")];
  const dial = document.querySelector("#opacity");
  const heats = [...document.querySelectorAll(".heat")];
  let chosen = null;

  const show = (turn) => {
    let lit = 0;
    for (const box of boxes) {
      const on = box.dataset.turn === turn && !box.classList.contains("proposed");
      box.classList.toggle("on", on);
      lit += on && box.classList.contains("served");
    }
    for (const item of turns) item.classList.toggle("on", item.dataset.turn === turn);
    for (const stage of stages) {
      stage.classList.toggle("busy", boxes.some((box) => box.classList.contains("on")));
      stage.classList.toggle("solo", lit === 1);
    }
  };

  const choose = (turn, move) => {
    chosen = turn;
    show(turn);
    const item = turns.find((each) => each.dataset.turn === turn);
    if (item && move) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      item.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
    }
  };

  for (const item of turns) {
    item.addEventListener("mouseenter", () => show(item.dataset.turn));
    item.addEventListener("mouseleave", () => show(chosen));
    item.addEventListener("click", (event) => {
      if (event.target.closest("summary, a") || String(getSelection())) return;
      choose(chosen === item.dataset.turn ? null : item.dataset.turn, false);
    });
  }
  for (const box of boxes) {
    box.addEventListener("mouseenter", () => show(box.dataset.turn));
    box.addEventListener("mouseleave", () => show(chosen));
    box.addEventListener("click", (event) => {
      event.preventDefault();
      choose(box.dataset.turn, true);
    });
  }
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target === dial) return;
    if (event.key === "Escape") return choose(null, false);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || turns.length === 0) return;
    event.preventDefault();
    const at = turns.findIndex((item) => item.dataset.turn === chosen);
    const next = at < 0 ? (step > 0 ? 0 : turns.length - 1) : at + step;
    choose(turns[Math.min(Math.max(next, 0), turns.length - 1)].dataset.turn, true);
  });

  if (dial) {
    const blend = () => { for (const heat of heats) heat.style.opacity = dial.value / 100; };
    dial.addEventListener("input", blend);
    dial.closest("label").hidden = false;
    blend();
  }
  for (const hint of document.querySelectorAll(".keys")) hint.hidden = false;
  const linked = location.hash.match(/^#turn-([\w-]+)$/);
  if (linked) choose(linked[1], true);
})();
